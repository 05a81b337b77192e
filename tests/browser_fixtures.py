"""What is seen in the `browser` of conftest.py."""

import io

import numpy as np
import pytest


def picture(page, of="#viewer canvas"):
    """What a part of the page, by default the viewer, shows, (H, W, 3)."""
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(page.locator(of).screenshot()))
    return np.asarray(image.convert("RGB")).astype(int)


def coloured(picture):
    """How many pixels are of faces: blue, red or yellow, where all else is grey."""
    return int((np.ptp(picture, axis=-1) > 45).sum())

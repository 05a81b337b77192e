"""The sheet of generated meshes beside real ones."""

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import trimesh
from PIL import Image

from iflame_cli.render import BACKGROUND
from training.drawing.contact_sheet import main
from training.procedural.make import make_dataset


@pytest.fixture
def data(tmp_path):
    meshes = make_dataset(3, seed=0, max_faces=40)
    columns = {name: [getattr(mesh, name).tolist() for mesh in meshes] for name in ("vertices", "faces")}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "real.parquet")
    return str(tmp_path / "real.parquet")


def test_real_meshes_stand_above_and_generated_ones_below(tmp_path, data):
    (tmp_path / "run").mkdir()
    for index in range(2):
        trimesh.creation.box().export(tmp_path / "run" / f"sample-{index:02d}.glb")
    out = tmp_path / "sheet.png"
    assert main([str(tmp_path / "run"), "--data", data, "--out", str(out), "--columns", "2", "--rows", "2"]) == 0
    picture = np.asarray(Image.open(out))
    cells = picture.reshape(3, picture.shape[0] // 3, 2, picture.shape[1] // 2, 3).swapaxes(1, 2)
    drawn = (cells[:, :, :256] != BACKGROUND).any(axis=(2, 3, 4))
    # Three real meshes, an empty place, then the two that were generated.
    assert drawn.tolist() == [[True, True], [True, False], [True, True]]
    assert np.array_equal(cells[2, 0, :256], cells[2, 1, :256]) and not np.array_equal(cells[0, 0], cells[0, 1])


def test_a_folder_without_meshes_is_told(tmp_path, data, capsys):
    assert main([str(tmp_path), "--data", data, "--out", str(tmp_path / "sheet.png")]) == 1
    assert "no generated meshes" in capsys.readouterr().err
    assert not (tmp_path / "sheet.png").exists()

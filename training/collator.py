"""The old place of `MeshCollator`."""

from training.rows.collate import MeshCollator

__all__ = ["MeshCollator"]

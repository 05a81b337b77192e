"""Pictures of meshes, drawn on the CPU: a contact sheet without a GPU or a display."""

import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from iflame_hf.files_iflame import write_whole

BACKGROUND = (255, 255, 255)
OUTSIDE = (140, 184, 224)
INSIDE = (224, 150, 132)
EDGE = (44, 62, 84)
_SAMPLES = 3  # per pixel and axis, averaged
_EDGE_WIDTH = 1.2  # in samples
_MARGIN = 0.07


def _camera(azimuth: float = 32.0, elevation: float = 24.0) -> np.ndarray:
    """Rows: the directions right, up and to the viewer, (3, 3), for angles in degrees."""
    around, above = np.radians([azimuth, elevation])
    right = np.array([np.cos(around), 0, -np.sin(around)])
    viewer = np.array([np.sin(around) * np.cos(above), np.sin(above), np.cos(around) * np.cos(above)])
    return np.stack([right, np.cross(viewer, right), viewer])


_CAMERA = _camera()
_LIGHT = np.array([-0.1, 0.85, 0.5]) / np.linalg.norm([-0.1, 0.85, 0.5])


def render_mesh(vertices: np.ndarray, faces: np.ndarray, size: int = 256) -> np.ndarray:
    """A picture (size, size, 3) uint8 of vertices (V, 3), y up, in any unit, and triangles (F, 3).

    Parallel projection, the same direction for all meshes, fitted to the picture. Every edge is drawn. Faces seen from
    outside are blue, from inside (wrong winding, or through a hole) red. A mesh without faces leaves it white. Raises
    ValueError for a coordinate that is not finite.
    """
    vertices, faces = np.asarray(vertices, dtype=np.float64), np.asarray(faces, dtype=np.int64)
    if not np.isfinite(vertices).all():
        raise ValueError("a coordinate is NaN or infinite")
    width = size * _SAMPLES
    picture = np.full((width, width, 3), BACKGROUND, dtype=np.float32)
    if faces.size:
        _draw(picture, vertices, faces)
    small = picture.reshape(size, _SAMPLES, size, _SAMPLES, 3).mean(axis=(1, 3))
    return np.rint(small).astype(np.uint8)


def _draw(picture: np.ndarray, vertices: np.ndarray, faces: np.ndarray) -> None:
    width = len(picture)
    seen = (vertices @ _CAMERA.T)[faces]  # (F, 3 corners, right-up-viewer)
    low, high = seen[..., :2].min(axis=(0, 1)), seen[..., :2].max(axis=(0, 1))
    if not (high - low).max() > 0:
        return
    scale = width * (1 - 2 * _MARGIN) / (high - low).max()
    seen = (seen - np.append((low + high) / 2, 0)) * scale
    corners = np.stack([seen[..., 0] + width / 2, width / 2 - seen[..., 1], seen[..., 2]], axis=-1)
    colours = _face_colours(vertices[faces])
    depth = np.full((width, width), -np.inf, dtype=np.float32)
    for triangle, colour in zip(corners, colours, strict=True):
        _draw_triangle(picture, depth, triangle, colour)


def _face_colours(triangles: np.ndarray) -> np.ndarray:
    """Shaded colours (F, 3) of triangles (F, 3, 3)."""
    normals = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    outside = normals @ _CAMERA[2] >= 0
    normals = np.where(outside[:, None], normals, -normals)
    brightness = 0.6 + 0.55 * np.maximum(normals @ _LIGHT, 0)
    return np.minimum(np.where(outside[:, None], OUTSIDE, INSIDE) * brightness[:, None], 255)


def _draw_triangle(picture: np.ndarray, depth: np.ndarray, corners: np.ndarray, colour: np.ndarray) -> None:
    """Draw where the triangle (3 corners, column-row-depth) is nearer than what is drawn: its face and its edges.

    Edge functions and a depth buffer: J. Pineda, "A Parallel Algorithm for Polygon Rasterization", SIGGRAPH 1988.
    """
    a, b, c = corners
    area = (b[0] - a[0]) * (c[1] - a[1]) - (c[0] - a[0]) * (b[1] - a[1])
    if abs(area) < 1e-6:
        return
    (left, top), (right, bottom) = np.floor(corners[:, :2].min(axis=0)), np.ceil(corners[:, :2].max(axis=0))
    rows, columns = slice(int(top), int(bottom) + 1), slice(int(left), int(right) + 1)
    y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + 0.5
    x = np.arange(columns.start, columns.stop, dtype=np.float32)[None] + 0.5
    weights, distances = [], []
    for start, end in ((b, c), (c, a), (a, b)):
        cross = (end[0] - start[0]) * (y - start[1]) - (end[1] - start[1]) * (x - start[0])
        weights.append(cross / area)
        distances.append(np.abs(cross) / np.hypot(end[0] - start[0], end[1] - start[1]))
    near = weights[0] * a[2] + weights[1] * b[2] + weights[2] * c[2]
    inside = (weights[0] >= 0) & (weights[1] >= 0) & (weights[2] >= 0) & (near > depth[rows, columns])
    edge = np.minimum(np.minimum(distances[0], distances[1]), distances[2]) < _EDGE_WIDTH
    depth[rows, columns][inside] = near[inside]
    picture[rows, columns][inside] = colour
    picture[rows, columns][inside & edge] = EDGE


def render_meshes(
    meshes: Sequence[Any],
    path: str | os.PathLike,
    columns: int = 4,
    titles: Sequence[str] | None = None,
    size: int = 256,
) -> None:
    """Write a PNG contact sheet of `meshes`, row by row, whole or not at all.

    Each mesh is a tuple (vertices, faces) or has such attributes, as a `trimesh.Trimesh` does; see `render_mesh`. None
    and a mesh without faces leave an empty cell. `titles` stand under the cells; `size` is a cell's side in pixels.
    Raises ValueError when there are no meshes, no columns, or not one title a mesh.
    """
    if not len(meshes):
        raise ValueError("there are no meshes to draw")
    if columns < 1 or size < 1:
        raise ValueError(f"columns and size must be at least 1, got {columns} and {size}")
    if titles is not None and len(titles) != len(meshes):
        raise ValueError(f"there are {len(meshes)} meshes and {len(titles)} titles")
    columns = min(columns, len(meshes))
    line = 0 if titles is None else max(size // 10, 12)
    rows = -(-len(meshes) // columns)
    sheet = Image.new("RGB", (columns * size, rows * (size + line)), BACKGROUND)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(max(line * 0.75, 8))
    for place, mesh in enumerate(meshes):
        left, top = place % columns * size, place // columns * (size + line)
        if mesh is not None:
            vertices, faces = mesh if isinstance(mesh, tuple) and len(mesh) == 2 else (mesh.vertices, mesh.faces)
            sheet.paste(Image.fromarray(render_mesh(vertices, faces, size)), (left, top))
        if titles is not None:
            pen.text((left + size / 2, top + size), titles[place], fill=EDGE, font=font, anchor="ma")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = BytesIO()
    sheet.save(picture, format="PNG")
    write_whole(path, picture.getvalue())

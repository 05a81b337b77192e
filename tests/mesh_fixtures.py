"""Meshes and mesh files that several tests use."""

import json
import struct
from pathlib import Path

import numpy as np
import trimesh

DATA = Path(__file__).parent / "data"


def reference_meshes() -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Vertices (V, 3), faces (F, 3) and the original code's tokens (F', 9) of eight meshes, by name."""
    with np.load(DATA / "reference_tokens.npz") as data:
        names = sorted({key.split("/")[0] for key in data.files})
        return {name: tuple(data[f"{name}/{part}"] for part in ("vertices", "faces", "tokens")) for name in names}


def solids() -> dict[str, trimesh.Trimesh]:
    """Closed meshes with a positive volume, no two alike, none at the origin or of size one."""
    meshes = {
        "box": trimesh.creation.box(extents=(1.0, 2.0, 0.5)),
        "icosphere": trimesh.creation.icosphere(subdivisions=2, radius=3.0),
        "torus": trimesh.creation.torus(major_radius=2.0, minor_radius=0.6, major_sections=24, minor_sections=10),
        "annulus": trimesh.creation.annulus(r_min=0.4, r_max=1.0, height=0.7, sections=20),
    }
    for mesh in meshes.values():
        mesh.apply_translation((5.0, -3.0, 11.0))
        assert mesh.is_volume and mesh.volume > 0
    return meshes


def signed_volume(vertices: np.ndarray, faces: np.ndarray) -> float:
    """Volume inside a closed mesh; negative where its faces look inwards (sum of tetrahedra to the origin)."""
    a, b, c = np.moveaxis(np.asarray(vertices)[np.asarray(faces)], 1, 0)
    return float((a * np.cross(b, c)).sum() / 6)


def write_gltf_binary(path: Path, tree: dict, blob: bytes) -> Path:
    text = json.dumps(tree).encode()
    text, blob = text + b" " * (-len(text) % 4), blob + b"\0" * (-len(blob) % 4)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(blob), b"BIN\0") + blob
    path.write_bytes(struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks)
    return path


def gltf_square(mode: int = 4, **changes) -> tuple[dict, bytes]:
    """A unit square as a glTF tree and its buffer; `mode` 4 is triangles, 5 a strip, 6 a fan."""
    indices = np.array({4: [0, 1, 2, 0, 2, 3], 5: [0, 1, 3, 2], 6: [0, 1, 2, 3]}[mode], dtype="<u2")
    blob = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], dtype="<f4").tobytes() + indices.tobytes()
    tree = {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "indices": 1, "mode": mode}]}],
        "accessors": [
            {"bufferView": 0, "componentType": 5126, "count": 4, "type": "VEC3", "min": [0, 0, 0], "max": [1, 1, 0]},
            {"bufferView": 1, "componentType": 5123, "count": len(indices), "type": "SCALAR"},
        ],
        "bufferViews": [
            {"buffer": 0, "byteOffset": 0, "byteLength": 48},
            {"buffer": 0, "byteOffset": 48, "byteLength": 2 * len(indices)},
        ],
        "buffers": [{"byteLength": len(blob)}],
    }
    return tree | changes, blob


def write_dae(path: Path, vertices: np.ndarray, faces: np.ndarray, up_axis: str | None) -> Path:
    """A COLLADA file that declares `up_axis`, or no axis. (trimesh itself writes Y_UP always.)"""
    data = trimesh.exchange.dae.export_collada(trimesh.Trimesh(vertices, faces, process=False))
    assert data.count(b"<up_axis>Y_UP</up_axis>") == 1
    declared = f"<up_axis>{up_axis.upper()}_UP</up_axis>" if up_axis else ""
    path.write_bytes(data.replace(b"<up_axis>Y_UP</up_axis>", declared.encode()))
    return path


def random_mesh(seed: int, vertex_count: int = 100, face_count: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Vertices and faces, each of three different vertices."""
    rng = np.random.default_rng(seed)
    corners = rng.permuted(np.tile(np.arange(vertex_count), (face_count, 1)), axis=1)[:, :3]
    return rng.normal(size=(vertex_count, 3)), corners

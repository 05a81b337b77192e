"""Files as they turn up in collections of meshes: good ones of odd kinds, and bad ones with what is wrong."""

import base64
import bz2
import gzip
import importlib.util
import io
import json
import os
import pickle
import socket
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import trimesh
from mesh_fixtures import gltf_square

GOOD = None
# What writes each file, and the kind of rejection that each mesh in it meets, by its path.
WRITERS: dict[str, Callable[[Path], None]] = {}
EXPECTED: dict[str, str | None] = {}
TETRAHEDRON = "0 0 0\n1 0 0\n0 1 0\n0 0 1.25\n3 0 2 1\n3 0 1 3\n3 0 3 2\n3 1 2 3\n"
LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 9\n"
COLLADA = '<?xml version="1.0"?><COLLADA xmlns="http://www.collada.org/2005/11/COLLADASchema" version="1.4.1">'
RANDOM = np.random.default_rng(0)


def write_all(folder: Path) -> None:
    """Write every file into `folder`."""
    for name, write in WRITERS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)


def file(name: str, expected: str | dict[str, str | None] | None, make: Callable[[], str | bytes]) -> None:
    """Enter a file: its content, and the kind of rejection it meets, or those of the meshes in it by their names."""

    def write(path: Path) -> None:
        data = make()
        path.write_bytes(data.encode() if isinstance(data, str) else data)

    special(name, expected, write)


def special(name: str, expected: str | dict[str, str | None] | None, write: Callable[[Path], None]) -> None:
    """Enter what is written by other means."""
    assert name not in WRITERS
    WRITERS[name] = write
    if isinstance(expected, dict):
        EXPECTED.update({name + member: kind for member, kind in expected.items()})
    else:
        EXPECTED[name] = expected


def box(width: float, depth: float = 1.0, scale: float = 1.0) -> str:
    """A box as OBJ text; boxes of different widths are different meshes."""
    mesh = trimesh.creation.box(extents=(width, depth, 1))
    lines = [f"v {x * scale!r} {y * scale!r} {z * scale!r}" for x, y, z in mesh.vertices.tolist()]
    return "\n".join(lines + [f"f {a} {b} {c}" for a, b, c in (mesh.faces + 1).tolist()]) + "\n"


def box_glb(width: float) -> bytes:
    return trimesh.creation.box(extents=(width, 1, 1)).export(file_type="glb")


def tetrahedron(height: float = 1.5, last_index: int = 3) -> tuple[dict, bytes]:
    """A glTF tree and its buffer."""
    tree, _ = gltf_square()
    positions = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, height]], dtype="<f4")
    indices = np.array([0, 2, 1, 0, 1, 3, 0, 3, 2, 1, 2, last_index], dtype="<u2")
    tree["accessors"][1]["count"] = len(indices)
    tree["bufferViews"][1]["byteLength"] = indices.nbytes
    tree["buffers"] = [{"byteLength": positions.nbytes + indices.nbytes}]
    return tree, positions.tobytes() + indices.tobytes()


def gltf(height: float = 1.5, change: Callable[[dict], object] = lambda tree: None, last_index: int = 3) -> str:
    """A .gltf file of a tetrahedron with its buffer inside, after a change to its tree."""
    tree, blob = tetrahedron(height, last_index)
    tree["buffers"][0]["uri"] = "data:application/octet-stream;base64," + base64.b64encode(blob).decode()
    change(tree)
    return json.dumps(tree)


def glb(height: float = 1.5, last_index: int = 3) -> bytes:
    tree, blob = tetrahedron(height, last_index)
    text = json.dumps(tree).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(blob), b"BIN\0") + blob
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks


def ply(vertices: int, faces: int, body: str | bytes, kind: str = "ascii") -> bytes:
    head = f"ply\nformat {kind} 1.0\nelement vertex {vertices}\nproperty float x\nproperty float y\nproperty float z\n"
    head += f"element face {faces}\nproperty list uchar int vertex_indices\nend_header\n"
    return head.encode() + (body.encode() if isinstance(body, str) else body)


def stl(count: int, claimed: int | None = None) -> bytes:
    """A binary STL of random triangles, which claims to have `claimed`."""
    rows = np.zeros(count, dtype=[("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
    rows["corners"] = RANDOM.random((count, 3, 3), dtype=np.float32)
    return b"\0" * 80 + struct.pack("<I", count if claimed is None else claimed) + rows.tobytes()


def billion_laughs() -> str:
    entities = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
    return f'<?xml version="1.0"?><!DOCTYPE COLLADA [<!ENTITY l0 "lol">{entities}]><COLLADA>&l9;</COLLADA>'


def zipped(*members: tuple[str, bytes | str]) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return target.getvalue()


def tarred(*members: tuple[str, bytes | str]) -> bytes:
    """A tar archive; a member whose content is a lone type of tarfile is of that type."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            data = data.encode() if isinstance(data, str) else data
            if data in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
                info.type, info.linkname, data = data, "/etc/passwd", b""
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return target.getvalue()


def endless_header() -> bytes:
    """A tar archive that begins with a header of 4 GiB."""
    info = tarfile.TarInfo("a.obj")
    info.type, info.size = tarfile.XHDTYPE, 2**32
    return info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 4096


def encrypted(archive: bytes) -> bytes:
    """An archive of one member, which is marked as encrypted."""
    data = bytearray(archive)
    data[6] |= 1
    data[archive.index(b"PK\x01\x02") + 8] |= 1
    return bytes(data)


def wrong_sum(archive: bytes) -> bytes:
    """An archive of one member whose checksum is wrong."""
    data = bytearray(archive)
    for start in (14, archive.index(b"PK\x01\x02") + 16):
        data[start] ^= 1
    return bytes(data)


def parquet(**columns: object) -> bytes:
    target = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), target)
    return target.getvalue()


class Planted:
    """What a hostile pickle asks for."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch planted",)


def row(height: float, last: list[int] | None = None) -> tuple[list, list]:
    vertices = [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, height]]
    return vertices, [[0, 2, 1], [0, 1, 3], [0, 3, 2], last or [1, 2, 3]]


def odd_rows() -> bytes:
    rows = [row(3.5), row(float("nan")), row(3.6, [1, 2, 9]), row(3.7, [1, 2]), (None, None), ([], []), row(3.5)]
    square = [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]]
    rows.append((square + [[0.5, 0.5, 3.8]], [[3, 2, 1, 0], [0, 1, 4], [1, 2, 4], [2, 3, 4], [3, 0, 4]]))
    return parquet(vertices=[vertices for vertices, _ in rows], faces=[faces for _, faces in rows])


def rows_of_files() -> bytes:
    files = [("a.obj", box(3.9)), ("b.obj", "nothing"), ("c.txt", "nothing")]
    return parquet(mesh=[{"path": path, "bytes": data.encode()} for path, data in files])


def socket_file(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket may have 107 bytes only
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


def locked_file(path: Path) -> None:
    path.write_text(box(1.95))
    path.chmod(0)


def pipe_as_buffer(path: Path) -> None:
    path.write_text(gltf(change=lambda tree: tree["buffers"][0].update(uri="endless.bin")))
    os.mkfifo(path.with_name("endless.bin"))


# Good.
file("good/box.obj", GOOD, lambda: box(1.1))
file("good/UPPER.GLB", GOOD, lambda: box_glb(1.2))
file("good/käse 椅子 🪑.obj", GOOD, lambda: box(1.3))
file("good/huge.obj", GOOD, lambda: box(1.4, scale=1e30))
file("good/tiny.obj", GOOD, lambda: box(1.5, scale=1e-30))
file(
    "good/polygons.off",
    GOOD,
    lambda: "OFF\n5 5 0\n0 0 0\n1 0 0\n1 0 1\n0 0 1\n.5 1 .5\n4 0 1 2 3\n3 1 0 4\n3 2 1 4\n3 3 2 4\n3 0 3 4\n",
)
file("good/text.ply", GOOD, lambda: ply(4, 4, TETRAHEDRON))
file("good/tree.gltf", GOOD, gltf)
file("good/mirrored.gltf", GOOD, lambda: gltf(1.6, lambda tree: tree["nodes"][0].update(scale=[-1, 1, 1])))
file("good/folder.obj/box.obj", GOOD, lambda: box(1.6))
file(
    "good/deep nodes.gltf",
    GOOD,
    lambda: gltf(1.7, lambda tree: tree.update(nodes=[{"children": [i + 1]} for i in range(300)] + [{"mesh": 0}])),
)

# Latin-1, which trimesh reads with the help of another package.
file(
    "good/latin.obj",
    GOOD if importlib.util.find_spec("charset_normalizer") else "missing package",
    lambda: "# Möbel\n".encode("latin-1") + box(1.75).encode(),
)
if sys.platform == "linux":
    NOT_UTF8 = os.fsdecode(b"shape/caf\xe9.obj")
    file(NOT_UTF8, "bad name", lambda: box(1.85))
    EXPECTED["shape/caf\\udce9.obj"] = EXPECTED.pop(NOT_UTF8)

# Something else.
file("else/empty.obj", "empty file", lambda: b"")
file("else/web page.glb", "wrong format", lambda: "<!DOCTYPE html><html><body>404</body></html>")
file("else/zeros.glb", "wrong format", lambda: b"\0" * 4096)
file("else/pointer.stl", "lfs pointer", lambda: LFS_POINTER)
file("else/pointer.zip", "lfs pointer", lambda: LFS_POINTER)
file("else/picture.ply", "unreadable", lambda: b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8)
file("else/scene.fbx", "unknown format", lambda: b"Kaydara FBX Binary  \0")
file("else/prose.obj", "empty", lambda: "these are not the lines you are looking for\n" * 50)
file("else/noise.obj", "empty", lambda: RANDOM.bytes(5000))
file("else/an stl.obj", "empty", lambda: stl(20))
file("else/an obj.stl", "empty", lambda: box(1.8))

# Geometry.
file("shape/points.obj", "empty", lambda: "v 0 0 0\nv 1 0 0\nv 0 1 0\n")
file("shape/points.ply", "empty", lambda: ply(3, 0, "0 0 0\n1 0 0\n0 1 0\n"))
file("shape/one face.obj", "too few faces", lambda: "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
file("shape/one point.obj", "flat", lambda: "v 2 2 2\n" * 4 + "f 1 2 3\nf 1 2 4\nf 1 3 4\nf 2 3 4\n")
file(
    "shape/line.obj",
    "flat",
    lambda: "".join(f"v {i} 0 0\nf {i + 1} {i + 2} {i + 3}\n" for i in range(6)) + "v 6 0 0\nv 7 0 0\n",
)
file("shape/twice.obj", "duplicate", lambda: "# again\n" + box(1.1, scale=2))
file("shape/nan.obj", "not finite", lambda: box(1.9).replace("0.5", "nan", 1))
file("shape/nan.glb", "not finite", lambda: glb(float("nan")))
file("shape/infinite.ply", "not finite", lambda: ply(4, 4, TETRAHEDRON.replace("1.25", "inf")))
file("shape/out of range.glb", "bad indices", lambda: glb(last_index=9))
file("shape/out of range.obj", "bad indices", lambda: box(2.0) + "f 1 2 99\n")
file("shape/out of range.off", "bad indices", lambda: "OFF\n4 4 0\n" + TETRAHEDRON.replace("3 1 2 3", "3 1 2 7"))
file("shape/negative.ply", "bad indices", lambda: ply(4, 4, TETRAHEDRON.replace("3 1 2 3", "3 1 2 -1")))
file("shape/million.stl", "too many faces", lambda: stl(1_000_000))

# Damaged.
file("damaged/cut.glb", "unreadable", lambda: box_glb(2.1)[:400])
file("damaged/cut header.glb", "unreadable", lambda: box_glb(2.1)[:10])
file("damaged/lying chunk.glb", "unreadable", lambda: glb()[:12] + b"\xff\xff\xff\x7f" + glb()[16:])
file("damaged/cut.stl", "empty", lambda: stl(20)[:-70])
file("damaged/lying count.stl", "empty", lambda: stl(20, 2**32 - 1))
file("damaged/lying count.ply", "unreadable", lambda: ply(2**31, 2**31, b"\0" * 400, "binary_little_endian"))
file("damaged/lying text.ply", "unreadable", lambda: ply(10**9, 10**9, TETRAHEDRON))
file("damaged/cut.ply", "unreadable", lambda: ply(4, 4, TETRAHEDRON)[:-12])
file("damaged/negative count.off", "empty", lambda: "OFF\n-4 -4 0\n" + TETRAHEDRON)
file("damaged/lying count.off", "unreadable", lambda: "OFF\n4 999999999 0\n" + TETRAHEDRON)
file("damaged/words.off", "unreadable", lambda: "OFF\nfour faces\n")
file("damaged/cut.dae", "unreadable", lambda: COLLADA + "<asset>")
file("damaged/no geometry.dae", "unreadable", lambda: COLLADA + "<asset/></COLLADA>")
file("damaged/billion laughs.dae", "unreadable", billion_laughs)
file("damaged/no collada.zae", "unreadable", lambda: zipped(("a.dae", "nothing")))

# Trees of glTF.
file("gltf/half.gltf", "unreadable", lambda: gltf()[:-200])
file("gltf/list.gltf", "unreadable", lambda: "[1, 2, 3]")
file("gltf/deep json.gltf", "unreadable", lambda: "[" * 100_000)
file("gltf/no nodes.gltf", "empty", lambda: gltf(change=lambda tree: tree.update(nodes=[], scenes=[{"nodes": []}])))
file("gltf/no such node.gltf", "unreadable", lambda: gltf(change=lambda tree: tree.update(scenes=[{"nodes": [7]}])))
file("gltf/no buffer.gltf", "missing file", lambda: gltf(change=lambda tree: tree["buffers"][0].update(uri="a.bin")))
file("gltf/outside.gltf", "unsafe name", lambda: gltf(change=lambda tree: tree["buffers"][0].update(uri="../a.bin")))
file("gltf/giant.gltf", "unreadable", lambda: gltf(change=lambda tree: tree["accessors"][0].update(count=10**12)))
for extension in ("KHR_draco_mesh_compression", "EXT_meshopt_compression"):
    file(
        f"gltf/{extension}.gltf",
        "compressed geometry",
        lambda extension=extension: gltf(change=lambda tree: tree.update(extensionsRequired=[extension])),
    )
file(
    "gltf/giant zeros.gltf",
    "memory limit",
    lambda: gltf(
        change=lambda tree: tree["accessors"].__setitem__(0, {"componentType": 5126, "count": 10**9, "type": "VEC3"})
    ),
)
file(
    "gltf/loop.gltf",
    "unreadable",
    lambda: gltf(change=lambda tree: tree.update(nodes=[{"children": [1]}, {"children": [0], "mesh": 0}])),
)

# No regular files.
special("special/link to nothing.obj", "missing file", lambda path: path.symlink_to("nothing.obj"))
special("special/loop of links.obj", "unreadable", lambda path: path.symlink_to(path.name))
special("special/locked.obj", "no permission" if os.geteuid() else GOOD, locked_file)
special("special/pipe.obj", "not a file", os.mkfifo)
special("special/socket.ply", "not a file", socket_file)
special("special/pipe.zip", "not a file", os.mkfifo)

# Archives.
file("archive/no zip.zip", "unreadable", lambda: b"PK\x03\x04 nor is this")
file("archive/cut.zip", "unreadable", lambda: zipped(("a.obj", box(3.0)))[:-30])
file("archive/secret.zip", {"/a.obj": "encrypted"}, lambda: encrypted(zipped(("a.obj", box(3.0)))))
file("archive/bomb.zip", {"/a.obj": "archive bomb"}, lambda: zipped(("a.obj", b" " * 100_000_000)))
file("archive/wrong sum.zip", {"/a.obj": "unreadable"}, lambda: wrong_sum(zipped(("a.obj", box(3.0)))))
file("archive/no tar.tar", "unreadable", lambda: b"junk" * 1000)
file("archive/no gzip.tar.gz", "unreadable", lambda: b"junk" * 1000)
file("archive/cut.tar.gz", "unreadable", lambda: gzip.compress(tarred(("a.txt", RANDOM.bytes(90_000))))[:40_000])
file("archive/bomb.tar.bz2", "archive bomb", lambda: bz2.compress(tarred(("a.txt", b"\0" * 100_000_000))))
file("archive/header.tar", "archive bomb", endless_header)
file(
    "archive/several.zip",
    {
        "/chairs/one.obj": GOOD,
        "/chairs/prose.obj": "empty",
        "/../../out.obj": "unsafe name",
        "//absolute.obj": "unsafe name",
        "/C:/windows.obj": "unsafe name",
        "/inner.zip": "nested archive",
        "/scene.fbx": "unknown format",
        "/scene/scene.gltf": GOOD,
        "/scene/no buffer.gltf": "missing file",
    },
    lambda: zipped(
        ("scene/scene.gltf", gltf(change=lambda tree: tree["buffers"][0].update(uri="parts/scene.bin"))),
        ("scene/no buffer.gltf", gltf(change=lambda tree: tree["buffers"][0].update(uri="parts/other.bin"))),
        ("scene/parts/scene.bin", tetrahedron(3.1)[1]),
        ("chairs/one.obj", box(3.2)),
        ("chairs/prose.obj", "nothing"),
        ("../../out.obj", box(3.3)),
        ("/absolute.obj", box(3.3)),
        ("C:\\windows.obj", box(3.3)),
        ("inner.zip", zipped(("a.obj", box(3.3)))),
        ("scene.fbx", "nothing"),
        ("__MACOSX/._one.obj", "nothing"),
        ("read me.txt", "nothing"),
    ),
)
file(
    "archive/several.tar.gz",
    {
        "/ok.ply": GOOD,
        "/../out.ply": "unsafe name",
        "/link.obj": "not a file",
        "/hard link.obj": "not a file",
        "/pipe.obj": "not a file",
        "/device.obj": "not a file",
    },
    lambda: gzip.compress(
        tarred(
            ("ok.ply", ply(4, 4, TETRAHEDRON.replace("1.25", "3.4"))),
            ("../out.ply", ply(4, 4, TETRAHEDRON)),
            ("link.obj", tarfile.SYMTYPE),
            ("hard link.obj", tarfile.LNKTYPE),
            ("pipe.obj", tarfile.FIFOTYPE),
            ("device.obj", tarfile.CHRTYPE),
        )
    ),
)

# Tables, and pickles, which are not read.
file("table/no parquet.parquet", "unreadable", lambda: b"PAR1 it is not PAR1")
file("table/cut.parquet", "unreadable", lambda: odd_rows()[:-100])
file("table/no columns.parquet", "no meshes", lambda: parquet(text=["a", "b"]))
file("table/text.parquet", {"#0": "bad shape"}, lambda: parquet(vertices=["a"], faces=["b"]))
file(
    "table/rows.parquet",
    {
        "#0": GOOD,
        "#1": "not finite",
        "#2": "bad indices",
        "#3": "bad shape",
        "#4": "empty",
        "#5": "empty",
        "#6": "duplicate",
        "#7": GOOD,
    },
    odd_rows,
)
file("table/files.parquet", {"#0": GOOD, "#1": "empty", "#2": "unknown format"}, rows_of_files)
file("table/planted.pkl", "unknown format", lambda: pickle.dumps({"name_train": Planted()}))

"""What a mesh holds besides triangles, which tokens do not keep."""

import os
import re
from typing import Any
from xml.etree import ElementTree

import numpy as np

from .mesh_errors_iflame import NOT_A_MESH, MeshError, errors_name
from .mesh_files_iflame import (
    check_file,
    errors_of_reader,
    is_mesh,
    is_scene,
    is_trimesh,
    read_gltf_tree,
    read_off_lines,
)

# All that `lost_attributes` can say, in this order.
LOST_ATTRIBUTES = (
    "several objects",
    "materials",
    "textures",
    "UVs",
    "vertex colours",
    "face colours",
    "normals",
    "points",
    "lines",
    "animations",
    "skins",
    "morph targets",
    "cameras",
    "lights",
)
_GLTF_MODES = {0: "points", 1: "lines", 2: "lines", 3: "lines"}
_GLTF_ATTRIBUTES = {"TEXCOORD": "UVs", "COLOR": "vertex colours", "NORMAL": "normals"}
_PLY_PROPERTIES = {"red": "colours", "diffuse_red": "colours", "nx": "normals", "s": "UVs", "u": "UVs"}
_PLY_PROPERTIES |= {"texture_u": "UVs", "texcoord": "UVs"}
_DAE_SEMANTICS = {"TEXCOORD": "UVs", "COLOR": "vertex colours", "NORMAL": "normals"}
_DAE_ELEMENTS = {"image": "textures", "lines": "lines", "linestrips": "lines", "animation": "animations"}
_DAE_ELEMENTS |= {"skin": "skins", "morph": "morph targets", "camera": "cameras", "light": "lights"}
_DAE_FACES = ("triangles", "trifans", "tristrips", "polylist", "polygons")
_OBJ_LINES = {"usemtl": "materials", "vt": "UVs", "vn": "normals", "p": "points", "l": "lines"}
# Of the options of a material in an mtl file, those that name a picture.
_MTL_PICTURE = re.compile(rb"^[ \t]*(map_|bump|disp|decal|refl|norm)", re.MULTILINE | re.IGNORECASE)


def lost_attributes(mesh: Any) -> list[str]:
    """What `mesh` holds that tokens, which are of triangles alone, do not keep: words of `LOST_ATTRIBUTES`, in that
    order; an empty list where nothing is lost but what rounding changes.

    A file is looked through without loading its mesh (`load_mesh` does that), so that this costs little beside it.
    Several objects become one; points and lines are left out. STL's normals of faces follow from the corners and do
    not count. A Trimesh or Scene does not know whether it was given its normals, so that they do not count there.

    Args:
        mesh: anything `load_mesh` takes: the path of a mesh file, a `trimesh.Trimesh`, a `trimesh.Scene`, or a tuple
            (vertices, faces), which holds nothing else.

    Raises FileNotFoundError for a missing file; MeshError, naming the file where there is one, for a file that cannot
    be read and for what is no mesh.
    """
    with errors_name(mesh):
        if isinstance(mesh, (str, os.PathLike)):
            suffix = check_file(os.fspath(mesh))
            with errors_of_reader(os.fspath(mesh), suffix):
                found = _READERS[suffix](os.fspath(mesh))
        elif is_mesh(mesh):
            found = _of_object(mesh)
        else:
            raise MeshError(NOT_A_MESH.format(type(mesh).__name__), "bad_shape")
    return [word for word in LOST_ATTRIBUTES if word in found]


def _of_object(mesh: Any) -> set[str]:
    """Of a Trimesh, a Scene or a tuple."""
    if isinstance(mesh, tuple):
        return set()
    pieces = [mesh.geometry[mesh.graph[node][1]] for node in mesh.graph.nodes_geometry] if is_scene(mesh) else [mesh]
    found = {"several objects"} if sum(map(is_trimesh, pieces)) > 1 else set()
    for piece in pieces:
        if not is_trimesh(piece):
            found.add("lines" if hasattr(piece, "entities") else "points")
            continue
        kind = piece.visual.kind
        if kind == "texture":
            found |= _of_material(piece.visual.material) | ({"UVs"} if piece.visual.uv is not None else set())
        elif kind is not None:
            found.add(f"{kind} colours")
        if "color" in piece.vertex_attributes:  # where trimesh has both these and a texture
            found.add("vertex colours")
    return found


def _of_material(material: Any) -> set[str]:
    found = {"materials"}
    for part in getattr(material, "materials", None) or [material]:
        pictures = [value for name, value in vars(part).items() if name == "image"]
        pictures += [value for name, value in getattr(part, "_data", {}).items() if name.endswith("Texture")]
        if any(picture is not None for picture in pictures):
            found.add("textures")
    return found


def _gltf(path: str) -> set[str]:
    tree = read_gltf_tree(path)
    found = {name for name in ("textures", "animations", "skins", "cameras") if tree.get(name)}
    if "KHR_lights_punctual" in tree.get("extensions", {}):
        found.add("lights")
    if sum("mesh" in node for node in tree.get("nodes", [])) > 1:
        found.add("several objects")
    for primitive in (primitive for mesh in tree.get("meshes", []) for primitive in mesh["primitives"]):
        names = {name.rstrip("0123456789").rstrip("_") for name in primitive["attributes"]}
        found |= {_GLTF_ATTRIBUTES[name] for name in names & _GLTF_ATTRIBUTES.keys()}
        if primitive.get("mode", 4) in _GLTF_MODES:
            found.add(_GLTF_MODES[primitive["mode"]])
        if "material" in primitive:
            found.add("materials")
        if primitive.get("targets"):
            found.add("morph targets")
    return found


def _obj(path: str) -> set[str]:
    with open(path, "rb") as file:
        text = file.read()

    def lines(word: str) -> Any:
        return re.finditer(rb"^[ \t]*%s[ \t]+([^\r\n]*)" % word.encode(), text, re.MULTILINE)

    found = {meaning for word, meaning in _OBJ_LINES.items() if next(lines(word), None)}
    if re.search(rb"^[ \t]*v(?:[ \t]+[-+.\deE]+){6,}[ \t\r]*(#|$)", text, re.MULTILINE):
        found.add("vertex colours")
    objects = {line[1].strip() for line in lines("o")} or {line[1].strip() for line in lines("g")}
    if len(objects) > 1:
        found.add("several objects")
    for line in lines("mtllib"):
        for name in {line[1].strip(), *line[1].split()}:  # one name with blanks in it, or several
            library = os.path.join(os.path.dirname(path), os.fsdecode(name))
            if os.path.isfile(library):
                with open(library, "rb") as file:
                    if _MTL_PICTURE.search(file.read()):
                        found.add("textures")
    return found


def _ply(path: str) -> set[str]:
    found, element = set(), ""
    with open(path, "rb") as file:
        for line in iter(file.readline, b""):
            words = line.decode("ascii", "replace").split()
            if words[:1] == ["end_header"]:
                break
            if words[:2] == ["comment", "TextureFile"]:
                found.add("textures")
            elif words[:1] == ["element"]:
                element = words[1] if int(words[2]) else ""
                found |= {"edge": {"lines"}, "material": {"materials"}}.get(element, set())
            elif words[:1] == ["property"] and element in ("vertex", "face") and words[-1] in _PLY_PROPERTIES:
                meaning = _PLY_PROPERTIES[words[-1]]
                found.add(f"{element} colours" if meaning == "colours" else meaning)
    return found


def _stl(path: str) -> set[str]:
    with open(path, "rb") as file:
        data = file.read()
    count = int.from_bytes(data[80:84], "little")
    if len(data) != 84 + 50 * count:  # a text
        return {"several objects"} if len(re.findall(rb"^[ \t]*solid\b", data, re.MULTILINE)) > 1 else set()
    # After the corners of a face two bytes: a colour if the highest bit is set, or, of Magics, if the header says so.
    has_colour = np.frombuffer(data, np.uint8, offset=84).reshape(-1, 50)[:, 49] & 0x80
    return {"face colours"} if b"COLOR=" in data[:80] or has_colour.any() else set()


def _off(path: str) -> set[str]:
    header, _, polygons = read_off_lines(path)
    found = {meaning for mark, meaning in (("ST", "UVs"), ("C", "vertex colours"), ("N", "normals")) if mark in header}
    if any(len(words) > 1 + int(words[0]) for words in polygons):
        found.add("face colours")
    return found


def _dae(path: str) -> set[str]:
    found, objects = set(), 0
    for _, element in ElementTree.iterparse(path):
        name = element.tag.rpartition("}")[2]
        objects += name in ("instance_geometry", "instance_controller")
        if name in _DAE_ELEMENTS:
            found.add(_DAE_ELEMENTS[name])
        elif name == "input" and element.get("semantic") in _DAE_SEMANTICS:
            found.add(_DAE_SEMANTICS[element.get("semantic")])
        elif name in _DAE_FACES and element.get("material"):
            found.add("materials")
        element.clear()
    return found | ({"several objects"} if objects > 1 else set())


_READERS = {".glb": _gltf, ".gltf": _gltf, ".obj": _obj, ".ply": _ply, ".stl": _stl, ".off": _off, ".dae": _dae}

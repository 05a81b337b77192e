"""iflame_hf.mesh_iflame without the package around it, which imports torch and transformers.

The processes that read meshes are many, start often and need neither.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def _load() -> ModuleType:
    name = "iflame_hf.mesh_iflame"
    if name in sys.modules:
        return sys.modules[name]
    package = importlib.util.find_spec("iflame_hf")
    path = Path(package.submodule_search_locations[0], "mesh_iflame.py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that there is one MeshError, which pickle finds by its name in any process
    spec.loader.exec_module(module)
    return module


_mesh = _load()
MESH_SUFFIXES = _mesh.MESH_SUFFIXES
MeshError = _mesh.MeshError
load_mesh, normalise, quantise = _mesh.load_mesh, _mesh.normalise, _mesh.quantise
canonicalise, declared_up_axis = _mesh.canonicalise, _mesh.declared_up_axis
to_y_up, triangulate = _mesh.to_y_up, _mesh.triangulate

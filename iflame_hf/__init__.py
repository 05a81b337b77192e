"""
iFlame: triangle meshes, token by token, as a transformers model.

The names below are imported when they are asked for. `from iflame_hf.mesh_files_iflame import load_mesh` imports
neither torch nor transformers, since what reads meshes needs neither. transformers knows the classes as soon as both
packages are imported, in whatever order.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._registration import register_with_transformers

if TYPE_CHECKING:
    from .attributes import lost_attributes
    from .cache_iflame import IFlameCache, StaticIFlameCache
    from .configuration_iflame import IFlameConfig
    from .export_iflame import export_mesh
    from .faces_iflame import FaceStreamer, stream_faces
    from .grammar_iflame import MeshGrammarLogitsProcessor
    from .layout_iflame import RowLayout
    from .many_iflame import GeneratedMesh, generate_meshes
    from .mesh_errors_iflame import MeshError
    from .modeling_iflame import IFlameForCausalLM, IFlameModel, IFlamePreTrainedModel
    from .pipeline_iflame import MeshGenerationPipeline
    from .tokenization_iflame import IFlameTokenizer

_MODULES = {
    "FaceStreamer": "faces_iflame",
    "GeneratedMesh": "many_iflame",
    "IFlameCache": "cache_iflame",
    "IFlameConfig": "configuration_iflame",
    "IFlameForCausalLM": "modeling_iflame",
    "IFlameModel": "modeling_iflame",
    "IFlamePreTrainedModel": "modeling_iflame",
    "IFlameTokenizer": "tokenization_iflame",
    "MeshError": "mesh_errors_iflame",
    "MeshGenerationPipeline": "pipeline_iflame",
    "MeshGrammarLogitsProcessor": "grammar_iflame",
    "RowLayout": "layout_iflame",
    "StaticIFlameCache": "cache_iflame",
    "export_mesh": "export_iflame",
    "generate_meshes": "many_iflame",
    "lost_attributes": "attributes",
    "stream_faces": "faces_iflame",
}

__all__ = [
    "FaceStreamer",
    "GeneratedMesh",
    "IFlameCache",
    "IFlameConfig",
    "IFlameForCausalLM",
    "IFlameModel",
    "IFlamePreTrainedModel",
    "IFlameTokenizer",
    "MeshError",
    "MeshGenerationPipeline",
    "MeshGrammarLogitsProcessor",
    "RowLayout",
    "StaticIFlameCache",
    "export_mesh",
    "generate_meshes",
    "lost_attributes",
    "stream_faces",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_transformers()

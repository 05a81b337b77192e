"""iFlame: triangle meshes, token by token, as a transformers model."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from .cache_iflame import IFlameCache
from .configuration_iflame import IFlameConfig
from .export_iflame import export_mesh
from .modeling_iflame import IFlameForCausalLM, IFlameModel, IFlamePreTrainedModel
from .streaming_iflame import FaceStreamer, stream_faces
from .tokenization_iflame import IFlameTokenizer

__all__ = [
    "FaceStreamer",
    "IFlameCache",
    "IFlameConfig",
    "IFlameForCausalLM",
    "IFlameModel",
    "IFlamePreTrainedModel",
    "IFlameTokenizer",
    "export_mesh",
    "stream_faces",
]

AutoConfig.register("iflame", IFlameConfig, exist_ok=True)
AutoModel.register(IFlameConfig, IFlameForCausalLM, exist_ok=True)
AutoModelForCausalLM.register(IFlameConfig, IFlameForCausalLM, exist_ok=True)
AutoTokenizer.register(IFlameConfig, IFlameTokenizer, exist_ok=True)

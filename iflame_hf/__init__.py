"""iFlame: triangle meshes, token by token, as a transformers model."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from .cache_iflame import IFlameCache
from .configuration_iflame import IFlameConfig
from .modeling_iflame import IFlameForCausalLM, IFlameModel, IFlamePreTrainedModel
from .tokenization_iflame import IFlameTokenizer

__all__ = [
    "IFlameCache",
    "IFlameConfig",
    "IFlameForCausalLM",
    "IFlameModel",
    "IFlamePreTrainedModel",
    "IFlameTokenizer",
]

AutoConfig.register("iflame", IFlameConfig, exist_ok=True)
AutoModel.register(IFlameConfig, IFlameForCausalLM, exist_ok=True)
AutoModelForCausalLM.register(IFlameConfig, IFlameForCausalLM, exist_ok=True)
AutoTokenizer.register(IFlameConfig, IFlameTokenizer, exist_ok=True)

"""iFlame: triangle meshes, token by token, as a transformers model."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.pipelines import PIPELINE_REGISTRY

from .attributes import lost_attributes
from .cache_iflame import IFlameCache, StaticIFlameCache
from .configuration_iflame import IFlameConfig
from .export_iflame import export_mesh
from .layout_iflame import RowLayout
from .mesh_iflame import MeshError
from .modeling_iflame import IFlameForCausalLM, IFlameModel, IFlamePreTrainedModel
from .pipeline_iflame import TASK, MeshGenerationPipeline
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
    "MeshError",
    "MeshGenerationPipeline",
    "RowLayout",
    "StaticIFlameCache",
    "export_mesh",
    "lost_attributes",
    "stream_faces",
]

AutoConfig.register("iflame", IFlameConfig, exist_ok=True)
AutoModel.register(IFlameConfig, IFlameForCausalLM, exist_ok=True)
AutoModelForCausalLM.register(IFlameConfig, IFlameForCausalLM, exist_ok=True)
AutoTokenizer.register(IFlameConfig, IFlameTokenizer, exist_ok=True)
# Registered already, as after importlib.reload, the task would be registered with a warning.
PIPELINE_REGISTRY.supported_tasks.pop(TASK, None)
PIPELINE_REGISTRY.register_pipeline(
    TASK, pipeline_class=MeshGenerationPipeline, pt_model=(AutoModelForCausalLM,), type="multimodal"
)

"""What transformers is told of the classes of this package, as soon as both are imported, in whatever order."""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

PACKAGE = __package__


def register() -> None:
    """Lets AutoConfig, AutoModel, AutoTokenizer and pipeline() find the classes; a second time changes nothing."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
    from transformers.pipelines import PIPELINE_REGISTRY

    from .configuration_iflame import TASK, IFlameConfig
    from .modeling_iflame import IFlameForCausalLM
    from .pipeline_iflame import MeshGenerationPipeline
    from .tokenization_iflame import IFlameTokenizer

    AutoConfig.register("iflame", IFlameConfig, exist_ok=True)
    AutoModel.register(IFlameConfig, IFlameForCausalLM, exist_ok=True)
    AutoModelForCausalLM.register(IFlameConfig, IFlameForCausalLM, exist_ok=True)
    AutoTokenizer.register(IFlameConfig, IFlameTokenizer, exist_ok=True)
    # Registered already, the task would be registered with a warning.
    PIPELINE_REGISTRY.supported_tasks.pop(TASK, None)
    PIPELINE_REGISTRY.register_pipeline(
        TASK, pipeline_class=MeshGenerationPipeline, pt_model=(AutoModelForCausalLM,), type="multimodal"
    )


def register_with_transformers() -> None:
    """Registers the classes now if transformers has been imported, and otherwise when it is."""
    if _is_imported():
        register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _is_imported() -> bool:
    return sys.modules.get("transformers") is not None  # None stands where its import is blocked


class _Finder(MetaPathFinder):
    """
    Finds transformers and the modules of this package as Python does, and registers the classes when transformers has
    been imported. Where a module of this package has imported it, that one is completed before.
    """

    def __init__(self):
        self.unfinished = 0  # modules of this package whose import has begun and not ended

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        is_own = name.startswith(f"{PACKAGE}.")
        if not is_own and name != "transformers":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: Any) -> None:
                self.unfinished += is_own
                try:
                    execute(module)
                finally:
                    self.unfinished -= is_own
                if not self.unfinished and _is_imported() and self in sys.meta_path:
                    sys.meta_path.remove(self)
                    register()

            spec.loader.exec_module = execute_and_register
        return spec

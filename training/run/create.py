"""What a run begins with: Accelerate's object, the model with its tokenizer, the optimiser, compiled blocks."""

import importlib
from typing import Any

import torch
import torch._functorch.config
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from transformers.utils import is_flash_attn_4_available

from iflame_hf import IFlameConfig, IFlameForCausalLM, IFlameTokenizer
from iflame_hf.names import model_folder
from training.arguments import Arguments, TrainArguments
from training.optim.average import MovingAverage
from training.optim.groups import create_optimizer
from training.rows.conditions import Conditions, frequent_categories
from training.rows.meshes import generated_meshes
from training.rows.pack import EXTRA_FACES, TOKENS_PER_FACE
from training.rows.stream import read_categories, read_num_faces
from training.run.weights import are_sharded

# Variants of a block that torch.compile may make before it gives up: 2 kinds x 3 levels x evaluation or training x one
# mesh a row or several.
MAX_COMPILED_BLOCKS = 24
# Options that a model to start from has decided.
SIZE_OPTIONS = (
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "stage_layers",
    "full_attention_interval",
    "initializer_range",
)


def create_accelerator(arguments: Arguments) -> Accelerator:
    train = arguments.train
    _check_trackers(train.report_to)
    accelerator = Accelerator(
        cpu=train.use_cpu,
        mixed_precision="bf16" if train.bf16 else "fp16" if train.fp16 else None,
        log_with=train.report_to or None,
        project_dir=train.output_dir,
        step_scheduler_with_optimizer=False,
    )
    # The loss is divided once, by the labels of a whole step, and not by what the environment says.
    accelerator.gradient_accumulation_steps = 1
    if accelerator.mixed_precision != "no":
        # What autocast leaves in float32, the states of linear attention above all, may be multiplied as tf32.
        torch.set_float32_matmul_precision("high")
    if accelerator.is_fsdp2:
        from torch.distributed.fsdp import MixedPrecisionPolicy  # which torch 2.5 has not

        # Autocast chooses the types, as it does where weights are not sharded; Accelerate's policy would hand on what
        # blocks compute, the loss and the gradients in bfloat16.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    return accelerator


def _check_trackers(names: list[str]) -> None:
    """Raises ValueError for trackers that do not exist or are not installed; Accelerate passes the latter over."""
    known, available = LoggerType.list(), {tracker.value for tracker in get_available_trackers()}
    for name in names:
        if name not in known:
            raise ValueError(f"report_to must be none or some of {', '.join(known)}; got {name!r}")
        if name not in ("all", *available):
            raise ValueError(f"--report_to {name} needs a package that is not installed: pip install {name}")


def create_model(arguments: Arguments, accelerator: Accelerator) -> tuple[IFlameTokenizer, IFlameForCausalLM]:
    """
    A fresh model of the sizes asked for, or a trained one to go on from, on the CPU.

    Raises:
        OSError, ValueError: there is no such model, or it contradicts an option that was given.
    """
    sizes = arguments.model
    implementations = {"linear_attn_implementation": sizes.linear_attn_implementation}
    if sizes.attn_implementation != "auto":
        implementations["attn_implementation"] = sizes.attn_implementation
    if sizes.model_name_or_path is not None:
        model_folder(sizes.model_name_or_path)
        settings, _ = IFlameConfig.get_config_dict(sizes.model_name_or_path)
        if settings.get("model_type") != IFlameConfig.model_type:
            raise ValueError(
                f"{sizes.model_name_or_path} is no iFlame model: its model_type is {settings.get('model_type')!r}"
            )
        tokenizer = IFlameTokenizer.from_pretrained(sizes.model_name_or_path)
        _check_sizes(arguments, IFlameConfig.from_dict(settings), tokenizer)
        model = IFlameForCausalLM.from_pretrained(sizes.model_name_or_path, dtype=torch.float32, **implementations)
    else:
        tokenizer = IFlameTokenizer(up_axis=arguments.data.up_axis)
        config = IFlameConfig(
            vocab_size=tokenizer.vocab_size,
            coordinate_resolution=tokenizer.coordinate_resolution,
            hidden_size=sizes.hidden_size,
            num_attention_heads=sizes.num_attention_heads,
            intermediate_size=sizes.intermediate_size,
            stage_layers=sizes.stage_layers,
            full_attention_interval=sizes.full_attention_interval,
            initializer_range=sizes.initializer_range,
            **_conditions(arguments),
            **implementations,
        )
        model = IFlameForCausalLM(config)
    if sizes.attn_implementation == "auto" and flash_attention_4_serves(
        accelerator, model.config.head_dim, arguments.train.torch_compile
    ):
        model.set_attn_implementation("flash_attention_4")
    # A mesh may be as long as a row; nothing is allocated for it.
    model.config.max_position_embeddings = max(model.config.max_position_embeddings, arguments.data.row_length)
    if sizes.gradient_checkpointing:
        enable_activation_checkpointing(model)
    return tokenizer, model


def _conditions(arguments: Arguments) -> dict[str, Any]:
    """
    What the configuration of a fresh model says of the conditions that the options ask for: the categories are those
    of enough training meshes, the numbers of faces those from the smallest of them to what fits into a row.

    Raises:
        ValueError: there are no such categories, or the training files cannot be read.
    """
    asked, files, most = (
        arguments.model.condition_on or [],
        arguments.data.train_file,
        arguments.data.max_train_samples,
    )
    meshes = generated_meshes(arguments.data, arguments.train.seed) if asked and not files else None
    settings: dict[str, Any] = {}
    if "num_faces" in asked:
        counts = read_num_faces(files, most) if meshes is None else meshes.num_faces.tolist()
        room = arguments.data.row_length // TOKENS_PER_FACE - EXTRA_FACES
        fewest = min(counts, default=1)
        settings["num_faces_range"] = [fewest, max(min(max(counts, default=room), room), fewest)]
    if "category" in asked:
        if meshes is None:
            names = read_categories(files, most)
        else:
            names = [meshes.category_names[index] for index in meshes.categories]
        settings["categories"] = frequent_categories(names, arguments.model.min_category_meshes)
    return settings


def flash_attention_4_serves(accelerator: Accelerator, head_dim: int, compiled: bool) -> bool:
    """Whether flash-attn-4 is there and computes such heads: in half precision, compute capability 9 or 10."""
    if compiled or accelerator.device.type != "cuda" or accelerator.mixed_precision not in ("bf16", "fp16"):
        return False
    if head_dim % 8 or not 8 <= head_dim <= 128 or torch.version.hip:
        return False
    if torch.cuda.get_device_capability(accelerator.device)[0] not in (9, 10) or not is_flash_attn_4_available():
        return False
    try:
        importlib.import_module("flash_attn.cute")
    except Exception:  # whatever is wrong with an installation of it
        return False
    return True


def enable_activation_checkpointing(model: IFlameForCausalLM) -> None:
    """
    Lets the backward pass compute blocks again; transformers renamed the method in 5.23. Blocks draw no random
    numbers, whose state would be kept otherwise, and a CUDA graph may not read it.
    """
    name = "activation_checkpointing"
    if not hasattr(model, f"{name}_enable"):
        name = "gradient_checkpointing"
    options = {f"{name}_kwargs": {"use_reentrant": False, "preserve_rng_state": False}}
    getattr(model, f"{name}_enable")(**options)


def _check_sizes(arguments: Arguments, config: IFlameConfig, tokenizer: IFlameTokenizer) -> None:
    """Raises ValueError if an option was given that the model to start from does not have so."""

    def shown(value: Any) -> str:
        return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)

    own = {name: getattr(config, name) for name in SIZE_OPTIONS} | {"up_axis": tokenizer.up_axis}
    own["condition_on"] = Conditions.of(config).names or None
    given = arguments.to_dict()
    others = [
        f"--{name} {shown(given[name])} (its own is {shown(value)})"
        for name, value in own.items()
        if name in arguments.given and shown(given[name]) != shown(value)
    ]
    if others:
        raise ValueError(
            f"{arguments.model.model_name_or_path} is as it is made and cannot have {', '.join(others)}: leave that "
            "out, or leave out --model_name_or_path to train a new model"
        )


def sampling_settings(arguments: Arguments, model: IFlameForCausalLM) -> dict[str, Any]:
    """
    How the model is to be sampled, in the run and by whoever loads it: a model to start from goes on as its folder
    says where no option says otherwise.
    """
    names = ("temperature", "top_k", "top_p")
    if arguments.model.model_name_or_path is not None and model.generation_config.do_sample:
        names = tuple(name for name in names if name in arguments.given)
    return {"do_sample": True} | {name: getattr(arguments.train, name) for name in names}


def create_optimization(
    options: TrainArguments, model: IFlameForCausalLM, accelerator: Accelerator
) -> tuple[torch.optim.Optimizer, MovingAverage | None]:
    """
    The optimiser that the options name, and the moving average of the weights if they ask for one.

    Raises:
        ValueError: an average is asked for while the weights are sharded.
    """
    average = None
    if options.ema_decay is not None:
        if are_sharded(accelerator):
            raise ValueError(
                "ema_decay is not available while the weights are sharded (FSDP): leave it out, or use DDP"
            )
        average = MovingAverage(model, options.ema_decay, accelerator.device)
    optimizer = create_optimizer(
        model,
        options.optim,
        options.learning_rate,
        options.weight_decay,
        (options.adam_beta1, options.adam_beta2),
        options.adam_epsilon,
        fused=device_leaves_out_steps(accelerator),
    )
    return optimizer, average


def device_leaves_out_steps(accelerator: Accelerator) -> bool:
    """
    Whether the optimiser is told on the device itself to leave out a step (`found_inf`), so that nobody waits to know.
    A gradient scaler does so itself, and other kinds of devices have no such optimisers.
    """
    return accelerator.device.type in ("cpu", "cuda") and accelerator.scaler is None


def keep_less(model: IFlameForCausalLM, memory_budget: float) -> None:
    """
    Lets eager blocks keep less for the backward pass: gates and ups, half of what there is to keep, are computed again
    where SwiGLU has kernels of its own, in as many blocks as it takes: in all with a budget of 0.5 or less.
    """
    items = [1 / model.config.level_strides[level] for level in model.config.layer_levels()]
    blocks = list(zip(items, model.model.layers, strict=True))
    too_much = min(1.0, 2 * (1 - memory_budget)) * sum(items)
    for of_block, block in sorted(blocks, key=lambda each: -each[0]):  # the finest first
        block.mlp.keeps_units = too_much < of_block / 2
        if not block.mlp.keeps_units:
            too_much -= of_block


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether torch.compile takes the calls of a module, as after `compile_blocks`."""
    return getattr(module, "_compiled_call_impl", None) is not None


def compile_blocks(
    model: IFlameForCausalLM, mode: str | None = None, backend: str = "inductor", memory_budget: float = 1.0
) -> None:
    """
    Compile every block by itself: there are few different ones (two kinds of attention at three lengths), so that
    compiling takes a fraction of the time that the whole network would, while little is left to fuse between them.

    Rows have one length, so the shapes of the first step are those of all; evaluation and training compile apart, and
    so do rows of one mesh and of several.

    Args:
        memory_budget: of what the backward pass may keep, the share that it does keep; the rest is computed again,
            first what takes the fewest operations. It holds for all that is compiled from then on.
    """
    torch._functorch.config.activation_memory_budget = memory_budget
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_COMPILED_BLOCKS)
    for block in model.model.layers:
        block.compile(mode=mode, backend=backend, dynamic=False)

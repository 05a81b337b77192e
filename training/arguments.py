"""The options of training/train.py, and how a yaml file and the command line set them."""

import argparse
import difflib
import json
import math
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

from training.optim.groups import OPTIMIZERS
from training.optim.schedule import SCHEDULES
from training.procedural.make import KINDS
from training.rows.conditions import CONDITIONS
from training.rows.pack import TOKENS_PER_FACE
from training.run.ending import is_first_to_say

LONG_MESHES = ("error", "crop", "drop")
TURNS = ("none", "quarter", "any")
# What train.py does without arguments.
DEMO_CONFIG = Path(__file__).with_name("configs") / "demo.yaml"
# What a file says of the end of its run, and the options that make the run another one if the command line gives them.
REPLACING_OPTIONS = {
    "max_steps": ("num_train_epochs",),
    "max_minutes": ("max_steps", "num_train_epochs"),
    "required_eval_loss": ("max_steps", "num_train_epochs", "train_file"),
}


def option(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field with its help text, and what may be chosen."""
    metadata: dict[str, Any] = {"help": text} if choices is None else {"help": text, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelArguments:
    model_name_or_path: str | None = option(
        None, "Folder or Hub name of a model to start from; without it a new model of the sizes below is made."
    )
    hidden_size: int = option(128, "Channels of every block.")
    num_attention_heads: int = option(4, "Heads; hidden_size / num_attention_heads must be a multiple of 4.")
    intermediate_size: int | None = option(None, "Hidden units of the SwiGLU; int(8 / 3 * hidden_size) if not given.")
    stage_layers: list[int] = option(
        [2, 2, 4, 2, 2], "Blocks of the five stages: coordinates, vertices, faces, vertices, coordinates."
    )
    full_attention_interval: int = option(4, "Every so many-th block has full attention, the others linear attention.")
    initializer_range: float = option(0.06, "Standard deviation of fresh weights; about 0.7 / sqrt(hidden_size).")
    attn_implementation: str = option(
        "auto",
        "How full attention is computed: sdpa, eager, flash_attention_2, flash_attention_4; auto: the last, in half "
        "precision and without torch_compile, where the package flash-attn-4 is installed and serves, else sdpa.",
    )
    linear_attn_implementation: str = option("auto", "How linear attention is computed: auto, chunked, fla, ...")
    gradient_checkpointing: bool = option(False, "Recompute blocks in the backward pass: less memory, more time.")
    condition_on: list[str] | None = option(
        None,
        "What a new model is told of each mesh, so that it can be asked for it later: its category, its number of "
        "faces. A model to start from keeps its own.",
        CONDITIONS,
    )
    min_category_meshes: int = option(
        20, "The categories that a new model knows are those of at least so many training meshes."
    )


@dataclass
class DataArguments:
    train_file: list[str] | None = option(
        None,
        "Parquet files with the columns vertices and faces, and category and name where known: paths, patterns and "
        "hf://datasets/user/name/... addresses; with --streaming also the name of a data set on the Hub. Without them "
        "the meshes are generated.",
    )
    validation_file: list[str] | None = option(None, "Parquet files of held-out meshes.")
    streaming: bool = option(
        False, "Read train_file piece by piece while training, instead of downloading and memory-mapping it."
    )
    streaming_row_groups: int = option(
        8, "Row groups of the parquet files that are read, shuffled and packed together when streaming."
    )
    num_procedural_meshes: int = option(4000, "Meshes to generate for training where no train_file is given.")
    num_procedural_validation_meshes: int = option(128, "Meshes to generate for evaluation in that case.")
    procedural_max_faces: int = option(200, "Most faces of a generated mesh.")
    procedural_kinds: list[str] = option(list(KINDS), f"Kinds of meshes to generate: {', '.join(KINDS)}.")
    max_train_samples: int | None = option(None, "Use only the first so many training meshes.")
    max_eval_samples: int | None = option(None, "Use only the first so many held-out meshes.")
    row_length: int = option(
        3 * 9 * 202, "Tokens of a row, which is filled with whole meshes of nine tokens a face; a multiple of nine."
    )
    long_meshes: str = option(
        "error",
        "What to do with a mesh longer than a row: stop with an error, crop it by whole faces to its lowest ones and "
        "leave its end open, or drop it.",
        LONG_MESHES,
    )
    scale_augmentation: float = option(
        0.25,
        "Stretch every mesh along each axis by a factor from 1 / (1 + this) to 1 + this, anew in every epoch; 0 "
        "leaves its sides as they are.",
    )
    shift_augmentation: bool = option(True, "Move every mesh by up to 0.1 (0.075 along the third axis) in its box.")
    turn_augmentation: str = option(
        "none",
        "Turn every mesh about the vertical axis, anew in every epoch: by a multiple of 90 degrees, or by any angle.",
        TURNS,
    )
    mirror_augmentation: bool = option(
        False, "Mirror every mesh at the plane x = 0 in half of the cases; its faces look outwards as before."
    )
    vertex_noise: float = option(
        0.0,
        "Share of the vertices, such as 0.01, that training rows show wrongly: moved, or another one of the mesh. "
        "What follows is to be predicted as ever, so that a model can go on after a mistake of its own.",
    )
    balance: list[str] | None = option(
        None,
        "Columns, such as category or pack, or num_faces, whose groups are up to 50, 100, 200, 400, ... faces: draw "
        "the meshes of an epoch such that those of small groups come more often. By several the chances of a mesh "
        "are multiplied.",
    )
    balance_power: float = option(
        0.5,
        "A group of n meshes is drawn with a probability proportional to n to this power: 0 draws all groups equally "
        "often, 1 leaves them as they are.",
    )
    condition_dropout: float = option(
        0.2,
        "The probability with which a mesh's category is left out in training, and, independently, its number of "
        "faces: so the model learns to do without.",
    )
    up_axis: str = option("y", "Vertical axis of the meshes.", ("y", "z"))
    dataloader_num_workers: int = option(0, "Processes that prepare rows; 0 prepares them in the main process.")


@dataclass
class TrainArguments:
    output_dir: str = option("outputs/train", "Where checkpoints, log, samples and in the end the model are written.")
    max_steps: int = option(-1, "Steps of the optimiser; by default as many as num_train_epochs takes.")
    num_train_epochs: float = option(
        3.0,
        "Passes through the data, if max_steps is not given; on the command line it goes before a file's max_steps.",
    )
    max_minutes: float | None = option(
        None,
        "Minutes that training may take: on a machine too slow for max_steps the run, schedule and all, is shortened. "
        "max_steps or num_train_epochs on the command line goes before the minutes of a file.",
    )
    required_eval_loss: float | None = option(
        None,
        "Evaluation loss, in nats a token, above which a finished run has failed: everything is written, the exit "
        "status is 1. Of a file it does not hold for other steps or meshes, given on the command line.",
    )
    per_device_train_batch_size: int = option(2, "Rows that one device takes at once.")
    per_device_eval_batch_size: int | None = option(None, "The same for evaluation; as in training if not given.")
    gradient_accumulation_steps: int = option(1, "Such batches for one step of the optimiser.")
    optim: str = option("muon", "muon trains the matrices in blocks with Muon, the rest with AdamW.", OPTIMIZERS)
    learning_rate: float = option(1e-3, "Highest learning rate, of Muon and of AdamW.")
    weight_decay: float = option(0.1, "Decay of the matrices in blocks; nothing else is decayed.")
    adam_beta1: float = option(0.9, "AdamW's decay of the mean.")
    adam_beta2: float = option(0.95, "AdamW's decay of the mean square.")
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = option(1.0, "Largest norm of the gradient, above which it is scaled down; 0 for no limit.")
    lr_scheduler_type: str = option("cosine", "How the learning rate changes.", SCHEDULES)
    lr_scheduler_kwargs: str | None = option(
        None, 'More settings of the schedule as JSON, such as {"num_decay_steps": 100} or {"min_lr_rate": 0.1}.'
    )
    warmup_steps: float = option(0.05, "Steps in which the learning rate rises, or below 1 a share of all steps.")
    ema_decay: float | None = option(
        None, "Keep a moving average of the weights, such as 0.999, which is evaluated, sampled from and published."
    )
    bf16: bool = option(False, "Compute in bfloat16 with weights in float32.")
    fp16: bool = option(False, "Compute in float16 with weights in float32.")
    torch_compile: bool = option(False, "Compile every block with torch.compile, once.")
    torch_compile_mode: str | None = option(None, "torch.compile's mode.")
    activation_memory_budget: float = option(
        1.0,
        "On a GPU: of what the backward pass may keep, the share that blocks do keep; the rest is computed again. "
        "Without torch_compile it is 0.5 at least.",
    )
    cuda_graphs: bool = option(True, "Let a GPU repeat whole steps from CUDA graphs, where it can.")
    use_cpu: bool = option(False, "Train on the CPU even if there is a GPU.")
    seed: int = option(42, "Of the fresh weights, the order of the data, its augmentation and the samples.")
    logging_steps: int = option(10, "Write the loss every so many steps.")
    eval_steps: int | None = option(None, "Evaluate every so many steps, and at the end; as save_steps if not given.")
    save_steps: int = option(500, "Save a checkpoint every so many steps, and at the end; 0 saves none.")
    save_total_limit: int | None = option(3, "Checkpoints to keep; the latest and the best are always kept.")
    load_best_model_at_end: bool = option(
        False, "Publish the checkpoint with the lowest evaluation loss, not the last."
    )
    resume_from_checkpoint: str | None = option(
        None,
        "latest, or a checkpoint's folder: continue as if the run had not stopped. latest without any starts anew.",
    )
    report_to: list[str] = option(
        ["none"], "Trackers besides the JSONL log: tensorboard, wandb, trackio, ... or none."
    )
    run_name: str | None = option(None, "Name of the run for trackers.")
    disable_tqdm: bool = option(False, "Show no progress bar.")
    sample_steps: int = option(0, "Generate and draw meshes every so many steps; 0 only at the end.")
    num_samples: int = option(16, "Meshes to generate at the end and every sample_steps; 0 for none.")
    sample_max_faces: int = option(200, "Faces at which a sample is cut off.")
    temperature: float = option(
        1.0, "Of sampling; a model to start from keeps its own, top_k and top_p too, unless given."
    )
    top_k: int = option(0, "Sample among so many likeliest tokens; 0 among all.")
    top_p: float = option(0.95, "Sample among the likeliest tokens that have this probability together.")


@dataclass
class Arguments:
    model: ModelArguments
    data: DataArguments
    train: TrainArguments
    given: frozenset[str] = frozenset()  # names of the options that the command line or the file set

    def __post_init__(self) -> None:
        train, data = self.train, self.data
        if train.bf16 and train.fp16:
            raise ValueError("bf16 and fp16 exclude each other")
        if train.max_steps == 0 or (train.max_steps < 0 and train.num_train_epochs <= 0):
            raise ValueError("there is nothing to train: give max_steps or num_train_epochs above 0")
        for least, part, names in (
            (1, train, ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")),
            (1, train, ("logging_steps", "save_total_limit")),
            (1, data, ("num_procedural_meshes", "streaming_row_groups", "max_train_samples", "max_eval_samples")),
            (0, train, ("save_steps", "eval_steps", "sample_steps", "num_samples", "warmup_steps", "max_grad_norm")),
            (0, data, ("dataloader_num_workers",)),
        ):
            for name in names:
                value = getattr(part, name)
                if value is not None and value < least:
                    raise ValueError(f"{name} must be at least {least}, got {value}")
        if train.ema_decay is not None and not 0 < train.ema_decay < 1:
            raise ValueError(f"ema_decay must lie between 0 and 1, got {train.ema_decay}")
        if not 0 <= train.activation_memory_budget <= 1:
            raise ValueError(
                f"activation_memory_budget must be from 0 to 1, got {train.activation_memory_budget}: 1 keeps most"
            )
        if train.load_best_model_at_end and (not train.save_steps or train.save_steps % (train.eval_steps or 1)):
            raise ValueError(
                "load_best_model_at_end needs an evaluation of every checkpoint: give a save_steps above 0 that is a "
                f"multiple of eval_steps, got save_steps {train.save_steps} and eval_steps {train.eval_steps}"
            )
        if data.row_length % TOKENS_PER_FACE or data.row_length < 3 * TOKENS_PER_FACE:
            raise ValueError(
                f"row_length must be a multiple of nine, a mesh being faces of nine tokens, and at least 27; "
                f"got {data.row_length}"
            )
        if not 0 <= data.scale_augmentation < math.inf:
            raise ValueError(
                f"scale_augmentation must be at least 0 and finite, got {data.scale_augmentation}: 0.25 stretches by "
                "0.8 to 1.25"
            )
        if not 0 <= data.vertex_noise < 1:
            raise ValueError(f"vertex_noise must be at least 0 and less than 1, got {data.vertex_noise}")
        self._check_balance()
        self._check_conditions()
        if data.validation_file and not data.train_file:
            raise ValueError("validation_file needs a train_file: generated meshes have their own held-out ones")
        if train.required_eval_loss is not None:
            if not train.required_eval_loss > 0:
                raise ValueError(f"required_eval_loss must be above 0, got {train.required_eval_loss}")
            if not (data.validation_file if data.train_file else data.num_procedural_validation_meshes):
                raise ValueError(
                    "required_eval_loss needs held-out meshes: give a validation_file or, where meshes are generated, "
                    "num_procedural_validation_meshes above 0; or leave required_eval_loss out"
                )
        if data.streaming:
            self._check_streaming()
        train.report_to = [name for name in train.report_to if name != "none"]
        self.schedule_kwargs()

    def _check_balance(self) -> None:
        columns, power = self.data.balance or [], self.data.balance_power
        if len(set(columns)) < len(columns):
            raise ValueError(f"balance names a column twice: {' '.join(columns)}")
        if not 0 <= power <= 1:
            raise ValueError(
                f"balance_power must be from 0 to 1, got {power}: 0 draws all groups equally often, 1 leaves them as "
                "they are"
            )
        if "balance_power" in self.given and not columns:
            raise ValueError("balance_power needs balance: name the columns to balance by, such as category")

    def _check_conditions(self) -> None:
        model, dropout = self.model, self.data.condition_dropout
        if model.condition_on:
            model.condition_on = [name for name in CONDITIONS if name in model.condition_on]
        if not 0 <= dropout < 1:
            raise ValueError(f"condition_dropout must be at least 0 and less than 1, got {dropout}")
        if model.min_category_meshes < 1:
            raise ValueError(f"min_category_meshes must be at least 1, got {model.min_category_meshes}")
        if "min_category_meshes" in self.given:
            if "category" not in (model.condition_on or []):
                raise ValueError("min_category_meshes needs --condition_on category")
            if model.model_name_or_path is not None:
                raise ValueError("min_category_meshes is for a new model: one to start from keeps its categories")

    def _check_streaming(self) -> None:
        if not self.data.train_file:
            raise ValueError("streaming needs a train_file")
        if self.train.max_steps < 0:
            raise ValueError(
                "streaming needs max_steps: how many steps num_train_epochs takes is not known before everything has "
                "been read"
            )
        if self.data.balance:
            raise ValueError(
                f"balance {' '.join(self.data.balance)} does not go with streaming: to draw rare meshes more often, "
                "all of them must be at hand. Leave out one of the two"
            )
        if self.data.max_train_samples is not None:
            raise ValueError("max_train_samples does not go with streaming: give fewer files instead")

    def schedule_kwargs(self) -> dict[str, Any]:
        """`lr_scheduler_kwargs` as a dictionary. Raises ValueError if it is not one."""
        text = self.train.lr_scheduler_kwargs or "{}"
        try:
            kwargs = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"lr_scheduler_kwargs must be JSON, got {text!r}: {error}") from error
        if not isinstance(kwargs, dict):
            raise ValueError(f"lr_scheduler_kwargs must be a JSON object, got {text!r}")
        return kwargs

    def to_dict(self) -> dict[str, Any]:
        """Every option by name."""
        return {**asdict(self.model), **asdict(self.data), **asdict(self.train)}


class _Parser(HfArgumentParser):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.options: dict[str, argparse.Action] = {}  # by name; of --name and --no_name the first
        super().__init__(*args, **kwargs)

    def add_argument(self, *args: Any, **kwargs: Any) -> argparse.Action:
        action = super().add_argument(*args, **kwargs)
        return self.options.setdefault(action.dest, action)

    def error(self, message: str) -> NoReturn:
        """As argparse does, but of all processes of a launch one says it."""
        if not is_first_to_say(message):
            self.exit(2)
        super().error(message)


def parse_arguments(argv: list[str] | None = None) -> Arguments:
    """
    Read `[config.yaml] [--options]`; what the command line says goes before what the file says. Without any argument
    the file is `configs/demo.yaml`.

    Prints one line and ends the process with status 2 on an unknown option or yaml key, which it names, and on values
    that make no sense.
    """
    parser = _Parser(
        (ModelArguments, DataArguments, TrainArguments),
        prog="training/train.py",
        usage="%(prog)s [config.yaml] [--option value ...]   (--help lists the options)",
        description="Train iFlame. Without arguments it is the run of training/configs/demo.yaml: a small model "
        "learns meshes that are generated on the spot.",
        allow_abbrev=False,
    )
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        argv, settings = argv or [str(DEMO_CONFIG)], {}
        if not argv[0].startswith("-"):
            settings, argv = _read_yaml(Path(argv[0]), parser.options), argv[1:]
        # Options are never None on the command line, so None stands for those that it does not give.
        values, rest = parser.parse_known_args(argv, argparse.Namespace(**dict.fromkeys(_option_types())))
        if rest:
            raise ValueError(f"no such option: {rest[0]}{_suggestion(rest[0].lstrip('-').split('=')[0])}")
        command_line = {name: value for name, value in vars(values).items() if value is not None}
        given = {
            name: value
            for name, value in settings.items()
            if command_line.keys().isdisjoint(REPLACING_OPTIONS.get(name, ()))
        } | command_line
        return Arguments(*parser.parse_dict(given), given=frozenset(given))
    except ValueError as error:
        parser.error(str(error))


def _read_yaml(path: Path, options: dict[str, argparse.Action]) -> dict[str, Any]:
    """
    The settings of a yaml file by name, of the types that the options have; None only for options that may be None.

    Raises:
        ValueError: the file is missing, is no mapping in yaml, names what is no option, or gives one what it does not
            take.
    """
    if not path.is_file():
        raise ValueError(f"there is no configuration file {path}")
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys) or {}  # a safe loader
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid yaml: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold lines of the form 'option: value'")
    types = _option_types()
    for key, value in settings.items():
        if key not in types:
            raise ValueError(f"{path}: no such option: {key}{_suggestion(str(key))}")
        if value is None and type(None) not in get_args(types[key]):
            raise ValueError(f"{path}: {key} cannot be null: give a value, or leave the line out")
        try:
            settings[key] = _as_on_the_command_line(value, options[key])
        except ValueError as error:
            raise ValueError(f"{path}: {key}: {error}") from error
    return settings


def _as_on_the_command_line(value: Any, option: argparse.Action) -> Any:
    """
    A value of a yaml file as argparse makes it of the same words: to yaml `1e-3` is a string.

    Raises:
        ValueError: it is not of the option's type, none of its choices, or not as many values as it takes.
    """
    if value is None:
        return None
    if isinstance(value, dict) and option.dest == "lr_scheduler_kwargs":
        value = json.dumps(value)
    is_list, takes_list = isinstance(value, list), option.nargs == "+"
    if isinstance(value, dict) or (is_list and not takes_list):
        raise ValueError(f"one value is expected, got {value}")
    if is_list and not value:
        raise ValueError("expected at least one value, got []")
    values = []
    for word in map(str, value if is_list else [value]):
        try:
            values.append(option.type(word))
        except argparse.ArgumentTypeError as error:
            raise ValueError(error) from error
        except ValueError as error:
            raise ValueError(f"invalid {option.type.__name__} value: {word!r}") from error
        if option.choices is not None and values[-1] not in option.choices:
            raise ValueError(f"invalid choice: {word!r} (choose from {', '.join(map(repr, option.choices))})")
    return values if takes_list else values[0]


class _UniqueKeys(yaml.SafeLoader):
    """Of a key that is given twice yaml takes the last one, without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"{key} is given twice")
        return super().construct_mapping(node, deep)


def _option_types() -> dict[str, Any]:
    """The type of each option as it is written above; HfArgumentParser takes the None out of those of the fields."""
    return {
        name: kind
        for part in (ModelArguments, DataArguments, TrainArguments)
        for name, kind in get_type_hints(part).items()
    }


def _suggestion(name: str) -> str:
    close = difflib.get_close_matches(name, _option_types(), n=1)
    return f" (did you mean {close[0]}?)" if close else ""

"""
What else could learn the same meshes: a plain decoder and the original code beside this project's model.

    python benchmarks/peers.py --data DIR --out DIR --peer llama|original|iflame --minutes M [--reference FOLDER]
    python benchmarks/peers.py --table A/peer.json B/peer.json ...

DIR is a folder that training/prepare_data.py wrote. A peer is trained for so many minutes, or on so many tokens that
have a label, which is to see each mesh as often; then the same held-out meshes tell its loss, and its samples are
written for training/evaluate.py --samples. OUT gets peer.json with all figures, run/log.jsonl and samples/.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, this module must find its siblings

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from benchmarks import common, launching, peer_llama, peer_original
from benchmarks.oracle import WrongResult
from benchmarks.peer_training import judge, labels_in_epoch, learn, write_samples
from benchmarks.scaling_figures import markdown
from iflame_cli.errors import CommandError
from iflame_hf import IFlameConfig, IFlameForCausalLM, IFlameTokenizer
from iflame_hf.files_iflame import write_whole
from iflame_hf.many_iflame import GeneratedMesh, generate_meshes
from training.arguments import Arguments, parse_arguments
from training.rows.map import Data, load_data
from training.run.create import create_accelerator
from training.run.ending import ends_in_words

PEERS = ("llama", "original", "iflame")
CONFIG = launching.ROOT / "training" / "configs" / "published.yaml"
# A size that learns something in minutes, with the stages that the original has: 19 million parameters.
SIZES = "--hidden_size 256 --num_attention_heads 8 --stage_layers 4 4 8 4 4 --initializer_range 0.04".split()
MANY_STEPS = 1_000_000  # which --minutes cuts short
# Of train.py beside the minutes that it trains: imports, the data, the held-out meshes.
MINUTES_BESIDE = 15
COLUMNS = {
    "name": "model",
    "parameters": "parameters",
    "minutes": "minutes",
    "labels": "labels learnt",
    "epochs": "epochs",
    "tokens_per_second": "tokens/s",
    "useful_tokens_per_second": "useful tokens/s",
    "memory_gib": "GiB",
    "loss": "held-out loss",
    "bits_per_face": "bits a face",
    "token_accuracy": "tokens right",
    "face_accuracy": "faces right",
    "sampled": "samples ended",
    "sample_seconds": "s a sample",
}
NOTES = """\
Held-out: the same {meshes:,} meshes and {labels:,} labels for all, each token predicted from the true ones before it;
the loss is in nats a token. A label is a coordinate or one of the nine tokens of the end face; start faces and padding
have none. Labels learnt count each mesh as often as it was seen; useful tokens/s are labels, tokens/s have start faces
and padding too. GiB: the most that tensors took on the GPU while it learnt. A sample that has ended came to its end
before it had as many faces as it may have."""

Figures = dict[str, Any]


class Outcome(NamedTuple):
    """A peer that has been trained."""

    model: nn.Module  # takes input_ids and layout, gives logits
    data: Data
    tokenizer: IFlameTokenizer
    accelerator: Accelerator
    figures: Figures
    sample: Callable[[], Iterable[GeneratedMesh]]


def train_words(options: argparse.Namespace, recipe: Mapping[str, str]) -> list[str]:
    """
    The command line of train.py that says what a peer learns from and how.

    Args:
        recipe: the peer's own settings; the user's go before them.
    """
    files = {f"{kind}_file": split_files(options.data, split) for kind, split in (("train",) * 2, ("validation",) * 2)}
    on_gpu = options.device.type == "cuda"
    own = {
        "output_dir": str(options.out / "run"),
        "seed": str(options.seed),
        "bf16": str(on_gpu),
        "use_cpu": str(not on_gpu),
        "num_samples": str(options.num_samples),
        "sample_max_faces": str(options.max_faces),
        "top_p": str(options.top_p),
        "top_k": str(options.top_k),
        "save_steps": "0",
        "disable_tqdm": "True",
        **recipe,
    }
    if options.learning_rate is not None:
        own["learning_rate"] = str(options.learning_rate)
    words = [str(options.config), *(SIZES if options.config == CONFIG else [])]
    words += [word for name, found in files.items() for word in (f"--{name}", *found)]
    words += [word for name, value in own.items() for word in (f"--{name}", value)]
    return [*words, *options.train_options]


def split_files(data: Path, split: str) -> list[str]:
    """Raises CommandError if there are none."""
    found = sorted(str(path) for path in data.resolve().glob(f"data/{split}-*.parquet"))
    if not found:
        raise CommandError(f"{data} has no data/{split}-*.parquet: training/prepare_data.py writes it")
    return found


def limit(options: argparse.Namespace, arguments: Arguments, data: Data) -> list[str]:
    """Sets how long is trained, and returns it as words of a command line. --tokens become passes through the meshes:
    however long rows are, all peers then see each mesh as often."""
    train = arguments.train
    if options.minutes is not None:
        train.max_steps, train.max_minutes = MANY_STEPS, options.minutes
        return ["--max_steps", str(MANY_STEPS), "--max_minutes", str(options.minutes)]
    train.max_steps, train.num_train_epochs = -1, options.tokens / labels_in_epoch(data)
    return ["--num_train_epochs", repr(train.num_train_epochs)]


def config_of(arguments: Arguments) -> IFlameConfig:
    """Of the sizes that the options say."""
    sizes = arguments.model
    return IFlameConfig(
        hidden_size=sizes.hidden_size,
        num_attention_heads=sizes.num_attention_heads,
        intermediate_size=sizes.intermediate_size,
        stage_layers=sizes.stage_layers,
        full_attention_interval=sizes.full_attention_interval,
    )


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def require_alike(arguments: Arguments) -> None:
    """Raises CommandError for options of train.py that only this project's model could follow."""
    asked = {
        "streaming": arguments.data.streaming,
        "balance": arguments.data.balance,
        "condition_on": arguments.model.condition_on,
        "gradient_accumulation_steps": arguments.train.gradient_accumulation_steps > 1,
        "ema_decay": arguments.train.ema_decay,
        "model_name_or_path": arguments.model.model_name_or_path,
    }
    if refused := [f"--{name}" for name, value in asked.items() if value]:
        raise CommandError(f"peers are to learn alike, and not all of them know {', '.join(refused)}: leave that out")


def begin(words: list[str], reversed_winding: bool = False) -> tuple[Arguments, Accelerator, IFlameTokenizer, Data]:
    """What a run begins with, see `training.train`."""
    arguments = parse_arguments(words)
    require_alike(arguments)
    accelerator = create_accelerator(arguments)
    set_seed(arguments.train.seed)
    tokenizer = IFlameTokenizer(up_axis=arguments.data.up_axis, reversed_winding=reversed_winding)
    Path(arguments.train.output_dir).mkdir(parents=True, exist_ok=True)
    return arguments, accelerator, tokenizer, load_data(arguments, tokenizer, accelerator)


def train_llama(options: argparse.Namespace) -> Outcome:
    words = train_words(options, {"learning_rate": str(peer_llama.LEARNING_RATE)})
    arguments, accelerator, tokenizer, data = begin(words)
    limit(options, arguments, data)
    parameters = options.parameters
    if parameters is None:
        with torch.device("meta"):
            parameters = count_parameters(IFlameForCausalLM(config_of(arguments)))
    width, layers = peer_llama.choose_sizes(parameters, tokenizer.vocab_size)
    network = peer_llama.build_network(
        tokenizer, arguments, options.width or width, options.layers or layers, options.heads
    )
    is_compiled = arguments.train.torch_compile
    asked = arguments.model.attn_implementation
    attention = peer_llama.choose_attention(asked, network, accelerator, is_compiled)
    if is_compiled:
        for layer in network.model.layers:
            layer.compile(dynamic=False)
    optimizer = peer_llama.create_optimizer(network, arguments)
    model, figures = learn(peer_llama.PackedLlama(network, attention), optimizer, arguments, data, accelerator)
    figures |= {"attention": attention, "compiled": is_compiled, **sizes_of(network.config)}

    def sample() -> Iterable[GeneratedMesh]:
        half = torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32
        return peer_llama.sample(network.to(half), tokenizer, arguments, options.sample_rows)

    return Outcome(model, data, tokenizer, accelerator, figures, sample)


def sizes_of(config: Any) -> Figures:
    return {
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
    }


def train_original(options: argparse.Namespace) -> Outcome:
    if options.reference is None:
        raise CommandError("--peer original needs --reference, a folder of the original code")
    is_cuda = options.device.type == "cuda"
    sizes = parse_arguments(train_words(options, {}))
    set_seed(options.seed)
    network, optimizer, script, packages = peer_original.build(options.reference, config_of(sizes), options.device)
    words = train_words(options, peer_original.recipe(script, is_cuda))
    # Its order of vertices: the second and the third of every face are swapped.
    arguments, accelerator, tokenizer, data = begin(words, reversed_winding=True)
    limit(options, arguments, data)
    train = arguments.train
    data = peer_original.one_mesh_a_row(
        data, train.seed, train.per_device_eval_batch_size or train.per_device_train_batch_size
    )
    # As its training script says; what dynamo cannot trace then runs as it is. Its Muon is compiled too.
    stance = "default" if is_cuda else "force_eager"
    with torch._dynamo.config.patch(suppress_errors=True), torch.compiler.set_stance(stance):
        model, figures = learn(
            peer_original.Original(network, is_compiled=is_cuda), optimizer, arguments, data, accelerator
        )
    figures |= {"packages": packages, "compiled": is_cuda, **sizes_of(config_of(arguments))}

    def sample() -> Iterable[GeneratedMesh]:
        return peer_original.sample(network, tokenizer, arguments, options.sample_rows, options.device)

    return Outcome(model, data, tokenizer, accelerator, figures, sample)


def train_iflame(options: argparse.Namespace) -> Outcome:
    words = train_words(options, {})
    arguments, accelerator, tokenizer, data = begin(words)
    spare = [*words, *limit(options, arguments, data), "--num_samples", "0"]
    run = Path(arguments.train.output_dir)
    is_cuda = options.device.type == "cuda"
    command = launching.launch_command("train.py", "one", 1, "bfloat16" if is_cuda else "float32", not is_cuda)
    seconds = 60 * (MINUTES_BESIDE + (options.minutes or options.limit))
    try:
        launching.run_program([*command, *spare], options.out / "train.txt", seconds)
    except WrongResult as error:
        raise CommandError(f"train.py: {error}; {options.out / 'train.txt'} has all that it said") from error
    figures = figures_of_log(run / "log.jsonl", arguments)
    model = IFlameForCausalLM.from_pretrained(run, dtype=torch.float32).to(options.device)
    figures |= sizes_of(model.config) | {"compiled": arguments.train.torch_compile}
    half = torch.bfloat16 if is_cuda else torch.float32

    def sample() -> Iterable[GeneratedMesh]:
        train = arguments.train
        seeds = range(options.seed, options.seed + options.num_samples)
        settings = {name: getattr(train, name) for name in ("temperature", "top_k", "top_p")}
        settings["max_faces"] = options.max_faces
        return generate_meshes(model.to(half), seeds, rows=options.sample_rows, **settings)

    return Outcome(model, data, tokenizer, accelerator, figures, sample)


def figures_of_log(path: Path, arguments: Arguments) -> Figures:
    """What `learn` says of a run, of one of train.py; the speed is that of the line in the middle."""
    lines = [line for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()) if "loss" in line]
    steady = sorted(lines[1:] or lines, key=lambda line: line["tokens_per_second"])
    middle, last = steady[len(steady) // 2], lines[-1]
    rows, length = arguments.train.per_device_train_batch_size, arguments.data.row_length
    rows *= arguments.train.gradient_accumulation_steps
    return {
        "steps": last["step"],
        "rows": rows,
        "row_tokens": length,
        "tokens": last["step"] * rows * length,
        "labels": last["labels"],
        "epochs": last["epoch"],
        "train_seconds": 60 * last["minutes"],
        "tokens_per_second": middle["tokens_per_second"],
        "useful_tokens_per_second": middle["useful_tokens_per_second"],
        "memory_gib": last.get("memory_gib"),
    }


TRAIN = {"llama": train_llama, "original": train_original, "iflame": train_iflame}


def run_peer(options: argparse.Namespace) -> Figures:
    """Trains a peer, judges it, writes its samples and `peer.json`."""
    began = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    outcome = TRAIN[options.peer](options)
    result = {"benchmark": "peers", "peer": options.peer, "name": options.name or options.peer}
    result |= {**common.machine(options.device), "seed": options.seed, "train_options": options.train_options}
    result |= {"minutes_asked": options.minutes, "tokens_asked": options.tokens, "data": options.data.name}
    result |= {"parameters": count_parameters(outcome.model), **outcome.figures}
    result["held_out"] = judge(outcome.model, outcome.data, outcome.tokenizer, outcome.accelerator)
    write_figures(options.out, result, began)  # sampling may take longer than anyone waits
    if options.num_samples:
        chosen = {name: getattr(options, name) for name in ("seed", "top_p", "top_k", "max_faces")}
        folder = options.out / "samples"
        result["samples"] = write_samples(
            outcome.sample(), folder, outcome.tokenizer, {**chosen, "peer": options.peer}
        )
        write_figures(options.out, result, began)
    return result


def write_figures(out: Path, result: Figures, began: float) -> None:
    result["seconds"] = time.monotonic() - began
    write_whole(out / "peer.json", json.dumps(result, indent=1) + "\n")


def table(results: Sequence[Figures]) -> str:
    """
    Runs beside each other. Raises CommandError where they were not judged by the same labels.
    """
    held_out = [(each["held_out"]["meshes"], each["held_out"]["labels"]) for each in results]
    if len(set(held_out)) > 1:
        said = "; ".join(
            f"{each['name']} by {meshes:,} meshes of {labels:,}"
            for each, (meshes, labels) in zip(results, held_out, strict=True)
        )
        raise CommandError(f"these runs cannot be compared, they are judged by different labels: {said}")
    meshes, labels = held_out[0]
    machines = sorted(
        {f"{each['gpu'] or each['machine']}, torch {each['torch']}, {each['commit']}" for each in results}
    )
    rows = [
        {
            **each,
            **{name: each["held_out"][name] for name in ("loss", "bits_per_face")},
            **{f"{of}_accuracy": f"{100 * each['held_out'][f'{of}_accuracy']:.1f} %" for of in ("token", "face")},
            "parameters": f"{each['parameters'] / 1e6:.1f} M",
            "labels": f"{each['labels'] / 1e6:,.1f} M",
            "minutes": f"{each['train_seconds'] / 60:.1f}",
            **sampling_cells(each.get("samples")),
        }
        for each in results
    ]
    notes = " ".join(NOTES.format(meshes=meshes, labels=labels).splitlines())
    return f"{'; '.join(sorted(machines))}\n\n{markdown(rows, COLUMNS)}\n\n{notes}\n"


def sampling_cells(samples: Figures | None) -> dict[str, str]:
    if samples is None:
        return {}
    each = f"{samples['seconds'] / samples['meshes']:.2f}"
    return {"sampled": f"{samples['ended']} of {samples['meshes']}", "sample_seconds": each}


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--table", nargs="+", type=Path, metavar="JSON", help="show these figures of runs beside each other instead")
    add("--data", type=Path, metavar="DIR", help="what training/prepare_data.py wrote, with a split validation")
    add("--out", type=Path, metavar="DIR", help="folder for figures, log and samples")
    add("--peer", choices=PEERS)
    add("--minutes", type=float, help="of training; schedule and all are fitted into them")
    add("--tokens", type=float, help="with a label to learn from, such as 50e6")
    add("--name", help="of the run in tables (default: that of the peer)")
    add("--reference", metavar="FOLDER", help="the original code, for --peer original")
    add("--config", type=Path, default=CONFIG, help="yaml file of train.py (default: published.yaml, with a smaller "
        f"network: {' '.join(SIZES)})")  # fmt: skip
    add("--learning_rate", type=float, help=f"default: {peer_llama.LEARNING_RATE} of a Llama, else the recipe's own")
    add("--parameters", type=float, help="of a Llama, about (default: those of an iFlame of the sizes)")
    add("--width", type=int, help="channels of a Llama (default: chosen by --parameters)")
    add("--layers", type=int, help="of a Llama, likewise")
    add("--heads", type=int, help=f"of a Llama (default: of {peer_llama.HEAD_SIZE} channels each)")
    add("--num_samples", type=int, default=256, help="0 for none (default 256)")
    add("--sample_rows", type=int, default=256, help="sampled at a time (default 256)")
    add("--max_faces", type=int, default=800, help="of a sample (default 800)")
    add("--top_p", type=float, default=0.95)
    add("--top_k", type=int, default=0, help="0: among all tokens")
    add("--limit", type=float, default=60, help="minutes after which a run of train.py by --tokens is ended")
    add("--device", type=common.find_device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add("--train_options", nargs=argparse.REMAINDER, default=[], help="last: more options of train.py")
    options = parser.parse_args(arguments)
    if options.table is not None:
        return options
    for name in ("data", "out", "peer"):
        if getattr(options, name) is None:
            parser.error(f"--{name} is needed")
    if (options.minutes is None) == (options.tokens is None):
        parser.error("give --minutes or --tokens, one of the two")
    for name in ("minutes", "tokens", "parameters", "width", "layers", "heads", "sample_rows", "max_faces"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            parser.error(f"--{name} must be above 0, got {value:g}")
    if options.device.type not in ("cuda", "cpu"):
        parser.error(f"--device must be cuda or cpu, got {options.device}")
    options.out = options.out.resolve()  # train.py is started in another folder
    return options


def read_result(path: Path) -> Figures:
    """Raises CommandError where the file has no figures of a peer."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["benchmark"] == "peers":
            return result
    except (ValueError, KeyError, TypeError):
        pass
    raise CommandError(f"--table {path} is not what this program wrote: it is called peer.json")


@ends_in_words("peers")
def main(arguments: Sequence[str] | None = None) -> int:
    options = read_options(arguments)
    results = [run_peer(options)] if options.table is None else [read_result(path) for path in options.table]
    print(table(results))
    if options.table is None:
        print(json.dumps(results[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

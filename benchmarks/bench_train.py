"""
Speed of a training step, of this model and, given a folder of its code, of the original.

    python benchmarks/bench_train.py [--preset published] [--mesh_faces 205] [--optim muon] [--step eager blocks]

Every variant's gradients are tested against the recurrence and spelled-out attention in float32 first, and it
has no figures if they fail.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, this module must find its siblings

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import common
from benchmarks.common import Row, gibibytes, measure
from benchmarks.models import build_model, draw_models, mesh_labels, mesh_tokens
from benchmarks.oracle import Oracle, WrongResult, computes_in, flat_gradients, gradients_of, require_close
from iflame_hf import IFlameConfig, IFlameTokenizer
from iflame_hf.format_iflame import known_format
from iflame_hf.layout_iflame import RowLayout
from training.convert_checkpoint import convert_weights
from training.optim.groups import OPTIMIZERS, create_optimizer
from training.rows.pack import EXTRA_FACES, IGNORED, best_fit, pack, row_inputs
from training.run.captured import CapturedLearner, why_no_graph
from training.run.create import compile_blocks, keep_less
from training.run.ending import ends_in_words

TOKENS_PER_FACE = known_format().tokens_per_face

# B batch, T tokens

PRESETS = {
    "published": {"batch_size": [8], "faces": 767, "repeats": 5},
    "demo": {"batch_size": [2], "faces": 60, "repeats": 2},
}
STEPS = ("eager", "compiled", "blocks")
# Of the rows whose gradients are tested: faces of a row, and of a mesh where several share it.
TEST_FACES, TEST_MESH_FACES, TEST_ROWS = 30, 8, 2
COLUMNS = {
    "model": "model",
    "step": "step",
    "graphs": "graphs",
    "dtype": "dtype",
    "batch_size": "rows",
    "row_tokens": "tokens a row",
    "tokens_per_second": "tokens/s",
    "milliseconds_per_step": "ms/step",
    "gpu_milliseconds": "GPU ms",
    "gpu_operations": "GPU operations",
    "labels_per_second": "labels/s",
    "first_step_seconds": "first step s",
    "memory_gib": "GiB",
}
NOTES = """\
A step: forward, loss, backward, clipping, optimiser; weights in float32, autocast to the dtype. Rows are of one mesh
each, or packed with meshes of --mesh_faces on average; labels are the tokens learnt from. The original packs nothing:
its labels/s count what is no padding where each row holds one such mesh. Compiled: the whole network; blocks: each
block by itself, as train.py does. Steps follow each other as in training, without a wait between them. Two figures are
two measurements. Memory is the GPU's peak from the first step on. GPU ms: what it works in a step, copies included, by
torch's profiler. Graphs: steps are CUDA graphs, as train.py's are where they can.
"""
MAX_GRAD_NORM = 1.0
STEPS_TOGETHER = 4  # on a GPU, between two looks at the clock
SHOWN_KERNELS, SHOWN_NAME = 24, 100


class Rows(NamedTuple):
    """What a step learns from."""

    input_ids: torch.Tensor  # (B, T)
    labels: torch.Tensor  # (B, T), -100 where nothing is to be predicted
    layout: RowLayout | None = None  # None: one mesh a row

    def to(self, device: torch.device) -> "Rows":
        return Rows(*(None if each is None else each.to(device) for each in self))

    @property
    def num_labels(self) -> int:
        return int((self.labels != IGNORED).sum())


Loss = Callable[[nn.Module, Rows], torch.Tensor]
Gradients = dict[str, torch.Tensor]


class FirstStep:
    """One batch and its gradients: those of the first variant, which was tested on shorter rows, are those of all."""

    def __init__(self, rows: Rows):
        self.rows = rows
        self.gradients: torch.Tensor | None = None

    def require(self, gradients: torch.Tensor, allowed: float) -> None:
        if self.gradients is None:
            self.gradients = gradients
        require_close("gradients of the first step", gradients, self.gradients, allowed)


def draw_rows(config: IFlameConfig, rows: int, faces: int, mesh_faces: int | None, seed: int) -> Rows:
    """
    Rows of 9 (`faces` + 2) tokens: one mesh of so many faces each, or packed by best fit, as train.py does, with
    meshes of half to one and a half times `mesh_faces`.
    """
    if mesh_faces is None:
        ids = mesh_tokens(config, rows, faces, seed, end=True)
        return Rows(ids, mesh_labels(ids))
    random = np.random.default_rng(seed)
    capacity = faces + EXTRA_FACES
    counts = random.integers(max(1, mesh_faces // 2), min(3 * mesh_faces // 2, faces) + 1, 4 * rows * capacity)
    counts = counts[: np.searchsorted(np.cumsum(counts + EXTRA_FACES), 1.2 * rows * capacity) + 1]
    sizes = sorted((counts + EXTRA_FACES).tolist(), reverse=True)
    chosen = sorted(best_fit(sizes, capacity), key=lambda row: -sum(sizes[mesh] for mesh in row))[:rows]
    sequences = [
        [mesh_tokens(config, 1, sizes[mesh] - EXTRA_FACES, seed + mesh, end=True)[0].numpy() for mesh in row]
        for row in chosen
    ]
    tokenizer = IFlameTokenizer()
    inputs = row_inputs(pack(sequences, capacity * TOKENS_PER_FACE, tokenizer), tokenizer)
    return Rows(inputs["input_ids"], inputs["labels"], inputs["layout"])


def our_loss(model: nn.Module, rows: Rows) -> torch.Tensor:
    return model(rows.input_ids, labels=rows.labels, layout=rows.layout, use_cache=False).loss


def original_loss(network: nn.Module, rows: Rows) -> torch.Tensor:
    """The same loss: every token after the start face, from the one before it."""
    logits = network(rows.input_ids)[:, TOKENS_PER_FACE - 1 : -1]
    return F.cross_entropy(logits.flatten(0, 1).float(), rows.labels[:, TOKENS_PER_FACE:].flatten())


class Tested(NamedTuple):
    """Short rows, and the right gradients of a step on them."""

    rows: Rows
    gradients: torch.Tensor


def draw_tested(oracle: Oracle, is_packed: bool, seed: int) -> Tested:
    rows = draw_rows(oracle.config, TEST_ROWS, TEST_FACES, TEST_MESH_FACES if is_packed else None, seed)
    return Tested(rows, flat_gradients(gradients_of(oracle.model, lambda: our_loss(oracle.model, rows))))


def add_figures(
    row: Row,
    options: argparse.Namespace,
    network: nn.Module,
    loss_of: Loss,
    rows: Rows,
    require_first: Callable[[Gradients], None],
    useful: float = 1.0,
) -> None:
    """
    Measures, and writes the figures into the row.

    Args:
        require_first: raises WrongResult unless the gradients of the first step, by the network's names, are right.
        useful: share of the labels that are of a mesh.
    """
    device, dtype = options.device, common.DTYPES[options.dtype]
    run = torch.compile(network) if row["step"] == "compiled" else network
    if row["step"] == "blocks":
        compile_blocks(network, memory_budget=options.activation_memory_budget)
    if row["model"] != "original":
        keep_less(network, options.activation_memory_budget)
    if row["model"] == "original":
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=device.type == "cuda")
    else:
        optimizer = create_optimizer(network, options.optim, 1e-4, 0.1, fused=True)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    autocast = functools.partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    graphs = row["model"] != "original" and options.cuda_graphs
    graphs = graphs and why_no_graph(network.config, device, dtype) is None
    row["graphs"] = "yes" if graphs else "no"
    if graphs:
        learner = CapturedLearner(run, optimizer, MAX_GRAD_NORM, autocast)
        batch, labels = [rows._asdict()], rows.num_labels

        def backward() -> torch.Tensor:
            return learner.backward(batch, labels)

        def step() -> None:
            nonlocal last_loss
            last_loss = backward()
            learner.update(last_loss)

    else:

        def backward() -> torch.Tensor:
            optimizer.zero_grad(set_to_none=True)
            with autocast():
                loss = loss_of(run, rows)
            loss.backward()
            return loss.detach()

        def step() -> None:
            nonlocal last_loss
            last_loss = backward()
            norm = nn.utils.clip_grad_norm_(network.parameters(), MAX_GRAD_NORM)
            if row["model"] != "original":  # as train.py does
                optimizer.found_inf = (~norm.isfinite()).float()
            optimizer.step()

    started = time.perf_counter()
    last_loss = backward()
    common.synchronize(device)
    row["first_step_seconds"] = time.perf_counter() - started
    require_first({name: parameter.grad for name, parameter in network.named_parameters()})
    if graphs:
        learner.sums.zero_()

    for _ in range(options.warmup):
        step()
    together = STEPS_TOGETHER if device.type == "cuda" else 1
    most = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    seconds, memory = measure(lambda: [step() for _ in range(together)], device, options.repeats)
    seconds = [each / together for each in seconds]
    if not last_loss.isfinite():
        raise WrongResult(f"the loss became {float(last_loss)}")
    row["tokens_per_second"] = [rows.input_ids.numel() / each for each in seconds]
    row["labels_per_second"] = [useful * rows.num_labels / each for each in seconds]
    row["milliseconds_per_step"] = [1000 * each for each in seconds]
    row["memory_gib"] = gibibytes(None if most is None else max(most, memory))
    if options.profile:
        add_profile(row, step)


def add_profile(row: Row, step: Callable[[], None]) -> None:
    """Writes into the row, and shows, what the GPU works in a step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    kernels = [each for each in profile.key_averages() if each.device_type == on_gpu and not each.is_user_annotation]
    kernels.sort(key=lambda each: -each.self_device_time_total)
    row["gpu_milliseconds"] = sum(each.self_device_time_total for each in kernels) / 1000
    row["gpu_operations"] = sum(each.count for each in kernels)
    print(f"  {row['gpu_milliseconds']:.2f} ms in {row['gpu_operations']} operations, of them")
    for each in kernels[:SHOWN_KERNELS]:
        print(f"  {each.self_device_time_total / 1000:8.2f} ms {each.count:5d} x {each.key[:SHOWN_NAME]}")


def ours(
    row: Row,
    options: argparse.Namespace,
    oracle: Oracle,
    tested: Tested,
    first: FirstStep,
    attention: str,
    linear_attention: str,
) -> None:
    device, dtype = options.device, common.DTYPES[options.dtype]
    allowed = oracle.gradients_error(computes_in(dtype, device, linear_attention))
    model = build_model(oracle.config, oracle.weights, device, torch.float32, attention, linear_attention).train()
    rows = tested.rows.to(device)
    found = flat_gradients(gradients_of(model, lambda: our_loss(model, rows), dtype))
    require_close("gradients", found, tested.gradients, allowed)
    add_figures(row, options, model, our_loss, first.rows, lambda found: first.require(flat_gradients(found), allowed))


def theirs(row: Row, options: argparse.Namespace, oracle: Oracle, first: FirstStep, network: nn.Module) -> None:
    """
    Args:
        first: of rows of one mesh each.
    """
    device, dtype = options.device, common.DTYPES[options.dtype]
    network.to(device).train()

    def by_our_names(gradients: Gradients) -> torch.Tensor:
        return flat_gradients(convert_weights(gradients, oracle.config.num_attention_heads)[1])

    tested = Rows(oracle.input_ids, mesh_labels(oracle.input_ids)).to(device)
    found = by_our_names(gradients_of(network, lambda: original_loss(network, tested)))
    require_close("gradients", found, oracle.gradients, oracle.gradients_error(computes_in(torch.float32, device)))
    allowed = oracle.gradients_error(computes_in(dtype, device))
    useful = 1.0 if options.mesh_faces is None else (options.mesh_faces + 1) / (options.faces + 1)
    # As its training script does; what dynamo cannot trace then runs as it is.
    with torch._dynamo.config.patch(suppress_errors=True):
        add_figures(
            row,
            options,
            network,
            original_loss,
            first.rows,
            lambda found: first.require(by_our_names(found), allowed),
            useful,
        )


@ends_in_words("bench_train")
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_model_options(parser)
    parser.add_argument("--step", nargs="+", default=["eager"], choices=STEPS, help="one or several, each measured")
    parser.add_argument("--mesh_faces", type=int, help="mean faces of the meshes that rows are packed with")
    parser.add_argument("--optim", default="adamw_torch", choices=OPTIMIZERS, help="of our steps")
    parser.add_argument(
        "--cuda_graphs", action=argparse.BooleanOptionalAction, default=True, help="make our steps CUDA graphs"
    )
    parser.add_argument("--activation_memory_budget", type=float, default=1.0, help="as of training/train.py")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the clock starts")
    parser.add_argument("--profile", action="store_true", help="show what the kernels of a step take, on a GPU")
    options = common.parse_options(parser, PRESETS, arguments)
    if options.profile and options.device.type != "cuda":
        parser.error("--profile needs a GPU")
    device, packed = options.device, options.mesh_faces is not None
    if packed and not 1 <= options.mesh_faces <= options.faces:
        parser.error(f"--mesh_faces must be from 1 to --faces ({options.faces}), got {options.mesh_faces}")
    try:
        models = draw_models(common.build_config(options), options.seed, options.reference, device)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    oracle = Oracle(models.config, models.weights, options.seed)
    tested = draw_tested(oracle, packed, options.seed)

    rows: list[Row] = []
    for batch in options.batch_size:
        first = FirstStep(draw_rows(models.config, batch, options.faces, options.mesh_faces, options.seed).to(device))
        of_one_mesh = first
        if packed:
            of_one_mesh = FirstStep(draw_rows(models.config, batch, options.faces, None, options.seed).to(device))
        sizes = {"dtype": options.dtype, "batch_size": batch, "row_tokens": first.rows.input_ids.shape[1]}
        for step in options.step:
            for attention in options.attn_implementation:
                for linear_attention in options.linear_attn_implementation:
                    row = {"model": f"iflame_hf, {attention}, {linear_attention}", "step": step, **sizes}
                    with common.reported(row, rows, device):
                        ours(row, options, oracle, tested, first, attention, linear_attention)
            if models.original is not None and step != "blocks":
                row = {"model": "original", "step": step, **sizes}
                with common.reported(row, rows, device):
                    theirs(row, options, oracle, of_one_mesh, models.original())
    return common.report("train", options, rows, COLUMNS, NOTES + models.packages)


if __name__ == "__main__":
    sys.exit(main())

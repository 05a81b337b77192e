"""
Speed of attention by itself, forwards and with its backward pass, at the lengths of the three levels.

    python benchmarks/bench_attention.py [--batch_size 8] [--items 6921 2307 769] [--faces 205] [--full varlen flex]

With --faces every row is packed with meshes of so many faces on average. Every variant is tested first, on as many
rows of up to 600 items, against the recurrence and spelled-out attention, and has no figures if it fails.
"""

import argparse
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, this module must find its siblings

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import common
from benchmarks.common import Row, gibibytes, measure
from benchmarks.oracle import require_close
from iflame_hf.implementations_iflame import IMPLEMENTATIONS
from iflame_hf.layout_iflame import RowLayout
from iflame_hf.levels_iflame import block_mask
from iflame_hf.ops_iflame import alibi_slopes
from training.run.ending import ends_in_words

# B batch, T items, H heads, D head size

CALLS = 10  # between two looks at the clock
MOST_TESTED_ITEMS = 600
ALLOWED = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
ALLOWED_TF32 = 5e-3  # what the packages multiply float32 as
COLUMNS = {
    "kind": "attention",
    "implementation": "implementation",
    "dtype": "dtype",
    "batch_size": "rows",
    "items": "items",
    "meshes": "meshes",
    "heads": "heads",
    "head_dim": "head size",
    "forward_ms": "forward ms",
    "step_ms": "and backward ms",
    "gigabytes_per_second": "GB/s",
    "memory_gib": "GiB",
}
NOTES = """\
Forward, and forward with backward, a call; each the median of measurements of ten calls, measured twice.
With --cuda_graphs they are the GPU's time alone.
GB/s: what must be read and written at least (4 tensors forwards, 7 more backwards) over the second time.
"""

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def layout_of(rows: int, items: int, faces: int | None, device: torch.device, seed: int) -> RowLayout | None:
    """The layout of meshes of half to one and a half times 9 x `faces` items; None: one mesh a row."""
    if faces is None:
        return None
    random = torch.Generator().manual_seed(seed)
    begins = torch.zeros(rows, items, dtype=torch.bool)
    for row in begins:
        lengths = 9 * torch.randint(max(1, faces // 2), 3 * faces // 2 + 1, (items,), generator=random)
        places = lengths.cumsum(dim=0)
        row[places[places < items]] = True
    return RowLayout.of_begins(begins, items, (1,)).to(device)


def linear(name: str, heads: int, layout: RowLayout | None, device: torch.device) -> Attention:
    """An implementation of linear attention on (B, T, H, D)."""
    slopes, function = alibi_slopes(heads, device), IMPLEMENTATIONS[name].function
    bounds = None if layout is None else layout.bounds()
    return lambda q, k, v: function(q, k, v, slopes, None, bounds, False)[0]


def full(name: str, layout: RowLayout | None) -> Attention:
    """
    An implementation of causal softmax attention on (B, T, H, D): a backend of torch's scaled_dot_product_attention by
    name, its FlexAttention, or its attention of lengths laid end to end.

    Raises:
        ValueError: it knows no packed rows.
    """
    if name == "varlen":
        return _varlen(None if layout is None else layout.bounds())
    if name == "flex":
        return _flex(layout)
    if layout is not None:
        raise ValueError(f"{name} knows no packed rows: varlen and flex do")
    backend = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}[name]

    def attend(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(
                1, 2
            )

    return attend


def _varlen(bounds):
    from torch.nn.attention.varlen import varlen_attn

    is_causal = {"window_size": (-1, 0)}
    if "is_causal" in inspect.signature(varlen_attn).parameters:  # in earlier versions of torch
        is_causal = {"is_causal": True}

    def attend(q, k, v):
        rows, items = q.shape[:2]
        offsets, longest = None if bounds is None else bounds.offsets, items
        if bounds is None:
            offsets = torch.arange(0, rows * items + 1, items, dtype=torch.int32, device=q.device)
        else:
            longest = bounds.longest
        flat = (x.flatten(0, 1) for x in (q, k, v))
        return varlen_attn(*flat, offsets, offsets, longest, longest, **is_causal).view_as(q)

    return attend


def _flex(layout):
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    masks = []

    def attend(q, k, v):
        if not masks:
            masks.append(block_mask(None if layout is None else layout.positions(), 0, q.shape[1], q.device))
        return compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=masks[0]).transpose(1, 2)

    return attend


def spelled_out(layout: RowLayout | None) -> Attention:
    """Causal softmax attention, all pairs in float64."""

    def attend(q, k, v):
        q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
        allowed = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
        if layout is not None:
            meshes = layout.bounds().meshes
            allowed = allowed & (meshes[:, None, :, None] == meshes[:, None, None, :])
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2)

    return attend


def draw(rows: int, items: int, options: argparse.Namespace) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output."""
    random = torch.Generator(options.device).manual_seed(options.seed)
    shape = (rows, items, options.heads, options.head_dim)
    dtype = common.DTYPES[options.dtype]
    return [torch.randn(shape, generator=random, device=options.device).to(dtype) for _ in range(4)]


def gradients(attention: Attention, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    *leaves, grad = inputs
    leaves = [x.detach().requires_grad_() for x in leaves]
    output = attention(*leaves)
    return [output, *torch.autograd.grad(output, leaves, grad.to(output.dtype))]


def test(kind: str, name: str, rows: int, items: int, options: argparse.Namespace) -> None:
    """Raises WrongResult unless outputs and gradients on short rows are right."""
    items = min(items, MOST_TESTED_ITEMS)
    layout = layout_of(rows, items, options.faces and min(options.faces, 15), options.device, options.seed)
    inputs = draw(rows, items, options)
    if kind == "linear":
        tested, plain = (linear(each, options.heads, layout, options.device) for each in (name, "eager"))
    else:
        tested, plain = full(name, layout), spelled_out(layout)
    allowed = ALLOWED[common.DTYPES[options.dtype]]
    if options.dtype == "float32" and name in ("fla", "lightning_attn"):
        allowed = ALLOWED_TF32
    names = ("output", "gradient of q", "gradient of k", "gradient of v")
    for what, value, expected in zip(names, gradients(tested, inputs), gradients(plain, inputs), strict=True):
        require_close(what, value, expected, allowed)


def add_figures(row: Row, kind: str, name: str, options: argparse.Namespace) -> None:
    test(kind, name, row["batch_size"], row["items"], options)
    layout = layout_of(row["batch_size"], row["items"], options.faces, options.device, options.seed)
    make = linear(name, options.heads, layout, options.device) if kind == "linear" else full(name, layout)
    row["meshes"] = row["batch_size"] if layout is None else layout.num_meshes
    inputs = draw(row["batch_size"], row["items"], options)

    def forward():
        with torch.no_grad():
            for _ in range(CALLS):
                make(*inputs[:3])

    def step():
        for _ in range(CALLS):
            gradients(make, inputs)

    for function, column in ((forward, "forward_ms"), (step, "step_ms")):
        function()
        run = captured(function) if options.cuda_graphs else function
        seconds, memory = measure(run, options.device, options.repeats)
        row[column] = [1000 * each / CALLS for each in seconds]
    row["gigabytes_per_second"] = [11 * inputs[0].nbytes / 1e6 / each for each in row["step_ms"]]
    row["memory_gib"] = gibibytes(memory)


def captured(function: Callable[[], None]) -> Callable[[], None]:
    """The same as a CUDA graph: what the GPU takes, without the host."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        function()
    return graph.replay


@ends_in_words("bench_attention")
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", type=common.find_device, default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=common.DTYPES, default="bfloat16" if cuda else "float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, nargs="+", default=[8])
    parser.add_argument("--items", type=int, nargs="+", default=[6921, 2307, 769] if cuda else [279])
    parser.add_argument("--faces", type=int, help="mean faces of the meshes that a row is packed with; else one mesh")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head_dim", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    ours = ["triton", "chunked"] if cuda else ["chunked"]
    parser.add_argument("--linear", nargs="*", default=ours, choices=[*IMPLEMENTATIONS])
    backends = ["flash", "cudnn", "math", "varlen", "flex"]
    parser.add_argument("--full", nargs="*", default=[], choices=backends)
    parser.add_argument("--cuda_graphs", action="store_true", help="leave out what a call costs the host")
    options = parser.parse_args(arguments)
    if options.cuda_graphs and options.device.type != "cuda":
        parser.error("--cuda_graphs needs a GPU")
    rows: list[Row] = []
    for number in options.batch_size:
        for items in options.items:
            for kind, names in (("linear", options.linear), ("full", options.full)):
                for name in names:
                    row = {
                        **{"kind": kind, "implementation": name, "dtype": options.dtype, "batch_size": number},
                        **{"items": items, "heads": options.heads, "head_dim": options.head_dim},
                    }
                    with common.reported(row, rows, options.device, "step_ms", "ms"):
                        add_figures(row, kind, name, options)
    return common.report("attention", options, rows, COLUMNS, NOTES)


if __name__ == "__main__":
    sys.exit(main())

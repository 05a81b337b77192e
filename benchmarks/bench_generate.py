"""
Speed of generate() and of prefill, of this model and, given a folder of its code, of the original.

    python benchmarks/bench_generate.py [--preset published] [--batch_size 1 64] [--reference DIR] [--twin]

Every variant is tested against the recurrence and spelled-out attention in float32 first, and has no figures if it
fails. --twin adds transformers' own Llama of the same width, depth and vocabulary, whose tokens are tested against one
pass over them without a cache.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, this module must find its siblings

import torch
from torch import nn

from benchmarks import common
from benchmarks.common import Row, gibibytes, measure
from benchmarks.models import build_model, build_twin, draw_models, mesh_tokens
from benchmarks.oracle import Oracle, WrongResult, computes_in, require_close, require_likely
from benchmarks.reference import original_generate, original_logits, original_prefill
from iflame_hf import IFlameConfig, IFlameForCausalLM, engine_iflame
from iflame_hf.format_iflame import known_format
from iflame_hf.threads_iflame import spare_a_core
from training.run.ending import ends_in_words

TOKENS_PER_FACE = known_format().tokens_per_face

# B batch, T tokens

PRESETS = {
    "published": {"batch_size": [1, 64], "faces": 20, "prompt_faces": 200, "repeats": 1},
    "demo": {"batch_size": [1, 8], "faces": 6, "prompt_faces": 20, "repeats": 1},
}
# How our own rows are generated: the decode engine, and transformers' own loop.
LOOPS = {"engine": {}, "plain loop": {"cache_implementation": "dynamic"}}
TWIN_CACHES = ("dynamic", "static")
# Bytes a second of the memory of a GPU, by a part of its name: what its maker says.
BANDWIDTHS = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.04e12}
COLUMNS = {
    "model": "model",
    "parameters": "parameters",
    "dtype": "dtype",
    "batch_size": "rows",
    "new_tokens": "new tokens",
    "tokens_per_second": "tokens/s",
    "faces_per_second": "faces/s",
    "seconds_a_mesh": "s a batch",
    "milliseconds_per_step": "ms/step",
    "phases": "phases",
    "microseconds_a_phase": "us/phase",
    "gigabytes_per_second": "GB/s",
    "share_of_floor": "of floor",
    "last_to_first": "last/first",
    "first_seconds": "first call s",
    "prefill_tokens": "prompt",
    "seconds_prefill": "prefill s",
    "memory_gib": "GiB",
    "state_gib": "state GiB",
    "weights_gib": "weights GiB",
}
NOTES = """\
generate() from the start face to a number of faces, so that all take as many steps; tokens/s counts all rows.
GB/s: weights and states that a step must read and write, by formula; of floor: that over the memory's bandwidth.
Prefill is one pass over a prompt into an empty cache. Two figures are two measurements. Memory is the GPU's peak.
State: what the engine keeps of its rows, cache included; weights: its packed copy. Last/first: what the last 100 faces
take, over what the first 100 take.
"""
# Relative error of logits that keys and values in int8 may make.
INT8_ERROR = 0.01
# Tokens that are generated for the test, and single steps after a prefill that ends inside a face.
TEST_NEW_TOKENS, TEST_STEPS = 4 * TOKENS_PER_FACE, 31


def generate(
    model: IFlameForCausalLM,
    prompt: torch.Tensor,
    new_tokens: int,
    sample: bool = False,
    loop: str = "engine",
    grammar: bool = False,
    kv_cache_dtype: str | None = None,
    streamer: Any = None,
) -> torch.Tensor:
    choice = (common.SAMPLING if sample else {"do_sample": False}) | LOOPS[loop]
    choice |= {"kv_cache_dtype": kv_cache_dtype, "streamer": streamer}
    if grammar:
        choice["min_faces"] = choice["max_faces"] = new_tokens // TOKENS_PER_FACE
    return model.generate(prompt, max_new_tokens=new_tokens, eos_token_id=None, mesh_grammar=grammar, **choice)


class FaceClock:
    """A streamer that notes when each face has come."""

    def __init__(self) -> None:
        self.at: list[float] = []
        self._tokens = 0

    def put(self, value: torch.Tensor) -> None:
        if self._tokens % TOKENS_PER_FACE == 0:
            self.at.append(time.perf_counter())
        self._tokens += 1

    def end(self) -> None:
        pass

    def last_to_first(self, faces: int = 100, begin: int = 5) -> float:
        """Seconds of the last faces over those of the first ones, without the few at the beginning."""
        return (self.at[-1] - self.at[-1 - faces]) / (self.at[begin + faces] - self.at[begin])


def step_bytes(model: IFlameForCausalLM, rows: int, new_tokens: int, kv_cache_dtype: str | None = None) -> float:
    """
    Bytes that a step must move on average: each weight once for all rows, and for each row its states of linear
    attention (read and written, float32) and its keys and values so far.
    """
    config, size = model.config, model.lm_head.weight.element_size()
    item = size if kv_cache_dtype is None else 1 + 2 / config.head_dim
    total = model.lm_head.weight.numel() * size
    for layer, level, kind in zip(model.model.layers, config.layer_levels(), config.layer_types, strict=True):
        stride = config.level_strides[level]
        weights = sum(parameter.numel() for parameter in layer.parameters()) * size
        if kind == "full_attention":
            state = 2 * config.hidden_size * item * (new_tokens / 2 / stride)
        else:
            state = 2 * 4 * config.hidden_size * config.head_dim
        total += (weights + rows * state) / stride
    return total


@torch.no_grad()
def check_ours(
    model: IFlameForCausalLM, oracle: Oracle, allowed: float, loop: str, kv_cache_dtype: str | None = None
) -> None:
    """Raises WrongResult unless one pass, a prefill with steps after it, and generate() agree with the oracle."""
    input_ids = oracle.input_ids.to(model.device)
    require_close("logits in one pass", model(input_ids, use_cache=False).logits, oracle.logits, allowed)
    first = input_ids.shape[1] - TEST_STEPS
    output = model(input_ids[:, :first], use_cache=True)
    pieces = [output.logits]
    for token in input_ids[:, first:].split(1, dim=1):
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
        pieces.append(output.logits)
    require_close("logits of prefill and steps", torch.cat(pieces, dim=1), oracle.logits, allowed)
    prompt = input_ids[:, :TOKENS_PER_FACE]
    tokens = generate(model, prompt, TEST_NEW_TOKENS, loop=loop, kv_cache_dtype=kv_cache_dtype)
    oracle.require_greedy(tokens, TOKENS_PER_FACE, allowed if kv_cache_dtype is None else 2 * max(allowed, INT8_ERROR))


@torch.no_grad()
def check_original(network: nn.Module, oracle: Oracle, device: torch.device) -> None:
    """Raises WrongResult unless the original's logits in float32, and its greedy tokens, agree with the oracle."""
    input_ids = oracle.input_ids.to(device)
    allowed = oracle.logits_error(computes_in(torch.float32, device))
    require_close("logits in one pass", original_logits(network, input_ids), oracle.logits, allowed)
    tokens = original_generate(network, input_ids[:, :TOKENS_PER_FACE], TEST_NEW_TOKENS, device)
    oracle.require_greedy(tokens, TOKENS_PER_FACE, oracle.logits_error(torch.float16))


def add_figures(
    row: Row,
    options: argparse.Namespace,
    config: IFlameConfig,
    generate_tokens: Callable[[torch.Tensor, int], torch.Tensor],
    prefill: Callable[[torch.Tensor], torch.Tensor],
    fixed_length: bool = False,
) -> None:
    """
    Measures, and writes the figures into the row.

    Args:
        generate_tokens: of a prompt (B, T) and a number of new tokens, the (B, T + new tokens) tokens.
        prefill: of a prompt (B, T), anything.
        fixed_length: memory is made, and code compiled, for sequences of one length: the first call is as long.
    """
    batch, new_tokens = row["batch_size"], options.new_tokens
    start = torch.full((batch, TOKENS_PER_FACE), config.bos_token_id, device=options.device)
    began = time.perf_counter()
    generate_tokens(start, new_tokens if fixed_length else min(options.warmup_tokens, new_tokens))
    row["first_seconds"] = [time.perf_counter() - began]
    shapes = set()
    seconds, memory = measure(
        lambda: shapes.add(tuple(generate_tokens(start, new_tokens).shape)), options.device, options.repeats
    )
    if shapes != {(batch, TOKENS_PER_FACE + new_tokens)}:
        raise WrongResult(
            f"generate() returned tokens of the shape {shapes}, not {new_tokens} new ones for {batch} rows"
        )
    row["tokens_per_second"] = [batch * new_tokens / each for each in seconds]
    row["milliseconds_per_step"] = [1000 * each / new_tokens for each in seconds]
    row["faces_per_second"] = [each / TOKENS_PER_FACE for each in row["tokens_per_second"]]
    row["seconds_a_mesh"] = seconds
    row["memory_gib"] = gibibytes(memory)
    prompt = mesh_tokens(config, batch, options.prompt_faces, options.seed).to(options.device)
    row["prefill_tokens"] = prompt.shape[1]
    prefill(prompt)
    row["seconds_prefill"], _ = measure(lambda: prefill(prompt), options.device, options.repeats)


def ours(
    row: Row, options: argparse.Namespace, oracle: Oracle, loop: str, attention: str, linear_attention: str
) -> None:
    kv_cache_dtype = options.kv_cache_dtype if loop == "engine" else None
    dtype = common.DTYPES[options.dtype]
    model = build_model(oracle.config, oracle.weights, options.device, dtype, attention, linear_attention)
    row["parameters"] = count_parameters(model)
    check_ours(
        model, oracle, oracle.logits_error(computes_in(dtype, options.device, linear_attention)), loop, kv_cache_dtype
    )

    @torch.no_grad()
    def prefill(prompt: torch.Tensor) -> torch.Tensor:
        return model(prompt, use_cache=True, logits_to_keep=1).logits

    def generate_tokens(prompt: torch.Tensor, new_tokens: int, streamer: Any = None) -> torch.Tensor:
        grammar = new_tokens % TOKENS_PER_FACE == 0
        return generate(model, prompt, new_tokens, options.do_sample, loop, grammar, kv_cache_dtype, streamer)

    add_figures(row, options, oracle.config, generate_tokens, prefill, fixed_length=loop == "engine")
    if loop == "engine" and options.new_tokens >= 300 * TOKENS_PER_FACE:
        clock = FaceClock()
        start = torch.full((row["batch_size"], TOKENS_PER_FACE), oracle.config.bos_token_id, device=options.device)
        generate_tokens(start, options.new_tokens, clock)
        row["last_to_first"] = clock.last_to_first()
    steps = [each / 1000 for each in row["milliseconds_per_step"]]
    moved = step_bytes(model, row["batch_size"], row["new_tokens"], kv_cache_dtype)
    row["gigabytes_per_second"] = [moved / each / 1e9 for each in steps]
    if options.device.type == "cuda":
        name = torch.cuda.get_device_name(options.device)
        bandwidth = next((value for part, value in BANDWIDTHS.items() if part in name), None)
        if bandwidth is not None:
            row["share_of_floor"] = [moved / each / bandwidth for each in steps]
    for engine in engine_iflame._idle.pop(model, [])[:1] if loop == "engine" else []:
        row["state_gib"], row["weights_gib"] = map(gibibytes, common.engine_memory(engine))
        if engine.is_gpu:
            row["phases"] = [engine.phases]
            row["microseconds_a_phase"] = [1e6 * each / engine.phases for each in steps]


def theirs(row: Row, options: argparse.Namespace, oracle: Oracle, network: nn.Module) -> None:
    network.to(options.device)
    row["parameters"] = count_parameters(network)
    check_original(network, oracle, options.device)

    def prefill(prompt: torch.Tensor) -> torch.Tensor:
        return original_prefill(network, prompt)

    def generate_tokens(prompt: torch.Tensor, new_tokens: int) -> torch.Tensor:
        return original_generate(network, prompt, new_tokens, options.device, options.do_sample)

    add_figures(row, options, oracle.config, generate_tokens, prefill)


@torch.no_grad()
def twin(row: Row, options: argparse.Namespace, oracle: Oracle, cache: str) -> None:
    dtype, config = common.DTYPES[options.dtype], oracle.config
    room = TOKENS_PER_FACE * (1 + options.prompt_faces) + options.new_tokens
    model = build_twin(config, room, options.seed, options.device, dtype)
    row["parameters"] = count_parameters(model)
    made = {}

    def prefill(prompt: torch.Tensor) -> torch.Tensor:
        return model(prompt, use_cache=True, logits_to_keep=1).logits

    def generate_tokens(prompt: torch.Tensor, new_tokens: int) -> torch.Tensor:
        choice = common.SAMPLING if options.do_sample else {"do_sample": False}
        made["tokens"] = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            eos_token_id=None,
            pad_token_id=config.pad_token_id,
            cache_implementation=cache,
            **choice,
        )
        return made["tokens"]

    add_figures(row, options, config, generate_tokens, prefill, fixed_length=cache == "static")
    row["compiled"] = getattr(model, "_compiled_call", None) is not None
    tokens = made["tokens"][:2]
    logits = model(tokens[:, :-1], use_cache=False).logits[:, TOKENS_PER_FACE - 1 :].float()
    likeliest = common.SAMPLING["top_k"] if options.do_sample else 1
    require_likely("its tokens", tokens[:, TOKENS_PER_FACE:], logits, oracle.logits_error(dtype), likeliest)


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@ends_in_words("bench_generate")
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_model_options(parser)
    parser.add_argument("--new_tokens", type=int, help="by default the tokens of --faces")
    parser.add_argument("--prompt_faces", type=int, help="faces of the prompt that prefill is measured with")
    parser.add_argument(
        "--warmup_tokens", type=int, default=2 * TOKENS_PER_FACE, help="generated before the clock starts"
    )
    parser.add_argument(
        "--do_sample", action="store_true", help="sample with top_k 50 and top_p 0.95, instead of greedy"
    )
    parser.add_argument("--kv_cache_dtype", choices=["int8"], help="of the engine's keys and values")
    parser.add_argument("--loop", nargs="+", choices=LOOPS, default=list(LOOPS), help="how our rows are generated")
    parser.add_argument(
        "--twin", action="store_true", help="measure transformers' Llama of the same width, depth and vocabulary, too"
    )
    options = common.parse_options(parser, PRESETS, arguments)
    if options.new_tokens is None:
        options.new_tokens = options.faces * TOKENS_PER_FACE
    device = options.device
    try:
        models = draw_models(common.build_config(options), options.seed, options.reference, device)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    oracle = Oracle(models.config, models.weights, options.seed)

    rows = []
    with spare_a_core(device):  # as generate() does: for the original code and in the report, too
        for batch in options.batch_size:
            sizes = {"batch_size": batch, "new_tokens": options.new_tokens}
            for attention in options.attn_implementation:
                for linear_attention in options.linear_attn_implementation:
                    for loop in options.loop:
                        name = f"iflame_hf, {attention}, {linear_attention}" + f", {loop}" * (loop != "engine")
                        if loop == "engine" and options.kv_cache_dtype is not None:
                            name += f", keys and values in {options.kv_cache_dtype}"
                        row = {"model": name, "dtype": options.dtype, **sizes}
                        with common.reported(row, rows, device):
                            ours(row, options, oracle, loop, attention, linear_attention)
            if models.original is not None:
                # Its own sampling computes in half precision on a GPU, with weights in float32.
                row = {
                    "model": "original",
                    "dtype": "float16 autocast" if device.type == "cuda" else "float32",
                    **sizes,
                }
                with common.reported(row, rows, device):
                    theirs(row, options, oracle, models.original())
            for cache in TWIN_CACHES if options.twin else ():
                # transformers compiles a step on a static cache by itself, but not on a CPU.
                name = f"Llama, {cache} cache" + ", not compiled" * (cache == "static" and device.type == "cpu")
                row = {"model": name, "dtype": options.dtype, **sizes}
                with common.reported(row, rows, device):
                    twin(row, options, oracle, cache)
        return common.report("generate", options, rows, COLUMNS, NOTES + models.packages)


if __name__ == "__main__":
    sys.exit(main())

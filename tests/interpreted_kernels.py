"""What test_kernels.py runs in a process of Triton's interpreter."""

from functools import partial

import numpy as np
import torch
from quick_interpreter import make_quick
from served_checks import serve
from small_models import mesh_rows, small_model
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from iflame_hf import StaticIFlameCache
from iflame_hf.choosing_iflame import (
    COLUMNS,
    EXPECTED,
    FACES,
    LOWEST,
    Choice,
    KernelChooser,
    Places,
    RowsBegin,
    Settings,
)
from iflame_hf.closing_iflame import NO_EDGE, edge_keys
from iflame_hf.host_choosing_iflame import HostChooser
from iflame_hf.packing_iflame import pack_weights
from iflame_hf.steps_iflame import KernelSteps, Product, Tiles

FEW = Tiles(False, Product(8), Product(32), Product(8), Product(8), 2, (2, 2, 2), 2, 2)
MANY = Tiles(True, *[Product(16, rows=16, inner=16)] * 4, 1, (1, 1, 1), 4)
PROMPT = 23  # of 36 ids: there is every place of a face, and a face that is begun anew


@torch.inference_mode()
def step(rows, tiles, kv_cache_dtype=None):
    """Tokens after a prompt that ends inside a face, through kernels and network, give the same logits."""
    model = small_model(hidden_size=16, heads=2)
    ids = mesh_rows(int(rows), faces=3)
    caches = [StaticIFlameCache(model.config, 5, int(rows), kv_cache_dtype=kv_cache_dtype) for _ in range(2)]
    for cache in caches:
        model(ids[:, :PROMPT], cache=cache, use_cache=True)
    steps = KernelSteps(
        model.config, pack_weights(model, torch.float32), caches[0], False, FEW if tiles == "few" else MANY
    )
    steps.logits.fill_(torch.nan)
    steps.begin()
    for place in range(PROMPT, ids.shape[1]):
        steps.tokens.copy_(ids[:, place])
        steps.places.put(caches[0].positions, model.config.level_strides)
        steps.step(place % 9)
        caches[0].positions += 1
        expected = model(ids[:, place : place + 1], cache=caches[1], use_cache=True).logits[:, 0]
        torch.testing.assert_close(steps.logits, expected, atol=1e-4, rtol=1e-4)
    return "as it should be"


def choosers(rows, numbers, begin, settings):
    places = Places(rows, [9, 3, 1], torch.rand(9, 4), torch.rand(9, 4))
    positions = [torch.full((rows,), 9), torch.full((rows,), 9)]
    kernel = KernelChooser(rows, numbers, 132, 9, places, positions[0], False)
    host = HostChooser(rows, numbers, 132, 9, positions[1])
    for chooser in (kernel, host):
        chooser.set(settings)
        chooser.begin(torch.arange(rows), begin)
    return kernel, host


def fresh(rows, numbers, seen=None, limits=(0, 100)):
    state = np.zeros((rows, COLUMNS), dtype=np.int64)
    state[:, [LOWEST, EXPECTED, EXPECTED + 1, EXPECTED + 2]] = -1
    uniforms = np.random.default_rng(0).random((rows, numbers))
    seen = np.zeros((rows, 132), dtype=bool) if seen is None else seen
    return RowsBegin(state, np.tile(limits, (rows, 1)), uniforms, seen, np.zeros((rows, 0), dtype=np.int64))


def choice():
    """The kernel and its twin choose what transformers' processors and the same random numbers choose."""
    rows, random = 8, torch.Generator().manual_seed(0)
    for settings in (
        Settings(),
        Settings(temperature=0.6, top_k=5),
        Settings(temperature=1.4, top_p=0.6),
        Settings(min_p=0.2),
        Settings(0.9, 40, 0.9, 0.05, 1.3, guidance_scale=2.5),
        Settings(0.9, 40, 0.9, 0.05, 1.3),
    ):
        logits = 2 * torch.randn(rows, 132, generator=random)
        ids = torch.randint(0, 132, (rows, 20), generator=random)
        seen = np.zeros((rows, 132), dtype=bool)
        np.put_along_axis(seen, ids.numpy(), True, axis=1)
        begin = fresh(rows, 4, seen)
        scores = logits.clone()
        if settings.guidance_scale != 1:
            scores = scores.log_softmax(dim=-1)
            # as transformers' UnbatchedClassifierFreeGuidanceLogitsProcessor
            scores = settings.guidance_scale * (scores[::2] - scores[1::2]) + scores[1::2]
            scores = scores.repeat_interleave(2, dim=0)
        if settings.repetition_penalty != 1:
            scores = RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)(ids, scores)
        best = scores.argmax(dim=-1)
        scores = TemperatureLogitsWarper(settings.temperature)(ids, scores)
        if settings.top_k:
            scores = TopKLogitsWarper(settings.top_k)(ids, scores)
        if settings.top_p < 1:
            scores = TopPLogitsWarper(settings.top_p)(ids, scores)
        if settings.min_p:
            scores = MinPLogitsWarper(settings.min_p)(ids, scores)
        reached = scores.double().softmax(dim=-1).cumsum(dim=-1)
        sampled = (reached <= torch.from_numpy(begin.uniforms[:, :1]) * reached[:, -1:]).sum(dim=-1)
        for sample, expected in ((True, sampled), (False, best)):
            penalty, guided = settings.repetition_penalty != 1, settings.guidance_scale != 1
            how = Choice(sample, settings != Settings(), penalty, False, 129, 131, guided)
            for chooser in choosers(rows, 4, begin, settings):
                tokens = torch.zeros(rows, dtype=torch.long)
                chooser.choose(how, logits, tokens, 4, True)
                assert torch.equal(tokens, expected), (settings, sample, type(chooser).__name__)
                assert (chooser.positions == 10).all()
    logits[3, 7], logits[5, 9], logits[6] = torch.nan, torch.inf, -torch.inf
    for chooser in choosers(rows, 4, begin, settings):
        chooser.choose(how, logits, tokens, 4, True)
        assert np.flatnonzero(np.asarray(chooser.face)[:, -1]).tolist() == [3, 5, 6]
    return "as it should be"


def grammar(ordered=True):
    """The kernel and its twin make the same faces of the same scores, until all have ended."""
    rows, faces = 12, 5
    begin = fresh(rows, 9 * faces + 9, limits=(1, faces - 1))
    how = Choice(True, False, False, True, 129, 131, ordered=ordered)
    both = choosers(rows, 9 * faces + 9, begin, Settings())
    random = torch.Generator().manual_seed(1)
    tokens = [torch.zeros(rows, dtype=torch.long) for _ in both]
    ended, back = 0, 0
    for place in range(9 * faces):
        logits = torch.randn(rows, 132, generator=random)
        logits[:, 100:129] += 2
        logits[:, 131] += 2
        before = both[1].state.copy()
        for chooser, chosen in zip(both, tokens, strict=True):
            chooser.choose(how, logits, chosen, place % 9, True)
        assert torch.equal(*tokens), place
        assert np.array_equal(np.asarray(both[0].face), both[1].face)
        now, last = both[1].state[:, :3].tolist(), before[:, :3].tolist()
        back += sum(one < other for one, other in zip(now, last, strict=True))
        ended = int((tokens[0] == 131).sum())
    assert ended == rows and (back == 0) == ordered
    assert np.array_equal(np.asarray(both[0].state)[:, [0, 1, 2, 6, 7]], both[1].state[:, [0, 1, 2, 6, 7]])
    assert 1 < len(set(both[1].state[:, 6].tolist()))
    return "as it should be"


def closing():
    """The kernel and its twin close the same edges, also such as lie in later blocks than the first."""
    rows, faces, before = 6, 14, 400
    begin = fresh(rows, 9 * (faces + before), limits=(0, 10000))
    random = torch.Generator().manual_seed(2)
    # Faces of four coordinates, whose edges will be met again, on both sides of the first 1,024 places.
    vertices = np.random.default_rng(2).integers(0, 4, (rows, before, 3, 3)) @ (129 ** np.arange(3))
    begin = begin._replace(edges=edge_keys(vertices, 129**3).reshape(rows, -1))
    begin.state[:, FACES] = before
    how = Choice(True, False, False, True, 129, 131, closing=True)
    both = choosers(rows, 9 * (faces + before), begin, Settings(closing_strength=6.0))
    tokens = [torch.zeros(rows, dtype=torch.long) for _ in both]
    closed, expected = 0, np.zeros(3)
    for place in range(9 * faces):
        logits = torch.randn(rows, 132, generator=random)
        logits[:, :4] += 8
        for chooser, chosen in zip(both, tokens, strict=True):
            chooser.choose(how, logits, chosen, place % 9, True)
        assert torch.equal(*tokens), place
        if place % 9 == 8:
            assert np.array_equal(np.asarray(both[0].state), both[1].state)
            width = 3 * both[1].state[:, FACES].max()
            assert np.array_equal(np.asarray(both[0].edges)[:, :width], both[1].edges[:, :width])
            expected += (both[1].state[:, EXPECTED:] >= 0).sum(axis=0)
            closed = (both[1].edges[:, 1024 : 3 * before] == NO_EDGE).sum()
    assert closed and expected[0] > 3 * rows and expected.all()
    return "as it should be"


if __name__ == "__main__":
    make_quick()
    serve(
        {
            "step": step,
            "choice": choice,
            "grammar": grammar,
            "order": partial(grammar, ordered=False),
            "closing": closing,
        }
    )

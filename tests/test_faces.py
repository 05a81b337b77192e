"""Faces as they are generated, and meshes that are completed from a part."""

import itertools
import threading

import numpy as np
import pytest
import torch
import trimesh
from small_models import BOS, EOS, PAD, mesh_rows, small_model
from transformers.generation import StoppingCriteria, StoppingCriteriaList

from iflame_hf import FaceStreamer, IFlameTokenizer, stream_faces

FACES = 12


@pytest.fixture(scope="module")
def model():
    """It ends a mesh now and then, and seldom says pad or bos, as a trained one."""
    model = small_model()
    with torch.no_grad():
        model.lm_head.bias[[PAD, BOS]] -= 20
        model.lm_head.bias[EOS] -= 2
    return model


def sample(model, seed, *args, **options):
    torch.manual_seed(seed)
    return model.generate(*args, **{"do_sample": True, "max_new_tokens": 9 * FACES, "mesh_grammar": False, **options})


def corners(mesh):
    return np.asarray(mesh.vertices)[np.asarray(mesh.faces)]


def faces_of(model, tokenizer, seed, prompt=None, **options):
    torch.manual_seed(seed)
    faces = stream_faces(
        model, tokenizer, prompt, **{"do_sample": True, "max_new_tokens": 9 * FACES, "mesh_grammar": False, **options}
    )
    return np.array(list(faces)).reshape(-1, 3, 3)


def feed(streamer, prompt, ids):
    """What generate() does: the prompt, then one token at a time."""
    streamer.put(torch.tensor([prompt]))
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    return np.array(list(streamer)).reshape(-1, 3, 3)


@pytest.mark.parametrize("options", [{}, {"up_axis": "z"}, {"reversed_winding": True}], ids=str)
def test_faces_that_come_are_those_of_decode_mesh_bit_for_bit(model, options):
    tokenizer = IFlameTokenizer(**options)
    counts = []
    for seed in range(4):
        expected = corners(tokenizer.decode_mesh(sample(model, seed)[0]))
        found = faces_of(model, tokenizer, seed)
        assert found.dtype == np.float64 and np.array_equal(found, expected)
        counts.append(len(found))
    assert max(counts) > 3 and len(set(counts)) > 1


def test_the_streamer_works_with_generate_in_a_thread_as_transformers_own(model):
    tokenizer = IFlameTokenizer()
    streamer = FaceStreamer(tokenizer, timeout=60)
    for seed in (1, 2):  # twice: it can be used again
        expected = corners(tokenizer.decode_mesh(sample(model, seed)[0]))
        thread = threading.Thread(target=sample, args=(model, seed), kwargs={"streamer": streamer})
        thread.start()
        found = np.array(list(streamer)).reshape(-1, 3, 3)
        thread.join()
        assert len(found) > 0 and np.array_equal(found, expected)
        assert np.array_equal(corners(streamer.mesh), expected)


def test_the_first_face_arrives_before_the_generation_ends(model):
    """The generation cannot go on after its second face until the first one has been read."""
    was_read, lengths = threading.Event(), []

    class WaitForTheReader(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            lengths.append(input_ids.shape[1])
            if input_ids.shape[1] == 9 + 18:
                assert was_read.wait(60), "the first face was never read"
            return torch.zeros(1, dtype=torch.bool)

    faces = stream_faces(
        model,
        IFlameTokenizer(),
        mesh_rows(1, 0),
        max_new_tokens=9 * FACES,
        eos_token_id=None,
        timeout=60,
        stopping_criteria=StoppingCriteriaList([WaitForTheReader()]),
    )
    assert next(faces).shape == (3, 3)
    assert lengths[-1] <= 9 + 18
    was_read.set()
    assert len(list(faces)) > 0
    assert lengths[-1] == 9 + 9 * FACES


def test_a_prompts_faces_come_first_or_are_left_out_by_choice(model):
    tokenizer = IFlameTokenizer()
    prompt = tokenizer.encode_mesh(trimesh.creation.icosphere(subdivisions=1), add_end=False)[: 9 * 6]
    expected = corners(tokenizer.decode_mesh(sample(model, 3, torch.tensor([prompt]), eos_token_id=None)[0]))
    for given in (prompt, torch.tensor(prompt), torch.tensor([prompt])):
        assert np.array_equal(faces_of(model, tokenizer, 3, given, eos_token_id=None), expected)
    assert len(expected) > 5
    rest = faces_of(model, tokenizer, 3, prompt, eos_token_id=None, skip_prompt=True)
    assert np.array_equal(rest, expected[5:])


def test_a_mesh_can_be_the_prompt(model):
    tokenizer = IFlameTokenizer()
    tetrahedron = ([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], [[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
    found = faces_of(model, tokenizer, 0, tetrahedron)
    ids = tokenizer.encode_mesh(tetrahedron, add_end=False)
    assert np.array_equal(found[:4], corners(tokenizer.decode_mesh(ids)))
    assert np.array_equal(found, corners(tokenizer.decode_mesh(sample(model, 0, torch.tensor([ids]))[0])))


TAILS = {
    "an end": [EOS] * 9,
    "an end within a face": [1, 2, 3, EOS, 5, 6, 7, 8, 9] + [7, 8, 9, 1, 2, 3, 4, 5, 6],
    "padding": [PAD] * 3 + [7, 8, 9, 1, 2, 3, 4, 5, 6],
    "a start": [BOS, 7, 8, 9, 1, 2, 3, 4, 5, 6],
    "half a face": [7, 8, 9, 1],
    "nothing": [],
}


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS.keys())
@pytest.mark.parametrize("prompt", [[PAD] * 9 + [BOS] * 9, [BOS] * 9, [BOS] * 9 + [1, 2, 3, 40], [7]], ids=len)
def test_what_a_model_may_say_ends_the_faces_as_it_ends_decode_mesh(prompt, tail):
    tokenizer = IFlameTokenizer()
    repeated, degenerate = [1, 2, 3, 4, 5, 6, 7, 8, 9], [5, 5, 5, 5, 5, 5, 6, 6, 6]
    ids = repeated + [9, 9, 9, 1, 1, 1, 5, 5, 5] + degenerate + repeated[3:] + repeated[:3] + repeated[::-1] + tail
    expected = corners(tokenizer.decode_mesh(prompt + ids))
    streamer = FaceStreamer(tokenizer)
    assert np.array_equal(feed(streamer, prompt, ids), expected)
    assert len(expected) >= 3
    assert np.array_equal(corners(streamer.mesh), expected)


def test_the_mesh_so_far_grows(model):
    streamer = FaceStreamer(IFlameTokenizer())
    assert len(streamer.mesh.faces) == 0
    row = mesh_rows(1, 4)
    streamer.put(row[:, :9])
    sizes = []
    for token in row[0, 9:]:
        streamer.put(token[None])
        sizes.append(len(streamer.mesh.faces))
    assert sizes == [count // 9 for count in range(1, 37)]


def test_more_than_one_mesh_is_a_clear_error_for_reader_and_generator(model):
    tokenizer = IFlameTokenizer()
    for options in ({"num_return_sequences": 2}, {"num_beams": 2}):
        with pytest.raises(ValueError, match="one mesh at a time"):
            stream_faces(model, tokenizer, **options)
    with pytest.raises(ValueError, match="a prompt is one mesh"):
        stream_faces(model, tokenizer, mesh_rows(2, 1))
    streamer = FaceStreamer(tokenizer)
    with pytest.raises(ValueError, match="follows one mesh, got 3"):
        sample(model, 0, num_return_sequences=3, streamer=streamer)
    with pytest.raises(ValueError, match="follows one mesh, got 3"):
        next(streamer)


def test_errors_of_the_generating_thread_reach_the_reader(model):
    tokenizer = IFlameTokenizer()
    before = threading.active_count()
    with pytest.raises(ValueError, match="temperature"):
        list(stream_faces(model, tokenizer, do_sample=True, temperature=-1.0))

    class Broken(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if input_ids.shape[1] > 40:
                raise KeyError("the disk fell off")
            return torch.zeros(1, dtype=torch.bool)

    found = []
    with pytest.raises(KeyError, match="the disk fell off"):
        for face in stream_faces(model, tokenizer, eos_token_id=None, stopping_criteria=[Broken()]):
            found.append(face)
    assert len(found) == 3, "the faces before the error are handed over"
    assert threading.active_count() == before


def test_a_reader_that_waits_too_long_is_told_so():
    with pytest.raises(TimeoutError, match="no face came within 0.05 seconds"):
        next(FaceStreamer(IFlameTokenizer(), timeout=0.05))


def test_leaving_early_stops_the_generation(model):
    lengths = []

    class Watch(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            lengths.append(input_ids.shape[1])
            return torch.zeros(1, dtype=torch.bool)

    before = threading.active_count()
    faces = stream_faces(
        model, IFlameTokenizer(), max_new_tokens=9 * 500, eos_token_id=None, stopping_criteria=[Watch()]
    )
    assert len(list(itertools.islice(faces, 2))) == 2
    faces.close()
    assert threading.active_count() == before
    assert lengths[-1] < 9 * 400


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"streamer": object()}, "leave out streamer"),
        ({"prompt": [BOS], "input_ids": torch.tensor([[BOS]])}, "either prompt or input_ids"),
        ({"prompt": []}, "a prompt is one mesh"),
        ({"prompt": [0.5]}, "a prompt is one mesh"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_has_no_faces_to_come_is_refused_at_once(model, options, reason):
    with pytest.raises(ValueError, match=reason):
        stream_faces(model, IFlameTokenizer(), **options)

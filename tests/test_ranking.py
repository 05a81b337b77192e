"""The best of several meshes: what it is judged by, and that its seed makes it again."""

import json

import numpy as np
import pytest
import torch
import trimesh
from mesh_fixtures import solids
from scipy.stats import rankdata
from small_models import BOS, EOS, PAD, ending_model, mesh_rows, small_model
from transformers import StoppingCriteria, pipeline

from iflame_cli.command_line import main
from iflame_hf import GeneratedMesh, IFlameTokenizer, generate_meshes
from iflame_hf.ranking_iflame import _faces, _ranks, best, boundary_share, generate_best, log_probabilities
from training import generate
from training.metrics import topology

N = 3


@pytest.fixture(scope="module")
def model():
    """In float64; its meshes end early, or are cut off."""
    return ending_model(2)


@pytest.fixture(scope="module")
def generator(model):
    return pipeline("mesh-generation", model=model, tokenizer=IFlameTokenizer(), device="cpu")


def mean_of(model, ids, given):
    """Of one sequence by itself, token by token."""
    ids = ids[: int((ids == EOS).int().argmax()) + 1] if (ids == EOS).any() else ids
    with torch.no_grad():
        logits = model(ids[None]).logits[0].double()
    return float(np.mean([logits[t - 1].log_softmax(0)[ids[t]] for t in range(given, len(ids))]))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("max_tokens", [1, 200, 10_000])
def test_a_mean_of_packed_rows_is_that_of_a_pass_over_the_mesh_alone(max_tokens, implementation):
    network = small_model(attn_implementation=implementation)
    ids = [mesh_rows(1, faces, seed=faces, end=faces % 2 == 0)[0] for faces in (4, 11, 3, 8, 30, 2)]
    ids.append(ids[1][:-5])  # cut off inside a face
    for given in (None, 18):
        expected = [mean_of(network, each, given or 9) for each in ids]
        found = log_probabilities(network, ids, max_tokens, given)
        assert np.abs(found - expected).max() < 1e-5
    assert len({round(value, 3) for value in found}) == len(ids)


def test_a_row_is_as_long_as_asked_for_or_one_mesh(model):
    lengths = []
    hook = model.register_forward_pre_hook(
        lambda _, __, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        log_probabilities(model, [mesh_rows(1, faces)[0] for faces in (1, 2, 9, 3, 1)], 60)
    finally:
        hook.remove()
    assert lengths == [45, 90, 54]
    with pytest.raises(ValueError, match="18 tokens has none after the 18 that were given"):
        log_probabilities(model, [mesh_rows(1, 1)[0]], given=18)


def test_the_share_of_boundary_edges_is_that_of_the_metrics(model):
    tokenizer = IFlameTokenizer()
    shapes = [(solid.vertices, solid.faces[:cut]) for solid in solids().values() for cut in (None, 1, 9, -3)]
    # Three faces on one edge, which then is no boundary.
    shapes.append((np.eye(5, 3) + [0, 0, 1], np.array([[0, 1, 2], [1, 0, 3], [0, 1, 4]])))
    shares = set()
    for shape in shapes:
        ids = np.asarray(tokenizer.encode_mesh(shape))
        mesh = tokenizer.decode_mesh(ids)
        share = boundary_share(_faces(ids, tokenizer.format))
        assert share == pytest.approx(topology(mesh.vertices, mesh.faces).boundary_edges)
        shares.add(round(share, 3))
    assert len(shares) > 6 and {0.0, 1.0} <= shares
    assert boundary_share(np.zeros((0, 3), dtype=int)) == 0


def test_ranks_are_those_of_scipy():
    values = np.array([0.5, -1.0, 0.5, 3.0, 0.0, 0.5, 3.0])
    assert _ranks(values).tolist() == rankdata(values).tolist()


def test_ended_meshes_come_first_then_both_ranks_decide(monkeypatch, model):
    tokenizer = IFlameTokenizer()
    box = tokenizer.encode_mesh(trimesh.creation.box())
    no_face, closed, half, one = box[:9] + box[-9:], box, box[: 9 * 7] + box[-9:], box[: 9 * 2] + box[-9:]

    def chosen(*candidates):
        """Of triples: ids, whether it ended, nats."""
        by_length = {len(ids): nats for ids, _, nats in candidates}
        monkeypatch.setattr(
            "iflame_hf.ranking_iflame.log_probabilities",
            lambda model, ids, given, conditions: np.array([by_length[len(each)] for each in ids]),
        )
        meshes = [
            GeneratedMesh(place, place, torch.tensor(ids), ended) for place, (ids, ended, _) in enumerate(candidates)
        ]
        return best(model, meshes, 9).number

    assert chosen((closed, False, -0.1), (one, True, -9.0)) == 1, "ended"
    assert chosen((no_face, True, -0.1), (one, False, -9.0)) == 1, "a face"
    assert chosen((one, True, -2.0), (closed, True, -1.0)) == 1, "better by both"
    assert chosen((closed, True, -2.0), (one, True, -1.0)) == 1, "a tie goes to the likelier"
    # Ranks by nats 2, 1, 3 and by edges 1, 3, 2.
    assert chosen((closed, True, -2.0), (one, True, -1.0), (half, True, -3.0)) == 0


def test_each_mesh_is_the_best_of_its_own_seeds_and_its_seed_makes_it_again(model, generator):
    options = {"num_meshes": 4, "max_faces": 12}
    chosen = generator(best_of=N, seed=5, batch_size=4, **options)
    drawn = {mesh.seed: mesh for mesh in generate_meshes(model, range(5 * N, 9 * N), max_faces=12, top_k=0)}
    for number, mesh in enumerate(chosen):
        own = [drawn[(5 + number) * N + place] for place in range(N)]
        assert mesh.metadata["seed"] == best(model, own, 9).seed
        (again,) = generator(max_faces=12, seed=mesh.metadata["seed"])
        assert again.metadata == mesh.metadata and np.array_equal(again.triangles, mesh.triangles)
    places = {mesh.metadata["seed"] % N for mesh in chosen}
    assert len(places) > 1, "not always the same candidate"
    assert sum(mesh.metadata["ended"] for mesh in chosen) >= sum(
        mesh.metadata["ended"] for mesh in generator(seed=5, **options)
    )
    one = generator(best_of=1, seed=5, **options)
    assert [mesh.metadata["seed"] for mesh in one] == [5, 6, 7, 8]
    alone = generator(best_of=N, seed=[7], max_faces=12)[0]
    assert alone.metadata == chosen[2].metadata and np.array_equal(alone.triangles, chosen[2].triangles)


def test_completions_are_judged_by_what_was_added(generator, monkeypatch):
    tokenizer = generator.tokenizer
    part = tokenizer.decode_mesh(tokenizer.encode_mesh(trimesh.creation.box())[: 9 * 4])
    given = []
    source = log_probabilities
    monkeypatch.setattr(
        "iflame_hf.ranking_iflame.log_probabilities",
        lambda model, ids, **options: given.append(options["given"]) or source(model, ids, **options),
    )
    meshes = generator([part, part], num_meshes=2, max_faces=9, best_of=N, seed=0, room_above=1.0)
    assert [len(each) for each in meshes] == [2, 2] and set(given) == {9 * 4}
    seeds = [mesh.metadata["seed"] // N for each in meshes for mesh in each]
    assert seeds == [0, 1, 2, 3]


def test_what_a_criterion_stops_is_chosen_from_as_far_as_it_came(model):
    class Stop(StoppingCriteria):
        looks_once_a_face = True
        left = 3

        def __call__(self, input_ids, scores, **kwargs):
            self.left -= 1
            return torch.tensor(self.left < 0)

    meshes = list(generate_best(model, [0, 1, 2], N, rows=4, max_faces=50, stopping_criteria=[Stop()]))
    assert meshes and len({mesh.number for mesh in meshes}) == len(meshes) <= 3
    assert all(mesh.seed // N == mesh.number for mesh in meshes)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"best_of": 0}, "best_of must be a whole number from 1 on, got 0"),
        ({"best_of": 2, "do_sample": False}, "best_of=2 draws meshes at random and keeps the best: leave out"),
        ({"best_of": 2, "num_beams": 2}, "leave out do_sample=False and num_beams"),
    ],
)
def test_what_cannot_be_is_refused_in_plain_words(generator, options, reason):
    with pytest.raises(ValueError, match=reason):
        generator.as_finished(max_faces=3, **options)


def test_faces_that_come_are_of_one_mesh(generator):
    with pytest.raises(ValueError, match="before it is known which mesh will be the best: leave out best_of"):
        generator.stream(max_faces=3, best_of=2)
    assert list(generator.stream(max_faces=3, best_of=1, seed=0))


def test_the_command_and_the_script_choose_the_meshes_of_the_pipeline(tmp_path, capsys):
    model = small_model()
    with torch.no_grad():
        model.lm_head.bias[[PAD, BOS]] -= 20
        model.lm_head.bias[EOS] += 1
    for each in (model, IFlameTokenizer()):
        each.save_pretrained(tmp_path / "model")
    generator = pipeline("mesh-generation", model=model, tokenizer=IFlameTokenizer(), device="cpu")
    expected = [mesh.metadata["seed"] for mesh in generator(num_meshes=3, max_faces=6, best_of=N, seed=2)]
    options = "--max-faces 6 --num 3 --seed 2 --best-of 3 --device cpu".split()
    assert main(["generate", str(tmp_path / "model"), "--out", str(tmp_path / "a"), *options]) == 0
    record = json.loads((tmp_path / "a" / "meshes.json").read_text())
    assert record["best_of"] == N and [entry["seed"] for entry in record["meshes"]] == expected
    options = ["--use_cpu", f"--model={tmp_path / 'model'}", f"--out={tmp_path / 'b'}", "--max_faces=6", "--num=3"]
    assert generate.main([*options, "--seed=2", f"--best_of={N}"]) == 0
    lines = (tmp_path / "b" / "meshes.jsonl").read_text().splitlines()
    assert [json.loads(line)["seed"] for line in lines] == expected
    assert generate.main([*options, "--seed=2"]) == 1
    assert f"made with --best_of {N} (now 1)" in capsys.readouterr().err
    # A folder that was begun before the option was there.
    settings = json.loads((tmp_path / "b" / "generate.json").read_text())
    (tmp_path / "b" / "generate.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "best_of"}))
    assert generate.main([*options, "--seed=2"]) == 0

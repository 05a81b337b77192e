"""Vertices that training rows show wrongly: how many, which ones, and what is still to be predicted."""

import numpy as np
import pytest
import torch
from small_models import BOS, EOS, PAD, mesh_rows

from iflame_hf import IFlameTokenizer
from training.arguments import parse_arguments
from training.rows.noise import VertexNoise
from training.rows.pack import pack, row_inputs

TOKENIZER = IFlameTokenizer()


def rows(seed=0, faces=300):
    """Three rows, each of two meshes and padding."""
    meshes = mesh_rows(6, faces, seed=seed, end=True).numpy()
    return row_inputs(pack([meshes[:2], meshes[2:4], meshes[4:]], 9 * (2 * faces + 8), TOKENIZER), TOKENIZER)


def noisy(share, seed=1, **options):
    batch, clean = rows(**options), rows(**options)
    VertexNoise(share, seed, 129)(batch)
    return batch, clean


def vertices(tokens):
    return tokens.reshape(-1, 3)


def test_a_share_of_the_vertices_is_wrong_and_nothing_else():
    batch, clean = noisy(0.1)
    changed = (vertices(batch["input_ids"]) != vertices(clean["input_ids"])).any(dim=1)
    is_coordinate = (vertices(clean["input_ids"]) < 129).all(dim=1)
    assert 0.08 < changed[is_coordinate].float().mean() < 0.105 and not changed[~is_coordinate].any()
    assert (batch["input_ids"][clean["input_ids"] >= 129] == clean["input_ids"][clean["input_ids"] >= 129]).all()
    assert set(torch.unique(batch["input_ids"]).tolist()) <= {*range(129), PAD, BOS, EOS}
    assert torch.equal(batch["layout"].face_meshes, clean["layout"].face_meshes)


def test_half_of_them_are_moved_and_half_are_others_of_the_mesh():
    batch, clean = noisy(0.1)
    found, true = (vertices(each["input_ids"]).numpy() for each in (batch, clean))
    places = np.flatnonzero((found != true).any(axis=1))
    meshes = clean["layout"].face_meshes.flatten().numpy().repeat(3)
    moved = 0
    for place in places:
        steps = np.abs(found[place] - true[place])
        if (steps > 0).sum() == 1 and steps.max() <= 4:
            moved += 1
            continue
        before = slice(max(0, place - 64), place)
        same = (true[before] == found[place]).all(axis=1) & (meshes[before] == meshes[place])
        assert same.any(), place
    assert 0.4 < moved / len(places) < 0.65


def test_what_follows_is_still_to_be_predicted():
    batch, clean = noisy(0.1)
    wrong = (vertices(batch["input_ids"]) != vertices(clean["input_ids"])).any(dim=1)
    labels, true = vertices(batch["labels"]), vertices(clean["labels"])
    assert torch.equal(labels[:, 0], true[:, 0])
    ignored = (labels == -100) & (true != -100)
    assert not ignored[:, 0].any() and ignored[wrong][:, 1:].all()
    assert torch.equal(labels[~ignored], true[~ignored])
    # A vertex that is another occurrence of itself by chance may be left out too, but that is rare.
    assert ignored[~wrong].any(dim=1).float().mean() < 0.001


def test_it_depends_on_the_seed_and_the_rows_alone():
    first, again, other = noisy(0.05)[0], noisy(0.05)[0], noisy(0.05, seed=2)[0]
    assert torch.equal(first["input_ids"], again["input_ids"])
    assert not torch.equal(first["input_ids"], other["input_ids"])
    assert not torch.equal(first["input_ids"][0], first["input_ids"][1])


def test_none_changes_nothing():
    batch, clean = noisy(0.0)
    assert torch.equal(batch["input_ids"], clean["input_ids"]) and torch.equal(batch["labels"], clean["labels"])
    (found,) = VertexNoise(0.0, 1, 129).of([(batch, [0, 1])])
    assert found[0] is batch and found[1] == [0, 1]


@pytest.mark.parametrize("share", ["-0.1", "1"])
def test_a_share_that_cannot_be_is_refused(share, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--vertex_noise", share])
    assert "vertex_noise must be at least 0 and less than 1" in capsys.readouterr().err

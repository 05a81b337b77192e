"""The mean of models: right by torch's own, whole or not there, and refused for models that have none."""

import pytest
import torch
from small_models import small_model
from torch.optim.swa_utils import AveragedModel

from iflame_hf import IFlameForCausalLM, IFlameTokenizer
from training.average_models import average_models, main


def saved(folder, seed=0, dtype=torch.float32, up_axis="y", **options):
    model = small_model(seed=seed, **options).to(dtype)
    model.generation_config.update(do_sample=True, top_p=0.5 + seed / 10)
    model.save_pretrained(folder)
    IFlameTokenizer(up_axis=up_axis).save_pretrained(folder)
    return model


def test_the_mean_is_that_of_torch(tmp_path):
    models = [saved(tmp_path / str(seed), seed) for seed in range(3)]
    average_models([str(tmp_path / str(seed)) for seed in range(3)], tmp_path / "mean")
    expected = AveragedModel(models[0])
    for model in models:
        expected.update_parameters(model)
    mean = IFlameForCausalLM.from_pretrained(tmp_path / "mean")
    for (name, value), (_, wanted) in zip(mean.named_parameters(), expected.module.named_parameters(), strict=True):
        torch.testing.assert_close(value, wanted, msg=name)
    assert mean.generation_config.top_p == 0.5  # of the first
    assert IFlameTokenizer.from_pretrained(tmp_path / "mean").up_axis == "y"


def test_shares_and_the_dtype_of_the_first(tmp_path):
    first = saved(tmp_path / "a", 0, torch.bfloat16, categories=["chair", "table"])
    second = saved(tmp_path / "b", 1, categories=["chair", "table"])
    words = [str(tmp_path / "a"), str(tmp_path / "b"), "--weights", "0.25", "0.75", "--out", str(tmp_path / "mean")]
    assert main(words) == 0
    assert torch.is_grad_enabled()  # as before, for whoever calls it
    mean = IFlameForCausalLM.from_pretrained(tmp_path / "mean", dtype="auto")
    assert mean.dtype == torch.bfloat16
    for name, value in mean.state_dict().items():
        a, b = first.state_dict()[name].double(), second.state_dict()[name].double()
        torch.testing.assert_close(value.double(), 0.25 * a + 0.75 * b, rtol=2**-8, atol=1e-6, msg=name)


def test_a_mean_with_itself_is_the_model(tmp_path):
    model = saved(tmp_path / "a", 3)
    average_models([str(tmp_path / "a")] * 2, tmp_path / "mean")
    mean = IFlameForCausalLM.from_pretrained(tmp_path / "mean")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in mean.state_dict().items())


@pytest.mark.parametrize("own, words", [
    ({"hidden_size": 16}, "hidden_size are 32 and 16"),
    ({"stage_layers": (1, 1, 1, 2, 1)}, "stage_layers are"),
    ({"categories": ["table", "chair"]}, "categories are"),
    ({"num_faces_range": [4, 100]}, "num_faces_range are"),
    ({"up_axis": "z"}, "up_axis are y and z"),
])  # fmt: skip
def test_models_that_mean_something_else_have_none(tmp_path, capsys, own, words):
    saved(tmp_path / "a")
    saved(tmp_path / "b", **own)
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "mean")]) == 1
    said = capsys.readouterr().err
    assert words in said and str(tmp_path / "b") in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]  # nothing half done is left


@pytest.mark.parametrize("words, said", [
    (["a"], "two models at least"),
    (["a", "a", "--weights", "1"], "2 models and 1 weights"),
    (["a", "a", "--weights", "0.5", "0.6"], "make 1 together"),
    (["a", "a", "--weights", "1.5", "-0.5"], "make 1 together"),
    (["a", "missing"], "missing"),
])  # fmt: skip
def test_what_is_asked_for_wrongly(tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "a")
    words = [f"./{word}" if word in ("a", "missing") else word for word in words]
    assert main([*words, "--out", "mean"]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "mean").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path, capsys):
    saved(tmp_path / "a")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir() if path.is_file()}
    assert main([str(tmp_path / "a")] * 2 + ["--out", str(tmp_path / "a")]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir() if path.is_file()} == before

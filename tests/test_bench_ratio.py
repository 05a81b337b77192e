"""The benchmark of the parts of iFlame: every variant is timed, sampled and trained, and says what it is."""

import json

import pytest
import torch
from prepared_fixtures import write_rows

from benchmarks import bench_ratio
from iflame_hf import IFlameCache, IFlameConfig
from iflame_hf.states_iflame import LayerState

SIZES = (
    "--device cpu --hidden_size 32 --num_attention_heads 4 --stage_layers 1 1 2 1 1 --batch_size 2 --faces 12 "
    "--sample_rows 2 --sample_faces 3 --repeats 1 --warmup 1"
).split()


def run(capsys, *arguments):
    status = bench_ratio.main([*SIZES, *arguments])
    printed = capsys.readouterr()
    return status, json.loads(printed.out.rstrip("\n").splitlines()[-1])


def test_every_ratio_is_measured_with_the_hourglass_and_without(capsys):
    status, result = run(capsys, "--layers", "full only", "linear only", "--step", "eager")
    assert status == 0
    variants = [(row["layers"], row["shape"]) for row in result["rows"]]
    assert variants == [
        ("full only", "hourglass"),
        ("linear only", "hourglass"),
        ("full only", "flat"),
        ("linear only", "flat"),
    ]
    for row in result["rows"]:
        assert min(row["tokens_per_second"] + row["sample_tokens_per_second"]) > 0
        assert row["sampled_by"] == ("engine" if row["shape"] == "hourglass" else "transformers' loop")


@pytest.mark.parametrize("layers", ["full only", "1:1", "linear only"])
@pytest.mark.parametrize("stages", [[1, 1, 2, 1, 1], [6, 0, 0, 0, 0]])
def test_the_state_is_that_of_a_cache_which_has_seen_the_mesh(layers, stages):
    config = IFlameConfig(
        hidden_size=32,
        num_attention_heads=4,
        stage_layers=stages,
        full_attention_interval=bench_ratio.INTERVALS[layers],
    )
    model, rows, faces = bench_ratio.build_model(config, weights_of(config)), 3, 5
    cache = IFlameCache(config)
    with torch.no_grad():
        model(torch.zeros(rows, 9 * (faces + 1), dtype=torch.long), cache=cache, use_cache=True)
    held = sum(size_of(layer) for layer in cache.layers)
    assert bench_ratio.state_bytes(config, rows, faces, torch.float32) == held > 0


def weights_of(config):
    return bench_ratio.draw_models(config, 0, None, torch.device("cpu")).weights


def size_of(layer: LayerState) -> int:
    tensors = (getattr(layer, name, None) for name in ("keys", "values", "state"))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


@pytest.mark.parametrize("measured", [[], ["--measure", "loss"]])
def test_each_variant_is_trained_on_the_data_given_and_tells_its_loss(capsys, tmp_path, measured):
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    for split, count in (("train", 12), ("validation", 4)):
        write_rows(folder / f"{split}-00000.parquet", count, faces=10)
    status, result = run(
        capsys,
        *("--layers", "3:1", "--shape", "hourglass", "--data", str(tmp_path / "set"), "--out", str(tmp_path / "out")),
        *measured,
        *("--train_steps", "2", "--train_options", "--learning_rate", "0.001"),
    )
    (row,) = result["rows"]
    assert status == 0, row
    assert 1 < row["eval_loss"] < 6 and row["trained_tokens"] > 100 and row["row_tokens"] == 126
    assert ("tokens_per_second" in row) is ("sample_tokens_per_second" in row) is (not measured)
    assert (tmp_path / "out" / "3-to-1-hourglass" / "model.safetensors").exists()
    assert result["data"] == "set" and str(tmp_path) not in json.dumps(result)


def test_data_that_are_not_there_are_refused_before_anything_is_measured(capsys, tmp_path):
    data = ["--data", str(tmp_path)]
    for arguments in (data, [*data, "--out", str(tmp_path / "out")], ["--measure", "loss"]):
        with pytest.raises(SystemExit):
            bench_ratio.main([*SIZES, *arguments])
    printed = capsys.readouterr().err
    assert "has no data/validation-*.parquet" in printed and "--measure loss needs --data" in printed

"""The benchmark of several GPUs, with processes on a CPU: what it measures, compares, and says of what goes wrong."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from accelerate.commands.launch import launch_command_parser

from benchmarks import launching, scaling
from benchmarks.oracle import WrongResult
from benchmarks.scaling_figures import (
    add_ratio,
    differences,
    markdown,
    meshes_per_second,
    read_log,
    require_same_files,
    too_different,
    training_figures,
    training_speed,
)
from training.arguments import parse_arguments
from training.sampling.options import parse_options

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    "--device cpu --preset demo --hidden_size 32 --num_attention_heads 4 --stage_layers 1 1 2 1 1 --steps 6 "
    "--first_step 2 --compared_steps 3 --meshes 24 --mesh_rows 4"
).split()
TINY_DATA = "--train_options --procedural_max_faces 48 --num_procedural_meshes 40 --dataloader_num_workers 0".split()
SECONDS_A_STEP = 0.5


def result_of(out):
    return json.loads((out / "scaling.json").read_text())


def made_log(steps=8, loss=5.0, seconds=SECONDS_A_STEP, **values):
    """Lines as train.py writes them; the first two steps take a minute each."""
    minutes = [min(step, 2) + max(0, step - 2) * seconds / 60 for step in range(1, steps + 1)]
    return {
        step: {
            "step": step,
            "loss": loss / step,
            "grad_norm": 1.0,
            "labels": 10 * step,
            "minutes": minutes[step - 1],
            **values,
        }
        for step in range(1, steps + 1)
    }


# The whole


@pytest.mark.slow
def test_the_script_measures_one_process_and_two(tmp_path):
    out = tmp_path / "out"
    command = ["bash", "benchmarks/run_scaling.sh", "procedural", str(out), *TINY, *TINY_DATA]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "COUNTS": "1 2"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    result = result_of(out)
    one, together, several = result["train"]
    assert [row["gpus"] for row in result["train"]] == [1, 1, 2]
    assert several["name"] == "ddp" and several["goal"] == 0.92 and "tokens_per_second" not in together
    share = several["tokens_per_second"] / 2 / one["tokens_per_second"]
    assert several["ratio"] == pytest.approx(share) and several["reached"] == (share >= 0.92)
    assert several["losses"] < 1e-4 and several["first_loss"] < 1e-5 and several["first_norm"] < 1e-4
    assert [(row["gpus"], row["meshes"], row.get("same_files")) for row in result["generate"]] == [
        (1, 24, None),
        (2, 24, True),
    ]
    alone, both = result["generate"]
    assert both["ratio"] == pytest.approx(both["meshes_per_second"] / 2 / alone["meshes_per_second"])
    assert both["files"] == alone["files"] > 12
    table = (out / "scaling.md").read_text()
    assert table in run.stdout and str(tmp_path) not in table + json.dumps(result)
    lines = [line.split(" | ")[:2] for line in table.splitlines() if line.startswith("| ")]
    assert [line for line in lines if "---" not in line[1] and line[1] != "GPUs"] == [
        ["| one", "1"],
        ["| one, 2 batches a step, 3 steps", "1"],
        ["| ddp", "2"],
        ["| generate", "1"],
        ["| generate", "2"],
    ]
    names = {path.name for path in out.iterdir()}
    assert {"train-ddp-2-eager.jsonl", "train-ddp-2-eager.txt", "generate-2.txt"} < names
    assert not [name for name in names if "partial" in name or name.endswith((".glb", ".safetensors"))]


@pytest.mark.slow
def test_what_a_program_says_when_it_fails_stands_in_its_line(tmp_path, capsys):
    arguments = ["procedural", str(tmp_path), *TINY, "--counts", "1", "--measure", "train"]
    assert scaling.main([*arguments, "--train_options", "--learning_raet", "1"]) == 1
    (row,) = result_of(tmp_path)["train"]
    assert "exit status 2: training/train.py: error: no such option: --learning_raet" in row["wrong"]
    assert row["wrong"] in capsys.readouterr().out and row["wrong"] in (tmp_path / "scaling.md").read_text()


@pytest.fixture
def programs(monkeypatch):
    """In place of programs: what they would write, which a test changes by their name and number of processes."""
    changes = {}

    def run_program(command, said, limit):
        options = dict(zip(command, command[1:], strict=False))  # a word and the next one
        count = int(options.get("--nproc_per_node", 1))
        program = next(Path(word).stem for word in command if word.endswith((f"{os.sep}train.py", "generate.py")))
        change = changes.get((program, count), changes.get(program))
        said.write_text("")
        if isinstance(change, Exception):
            raise change
        out = Path(options["--output_dir" if program == "train" else "--out"])
        out.mkdir()
        if program == "train":
            log = made_log(int(options["--max_steps"]))
            if change:
                change(log)
            (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log.values()))
            return 1.0
        records = []
        for number in range(int(options["--num_meshes"])):
            path = out / f"mesh-{number:06d}.glb"
            path.write_bytes(change(number) if change else b"%d" % number)
            os.utime(path, ns=(0, 10**9 * (number + 1) // count))
            records.append({"number": number, "faces": 5, "file": path.name})
        (out / "meshes.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return 1.0

    monkeypatch.setattr(launching, "run_program", run_program)
    return changes


def measured(out, *options):
    status = scaling.main(["procedural", str(out), *TINY, *options])
    return status, result_of(out)


def test_nothing_is_wrong_where_several_do_the_same(tmp_path, programs):
    status, result = measured(tmp_path, "--counts", "4", "2")
    assert status == 0 and not any("wrong" in row for row in result["train"] + result["generate"])
    one, _, two, _, four = result["train"]
    assert [row["gpus"] for row in result["train"]] == [1, 1, 2, 1, 4]
    assert one["tokens_per_second"] == pytest.approx(2 * 450 / SECONDS_A_STEP)
    assert two["ratio"] == pytest.approx(1) and four["tokens_per_second"] == pytest.approx(
        4 * one["tokens_per_second"]
    )
    assert [row.get("ratio") for row in result["generate"]] == [None, pytest.approx(1), pytest.approx(1)]
    assert result["goals"] == {"ddp": 0.92, "fsdp2": 0.85, "generate": 0.95}


def test_a_mesh_that_two_processes_make_otherwise_is_told(tmp_path, programs):
    programs["generate", 2] = lambda number: b"%d" % (0 if number == 7 else number)
    status, result = measured(tmp_path, "--measure", "generate")
    one, two = result["generate"]
    assert status == 1 and "wrong" not in one and two["same_files"] is False
    assert two["wrong"] == "1 of 25 files are not those of one GPU: mesh-000007.glb"


def test_a_run_that_fails_is_told_and_the_others_are_measured(tmp_path, programs):
    programs["train", 2] = WrongResult("exit status 1: train: the disk is full")
    status, result = measured(tmp_path)
    assert status == 1
    assert [row.get("wrong") for row in result["train"]] == [None, None, "exit status 1: train: the disk is full"]
    assert all(row["meshes_per_second"] for row in result["generate"])
    programs.update({("train", 2): None, ("train", 1): OSError("gone"), ("generate", 1): OSError("gone")})
    status, result = measured(tmp_path)
    one, _, two = result["train"]
    assert status == 1 and one["wrong"] == "OSError: gone" and two["tokens_per_second"] and "ratio" not in two
    assert two["wrong"].startswith("not compared: there are no losses")
    assert result["generate"][1]["wrong"].startswith("not compared: there are no meshes")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda log: log[1].update(grad_norm=2.0), r"the gradient's norm in the first step by 1 \(at most 0\.0001\)$"),
        (lambda log: log[2].update(loss=2.6), r": the loss in the mean of 3 steps by 0\.013 \(at most 0\.0001\)$"),
        (lambda log: log[3].update(labels=29), "step 3 is learnt from other rows than one GPU's"),
        (lambda log: log.pop(5), "1 of 6 steps are not in the log, the first of them 5"),
    ],
)
def test_two_that_learn_otherwise_are_told(tmp_path, programs, change, reason):
    programs["train", 2] = change
    status, result = measured(tmp_path, "--measure", "train")
    assert status == 1
    pytest.raises(WrongResult, _raise, result["train"][-1]["wrong"]).match(reason)


def _raise(message):
    raise WrongResult(message)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--strategies", "fsdp2"], "Accelerate shards weights on GPUs only"),
        (["--counts", "8"], "--meshes 24 are too few for 8 processes with 4 rows"),
        (["--first_step", "6"], "--first_step must be from 1 to before --steps"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(tmp_path, capsys, options, reason):
    with pytest.raises(SystemExit):
        scaling.main(["procedural", str(tmp_path), *TINY, *options])
    assert reason in capsys.readouterr().err
    with pytest.raises(SystemExit):
        scaling.main([str(tmp_path), str(tmp_path), *TINY])
    assert "has no data/train-*.parquet" in capsys.readouterr().err


# Figures


def test_speed_is_that_of_the_steps_between_the_first_and_the_last_one(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [*made_log(12, memory_gib=7.5).values(), {"step": 12, "eval_loss": 1.0}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    log = read_log(path, 12)
    assert training_speed(log, 2, 12, 100) == pytest.approx(100 / SECONDS_A_STEP)
    assert training_speed(log, 1, 12, 100) == pytest.approx(1100 / (60 + 10 * SECONDS_A_STEP))
    figures = training_figures(log, 12)
    assert figures["memory_gib"] == 7.5
    assert figures["loss"] == pytest.approx(sum(5 / step for step in range(3, 13)) / 10)
    with pytest.raises(WrongResult, match="1 of 13 steps are not in the log, the first of them 13"):
        read_log(path, 13)
    with pytest.raises(WrongResult, match="13 of 13 steps"):
        read_log(tmp_path / "nowhere.jsonl", 13)


@pytest.mark.parametrize(("dtype", "largest"), [("bfloat16", 1e-2), ("float32", 1e-4)])
def test_losses_may_differ_by_rounding_alone(dtype, largest):
    for factor, is_told in ((0.9, False), (1.1, True)):
        other = made_log()
        for step in range(2, 9):
            other[step]["loss"] *= 1 + factor * largest * 8 / 7
        found = differences(other, made_log(), 8)
        assert found["losses"] == pytest.approx(factor * largest) and found["first_loss"] == 0
        assert bool(too_different(found, dtype, 8)) == is_told
    assert "first step by nan" in too_different({**found, "first_norm": float("nan")}, dtype, 8)


def test_each_gpus_share_is_of_what_one_does_alone():
    row = {"gpus": 4, "speed": 360.0}
    add_ratio(row, "speed", {"speed": 100.0}, "fsdp2")
    assert row["ratio"] == pytest.approx(0.9) and row["goal"] == 0.85 and row["reached"] is True
    add_ratio(row, "speed", {"speed": 100.0}, "ddp")
    assert row["reached"] is False
    columns = {"gpus": "GPUs", "ratio": "of one", "goal": "goal", "reached": "", "nothing": "nothing"}
    assert markdown([row], columns).splitlines() == [
        "| GPUs | of one | goal |  | nothing |",
        "| --- | --- | --- | --- | --- |",
        "| 4 | 90.0 % | 92 % | missed |  |",
    ]


def test_meshes_a_second_are_counted_by_their_faces_while_all_rows_are_full():
    steady = [(10.0 + number, 1 + number % 3) for number in range(90)]
    assert meshes_per_second([(9.0, 2)] * 4 + steady[::-1] + [(300.0, 2)] * 4, 4) == pytest.approx(1, rel=0.05)
    # The larger half of the meshes takes twice as long: the speed is the same.
    longer = [(10.0 + number, 10) for number in range(40)] + [(50.0 + 2 * number, 20) for number in range(40)]
    assert meshes_per_second(longer, 8) == pytest.approx(10 / 15, rel=0.05)
    for few in ([], [(1.0, 5)], [(1.0, 5)] * 8):
        with pytest.raises(WrongResult, match=f"{len(few)} meshes with faces are too few to measure"):
            meshes_per_second(few, 1)


def test_files_are_the_same_byte_for_byte():
    files = {"meshes.jsonl": b"{}", "mesh-0.glb": b"glTF"}
    require_same_files(dict(files), files)
    for other in ({**files, "mesh-0.glb": b"glTf"}, {"meshes.jsonl": b"{}"}, {**files, "mesh-1.glb": b""}):
        with pytest.raises(WrongResult, match=r"^1 of 2 files are not those of one GPU: mesh-[01]\.glb$"):
            require_same_files(other, files)


# Programs


@pytest.mark.parametrize(
    ("strategy", "count", "config"), [("ddp", 1, "one_gpu"), ("ddp", 2, "ddp"), ("fsdp2", 4, "fsdp2")]
)
def test_accelerate_and_the_programs_take_their_options(tmp_path, monkeypatch, strategy, count, config):
    commands = []

    def run_program(command, said, limit):
        commands.append(command)
        raise WrongResult("not run")

    monkeypatch.setattr(launching, "run_program", run_program)
    arguments = ["procedural", str(tmp_path), "--device", "cpu", "--dtype", "bfloat16", "--blocks", "compiled"]
    options = scaling.read_options(arguments)
    measurement = scaling.Measurement(options, tmp_path / "work")
    measurement.use_cpu = False  # as for GPUs
    row = {"name": strategy, "gpus": count, "blocks": "compiled"}
    with pytest.raises(WrongResult):
        measurement.train(row, strategy, options.steps)
    with pytest.raises(WrongResult):
        measurement.generate(row, "model")
    for command, script in zip(commands, ("train.py", "generate.py"), strict=True):
        assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
        launch = launch_command_parser().parse_args(command[3:])
        name = config if script == "train.py" else {1: "one_gpu"}.get(count, "ddp")
        assert launch.config_file == str(ROOT / "training" / "configs" / "accelerate" / f"{name}.yaml")
        assert launch.num_processes == count and launch.mixed_precision == "bf16"
        assert launch.training_script == str(ROOT / "training" / script)
        if script == "generate.py":
            assert parse_options(launch.training_script_args, "").num == 2000
            continue
        taken = parse_arguments(launch.training_script_args)
        train, data = taken.train, taken.data
        assert (train.bf16, train.torch_compile, train.use_cpu, train.cuda_graphs) == (True, True, False, True)
        assert (train.max_steps, train.logging_steps, train.per_device_train_batch_size) == (150, 1, 8)
        assert (data.row_length, data.long_meshes, taken.model.hidden_size) == (6921, "drop", 512)


def test_prepared_data_are_trained_on_wherever_programs_are_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = [tmp_path / "set" / "data" / f"train-0000{number}.parquet" for number in range(2)]
    files[0].parent.mkdir(parents=True)
    for file in files:
        file.touch()
    options = scaling.read_options(["set", "out", *TINY])
    words = scaling.Measurement(options, tmp_path).training_options("eager", 6, 1)
    assert parse_arguments(words).data.train_file == [str(file) for file in files]


def test_default_counts_are_the_powers_of_two_that_there_are(monkeypatch):
    for there, counts in ((1, [1]), (2, [1, 2]), (3, [1, 2]), (4, [1, 2, 4]), (8, [1, 2, 4, 8])):
        monkeypatch.setattr(torch.cuda, "device_count", lambda there=there: there)
        assert scaling.default_counts(torch.device("cuda")) == counts
    assert scaling.default_counts(torch.device("cpu")) == [1, 2]


def test_of_what_a_program_says_the_cause_is_told(tmp_path):
    said = tmp_path / "said.txt"
    texts = {
        "train: another process of the run has ended; it says why\ntrain: no file\nValueError: it\n": "train: no file",
        "[rank1]: torch.OutOfMemoryError: CUDA\nx.errors.ChildFailedError: y\nend\n": "torch.OutOfMemoryError: CUDA",
        "a\nkilled\n\n": "killed",
        "": "nothing",
    }
    for text, reason in texts.items():
        program = [sys.executable, "-c", f"import sys; sys.stdout.write({text!r}); sys.exit(3)"]
        with pytest.raises(WrongResult) as failed:
            launching.run_program(program, said, 60)
        assert str(failed.value) == f"exit status 3: {reason}"
    assert launching.run_program([sys.executable, "-c", "print('ended')"], said, 60) < 60
    assert said.read_text() == "ended\n"


def test_a_program_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(launching, "GRACE", 2)
    child = "import time; print('waiting', flush=True); time.sleep(600)"
    parent = (
        "import os, subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    began = time.monotonic()
    with pytest.raises(WrongResult, match="not at its end after 2 s; the last it said: waiting"):
        launching.run_program([sys.executable, "-c", parent], tmp_path / "said.txt", 2)
    assert time.monotonic() - began < 2 + launching.GRACE + 10
    pid = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE

"""Training started by launchers: Accelerate's configurations, several machines, and processes that go wrong."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from training_processes import ENVIRONMENT, SHARDED, SHARDED_BLOCKS, command_line, log_of, losses_of

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "training" / "configs" / "accelerate"
FAULTY = ROOT / "tests" / "faulty_rank.py"


def launched(name, *options):
    """The arguments and the environment of the processes that `accelerate launch` would start."""
    command = ["--config_file", str(CONFIGS / f"{name}.yaml"), *options, "training/train.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    if arguments.multi_gpu or arguments.use_fsdp:
        return arguments, prepare_multi_gpu_env(arguments)
    return arguments, prepare_simple_launcher_cmd_env(arguments)[1]


@pytest.fixture(autouse=True)
def environment_as_before(monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())


@pytest.mark.parametrize(("name", "processes"), [("one_gpu", 1), ("ddp", 2), ("fsdp2", 2), ("machines", 16)])
def test_accelerate_takes_every_setting_of_its_configurations(name, processes):
    arguments, environment = launched(name)
    assert arguments.num_processes == processes
    assert arguments.multi_gpu == (name in ("ddp", "machines")) and arguments.use_fsdp == (name == "fsdp2")
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    if name == "fsdp2":
        assert {key: environment[key] for key in SHARDED} == SHARDED
    known = {"compute_environment", "distributed_type", "fsdp_config"} | set(vars(arguments))
    assert set(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())) <= known


def test_the_commands_in_the_configurations_are_ones_that_accelerate_takes():
    found = 0
    for path in CONFIGS.glob("*.yaml"):
        for command in re.findall(r"#   accelerate launch (.*)", path.read_text()):
            words = command.replace("ADDRESS", "10.0.0.1").partition(" training/train.py")[0].split()
            assert words[:2] == ["--config_file", f"training/configs/accelerate/{path.name}"]
            launched(path.stem, *words[2:])
            found += 1
    assert found == 6


def test_a_larger_model_can_have_each_of_its_blocks_sharded_by_itself():
    command = re.search(
        r"#   accelerate launch (.*TRANSFORMER_BASED_WRAP.*) training", (CONFIGS / "fsdp2.yaml").read_text()
    )
    _, environment = launched("fsdp2", *command[1].split()[2:])
    assert {key: environment[key] for key in SHARDED_BLOCKS} == SHARDED_BLOCKS


def torchrun(script, arguments, processes=1, machine=None, port=None):
    """Starts what `accelerate launch` starts on machines without a GPU too."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    if machine is None:
        command += ["--standalone"]
    else:
        command += ["--nnodes=2", f"--node_rank={machine}", "--master_addr=127.0.0.1", f"--master_port={port}"]
    environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, str(script), *arguments],
        env=environment,
        stderr=subprocess.STDOUT,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_machines_train_together_and_leave_out_a_step_whose_loss_is_nan_on_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["nan", *command_line(tmp_path, max_steps=4, save_steps=4, num_procedural_validation_meshes=0)]
    machines = [torchrun(FAULTY, arguments, machine=machine, port=port) for machine in (0, 1)]
    outputs = [machine.communicate(timeout=120)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(outputs)
    if Path("/proc/self/task").exists():
        threads = [re.findall(r"^threads at the end: (.+)$", output, re.MULTILINE) for output in outputs]
        assert all(len(lines) == 1 and "python" in lines[0] and "gloo" not in lines[0] for lines in threads), threads
    assert re.search(
        r"step 2 is left out, its gradient is not finite; losses by process: \[\d\.\d+, nan\]", outputs[0]
    )
    losses = losses_of(tmp_path)
    assert sorted(losses) == [1, 3, 4] and all(loss < 6 for loss in losses.values())
    assert {"random_states_0.pkl", "random_states_1.pkl"} < set(os.listdir(tmp_path / "checkpoint-4"))


def test_an_error_in_one_process_ends_all_and_is_told(tmp_path):
    began = time.monotonic()
    run = torchrun(FAULTY, ["exception", *command_line(tmp_path, max_steps=1000, save_steps=0)], processes=2)
    output, _ = run.communicate(timeout=120)
    assert run.returncode != 0 and time.monotonic() - began < 60
    assert output.count("train: the disk of this machine is gone\n") == 1
    assert re.search(r"rank\s*: 1", output)
    assert len(log_of(tmp_path)) <= 1


@pytest.mark.parametrize(
    ("options", "status", "sentence"),
    [
        (["--train_file", "nowhere.parquet"], 1, r"^train: nowhere\.parquet cannot be read as a parquet file: .+$"),
        (["--max_steps", "0"], 2, r"^training/train\.py: error: there is nothing to train: .+$"),
    ],
)
def test_what_all_processes_refuse_is_said_once_and_without_a_traceback(tmp_path, options, status, sentence):
    run = torchrun(ROOT / "training" / "train.py", [f"--output_dir={tmp_path / 'run'}", "--use_cpu", *options], 2)
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 1
    assert len(re.findall(sentence, output, re.MULTILINE)) == 1, output
    assert 'training/train.py", line' not in output, "the launcher's own traceback has no line of ours"
    assert re.search(rf"exitcode\s*: {status}", output)
    assert not (tmp_path / "run").exists()

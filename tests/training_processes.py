"""Training runs as processes of their own, started from one that has imported everything once."""

import functools
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

from program_processes import Processes, environments_of_ranks, speak_into

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
# What `accelerate launch --config_file training/configs/accelerate/fsdp2.yaml` sets.
SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "false",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
# What it sets with the options for larger models: one block is whole at a time.
SHARDED_BLOCKS = {
    **SHARDED,
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
SMALL_RUN = {
    "use_cpu": True,
    "disable_tqdm": True,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "stage_layers": [1, 1, 1, 1, 1],
    "full_attention_interval": 2,
    "num_procedural_meshes": 24,
    "num_procedural_validation_meshes": 4,
    "procedural_max_faces": 48,
    "row_length": 450,
    "max_steps": 8,
    "logging_steps": 1,
    "save_steps": 4,
    "save_total_limit": 2,
    "num_samples": 0,
}


def command_line(output_dir: Path, **options) -> list[str]:
    arguments = [f"--output_dir={output_dir}"]
    for name, value in {**SMALL_RUN, **options}.items():
        if isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)]
        else:
            arguments.append(f"--{name}={value}")
    return arguments


def run_training(arguments: list[str], environment: dict[str, str], output: str, file_size: int | None) -> None:
    """In the new process: what `python training/train.py` does, with its messages in a file."""
    os.environ.update(environment)
    if "OWN_GROUP" in environment:  # as a shell or a scheduler starts programs
        os.setpgrp()
    if file_size is not None:  # what a full disk is to the programs that write
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    speak_into(output)
    import torch
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    from training.run import captured, learner
    from training.run.sharded import ShardedCapturedLearner
    from training.train import main

    if "ACCELERATE_USE_FSDP" in environment:  # Accelerate shards on GPUs only, though torch does on CPUs
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    if "AS_IN_GRAPHS" in environment:  # steps as on a GPU, but that they are run as they are
        captured.why_no_graph = lambda *_: None
        learner.AcceleratedLearner = None  # is not to be used
        initialise = functools.partialmethod(ShardedCapturedLearner.__init__, captures=False)
        ShardedCapturedLearner.__init__ = initialise

    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # loader workers need not import everything again
    sys.exit(main(arguments))


class Trainer(Processes):
    """Starts training processes."""

    def __init__(self, folder: Path):
        super().__init__(folder, "training.train")

    def start(
        self, output_dir: Path, environment: dict[str, str] | None = None, file_size: int | None = None, **options
    ):
        environment = {**ENVIRONMENT, **(environment or {})}
        arguments = command_line(output_dir, **options)
        return self.start_process(run_training, arguments, environment, str(self.messages), file_size)

    def run(self, output_dir: Path, **options) -> None:
        """A run that must come to its end."""
        self.finish(self.start(output_dir, **options))

    def start_ranks(self, output_dir: Path, count: int, environment: dict[str, str] | None = None, **options) -> list:
        """The processes that `accelerate launch --cpu --num_processes COUNT` would start."""
        return [
            self.start(output_dir, {**of_rank, **(environment or {})}, **options)
            for of_rank in environments_of_ranks(count)
        ]


def log_of(output_dir: Path) -> list[dict]:
    path = output_dir / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses_of(output_dir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in log_of(output_dir) if "loss" in line}


def wait_for_step(output_dir: Path, step: int, process, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while max(losses_of(output_dir), default=0) < step:
        assert process.is_alive(), "the process ended too early"
        assert time.monotonic() < end, f"step {step} was not reached in {seconds} seconds"
        time.sleep(0.01)

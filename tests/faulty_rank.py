"""train.py with one process that goes wrong, for tests: python faulty_rank.py nan|exception [options of train.py]"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from iflame_hf import IFlameForCausalLM
from training.train import main

FAULTY_RANK, FAULTY_CALL = "1", 2
calls = 0
forward = IFlameForCausalLM.forward


def faulty_forward(self, *args, **kwargs):
    global calls
    calls += 1
    output = forward(self, *args, **kwargs)
    if os.environ["RANK"] == FAULTY_RANK and calls == FAULTY_CALL:
        if sys.argv[1] == "exception":
            raise OSError("the disk of this machine is gone")
        output.loss = output.loss * float("nan")
    return output


if __name__ == "__main__":
    torch.set_num_threads(1)
    IFlameForCausalLM.forward = faulty_forward
    status = record(main)(sys.argv[2:])
    print("threads at the end:", *(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")))
    sys.exit(status)

"""Processes that share tensors by rows, as FSDP2 does, on CPUs."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

Share = Callable[[torch.Tensor], DTensor]


def found_by(work: Callable[[Share], Any], count: int, folder: Path, begins_anew: bool = False) -> Any:
    """
    What `work(share)`, called in each of so many processes, returns in the first: of numpy's arrays.

    Args:
        begins_anew: the processes know nothing of what this one did, such as the threads of autograd, which would not
            work in a copy of it; `work` can be pickled.
    """
    context = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")
    if begins_anew:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["training.train"])
    found = context.Queue()
    processes = [
        context.Process(target=_work, args=(rank, count, folder / "store", work, found), daemon=True)
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    result = found.get(timeout=60)
    for process in processes:
        process.join(30)
    return result


def _work(rank, count, store, work, found):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    mesh = init_device_mesh("cpu", (count,))
    result = work(lambda tensor: distribute_tensor(tensor.detach(), mesh, [Shard(0)]))
    if rank == 0:
        found.put(result)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()

"""
The original research code as its training script trains it, from a folder of the reader's own.

Its network, its optimiser, its precision and its schedule; one mesh a row, padded to the length of the longest that it
takes, in its own order of vertices. The meshes come from this project's loader, which stretches them a little
otherwise: the original draws the factors themselves evenly, this project their logarithms.
"""

import json
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import torch
from torch import nn

from benchmarks.peer_training import Output, cut_at_end, output_of, start_faces
from benchmarks.reference import load_original, load_training_script, quiet
from iflame_hf import IFlameConfig, IFlameTokenizer
from iflame_hf.layout_iflame import RowLayout
from iflame_hf.many_iflame import GeneratedMesh
from training.arguments import Arguments
from training.rows.map import Data, HeldOutRows, MappedRows, RowKey, RowStream
from training.rows.pack import TOKENS_PER_FACE

# B batch, T tokens

# Written out in its training script: the share of steps in which the learning rate rises, and the largest gradient.
WARMUP_SHARE, MAX_GRAD_NORM = 0.1, 1.0


def recipe(script: ModuleType, is_cuda: bool) -> dict[str, str]:
    """The settings of its training script as options of train.py."""
    own = script.args
    return {
        "per_device_train_batch_size": str(own.batch_size),
        "learning_rate": str(own.lr),
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": json.dumps({"min_lr_rate": own.min_lr / own.lr}),
        "warmup_steps": str(WARMUP_SHARE),
        "max_grad_norm": str(MAX_GRAD_NORM),
        "bf16": "False",
        "fp16": str(is_cuda),
    }


class Original(nn.Module):
    """
    Its network behind the interface of this project's.

    Args:
        is_compiled: steps run under torch.compile, as in its training script.
    """

    def __init__(self, network: nn.Module, is_compiled: bool):
        super().__init__()
        self.network = network
        self.run = torch.compile(network) if is_compiled else network

    def forward(
        self,
        input_ids: torch.Tensor,
        layout: RowLayout | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Output:
        """Ids and labels (B, T) of one mesh a row, which padding follows."""
        run = self.run if self.training else self.network
        return output_of(run(input_ids), labels, num_items_in_batch)


def build(
    folder: str, config: IFlameConfig, device: torch.device
) -> tuple[nn.Module, torch.optim.Optimizer, ModuleType, str]:
    """
    Its network with fresh weights on the device, its optimiser, its training script, and a sentence on the packages
    that were replaced.

    Raises:
        FileNotFoundError, ValueError, ImportError: as `load_original` and `load_training_script`.
    """
    make, packages = load_original(folder, config, device)
    script = load_training_script(folder, device)
    network = make().to(device)
    return network, script.get_optimizer(network, script.optname, lr=script.args.lr), script, packages


def one_mesh_a_row(data: Data, seed: int, batch_size: int) -> Data:
    """The same meshes, training and held-out, each in a row of its own."""
    stream, held_out = data.rows.stream, data.validation_loader
    alone = RowStream(np.full_like(stream.sizes, stream.capacity), stream.used, stream.capacity, seed)
    meshes = np.concatenate([key.draws for keys in held_out.keys for key in keys])
    keys = [RowKey(0, meshes[place : place + 1]) for place in range(len(meshes))]
    batches = [keys[first : first + batch_size] for first in range(0, len(keys), batch_size)]
    return Data(MappedRows(data.rows.rows, alone), data.validation, HeldOutRows(held_out.rows, batches))


def sample(
    network: nn.Module, tokenizer: IFlameTokenizer, arguments: Arguments, rows: int, device: torch.device
) -> Iterator[GeneratedMesh]:
    """As many meshes as the options ask for, so many rows at a time, by its own sampling in its own half precision,
    which goes on to the most tokens whatever has ended."""
    options = arguments.train
    for first in range(0, options.num_samples, rows):
        prompt = start_faces(min(rows, options.num_samples - first), tokenizer, device)
        torch.manual_seed(options.seed + first)
        with quiet():
            tokens = network.generate_sequence(
                prompt,
                None,
                (1 + options.sample_max_faces) * TOKENS_PER_FACE + 1,
                device,
                top_k=options.top_k,
                top_p=options.top_p,
                temperature=options.temperature,
            )
        yield from cut_at_end(torch.from_numpy(tokens), first, options.seed + first, tokenizer)

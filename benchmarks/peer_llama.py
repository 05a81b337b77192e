"""
A plain decoder on the same tokens: transformers' Llama, which knows nothing of vertices and faces.

Meshes share rows as this project's do, each with positions of its own and blind to the others.
"""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.utils import is_flash_attn_2_available

from benchmarks.peer_training import Output, cut_at_end, output_of, start_faces
from iflame_hf import IFlameTokenizer
from iflame_hf.layout_iflame import RowLayout
from iflame_hf.many_iflame import GeneratedMesh
from iflame_hf.packed_attention_iflame import Packing, packed_attention
from training.arguments import Arguments
from training.rows.pack import EXTRA_FACES, TOKENS_PER_FACE
from training.run.create import flash_attention_4_serves

# B batch, T tokens, H heads, D head size, V vocabulary

LEARNING_RATE = 1e-3
HEAD_SIZE = 64
# Channels for each layer, between which sizes are chosen: as of usual decoders.
LEAST_ASPECT, MOST_ASPECT = 32, 64
# torch's flash attention of lengths laid end to end, on a CPU its attention of one mesh after the other: what serves
# without a package. A name with "flash" in it transformers takes for a kernel on the Hub.
TORCH_VARLEN = "torch_varlen"
IMPLEMENTATIONS = ("sdpa", TORCH_VARLEN, "flash_attention_2", "flash_attention_4")


def attend_by_torch(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    packing: Packing,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers: (B, H, T, D) -> (B, T, H, D)."""
    heads_last = (x.transpose(1, 2) for x in (query, key, value))
    return packed_attention(*heads_last, packing, scaling), None


AttentionInterface.register(TORCH_VARLEN, attend_by_torch)


def choose_sizes(parameters: int, vocab_size: int) -> tuple[int, int]:
    """Channels and layers of the Llama that comes nearest to so many parameters, of the usual aspect if there is one:
    a layer has 12 times the square of its channels, as the SwiGLU's hidden units are 8/3 of them."""
    found = []
    for width in range(HEAD_SIZE, 64 * HEAD_SIZE, HEAD_SIZE):
        in_layer, others = 4 * width**2 + 3 * width * int(8 / 3 * width) + 2 * width, (2 * vocab_size + 1) * width
        layers = max(1, round((parameters - others) / in_layer))
        is_usual = LEAST_ASPECT <= width / layers <= MOST_ASPECT
        found.append((not is_usual, abs(others + layers * in_layer - parameters), width, layers))
    return min(found)[2:]


def build_network(
    tokenizer: IFlameTokenizer, arguments: Arguments, width: int, layers: int, heads: int | None = None
) -> LlamaForCausalLM:
    """A fresh network. Raises ValueError where the heads do not fit."""
    heads = heads or max(1, width // HEAD_SIZE)
    if width % heads or width // heads % 2:
        raise ValueError(f"{width} channels cannot be cut into {heads} heads of an even size: give another --heads")
    in_sample = (arguments.train.sample_max_faces + EXTRA_FACES) * TOKENS_PER_FACE
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=width,
        intermediate_size=int(8 / 3 * width),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=max(arguments.data.row_length, in_sample),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def choose_attention(asked: str, network: LlamaForCausalLM, accelerator: Accelerator, is_compiled: bool) -> str:
    """What computes attention; for "auto" the fastest that the machine has. Raises ValueError for what is unknown."""
    if asked != "auto":
        if asked not in IMPLEMENTATIONS:
            raise ValueError(f"--attn_implementation of a Llama must be {', '.join(IMPLEMENTATIONS)}; got {asked!r}")
        return asked
    if flash_attention_4_serves(accelerator, network.config.head_dim, is_compiled):
        return "flash_attention_4"
    return "flash_attention_2" if is_flash_attn_2_available() else TORCH_VARLEN


class PackedLlama(nn.Module):
    """
    Tells the network what `layout` says of its rows, by transformers' own means: positions and, for flash attention of
    packed sequences, where meshes begin among all rows laid end to end.
    """

    def __init__(self, network: LlamaForCausalLM, attention: str):
        super().__init__()
        network.set_attn_implementation(attention)
        self.network = network
        self.attention = attention

    def forward(
        self,
        input_ids: torch.Tensor,
        layout: RowLayout,
        labels: torch.Tensor | None = None,
        use_cache: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Output:
        """Ids and labels (B, T)."""
        ids, positions, bounds, told = input_ids, layout.positions(), layout.bounds(), {}
        if self.attention == TORCH_VARLEN:
            told["packing"] = Packing.of(bounds, ids.numel() // TOKENS_PER_FACE)
        elif self.attention.startswith("flash_attention"):
            ids, positions = ids.view(1, -1), positions.reshape(1, -1)
            told = {f"cu_seq_lens_{of}": bounds.offsets for of in "qk"}
            told |= {f"max_length_{of}": bounds.longest for of in "qk"}
        logits = self.network(ids, position_ids=positions, use_cache=use_cache, **told).logits
        return output_of(logits.view(*input_ids.shape, -1), labels, num_items_in_batch)


def create_optimizer(network: nn.Module, arguments: Arguments) -> torch.optim.AdamW:
    """AdamW with the settings of the options, which decays matrices alone."""
    options = arguments.train
    parameters = list(network.parameters())
    groups = [
        {"params": [each for each in parameters if each.dim() > 1], "weight_decay": options.weight_decay},
        {"params": [each for each in parameters if each.dim() <= 1], "weight_decay": 0.0},
    ]
    betas = options.adam_beta1, options.adam_beta2
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=betas, eps=options.adam_epsilon, fused=True)


@torch.no_grad()
def sample(
    network: LlamaForCausalLM, tokenizer: IFlameTokenizer, arguments: Arguments, rows: int
) -> Iterator[GeneratedMesh]:
    """As many meshes as the options ask for, so many rows at a time, by transformers' `generate` with its cache."""
    options = arguments.train
    network.set_attn_implementation("sdpa")
    network.eval()
    for first in range(0, options.num_samples, rows):
        prompt = start_faces(min(rows, options.num_samples - first), tokenizer, network.device)
        torch.manual_seed(options.seed + first)
        # Compiled layers would be compiled again for every length.
        with torch.compiler.set_stance("force_eager"):
            tokens = network.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                # The last is the end of a mesh that has as many faces as it may.
                max_new_tokens=options.sample_max_faces * TOKENS_PER_FACE + 1,
                do_sample=True,
                temperature=options.temperature,
                top_k=options.top_k,
                top_p=options.top_p,
            )
        yield from cut_at_end(tokens, first, options.seed + first, tokenizer)

"""Small models with weights large enough that every part of the network matters, and token rows to feed them."""

import torch

from iflame_hf import IFlameConfig, IFlameForCausalLM
from iflame_hf.blocks_iflame import IFlameRMSNorm, IFlameUpsample

PAD, BOS, EOS = 129, 130, 131


def small_config(heads=4, hidden_size=32, stage_layers=(1, 1, 2, 1, 1), full_attention_interval=2, **options):
    """By default six blocks: every level has one with linear and one with full attention."""
    return IFlameConfig(
        hidden_size=hidden_size,
        num_attention_heads=heads,
        stage_layers=list(stage_layers),
        full_attention_interval=full_attention_interval,
        **options,
    )


def small_model(seed=0, **options):
    """A model in evaluation mode with random weights, drawn so that every block's part is of the size of its input."""
    model = IFlameForCausalLM(small_config(**options))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                noise = torch.randn(parameter.shape, generator=random)
                if isinstance(module, (IFlameRMSNorm, IFlameUpsample)):
                    parameter.copy_(1 + 0.1 * noise)
                elif isinstance(module, torch.nn.Embedding):
                    parameter.copy_(noise)
                elif parameter.dim() == 1:
                    parameter.copy_(0.1 * noise)
                else:
                    parameter.copy_(noise / parameter.shape[1] ** 0.5)
    return model.eval()


def ending_model(more, **options):
    """A small model whose rows end now and then, the more often the more, and write neither padding nor start tokens;
    in float64, so that no token hangs on how a sum is ordered."""
    model = small_model(**options).double()
    with torch.no_grad():
        model.lm_head.bias[[PAD, BOS]] -= 20
        model.lm_head.bias[EOS] += more
    return model


def mesh_rows(batch, faces, seed=0, end=False):
    """(B, 9 + 9 faces (+ 9)) ids: the start face, faces of random coordinates, and the end face if asked for."""
    random = torch.Generator().manual_seed(seed)
    parts = [torch.full((batch, 9), BOS), torch.randint(0, 129, (batch, 9 * faces), generator=random)]
    return torch.cat(parts + [torch.full((batch, 9), EOS)] * end, dim=1)


def relative_error(value, expected):
    """Size of the difference over the size of what was expected."""
    assert value.shape == expected.shape
    value, expected = value.detach().double(), expected.detach().double()
    return float((value - expected).norm() / expected.norm())


def switch_checkpointing(model, on=True, **options):
    """Lets the backward pass compute blocks again, or not; transformers renamed the method in 5.23."""
    names = ("activation_checkpointing", "gradient_checkpointing")
    name = next(each for each in names if hasattr(model, f"{each}_enable"))
    if on:
        getattr(model, f"{name}_enable")(**{f"{name}_kwargs": options} if options else {})
    else:
        getattr(model, f"{name}_disable")()

"""What linear attention is, written out in float64, and how an implementation is compared with it."""

import torch
from small_models import relative_error

from iflame_hf.layout_iflame import MeshBounds
from iflame_hf.ops_iflame import alibi_slopes

# no powers of two, which a half-precision format would hold exactly
SLOPES = alibi_slopes(16)[[0, 6, 14]]


def attention_formula(q, k, v, slopes, state=None, bounds=None):
    """o_t = sum over j <= t of exp(-s (t - j)) (q_t k_j) v_j, within a mesh, all pairs in float64."""
    batch, length, heads, size = q.shape
    q, k, v, slopes = q.double(), k.double(), v.double(), slopes.double()
    index = torch.arange(length)
    meshes = torch.zeros(batch, length, dtype=torch.long) if bounds is None else bounds.meshes
    distance = (index[:, None] - index).clamp(min=0)
    allowed = (index[:, None] >= index) & (meshes[:, :, None] == meshes[:, None, :])
    outputs, states = [], []
    for head in range(heads):
        decay = torch.exp(-slopes[head] * distance) * allowed
        output = ((q[:, :, head] @ k[:, :, head].mT) * decay) @ v[:, :, head]
        last = (k[:, :, head] * decay[:, -1, :, None]).mT @ v[:, :, head]
        if state is not None:
            first = (meshes == meshes[:, :1]).double()
            entering = first * torch.exp(-slopes[head] * (index + 1))
            output = output + entering[..., None] * (q[:, :, head] @ state[:, head].double())
            last = last + entering[:, -1, None, None] * state[:, head].double()
        outputs.append(output)
        states.append(last)
    return torch.stack(outputs, dim=2), torch.stack(states, dim=1)


def random_inputs(batch, length, heads, size, seed=0, requires_grad=True):
    random = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(batch, length, heads, size, generator=random) for _ in range(3)]
    inputs.append(torch.randn(batch, heads, size, size, generator=random))
    return [x.requires_grad_(requires_grad) for x in inputs]


def bounds_from(starts, length):
    """The bounds of meshes that begin at the given items of each row."""
    begins = torch.zeros(len(starts), length, dtype=torch.bool)
    for row, items in enumerate(starts):
        begins[row, list(items)] = True
    meshes = begins.flatten().cumsum(dim=0).view(begins.shape) - 1
    offsets = torch.tensor([row * length + item for row, items in enumerate(starts) for item in items])
    offsets = torch.cat([offsets, torch.tensor([begins.numel()])]).to(torch.int32)
    return MeshBounds(meshes, offsets, offsets, int(offsets.diff().max()))


def agreement(function, length, state=True, starts=None, heads=3, size=8, tolerance=5e-6):
    """Compares outputs, final states and all gradients with the formula."""
    batch = 2 if starts is None else len(starts)
    q, k, v, initial = random_inputs(batch, length, heads, size)
    initial = initial if state else None
    bounds = None if starts is None else bounds_from(starts, length)
    slopes = SLOPES[:heads]
    inputs = [q, k, v] + [initial] * state
    results = {}
    for name, compute in (("expected", attention_formula), ("value", function)):
        output, last = compute(q, k, v, slopes, initial, bounds)
        assert output.shape == q.shape and last.shape == (batch, heads, size, size)
        weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)
        loss = (output * weights).sum() + (last * last).sum()
        gradients = torch.autograd.grad(loss, inputs)
        results[name] = [output, last, *gradients]
    for value, expected in zip(results["value"], results["expected"], strict=True):
        assert value.dtype == torch.float32
        assert relative_error(value, expected) < tolerance

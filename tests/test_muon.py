"""The step of all matrices of one shape together is that of torch's Muon, within the rounding of bfloat16."""

import pytest
import torch
from sharing_processes import found_by

from training.optim.muon import BatchedMuon, orthogonalise

SHAPES = [(24, 24), (24, 24), (40, 16), (16, 40), (40, 16), (2, 8)]
COEFFICIENTS = (3.4445, -4.775, 2.0315)  # of torch.optim.Muon


def matrices():
    random = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=random)) for shape in SHAPES]


def steps(kind, count=4, **options):
    random = torch.Generator().manual_seed(1)
    parameters = matrices()
    optimizer = kind(parameters, lr=0.02, **options)
    for _ in range(count):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=random)
        optimizer.step()
    return optimizer, parameters


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_a_step_moves_every_matrix_as_torchs_muon_does(adjust, nesterov):
    options = {"weight_decay": 0.3, "nesterov": nesterov, "adjust_lr_fn": adjust}
    (ours, moved), (theirs, expected) = steps(BatchedMuon, **options), steps(torch.optim.Muon, **options)
    for parameter, other, start in zip(moved, expected, matrices(), strict=True):
        difference = (parameter - other).norm() / (other - start).norm()
        assert difference < 0.02
        momentum = ours.state[parameter]["momentum_buffer"]
        torch.testing.assert_close(momentum, theirs.state[other]["momentum_buffer"])


def formula(matrix, gradients, lr, weight_decay, momentum=0.95):
    """Muon's steps in float64, from arXiv 2502.16982, sections 2.1 and 2.2: one matrix by itself."""
    a, b, c = COEFFICIENTS
    matrix, buffer = matrix.detach().double(), torch.zeros(matrix.shape, dtype=torch.float64)
    for gradient in gradients:
        buffer = momentum * buffer + (1 - momentum) * gradient.double()
        x = momentum * buffer + (1 - momentum) * gradient.double()
        x = x / x.norm()
        for _ in range(5):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        matrix = (1 - lr * weight_decay) * matrix - lr * 0.2 * max(matrix.shape) ** 0.5 * x
    return matrix


def test_on_a_cpu_a_step_is_exact_to_the_precision_of_float32():
    options = {"lr": 0.02, "weight_decay": 0.3}
    random, parameters = torch.Generator().manual_seed(1), matrices()
    optimizer = BatchedMuon(parameters, adjust_lr_fn="match_rms_adamw", **options)
    gradients = []
    for _ in range(4):
        gradients.append([torch.randn(parameter.shape, generator=random) for parameter in parameters])
        for parameter, gradient in zip(parameters, gradients[-1], strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    for index, (parameter, start) in enumerate(zip(parameters, matrices(), strict=True)):
        expected = formula(start, [step[index] for step in gradients], **options)
        assert (parameter - expected).norm() / (expected - start).norm() < 1e-5


def test_a_matrix_without_a_gradient_stays():
    parameters = matrices()
    optimizer = BatchedMuon(parameters, lr=0.1)
    parameters[0].grad = torch.randn(SHAPES[0])
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer.step()
    changed = [not torch.equal(parameter, value) for parameter, value in zip(parameters, before, strict=True)]
    assert changed == [True] + [False] * (len(SHAPES) - 1)


def test_singular_values_come_near_one_whatever_the_shape():
    random = torch.Generator().manual_seed(0)
    for shape in set(SHAPES):
        left, values, right = torch.linalg.svd(torch.randn(3, *shape, generator=random), full_matrices=False)
        matrices = left * torch.linspace(0.05, 1, values.shape[-1]) @ right
        found = torch.linalg.svdvals(orthogonalise(matrices, COEFFICIENTS, 5, 1e-7))
        assert 0.3 < found.min() and found.max() < 1.3


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(512, 1365), (1365, 512), (512, 512), (24, 17), (17, 24)])
def test_on_a_gpu_they_are_those_of_float64_to_the_precision_of_bfloat16(shape):
    a, b, c = COEFFICIENTS
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    x = matrices.double()
    x = x / x.norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    found = orthogonalise(matrices.to("cuda"), COEFFICIENTS, 5, 1e-7)
    assert found.shape == matrices.shape and found.dtype == torch.bfloat16
    assert (found.cpu() - x).norm() / x.norm() < 0.02


def test_off_a_cpu_the_products_are_in_bfloat16_as_torchs_are():
    assert orthogonalise(torch.empty(3, 8, 4, device="meta"), COEFFICIENTS, 5, 1e-7).dtype == torch.bfloat16


def shared_steps(share):
    """Whole matrices after some steps of those that processes share."""
    random = torch.Generator().manual_seed(1)
    parameters = [torch.nn.Parameter(share(matrix)) for matrix in matrices()]
    optimizer = BatchedMuon(parameters, lr=0.02)
    for _ in range(4):
        for parameter in parameters:
            parameter.grad = share(torch.randn(parameter.shape, generator=random))
        optimizer.step()
    return [parameter.detach().full_tensor().numpy() for parameter in parameters]


def test_matrices_shared_unevenly_by_three_processes_move_as_whole_ones(tmp_path):
    moved = found_by(shared_steps, 3, tmp_path)
    for parameter, expected, start in zip(moved, steps(BatchedMuon)[1], matrices(), strict=True):
        difference = (torch.from_numpy(parameter) - expected).norm() / (expected - start).norm()
        assert difference < 1e-5

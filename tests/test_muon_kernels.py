"""What stands before and after the products of Muon's step, by Triton's interpreter, against plain torch."""

import copy
from types import SimpleNamespace

import pytest
import torch
from interpreted_module import interpreted
from small_models import relative_error

from training.optim import muon, muon_kernels
from training.optim.muon import BatchedMuon

pytest.importorskip("triton")

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
SHAPES = [(24, 24), (40, 16), (16, 40), (37, 21), (2, 8), (1, 1)]
MOMENTUM = 0.95
# The interpreter cuts off what does not fit into bfloat16, where a GPU rounds.
ALLOWED = 0.01


@pytest.fixture(scope="module")
def interpreted_kernels():
    with interpreted(muon_kernels) as module:
        module.TILE, module.PIECE, module.SUMS = 32, 512, 4  # of small matrices, too, there are several
        yield module


@pytest.fixture(params=["cpu", CUDA])
def place(request, interpreted_kernels, monkeypatch):
    """The kernels, and the device that they run on; the optimiser takes them there."""
    if request.param == "cuda":
        return muon_kernels, "cuda"
    for name in ("Tables", "move_momenta", "step_parameters"):
        monkeypatch.setattr(muon, name, getattr(interpreted_kernels, name))
    monkeypatch.setattr(muon, "has_muon_kernels", lambda *matrices: True)
    monkeypatch.setattr(muon, "_is_read_at_once", lambda tensor: False)
    return interpreted_kernels, "cpu"


def matrices(device, *shapes, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random).to(device) for shape in shapes]


def three_of(shape, device):
    """Parameters, gradients and momentum of three matrices."""
    return [matrices(device, *[shape] * 3, seed=seed) for seed in range(3)]


def bits(tensors):
    return torch.stack(list(tensors)).detach().view(torch.int32)


def turned(x, shape):
    """Updates as they lie before and after products -> of the shape of the matrices, without columns of zeros."""
    rows, columns = shape
    x = x[..., : max(shape)]
    return x.mT if rows > columns else x


@pytest.mark.parametrize("shape", [*SHAPES, (5, 277), (85, 33)])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("found", [None, 0.0])
def test_momentum_moves_and_updates_have_a_norm_of_one(place, shape, nesterov, found):
    kernels, device = place
    parameters, gradients, buffers = three_of(shape, device)
    moved = torch.stack(buffers).lerp(torch.stack(gradients), 1 - MOMENTUM)
    updates = torch.stack(gradients).lerp(moved, MOMENTUM) if nesterov else moved
    table = kernels.Tables().of(parameters, gradients, buffers)
    found = None if found is None else torch.tensor(found, device=device)
    x = kernels.move_momenta(table, MOMENTUM, nesterov, 1e-7, found)
    torch.testing.assert_close(torch.stack(buffers), moved)
    assert x.dtype == torch.bfloat16 and x.shape[1:] == (min(shape), -(-max(shape) // 16) * 16)
    assert not x[..., max(shape) :].any()
    norms = updates.norm(dim=(1, 2), keepdim=True)
    assert relative_error(turned(x, shape), updates / norms) < ALLOWED


def test_updates_of_zeros_stay_zeros(place):
    kernels, device = place
    parameters, *others = three_of((16, 8), device)
    for each in others:
        for x in each:
            x.zero_()
    x = kernels.move_momenta(kernels.Tables().of(parameters, *others), MOMENTUM, True, 1e-7, None)
    assert not x.any()


@pytest.mark.parametrize("shape", [*SHAPES, (5, 277), (85, 33)])
@pytest.mark.parametrize("how", ["float", "tensor", "tensor that may be left out"])
def test_parameters_decay_and_take_their_step(place, shape, how):
    kernels, device = place
    parameters, *others = three_of(shape, device)
    before = torch.stack(parameters).double()
    table = kernels.Tables().of(parameters, *others)
    random = torch.Generator().manual_seed(3)
    x = torch.randn(3, min(shape), -(-max(shape) // 16) * 16, generator=random).to(device, torch.bfloat16)
    lr = 0.02 if how == "float" else torch.tensor(0.02, device=device)
    found = torch.zeros((), device=device) if "left out" in how else None
    kernels.step_parameters(table, x, lr, 0.3, 1.7, found)
    expected = before * (1 - 0.02 * 0.3) - 0.02 * 1.7 * turned(x, shape).double()
    torch.testing.assert_close(torch.stack(parameters).double(), expected, rtol=1e-6, atol=1e-6)


def steps(device, kind=BatchedMuon, count=4, lr=0.02, found_inf=None, **options):
    random = torch.Generator().manual_seed(1)
    parameters = [torch.nn.Parameter(x) for x in matrices(device, *SHAPES, *SHAPES[1:3])]
    optimizer = kind(parameters, lr=0.02, **options)
    for group in optimizer.param_groups:
        group["lr"] = lr
    if found_inf is not None:
        optimizer.found_inf = torch.tensor(found_inf, device=device)
    for _ in range(count):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=random).to(device)
        optimizer.step()
    return optimizer, parameters


def assert_moved_alike(found, expected):
    starts = steps(found[0].device, count=0)[1]
    for parameter, other, start in zip(found, expected, starts, strict=True):
        assert (parameter - other).norm() / (other - start).norm() < 0.03


OPTIONS = [
    {"nesterov": nesterov, "adjust_lr_fn": adjust, "weight_decay": 0.3}
    for nesterov in (True, False)
    for adjust in ("original", "match_rms_adamw")
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_step_is_that_of_its_plain_twin_and_of_torchs_muon(place, options, monkeypatch):
    device = place[1]
    lr = torch.tensor(0.02, device=device)
    optimizer, found = steps(device, lr=lr, found_inf=0.0, **options)
    monkeypatch.setattr(muon, "has_muon_kernels", lambda *matrices: False)
    for kind in (BatchedMuon, torch.optim.Muon):
        plain, expected = steps(device, kind, **options)
        assert_moved_alike(found, expected)
        for parameter, other in zip(found, expected, strict=True):
            momentum = optimizer.state[parameter]["momentum_buffer"]
            torch.testing.assert_close(momentum, plain.state[other]["momentum_buffer"])


def test_a_learning_rate_on_the_device_is_the_same_as_one_on_the_host(place):
    device = place[1]
    on_host, on_device = (steps(device, count=2, lr=lr)[1] for lr in (0.02, torch.tensor(0.02, device=device)))
    assert all(torch.equal(x, y) for x, y in zip(on_host, on_device, strict=True))


def test_the_same_numbers_come_of_every_run(place):
    first, second = (steps(place[1], count=2)[1] for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_step_that_is_left_out_leaves_every_bit(place, poison):
    device = place[1]
    optimizer, parameters = steps(device, count=2)
    buffers = [optimizer.state[parameter]["momentum_buffer"] for parameter in parameters]
    buffers[0][0, 0], parameters[0].data[0, 0] = -0.0, -0.0
    before = [x.detach().clone() for x in (*parameters, *buffers)]
    optimizer.found_inf = torch.ones((), device=device)
    for parameter in parameters:
        parameter.grad.view(-1)[-1] = poison
    optimizer.step()
    for x, old in zip((*parameters, *buffers), before, strict=True):
        assert torch.equal(bits([x]), bits([old]))
    optimizer.found_inf = torch.zeros((), device=device)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert not any(torch.equal(x, old) for x, old in zip((*parameters, *buffers), before, strict=True))
    assert all(x.isfinite().all() for x in (*parameters, *buffers))


def test_what_is_not_a_number_is_seen_where_no_step_is_left_out(place):
    optimizer, parameters = steps(place[1], count=1)
    parameters[0].grad[3, 3] = torch.nan
    optimizer.step()
    assert parameters[0].isnan().all()


@pytest.mark.parametrize("how", ["state", "copy"])
def test_who_goes_on_from_a_state_takes_the_same_steps(place, how):
    device = place[1]
    optimizer, parameters = steps(device, count=2)
    if how == "copy":
        other = copy.deepcopy(optimizer)
        again = other.param_groups[0]["params"]
    else:
        again = [torch.nn.Parameter(x.detach().clone()) for x in parameters]
        other = BatchedMuon(again, lr=0.02)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for x, y in zip(parameters, again, strict=True):
        assert {name: value.shape for name, value in other.state[y].items()} == {"momentum_buffer": x.shape}
        x.grad = torch.randn_like(x)
        y.grad = x.grad.clone()
    optimizer.step()
    other.step()
    assert all(torch.equal(x, y) for x, y in zip(parameters, again, strict=True))


def test_autograd_knows_that_parameters_have_moved(place):
    optimizer, parameters = steps(place[1], count=1)
    product = (parameters[0] * parameters[0]).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_a_table_is_made_again_where_a_matrix_lies_elsewhere():
    tables, (parameters, gradients, buffers) = muon_kernels.Tables(), three_of((4, 8), "cpu")
    table = tables.of(parameters, gradients, buffers)
    places = [[x.data_ptr() for x in each] for each in (parameters, gradients, buffers)]
    assert table.places.tolist() == places and table.shape == (4, 8)
    assert tables.of(parameters, gradients, buffers) is table
    gradients[1] = torch.zeros(33)[1:].view(4, 8)
    moved = tables.of(parameters, gradients, buffers)
    assert moved.places[1, 1] == gradients[1].data_ptr() and not moved.is_aligned


def test_no_table_is_made_while_a_graph_is_captured(monkeypatch):
    matrix = SimpleNamespace(data_ptr=lambda: 256, device=torch.device("cuda"), shape=torch.Size((4, 8)))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert muon_kernels.Tables().of([matrix], [matrix], [matrix]) is None


@pytest.mark.parametrize("plain", ["cpu", "float64", "strided", "other type of momentum"])
def test_who_has_no_kernels(plain, monkeypatch):
    monkeypatch.setattr(muon_kernels, "why_no_kernels", lambda: None)
    parameters, gradients, buffers = three_of((4, 8), "cpu")
    if plain != "cpu":
        parameters, gradients, buffers = ([OnCuda(x) for x in each] for each in (parameters, gradients, buffers))
        assert muon_kernels.has_muon_kernels(parameters, gradients, buffers)
    if plain == "float64":
        parameters[1].dtype = torch.float64
    elif plain == "strided":
        gradients[1].is_contiguous = lambda: False
    elif plain == "other type of momentum":
        buffers[2].dtype = torch.bfloat16
    assert not muon_kernels.has_muon_kernels(parameters, gradients, buffers)


class OnCuda:
    """What is asked of a matrix, as if it were on a GPU."""

    def __init__(self, like):
        self.device, self.dtype, self.is_contiguous = torch.device("cuda"), like.dtype, like.is_contiguous


LARGE = [(512, 512), (1365, 512), (512, 1365), (24, 17), (512, 512), (1365, 512)]


def on_one_buffer(shapes, offset):
    """Parameters whose gradients are views of one buffer, as a captured learner's."""
    parameters = [torch.nn.Parameter(x) for x in matrices("cuda", *shapes)]
    starts, end = [], offset
    for parameter in parameters:
        starts.append(end)
        end += -(-parameter.numel() // 64) * 64
    gradients = torch.zeros(end, device="cuda")
    for start, parameter in zip(starts, parameters, strict=True):
        parameter.grad = gradients[start : start + parameter.numel()].view_as(parameter)
    return parameters, gradients


class Stepped:
    """Steps as a captured learner takes them, whose gradients, rate and found_inf lie on the device."""

    def __init__(self, offset=0, **options):
        self.parameters, self.gradients = on_one_buffer(LARGE, offset)
        self.optimizer = BatchedMuon(self.parameters, lr=0.02, weight_decay=0.3, **options)
        self.rate = torch.zeros((), device="cuda")
        self.optimizer.param_groups[0]["lr"] = self.rate
        self.optimizer.found_inf = torch.zeros((), device="cuda")
        self.count = 0

    def feed(self, found=0.0):
        random = torch.Generator().manual_seed(self.count)
        for parameter in self.parameters:
            parameter.grad.copy_(torch.randn(parameter.shape, generator=random))
        if found:
            self.gradients.fill_(torch.nan)
        self.count += 1
        self.rate.fill_(0.01 * self.count)
        self.optimizer.found_inf.fill_(found)

    def assert_moved_as(self, other):
        for x, y, start in zip(self.parameters, other.parameters, matrices("cuda", *LARGE), strict=True):
            assert (x - y).norm() / (y - start).norm() < 0.03
            ours, theirs = (each.optimizer.state[of]["momentum_buffer"] for each, of in ((self, x), (other, y)))
            torch.testing.assert_close(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("offset", [0, 1])
def test_on_a_gpu_steps_are_those_of_the_plain_twin(nesterov, offset, monkeypatch):
    found, expected = (Stepped(offset, nesterov=nesterov) for _ in range(2))
    for each in (found, expected):
        if each is expected:
            monkeypatch.setattr(muon, "has_muon_kernels", lambda *matrices: False)
        for step in range(5):
            each.feed(float(step == 2))
            each.optimizer.step()
    assert found.optimizer._tables._tables and not expected.optimizer._tables._tables
    found.assert_moved_as(expected)


@pytest.mark.gpu
@pytest.mark.parametrize("warm", [True, False])
def test_on_a_gpu_a_step_may_be_a_graph(warm, monkeypatch):
    found, expected = Stepped(), Stepped()
    for step in range(5):
        expected.feed(float(step == 2))
        expected.optimizer.step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found.feed()
        if not warm:  # the state is there, and no table
            monkeypatch.setattr(muon, "has_muon_kernels", lambda *matrices: False)
        found.optimizer.step()
        monkeypatch.undo()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found.optimizer.step()
    assert bool(found.optimizer._tables._captured) == warm
    for step in range(1, 5):
        found.feed(float(step == 2))
        graph.replay()
    torch.cuda.synchronize()
    found.assert_moved_as(expected)


@pytest.mark.gpu
def test_on_a_gpu_the_host_waits_for_nothing_even_where_gradients_lie_elsewhere():
    stepped = Stepped()
    stepped.feed()
    stepped.optimizer.step()
    others = [torch.randn_like(parameter) for parameter in stepped.parameters]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for parameter, gradient in zip(stepped.parameters, others, strict=True):
            parameter.grad = gradient
        stepped.optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")

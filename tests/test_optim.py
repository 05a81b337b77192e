"""Which parameter is trained how, and learning rates over a run."""

import copy
import math
import re

import pytest
import torch
from small_models import small_model

from training.optim import muon
from training.optim.average import MovingAverage
from training.optim.groups import MuonAdamW, create_optimizer, parameter_groups
from training.optim.schedule import learning_rate_curve

MATRIX = r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight"
EMBEDDING = r"model\.embed_tokens\.weight|lm_head\.weight"
OTHER = (
    r"model\.embed_norm\.weight|lm_head\.bias|model\.upsamplers\.[01]\.scale|"
    r"model\.layers\.\d+\.(mlp\.(gate|up|down)_proj\.bias|self_attn\.norm\.weight|(input|post_attention)_layernorm\.weight)"
)


def set_gradients(model, seed):
    random = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=random)


def test_every_parameter_is_in_one_group_and_in_the_right_one():
    model = small_model()
    groups = parameter_groups(model)
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    for group, pattern in (("matrices", MATRIX), ("embeddings", EMBEDDING), ("others", OTHER)):
        assert groups[group], group
        # in the order of the model, by which a checkpoint numbers the states of an optimiser
        assert list(groups[group]) == [name for name, _ in model.named_parameters() if re.fullmatch(pattern, name)]
    assert all(groups[group][name] is model.get_parameter(name) for group in groups for name in groups[group])


def test_a_matrix_that_embedding_and_head_share_is_in_one_group():
    model = small_model()
    model.lm_head.weight = model.model.embed_tokens.weight
    groups = parameter_groups(model)
    assert list(groups["embeddings"]) == ["model.embed_tokens.weight"]
    assert "lm_head.bias" in groups["others"] and all(re.fullmatch(MATRIX, name) for name in groups["matrices"])


def test_what_is_frozen_is_in_no_group_and_adapters_are_matrices():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(small_model(), peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=2))
    groups = parameter_groups(model)
    assert set(groups["matrices"]) == {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert groups["matrices"] and not groups["embeddings"] and not groups["others"]


@pytest.mark.parametrize(
    ("strange", "name"),
    [
        (torch.nn.Parameter(torch.zeros(4)), r"model\.layers\.0\.strange"),
        (torch.nn.LayerNorm(4), r"model\.layers\.0\.strange\.weight"),
    ],
)
def test_a_parameter_that_fits_no_group_is_named(strange, name):
    model = small_model()
    model.model.layers[0].strange = strange
    with pytest.raises(ValueError, match=rf"the parameter {name} of shape \(4,\)"):
        parameter_groups(model)


@pytest.mark.parametrize("name", ["muon", "adamw_torch"])
def test_the_optimiser_holds_every_parameter_once(name):
    model = small_model()
    held = [id(p) for group in create_optimizer(model, name, 1e-3, 0.1).param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("name", ["muon", "adamw_torch"])
def test_only_matrices_in_blocks_are_decayed(name):
    model = small_model()
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    create_optimizer(model, name, lr=0.01, weight_decay=0.5).step()
    decayed = {key for key, parameter in model.named_parameters() if not torch.equal(parameter, before[key])}
    assert decayed == {key for key in before if re.fullmatch(MATRIX, key)}
    for key in decayed:
        torch.testing.assert_close(model.get_parameter(key), before[key] * (1 - 0.01 * 0.5))


def test_muon_with_adamw_steps_as_the_two_optimisers_of_torch_do_apart():
    together, apart, start = small_model(), small_model(), small_model()
    ours = create_optimizer(together, "muon", lr=3e-3, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6)
    assert isinstance(ours, MuonAdamW)
    parameters = dict(apart.named_parameters())
    matrices = [parameter for name, parameter in parameters.items() if re.fullmatch(MATRIX, name)]
    rest = [parameter for name, parameter in parameters.items() if not re.fullmatch(MATRIX, name)]
    muon = torch.optim.Muon(matrices, lr=3e-3, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=3e-3, weight_decay=0.0, betas=(0.8, 0.9), eps=1e-6)
    for step in range(3):
        set_gradients(together, step)
        set_gradients(apart, step)
        ours.step()
        muon.step()
        adamw.step()
    for name, parameter in together.named_parameters():
        difference = (parameter - parameters[name]).norm() / (parameters[name] - start.get_parameter(name)).norm()
        assert difference <= (0.02 if re.fullmatch(MATRIX, name) else 0), name  # torch's Muon computes in bfloat16


def test_an_optimiser_restored_from_its_state_goes_on_as_before():
    models = [small_model(), small_model()]
    optimizers = [create_optimizer(model, "muon", lr=3e-3, weight_decay=0.1) for model in models]
    set_gradients(models[0], 0)
    optimizers[0].step()
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for model, optimizer in zip(models, optimizers, strict=True):
        set_gradients(model, 1)
        optimizer.param_groups[0]["lr"] = 1e-3  # as a scheduler does; it must reach Muon
        optimizer.step()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)
    matrix = models[1].model.layers[0].self_attn.q_proj.weight
    before = matrix.detach().clone()
    for group in optimizers[1].param_groups:
        group["lr"] = 0.0
    optimizers[1].step()
    assert torch.equal(matrix, before)


def test_an_old_torch_without_muon_is_told_what_to_do(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ImportError, match=r"torch 2\.9.*--optim adamw_torch"):
        create_optimizer(small_model(), "muon", 1e-3, 0.1)
    create_optimizer(small_model(), "adamw_torch", 1e-3, 0.1)


def test_an_unknown_optimiser_or_schedule_is_refused():
    with pytest.raises(ValueError, match="'sgd'"):
        create_optimizer(small_model(), "sgd", 1e-3, 0.1)
    with pytest.raises(ValueError, match="'polynomial'"):
        learning_rate_curve("polynomial", 0, 10)


def test_warm_up_and_cosine():
    curve = learning_rate_curve("cosine", 0.1, 100)
    assert [curve(step) for step in (0, 5, 10)] == pytest.approx([0, 0.5, 1])
    assert curve(55) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.5)))
    assert curve(100) == pytest.approx(0, abs=1e-9)


def test_warm_up_stable_decay_decays_over_the_last_fifth():
    curve = learning_rate_curve("warmup_stable_decay", 10, 100)
    assert [curve(step) for step in (5, 10, 50, 79)] == pytest.approx([0.5, 1, 1, 1])
    assert 0 < curve(95) < curve(85) < 1
    assert learning_rate_curve("warmup_stable_decay", 10, 100, {"num_decay_steps": 5})(90) == 1


def test_the_moving_average_follows_its_formula():
    model = torch.nn.Linear(2, 2)
    average = MovingAverage(model, decay=0.5)
    values = [1.0, 3.0, -2.0, 5.0, 5.0, 0.0]
    expected = None
    for count, value in enumerate(values):
        torch.nn.init.constant_(model.weight, value)
        average.update_parameters(model)
        kept = min(0.5, (1 + count) / (10 + count))
        expected = value if expected is None else kept * expected + (1 - kept) * value
    torch.testing.assert_close(average.module.weight, torch.full((2, 2), expected))


def states_of(model, optimizer):
    return copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"]])


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.fixture(params=[True, False], ids=["as on a CPU", "as on a GPU"])
def read_at_once(request, monkeypatch):
    monkeypatch.setattr(muon, "_is_read_at_once", lambda tensor: request.param)


@pytest.mark.parametrize("name", ["muon", "adamw_torch"])
def test_a_step_that_is_left_out_changes_nothing_and_the_next_one_is_as_if_it_had_not_been(name, read_at_once):
    runs = []
    for has_fault in (False, True):
        model = small_model()
        optimizer = create_optimizer(model, name, 0.01, 0.1, fused=True)
        set_gradients(model, 0)
        optimizer.found_inf = torch.zeros(())
        optimizer.step()
        if has_fault:
            before = states_of(model, optimizer)
            for parameter in model.parameters():
                parameter.grad.fill_(torch.nan)
            optimizer.found_inf = torch.ones(())
            optimizer.step()
            assert_equal(states_of(model, optimizer), before)
        set_gradients(model, 1)
        optimizer.found_inf = torch.zeros(())
        optimizer.step()
        runs.append(states_of(model, optimizer))
    assert_equal(*runs)
    assert any((value != small_model().state_dict()[key]).any() for key, value in runs[0][0].items())


@pytest.mark.parametrize("name", ["muon", "adamw_torch"])
def test_a_step_that_may_be_left_out_is_the_step_that_may_not(name, read_at_once):
    moved = []
    for found_inf in (None, torch.zeros(())):
        model = small_model()
        optimizer = create_optimizer(model, name, 0.01, 0.1, fused=found_inf is not None)
        optimizer.found_inf = found_inf
        for seed in range(3):
            set_gradients(model, seed)
            optimizer.step()
        moved.append(model.state_dict())
    torch.testing.assert_close(*moved, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["muon", "adamw_torch"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_checkpoint_of_an_optimiser_that_was_fused_or_not_is_gone_on_with_by_one_that_is_as_it_was_made(name, fused):
    model = small_model()
    earlier = create_optimizer(model, name, 0.01, 0.1, fused=not fused)
    set_gradients(model, 0)
    earlier.step()
    later = create_optimizer(model, name, 0.01, 0.1, fused=fused)
    later.load_state_dict(earlier.state_dict())
    assert {group["fused"] for group in later.param_groups if "fused" in group} == {fused}
    later.found_inf = torch.zeros(()) if fused else None
    before = copy.deepcopy(model.state_dict())
    set_gradients(model, 1)
    later.step()
    assert all((value != before[key]).any() for key, value in model.state_dict().items())

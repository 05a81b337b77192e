"""The network: what each logit depends on, what goes in and comes out, initial weights, files, devices."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import mesh_rows, relative_error, small_config, small_model
from transformers import AutoModel, AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from iflame_hf import IFlameCache, IFlameConfig, IFlameForCausalLM, IFlameModel

PUBLISHED = {"stage_layers": (4, 4, 8, 4, 4), "full_attention_interval": 4}


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.mark.parametrize(
    "sizes", [{}, {"heads": 6, "hidden_size": 48}, PUBLISHED], ids=["4 heads", "6 heads", "4-4-8-4-4"]
)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_changing_a_token_changes_no_logit_before_it_and_every_logit_from_it_on(sizes, attention):
    model = small_model(**sizes)
    model.set_attn_implementation(attention)
    row = mesh_rows(1, faces=3)
    changed_at = range(9, 27)
    rows = row.repeat(len(changed_at), 1)
    for number, token in enumerate(changed_at):
        rows[number, token] = (rows[number, token] + 64) % 129
    differences = (model(rows).logits - model(row).logits).abs().amax(dim=-1)
    for number, token in enumerate(changed_at):
        assert differences[number, :token].max() < 1e-5, f"a change of token {token} is seen before it"
        assert differences[number, token:].min() > 1e-4, f"a change of token {token} is not seen after it"


def test_each_coordinate_reads_the_vertex_and_the_face_that_were_complete_when_it_arrived():
    # One block, of the faces: all that a logit knows of other tokens it has through the hourglass.
    model = small_model(stage_layers=(0, 0, 1, 0, 0), full_attention_interval=1)
    embeddings = model.get_input_embeddings()(mesh_rows(1, faces=4)).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, use_cache=False).logits
    for token in range(embeddings.shape[1]):
        expected = {token}
        vertex = (token - 2) // 3
        if vertex >= 0:
            expected |= set(range(3 * vertex, 3 * vertex + 3))
            face = (vertex - 2) // 3
            if face >= 0:
                expected |= set(range(9 * (face + 1)))
        (gradient,) = torch.autograd.grad(logits[0, token].square().sum(), embeddings, retain_graph=True)
        assert set(gradient[0].abs().sum(dim=-1).nonzero().flatten().tolist()) == expected


@torch.no_grad()
def test_rows_of_a_batch_do_not_see_each_other(model):
    rows = mesh_rows(4, faces=3)
    alone = torch.cat([model(row[None]).logits for row in rows])
    torch.testing.assert_close(model(rows).logits, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 3, 8, 9, 10, 31, 130])
@torch.no_grad()
def test_implementations_agree_at_every_length(model, length):
    rows = mesh_rows(2, faces=14)[:, :length]
    results = []
    for attention in ("eager", "sdpa"):
        for linear_attention in ("eager", "chunked"):
            model.set_attn_implementation(attention)
            model.config.linear_attn_implementation = linear_attention
            results.append(model(rows).logits)
    model.config.linear_attn_implementation = "auto"
    assert all(logits.shape == (2, length, 132) for logits in results)
    assert all(relative_error(logits, results[0]) < 1e-5 for logits in results[1:])


@torch.no_grad()
def test_the_unnormalised_residual_goes_to_the_head(model):
    row = mesh_rows(1, faces=2)
    hidden = model.model(row).last_hidden_state
    torch.testing.assert_close(model(row).logits, hidden @ model.lm_head.weight.T + model.lm_head.bias)


@torch.no_grad()
def test_logits_to_keep_chooses_positions(model):
    rows = mesh_rows(2, faces=2)
    logits = model(rows).logits
    torch.testing.assert_close(model(rows, logits_to_keep=1).logits, logits[:, -1:])
    torch.testing.assert_close(model(rows, logits_to_keep=5).logits, logits[:, -5:])
    torch.testing.assert_close(model(rows, logits_to_keep=0).logits, logits)
    chosen = torch.tensor([3, 0, 20])
    torch.testing.assert_close(model(rows, logits_to_keep=chosen).logits, logits[:, chosen])


@torch.no_grad()
def test_embeddings_may_be_given_instead_of_ids(model):
    rows = mesh_rows(2, faces=2)
    embeddings = model.get_input_embeddings()(rows)
    assert torch.equal(model(inputs_embeds=embeddings).logits, model(rows).logits)
    for ids, embeds in ((None, None), (rows, embeddings)):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(input_ids=ids, inputs_embeds=embeds)


@pytest.mark.parametrize("length", [27, 31])
@torch.no_grad()
def test_hidden_states_come_one_for_each_block_at_the_length_of_its_level(length):
    model = small_model(stage_layers=(1, 2, 3, 1, 1))
    output = model(mesh_rows(2, faces=3)[:, :length], output_hidden_states=True)
    lengths = [length] * 2 + [length // 3] * 2 + [length // 9] * 3 + [length // 3] + [length]
    assert [tuple(states.shape) for states in output.hidden_states] == [(2, count, 32) for count in lengths]
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)
    assert model(mesh_rows(1, faces=1)).hidden_states is None


@torch.no_grad()
def test_attention_weights_come_from_full_layers_and_sum_to_one_over_what_is_not_ahead():
    model = small_model()
    model.set_attn_implementation("eager")
    output = model(mesh_rows(2, faces=3), output_attentions=True)
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 4, n, n) for n in (12, 4, 36)]
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))
        assert (weights.triu(1) == 0).all() and (weights.tril() > 0).sum() > weights[..., 0].numel()
    assert model(mesh_rows(1, faces=1)).attentions is None


@torch.no_grad()
def test_a_tuple_is_returned_for_return_dict_false_with_the_same_content(model):
    rows = mesh_rows(2, faces=2)
    whole = model(rows, labels=rows, use_cache=False)
    as_tuple = model(rows, labels=rows, use_cache=False, return_dict=False)
    assert isinstance(whole, CausalLMOutputWithPast) and isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], whole.loss) and torch.equal(as_tuple[1], whole.logits) and len(as_tuple) == 2
    base = model.model(rows, use_cache=True)
    base_tuple = model.model(rows, use_cache=True, return_dict=False)
    assert isinstance(base, BaseModelOutputWithPast) and isinstance(base_tuple[1], IFlameCache)
    assert torch.equal(base_tuple[0], base.last_hidden_state)


@torch.no_grad()
def test_a_row_longer_than_the_configured_length_is_refused():
    model = small_model(max_position_embeddings=36)
    model(mesh_rows(1, faces=3))
    with pytest.raises(ValueError, match="45 tokens is longer than max_position_embeddings = 36"):
        model(mesh_rows(1, faces=4))
    cache = model(mesh_rows(1, faces=3), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="37 tokens is longer"):
        model(torch.tensor([[5]]), past_key_values=cache)


@pytest.mark.parametrize("given", ["input_ids", "inputs_embeds"])
def test_a_row_of_no_tokens_is_refused(model, given):
    empty = torch.zeros(1, 0, dtype=torch.long) if given == "input_ids" else torch.zeros(1, 0, 32)
    with pytest.raises(ValueError, match="no tokens"):
        model(**{given: empty})


@torch.no_grad()
def test_fresh_weights_have_the_configured_deviation_and_residual_projections_less():
    torch.manual_seed(0)
    model = IFlameForCausalLM(IFlameConfig(hidden_size=128, num_attention_heads=4, initializer_range=0.05))
    scaled = 0
    for name, parameter in model.named_parameters():
        if name.endswith((".o_proj.weight", ".down_proj.weight")):
            assert float(parameter.std()) == pytest.approx(0.05 / 48**0.5, rel=0.05), name
            scaled += 1
        elif parameter.dim() == 2:
            assert float(parameter.std()) == pytest.approx(0.05, rel=0.05), name
        else:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name
    assert scaled == 48


def add_noise(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("loader", [IFlameForCausalLM, AutoModel, AutoModelForCausalLM])
@torch.no_grad()
def test_weights_and_logits_survive_saving_and_loading(tmp_path, loader):
    model = add_noise(small_model(heads=6, hidden_size=48))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file() and not list(tmp_path.glob("*.bin"))
    loaded, report = loader.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is IFlameForCausalLM and not loaded.training
    assert not any(report.values()), report
    compare_tensors(model, loaded)
    rows = mesh_rows(2, faces=14)
    assert torch.equal(loaded(rows).logits, model(rows).logits)


def compare_tensors(model, loaded, dtype=torch.float32):
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(model, kind)()), dict(getattr(loaded, kind)())
        assert ours.keys() == theirs.keys()
        assert kind == "named_buffers" or len(ours) > 50
        for name, tensor in ours.items():
            assert theirs[name].dtype == dtype, name
            assert torch.equal(tensor.to(dtype), theirs[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_weights_may_be_loaded_in_half_precision(tmp_path, dtype):
    model = small_model()
    model.save_pretrained(tmp_path)
    loaded = IFlameForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    compare_tensors(model, loaded, dtype)
    rows = mesh_rows(2, faces=100)
    logits = loaded(rows).logits
    assert logits.dtype == dtype
    # casting in memory is the same as loading in that dtype: nothing else may be cast
    assert torch.equal(logits, copy.deepcopy(model).to(dtype)(rows).logits)
    assert relative_error(logits, model(rows).logits) < {torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]


@torch.no_grad()
def test_the_hourglass_without_its_head_loads_from_the_same_folder(tmp_path):
    model = add_noise(small_model())
    model.save_pretrained(tmp_path)
    base = IFlameModel.from_pretrained(tmp_path)
    compare_tensors(model.model, base)


@torch.no_grad()
def test_only_the_weights_that_a_checkpoint_lacks_are_drawn_anew(tmp_path):
    model = add_noise(small_model(hidden_size=64))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lacking = {
        "model.layers.2.self_attn.o_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.upsamplers.1.scale",
    }
    assert lacking < set(weights)
    kept = {name: tensor for name, tensor in weights.items() if name not in lacking}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = IFlameForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == lacking
    fresh = loaded.state_dict()
    assert all(torch.equal(fresh[name], tensor) for name, tensor in kept.items())
    assert float(fresh["model.layers.2.self_attn.o_proj.weight"].std()) == pytest.approx(0.02 / 12**0.5, rel=0.1)
    assert float(fresh["model.layers.1.mlp.up_proj.weight"].std()) == pytest.approx(0.02, rel=0.1)
    assert (fresh["model.layers.0.input_layernorm.weight"] == 1).all() and fresh["model.upsamplers.1.scale"] == 1


@torch.no_grad()
def test_a_model_may_be_dispatched_over_devices_block_by_block(tmp_path):
    pytest.importorskip("accelerate")
    model = small_model()
    model.save_pretrained(tmp_path / "model")
    rows = mesh_rows(2, faces=2)
    whole = IFlameForCausalLM.from_pretrained(tmp_path / "model", device_map={"": "cpu"})
    assert torch.equal(whole(rows).logits, model(rows).logits)
    # on a machine without a GPU the disk is the only other place
    places = dict.fromkeys(["model.embed_tokens", "model.embed_norm", "lm_head", "model.upsamplers.0"], "cpu")
    places |= {f"model.layers.{index}": "disk" if index in (1, 2, 4) else "cpu" for index in range(6)}
    places["model.upsamplers.1"] = "disk"
    split = IFlameForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert split.model.layers[1].self_attn.q_proj.weight.device.type == "meta"
    assert split.model.layers[0].self_attn.q_proj.weight.device.type == "cpu"
    assert torch.equal(split(rows).logits, model(rows).logits)
    ids = split.generate(rows, max_new_tokens=12, do_sample=False, eos_token_id=None, mesh_grammar=False)
    assert torch.equal(
        ids, model.generate(rows, max_new_tokens=12, do_sample=False, eos_token_id=None, mesh_grammar=False)
    )


def test_blocks_are_what_is_wrapped_and_never_split():
    accelerate = pytest.importorskip("accelerate")
    model = small_model()
    names = {type(module).__name__ for module in model.modules()}
    assert model._no_split_modules and set(model._no_split_modules) <= names
    policy_class = accelerate.utils.dataclasses.get_module_class_from_name(model, *model._no_split_modules)
    wrapped = [module for module in model.modules() if type(module) is policy_class]
    assert wrapped == list(model.model.layers)
    sizes = accelerate.utils.compute_module_sizes(model)
    sizes = sizes[0] if isinstance(sizes, tuple) else sizes
    places = accelerate.infer_auto_device_map(
        model,
        max_memory={0: sizes[""] // 2, "cpu": sizes[""] * 2},
        no_split_module_classes=model._no_split_modules,
    )
    # no block lies on two devices: no place is named for a part of one
    assert {"0", "cpu"} == {str(place) for place in places.values()}
    assert not [name for name in places if name.startswith("model.layers.") and name.count(".") > 2]


def test_the_published_shape_trains_a_step_and_generates():
    model = IFlameForCausalLM(small_config(**PUBLISHED))
    rows = mesh_rows(2, faces=2, end=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(rows, labels=rows).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(torch.log(torch.tensor(132.0)).item(), abs=0.5)
    assert losses[-1] < losses[0] - 0.1
    assert model.eval().generate(max_new_tokens=20, eos_token_id=None, mesh_grammar=False).shape == (1, 29)

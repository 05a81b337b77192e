"""The model in the hands of other libraries: adapters, quantisation, weights on several devices, exported graphs.

What needs a package that is not installed is skipped.
"""

import json

import accelerate
import pytest
import torch
from code_cache import own_code_cache  # noqa: F401
from small_models import PAD, mesh_rows, relative_error, small_model
from transformers import AutoModel, pipeline

from iflame_hf import IFlameForCausalLM, IFlameTokenizer, stream_faces

LAYERS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    small_model().save_pretrained(path)
    IFlameTokenizer().save_pretrained(path)
    return path


def continued(model, tokens=20):
    """Two prompts of three faces, and what the model likes best after them."""
    return model.generate(input_ids=mesh_rows(2, faces=3), max_new_tokens=tokens, do_sample=False, mesh_grammar=False)


@torch.no_grad()
def logits_of(model, ids=None):
    return model(input_ids=mesh_rows(2, faces=3) if ids is None else ids).logits.float()


def assert_same(model, other):
    assert relative_error(logits_of(model), logits_of(other)) < 1e-5
    tokens = continued(model)
    assert tokens.shape == (2, 56) and torch.equal(tokens, continued(other))


# Half precision


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)], ids=str)
def test_a_model_cast_to_half_precision_generates_what_the_other_one_finds_about_as_good(dtype, error):
    plain = small_model()
    half = small_model().half() if dtype is torch.float16 else small_model().bfloat16()
    assert half.dtype is dtype and relative_error(logits_of(half), logits_of(plain)) < error
    tokens = continued(half)
    likings = logits_of(plain, tokens)[:, 35:-1]
    chosen = likings.gather(-1, tokens[:, 36:, None])[..., 0]
    assert tokens.shape == (2, 56) and (likings.amax(dim=-1) - chosen < 10 * error * likings.std()).all()
    assert {
        type(each).__name__: each.state.dtype for each in half(tokens).past_key_values.layers if hasattr(each, "state")
    } == {"RecurrentState": torch.float32}


# Weights on several devices


def half_on_disk():
    blocks = {f"model.layers.{i}": "cpu" if i < LAYERS // 2 else "disk" for i in range(LAYERS)}
    return {
        "model.embed_tokens": "cpu",
        "model.embed_norm": "cpu",
        "model.upsamplers": "cpu",
        "lm_head": "cpu",
    } | blocks


@pytest.mark.parametrize(
    ("device_map", "options"),
    [
        ("auto", {}),
        ("cpu", {}),
        ("auto", {"max_memory": {"cpu": "200KB"}}),
        (half_on_disk(), {}),
        ({"model": "disk", "lm_head": "cpu"}, {}),
    ],
    ids=["auto", "cpu", "auto with little memory", "blocks on disk", "all on disk"],
)
def test_a_device_map_changes_no_token(device_map, options, folder, tmp_path):
    model = IFlameForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path, **options)
    devices = {parameter.device.type for parameter in model.parameters()}
    assert devices == ({"cpu"} if type(device_map) is str and not options else {"cpu", "meta"})
    assert_same(model, small_model())


@pytest.mark.parametrize("offload", ["disk_offload", "cpu_offload"])
def test_weights_that_accelerate_fetches_block_by_block_give_the_same_tokens(offload, tmp_path):
    model = small_model()
    if offload == "disk_offload":
        accelerate.disk_offload(model, tmp_path)
    else:
        accelerate.cpu_offload(model, "cpu")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert_same(model, small_model())


def test_the_pipeline_takes_a_device_map(folder, tmp_path):
    options = {"num_meshes": 2, "max_faces": 4, "seed": 0, "suppress_tokens": [131]}
    plain, spread = (
        pipeline("mesh-generation", model=str(folder), trust_remote_code=True, **each)(**options)
        for each in ({}, {"device_map": half_on_disk(), "model_kwargs": {"offload_folder": str(tmp_path)}})
    )
    assert len(plain) == 2 and [len(mesh.faces) for mesh in plain] != [0, 0]
    assert [mesh.vertices.tolist() for mesh in spread] == [mesh.vertices.tolist() for mesh in plain]


# Adapters


def lora(model, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4, **options)
    return peft.get_peft_model(model, config)


def test_lora_learns_and_is_saved_loaded_and_merged(folder, tmp_path):
    peft = pytest.importorskip("peft")
    model, ids = lora(IFlameForCausalLM.from_pretrained(folder)), mesh_rows(2, faces=3)
    assert_same(model.eval(), small_model())
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(4):
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.5
    model.eval().save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < (
        folder / "model.safetensors"
    ).stat().st_size

    loaded = peft.PeftModel.from_pretrained(IFlameForCausalLM.from_pretrained(folder), tmp_path / "adapter").eval()
    assert_same(loaded, model)
    assert_same(peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval(), model)
    merged = loaded.merge_and_unload()
    assert type(merged) is IFlameForCausalLM
    merged.save_pretrained(tmp_path / "merged")
    assert_same(IFlameForCausalLM.from_pretrained(tmp_path / "merged"), model)


def test_an_adapter_is_added_to_a_model_that_is_loaded(folder, tmp_path):
    integration = pytest.importorskip("transformers.integrations.peft")
    version = pytest.importorskip("packaging.version")
    peft = pytest.importorskip("peft")
    if version.parse(peft.__version__) < version.parse(integration.MIN_PEFT_VERSION):
        pytest.skip(f"this transformers adds adapters of peft {integration.MIN_PEFT_VERSION} and newer only")
    tuned = lora(IFlameForCausalLM.from_pretrained(folder), init_lora_weights=False).eval()
    tuned.save_pretrained(tmp_path)
    model = IFlameForCausalLM.from_pretrained(folder)
    model.load_adapter(str(tmp_path))
    assert_same(model, tuned)


def test_the_pipeline_and_streaming_take_a_model_with_an_adapter(folder):
    tuned = lora(AutoModel.from_pretrained(folder, trust_remote_code=True), init_lora_weights=False).eval()
    tokenizer = IFlameTokenizer()
    generator = pipeline("mesh-generation", model=tuned, tokenizer=tokenizer)
    meshes = generator(num_meshes=2, max_faces=4, seed=0, suppress_tokens=[131])
    assert [len(mesh.faces) > 0 for mesh in meshes] == [True, True]
    assert list(generator.stream(max_faces=4, seed=0, suppress_tokens=[131]))
    assert list(stream_faces(tuned, tokenizer, do_sample=True, max_new_tokens=36, suppress_tokens=[131]))


def test_prefix_tuning_is_refused_in_words():
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=9)
    with pytest.raises(ValueError, match="must be an IFlameCache"):
        peft.get_peft_model(small_model(), config)(input_ids=mesh_rows(1, faces=1))


# Quantisation


def with_weights_of(quantised):
    """The plain model with the weights that a quantised one stands for."""
    model, count = small_model(), 0
    with torch.no_grad():
        for name, module in quantised.named_modules():
            if isinstance(module, torch.nn.Linear) and type(module.weight) is not torch.nn.Parameter:
                model.get_submodule(name).weight.copy_(module.weight.dequantize())
                count += 1
    assert count >= 7 * LAYERS
    return model


def torchao_after_loading(folder):
    quantization = pytest.importorskip("torchao.quantization")
    model = IFlameForCausalLM.from_pretrained(folder)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def torchao_on_loading(folder):
    from transformers import TorchAoConfig

    config = pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig()
    return IFlameForCausalLM.from_pretrained(folder, quantization_config=TorchAoConfig(config))


def quanto_on_loading(folder):
    from transformers import QuantoConfig

    pytest.importorskip("optimum.quanto")
    return IFlameForCausalLM.from_pretrained(folder, quantization_config=QuantoConfig(weights="int8"))


@pytest.mark.parametrize("quantised", [torchao_after_loading, torchao_on_loading, quanto_on_loading])
def test_a_model_with_weights_of_eight_bits_is_the_one_with_these_weights(quantised, folder):
    model = quantised(folder).eval()
    assert 1e-3 < relative_error(logits_of(model), logits_of(small_model())) < 0.05
    assert_same(model, with_weights_of(model))


def test_a_model_with_weights_of_eight_bits_is_saved_and_loaded(folder, tmp_path):
    model = torchao_on_loading(folder)
    model.save_pretrained(tmp_path)
    assert "quantization_config" in json.loads((tmp_path / "config.json").read_text())
    assert_same(IFlameForCausalLM.from_pretrained(tmp_path), model)


# Graphs


def test_one_pass_is_exported_as_a_graph_and_one_with_a_cache_is_not():
    model, ids = small_model(stage_layers=(1, 0, 2, 0, 1)), mesh_rows(2, faces=2)
    graph = torch.export.export(model, (ids,), {"use_cache": False}).module()
    assert relative_error(graph(ids, use_cache=False).logits, logits_of(model, ids)) < 1e-6
    with pytest.raises((RuntimeError, AssertionError), match="IFlameCache"):
        torch.export.export(model, (ids,), strict=False)


@pytest.mark.slow
def test_one_pass_in_onnx_computes_the_same_logits_for_any_number_of_rows(tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    runtime = pytest.importorskip("onnxruntime")
    model, path = small_model(stage_layers=(1, 1, 1, 1, 1)), tmp_path / "model.onnx"
    torch.onnx.export(
        model,
        kwargs={"input_ids": mesh_rows(2, faces=9), "use_cache": False},
        f=path,
        dynamo=True,
        input_names=["input_ids"],
        output_names=["logits"],
        dynamic_shapes={"input_ids": {0: "rows"}, "use_cache": None},
    )
    session = runtime.InferenceSession(path)

    def run(ids):
        return torch.from_numpy(session.run(["logits"], {"input_ids": ids.numpy()})[0])

    for count in (1, 2, 5):
        ids = mesh_rows(count, faces=9, seed=count)
        assert relative_error(run(ids), logits_of(model, ids)) < 1e-5
    padded = torch.cat([ids[:, :40], torch.full((5, 50), PAD)], dim=1)
    assert relative_error(run(padded)[:, :40], logits_of(model, ids[:, :40])) < 1e-5, "shorter rows end in anything"


# What is not for this network


def test_continuous_batching_is_refused_in_words():
    with pytest.raises(ValueError, match="continuous batching.*several prompts to generate"):
        small_model().generate_batch(mesh_rows(2, faces=1).tolist(), max_new_tokens=9)

"""The network is that of the original code: weights made by a recipe, and what the original computes with them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from iflame_hf import IFlameForCausalLM
from training.convert_checkpoint import SKIP_WEIGHTS, STAGES, convert_checkpoint, convert_weights, load_original

DATA = np.load(Path(__file__).parent / "data" / "original_logits.npz")
CASES = ("power_of_two", "six_heads")
LAYERS = 24


def original_weights(hidden_size, seed):
    """Weights by the names of the original code, drawn in the order of their names."""
    hidden_units = int(8 / 3 * hidden_size)
    square, wide, high = (hidden_size,) * 2, (hidden_units, hidden_size), (hidden_size, hidden_units)
    block = {
        "attn.q_proj.weight": square,
        "attn.k_proj.weight": square,
        "attn.v_proj.weight": square,
        "attn.out_proj.weight": square,
        "feed_forward.proj1.weight": wide,
        "feed_forward.proj1.bias": (hidden_units,),
        "feed_forward.proj2.weight": wide,
        "feed_forward.proj2.bias": (hidden_units,),
        "feed_forward.proj3.weight": high,
        "feed_forward.proj3.bias": (hidden_size,),
        "norm1.weight": (hidden_size,),
        "norm2.weight": (hidden_size,),
    }
    shapes = {
        "embedding.weight": (132, hidden_size),
        "norm.weight": (hidden_size,),
        "output_proj.weight": (132, hidden_size),
        "output_proj.bias": (132,),
        SKIP_WEIGHTS: (2,),
    }
    for stage in STAGES:
        for index in range(4):
            shapes |= {f"{stage}.{index}.{name}": shape for name, shape in block.items()}
            if index < 3:
                shapes[f"{stage}.{index}.attn.rms_norm.weight"] = (hidden_size,)
    random, weights = np.random.RandomState(seed), {}
    for name in sorted(shapes):
        values = random.standard_normal(shapes[name])
        if name.endswith("bias"):
            values = 0.1 * values
        elif "norm" in name or name == SKIP_WEIGHTS:
            values = 1 + 0.1 * values
        elif name == "output_proj.weight":
            values = 0.2 * values / np.sqrt(hidden_size)
        elif name != "embedding.weight":
            values = values / np.sqrt(shapes[name][1])
        weights[name] = torch.from_numpy(values.astype(np.float32))
    return weights


@pytest.fixture(scope="module", params=CASES)
def case(request):
    def stored(name):
        return DATA[f"{request.param}/{name}"]

    weights = original_weights(int(stored("hidden_size")), int(stored("seed")))
    config, converted = convert_weights(weights, int(stored("heads")))
    model = IFlameForCausalLM(config).eval()
    model.load_state_dict(converted)
    return model, *(torch.from_numpy(stored(name)) for name in ("input_ids", "logits", "greedy"))


def in_pieces(model, input_ids, lengths):
    cache, pieces, first = None, [], 0
    for length in lengths:
        output = model(input_ids[:, first : first + length], past_key_values=cache, use_cache=True)
        cache, first = output.past_key_values, first + length
        pieces.append(output.logits)
    assert cache.get_seq_length() == first == input_ids.shape[1]
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("linear_attention", ["eager", "chunked"])
@pytest.mark.parametrize(
    "lengths",
    [[108], [90] + [1] * 18, [1] * 108, [13, 1, 5, 40, 2, 30, 17], [31, 77], [2] * 54],
    ids=["one pass", "prefill and steps", "steps", "uneven pieces", "ends inside a face", "twos"],
)
@torch.no_grad()
def test_logits_are_those_of_the_original_code(case, attention, linear_attention, lengths):
    model, input_ids, logits, _ = case
    model.set_attn_implementation(attention)
    model.config.linear_attn_implementation = linear_attention
    torch.testing.assert_close(in_pieces(model, input_ids.long(), lengths), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("linear_attention", ["eager", "chunked"])
def test_greedy_tokens_are_those_of_the_original_code(case, linear_attention):
    model, _, _, greedy = case
    model.config.linear_attn_implementation = linear_attention
    generated = model.generate(do_sample=False, max_new_tokens=90, eos_token_id=None, mesh_grammar=False)
    assert generated.tolist() == greedy.tolist()
    inside_a_face = model.generate(
        greedy[:, :31].long(), do_sample=False, max_new_tokens=68, eos_token_id=None, mesh_grammar=False
    )
    assert inside_a_face.tolist() == greedy.tolist()


def save_original(path, weights, prefix="_orig_mod.", **others):
    torch.save({"epoch": 1, "model_state_dict": {prefix + name: w for name, w in weights.items()}, **others}, path)
    return path


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", ""])
def test_a_checkpoint_file_becomes_a_folder_that_computes_the_same(tmp_path, case, prefix):
    model, input_ids, logits, _ = case
    hidden_size = model.config.hidden_size
    seed = {32: 1, 48: 2}[hidden_size]
    path = save_original(tmp_path / "original.pth", original_weights(hidden_size, seed), prefix)
    convert_checkpoint(path, tmp_path / "hub", model.config.num_attention_heads)
    loaded = IFlameForCausalLM.from_pretrained(tmp_path / "hub")
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids.long()).logits, logits, atol=1e-4, rtol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "original.pth"]
    with pytest.raises(FileExistsError, match="not empty"):
        convert_checkpoint(path, tmp_path / "hub", model.config.num_attention_heads)


def test_every_weight_is_used_once_and_none_is_left():
    weights = original_weights(32, 1)
    for number, tensor in enumerate(weights.values()):
        tensor.fill_(number)
    _, converted = convert_weights(weights, 4)
    assert sum(tensor.numel() for tensor in converted.values()) == sum(tensor.numel() for tensor in weights.values())
    marks = [float(tensor.flatten()[0]) for name, tensor in converted.items() if "upsamplers" not in name]
    assert sorted(marks) == sorted(set(marks)) and len(marks) == len(weights) - 1
    assert config_layers(converted) == LAYERS


def config_layers(converted):
    return len({name.split(".")[2] for name in converted if name.startswith("model.layers.")})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda w: w.pop("encoder_blocks.1.2.norm1.weight"), "missing or left over"),
        (lambda w: w.pop("embedding.weight"), "embedding.weight is missing"),
        (lambda w: w.update(extra=torch.zeros(1)), "no place in iFlame: extra"),
        (lambda w: w.update({"norm.weight": torch.zeros(7)}), "of shape"),
        (lambda w: w.update({"encoder_blocks.0.3.attn.rms_norm.weight": torch.ones(32)}), "not every|missing"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, damage, message):
    weights = original_weights(32, 1)
    damage(weights)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(save_original(tmp_path / "x.pth", weights), tmp_path / "out", 4)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]


def test_weights_of_another_model_are_refused():
    with pytest.raises(ValueError, match="not weights of the original iFlame code"):
        convert_weights({"layer.weight": torch.zeros(1)}, 4)


def test_a_wrong_number_of_heads_is_refused():
    with pytest.raises(ValueError, match="num_attention_heads"):
        convert_weights(original_weights(32, 1), 5)


class Trap:
    def __reduce__(self):
        return (print, ("code in the file ran",))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_text("not a checkpoint"), "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: torch.save({"weights": torch.zeros(1)}, path), "no 'model_state_dict'"),
        (lambda path: torch.save(torch.zeros(1), path), "no 'model_state_dict'"),
        (lambda path: torch.save({"model_state_dict": {}, "optimizer": Trap()}, path), "cannot be read"),
    ],
)
def test_a_foreign_file_is_refused_and_no_code_in_it_runs(tmp_path, capsys, make, message):
    make(tmp_path / "x.pth")
    with pytest.raises(ValueError, match=message):
        load_original(tmp_path / "x.pth")
    assert capsys.readouterr().out == ""


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        load_original(tmp_path / "nowhere.pth")

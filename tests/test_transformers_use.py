"""What users of transformers do with a causal model, done with this one."""

import copy
import pickle

import pytest
import torch
from small_models import PAD, mesh_rows, relative_error, small_config, small_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from iflame_hf import IFlameCache, IFlameForCausalLM


@pytest.mark.parametrize("use_cache", [True, False])
def test_padding_on_the_right_changes_no_logit_before_it(use_cache):
    model, ids = small_model(), mesh_rows(2, faces=3)
    mask = torch.ones_like(ids)
    mask[1, 18:] = 0
    padded = ids.masked_fill(mask == 0, PAD)
    with torch.no_grad():
        expected = model(ids).logits
        logits = model(padded, attention_mask=mask, use_cache=use_cache).logits
    torch.testing.assert_close(logits[0], expected[0])
    torch.testing.assert_close(logits[1, :18], expected[1, :18])


def test_a_row_padded_on_the_right_is_not_continued():
    model, ids = small_model(), mesh_rows(2, faces=2)
    mask = torch.ones_like(ids)
    mask[1, 18:] = 0
    with pytest.raises(ValueError, match="padding_side='left'"):
        model.generate(ids, attention_mask=mask, max_new_tokens=1, mesh_grammar=False)
    cache = IFlameCache(model.config)
    model(ids, attention_mask=mask, past_key_values=cache)
    with pytest.raises(ValueError, match="padding_side='left'"):
        model(ids[:, :1], past_key_values=cache)
    cache.reset()
    assert model(ids[:, :1], past_key_values=cache).logits.shape[:2] == (2, 1)


def test_tokens_after_a_filled_cache_are_neither_padding_nor_another_mesh():
    model, ids = small_model(), mesh_rows(2, faces=2)
    counting = torch.arange(27).expand(2, -1)
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0

    def continued(**inputs):
        cache = IFlameCache(model.config)
        model(ids[:, :18], past_key_values=cache)
        return model(ids[:, 18:], past_key_values=cache, **inputs).logits

    with torch.no_grad():
        expected = model(ids).logits[:, 18:]
        torch.testing.assert_close(
            continued(position_ids=counting[:, 18:], attention_mask=mask.clamp(min=1)), expected
        )
    with pytest.raises(ValueError, match="cannot be padding"):
        continued(attention_mask=mask)
    with pytest.raises(ValueError, match="count on"):
        continued(position_ids=counting[:, :9])


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_a_prompt_may_end_anywhere_in_its_first_face_after_padding_or_another_mesh(kind):
    model, alone = small_model(), mesh_rows(1, faces=2)
    before = torch.full((1, 18), PAD) if kind == "padded" else mesh_rows(1, faces=1, seed=1)
    ids = torch.cat([before, alone], dim=1)
    options = {
        "padded": {"attention_mask": (torch.arange(45) >= 18)[None].long()},
        "packed": {"position_ids": torch.cat([torch.arange(18), torch.arange(27)])[None]},
    }[kind]
    with torch.no_grad():
        expected = model(alone).logits
        for first in range(19, 28):
            cache = IFlameCache(model.config)
            model(ids[:, :first], **{name: each[:, :first] for name, each in options.items()}, past_key_values=cache)
            logits = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(first, 45)]
            assert relative_error(torch.cat(logits, dim=1), expected[:, first - 18 :]) < 1e-5, f"split at {first}"


def test_the_trainer_trains_evaluates_and_saves(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in mesh_rows(8, faces=3)]
    model = small_model()
    with torch.no_grad():
        before = model(mesh_rows(8, faces=3), labels=mesh_rows(8, faces=3)).loss.item()
    losses = []

    class Record(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            losses.extend([logs["loss"]] if "loss" in logs else [])

    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=default_data_collator,
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=[Record()],
    )
    trainer.train()
    # The first step's loss is the mean over all eight rows: the number of labels reaches the model.
    assert losses[0] == pytest.approx(before, rel=1e-3) and losses[-1] < losses[0]
    metrics, predictions = trainer.evaluate(), trainer.predict(rows).predictions
    assert metrics["eval_loss"] < before and predictions.shape == (8, 36, 132)
    loaded = IFlameForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    with torch.no_grad():
        logits = loaded(mesh_rows(8, faces=3)).logits
    assert relative_error(logits, torch.from_numpy(predictions)) < 1e-5


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
def test_the_auto_classes_build_a_model_from_its_configuration(auto):
    model = auto.from_config(small_config(), attn_implementation="eager", dtype=torch.bfloat16)
    assert type(model) is IFlameForCausalLM and model.dtype is torch.bfloat16
    assert model.config._attn_implementation == "eager"


def test_attention_implementations_are_chosen_on_loading_and_changed_later(tmp_path):
    small_model().save_pretrained(tmp_path)
    model = IFlameForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    ids = mesh_rows(1, faces=2)
    with torch.no_grad():
        eager = model(ids, output_attentions=True)
        model.set_attn_implementation("sdpa")
        with pytest.warns(UserWarning, match="computes no attention weights"):
            sdpa = model(ids, output_attentions=True)
    assert len(eager.attentions) == 3 and not sdpa.attentions
    assert relative_error(sdpa.logits, eager.logits) < 1e-5
    with pytest.raises(ValueError, match="nonsense"):
        model.set_attn_implementation("nonsense")


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_models_and_caches_are_copied_whole(copied):
    model, ids = small_model(), mesh_rows(2, faces=2)
    other = copied(model)
    with torch.no_grad():
        outputs = model(ids[:, :20])
        cache = copied(outputs.past_key_values)
        expected = model(ids[:, 20:], past_key_values=outputs.past_key_values).logits
        torch.testing.assert_close(other(ids[:, 20:], past_key_values=cache).logits, expected, rtol=0, atol=0)
    other.set_attn_implementation("eager")
    assert model.config._attn_implementation == "sdpa"


def test_the_vocabulary_can_grow_and_shrink_down_to_the_special_tokens(tmp_path):
    model, ids = small_model(), mesh_rows(1, faces=2)
    with torch.no_grad():
        expected = model(ids).logits
        model.resize_token_embeddings(140)
        grown = model(ids).logits
        model.save_pretrained(tmp_path)
        loaded = IFlameForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(ids).logits, grown)
        assert grown.shape[-1] == loaded.config.vocab_size == 140 and relative_error(grown[..., :132], expected) < 1e-6
        model.resize_token_embeddings(132)
        assert relative_error(model(ids).logits, expected) < 1e-6
    with pytest.raises(ValueError, match="at least 132"):
        model.resize_token_embeddings(131)


def test_embeddings_are_found_and_replaced():
    model = small_model()
    assert model.get_input_embeddings() is model.model.embed_tokens and model.get_output_embeddings() is model.lm_head
    embedding, head = torch.nn.Embedding(132, 32), torch.nn.Linear(32, 132)
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(head)
    assert model.model.get_input_embeddings() is embedding and model.lm_head is head


def test_a_long_prompt_may_be_read_in_pieces():
    model, ids = small_model(), mesh_rows(2, faces=3)[:, :31]
    whole = model.generate(ids, max_new_tokens=10, do_sample=False, mesh_grammar=False)
    torch.testing.assert_close(
        model.generate(ids, max_new_tokens=10, do_sample=False, prefill_chunk_size=5, mesh_grammar=False), whole
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_loaded_in_half_precision_generates(tmp_path, dtype):
    small_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, linear_attn_implementation="chunked")
    assert model.dtype is dtype and model.config.linear_attn_implementation == "chunked"
    ids = model.generate(max_new_tokens=19, do_sample=False)
    assert ids.shape[0] == 1 and 9 < ids.shape[1] <= 28

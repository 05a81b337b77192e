"""Peers learn the same meshes and are judged by the same labels."""

import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
from prepared_fixtures import write_rows
from transformers import LlamaForCausalLM

from benchmarks import peer_llama, peer_original, peers
from benchmarks.peer_training import Output, cut_at_end, judge, labels_in_epoch
from iflame_hf import IFlameTokenizer
from training import train
from training.arguments import parse_arguments
from training.evaluation.samples import read_sets
from training.optim.schedule import learning_rate_curve
from training.rows.pack import pack, row_inputs

ORIGINAL = os.environ.get("IFLAME_ORIGINAL")
TINY = "--num_samples 3 --sample_rows 2 --max_faces 4 --device cpu".split()
ROWS = "--row_length 180 --per_device_train_batch_size 2 --dataloader_num_workers 0 --logging_steps 3".split()
NETWORK = "--hidden_size 32 --num_attention_heads 2 --stage_layers 1 1 2 1 1".split()
HELD_OUT_FACES = [4] * 3 + [11] * 2
HELD_OUT_LABELS = sum(9 * (faces + 1) for faces in HELD_OUT_FACES)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve meshes to learn, five held out."""
    folder = tmp_path_factory.mktemp("meshes")
    (folder / "data").mkdir()
    write_rows(folder / "data" / "train-00000.parquet", 12, 5)
    write_rows(folder / "data" / "validation-00000.parquet", 3, 4)
    write_rows(folder / "data" / "validation-00001.parquet", 2, 11)
    return folder


def words(data, out, peer, *more, rows=ROWS):
    return ["--data", str(data), "--out", str(out), "--peer", peer, *TINY, *more, "--train_options", *rows]


class Undecided(torch.nn.Module):
    """All tokens are as likely as any other, and 5 is the first of the likeliest."""

    def forward(self, input_ids, layout, use_cache):
        logits = torch.zeros(*input_ids.shape, 132)
        logits[..., 5] = 1e-6
        return Output(None, logits)


def test_all_peers_are_judged_by_the_coordinates_and_end_faces_of_the_same_meshes(data, tmp_path):
    options = peers.read_options(words(data, tmp_path, "llama", "--tokens", "1"))
    found, layouts = [], []
    for reversed_winding in (False, True):
        arguments, accelerator, tokenizer, rows = peers.begin(peers.train_words(options, {}), reversed_winding)
        if reversed_winding:
            rows = peer_original.one_mesh_a_row(rows, 0, 2)
            assert rows.rows.rows_in_epoch == 12
            learnt = next(rows.rows.batches([], 12))[0]["input_ids"]
            assert (learnt[:, :9] == 130).all() and ((learnt[:, ::9] == 130).sum(dim=1) == 1).all()
        found.append(judge(Undecided(), rows, tokenizer, accelerator))
        layouts.append([batch["input_ids"] for batch in rows.validation_loader])
        assert labels_in_epoch(rows) == 12 * 9 * 6
    packed, alone = found
    assert packed["labels"] == alone["labels"] == HELD_OUT_LABELS and packed["meshes"] == alone["meshes"] == 5
    for each in found:
        assert each["loss"] == pytest.approx(math.log(132), abs=1e-5)
        assert each["bits_per_face"] == pytest.approx(math.log2(132) * HELD_OUT_LABELS / sum(HELD_OUT_FACES), abs=1e-3)
    starts = [sum(int((ids[:, ::9] == 130).sum()) for ids in batches) for batches in layouts]
    assert starts == [5, 5] and all((ids[:, :9] == 130).all() for ids in layouts[1])
    # The most meshes of a row is one; the second and the third vertex are swapped.
    assert all((ids[:, ::9] == 130).sum(dim=1).max() == 1 for ids in layouts[1])
    ours, theirs = ({tuple(face) for ids in batches for face in ids.view(-1, 9).tolist()} for batches in layouts)
    assert {face[:3] + face[6:] + face[3:6] for face in theirs} == ours != theirs


@pytest.mark.parametrize("attention", ["sdpa", peer_llama.TORCH_VARLEN, "flash_attention_2"])
def test_meshes_of_a_row_do_not_see_each_other(attention):
    torch.manual_seed(0)
    tokenizer, arguments = IFlameTokenizer(), parse_arguments(["--row_length", "180"])
    network = peer_llama.build_network(tokenizer, arguments, 32, 2, heads=2).double()
    random = torch.Generator().manual_seed(1)
    sequences = [
        torch.cat([torch.full((9,), 130), torch.randint(129, (9 * faces,), generator=random), torch.full((9,), 131)])
        for faces in (5, 2, 3, 7)
    ]
    rows = row_inputs(
        pack([[s.numpy() for s in row] for row in (sequences[:3], sequences[3:])], 180, tokenizer), tokenizer
    )
    model = peer_llama.PackedLlama(network, "sdpa" if attention == "flash_attention_2" else attention)
    model.attention = attention  # flash attention's laid end to end, which sdpa computes too
    labels = int((rows["labels"] != -100).sum())
    loss = model(**rows, num_items_in_batch=torch.tensor(labels)).loss
    network.set_attn_implementation("eager")
    total = 0.0
    for ids in sequences:
        own = torch.where(torch.arange(len(ids)) < 9, -100, ids)[None]
        total += network(ids[None], labels=own).loss.item() * (len(ids) - 9)
    assert labels == sum(len(ids) - 9 for ids in sequences)
    assert loss.item() == pytest.approx(total / labels, rel=1e-6)


@pytest.mark.parametrize("parameters", [16e6, 19e6, 75.7e6])
def test_a_llama_has_about_as_many_parameters_as_asked_for(parameters):
    tokenizer = IFlameTokenizer()
    width, layers = peer_llama.choose_sizes(parameters, tokenizer.vocab_size)
    with torch.device("meta"):
        network = peer_llama.build_network(tokenizer, parse_arguments(["--row_length", "180"]), width, layers)
    assert isinstance(network, LlamaForCausalLM) and 32 <= width / layers <= 64
    assert peers.count_parameters(network) == pytest.approx(parameters, rel=0.03)


def test_the_originals_schedule_is_its_cosine_to_its_own_least_rate():
    script = SimpleNamespace(args=SimpleNamespace(batch_size=48, lr=1e-3, min_lr=1.28e-6))
    recipe = peer_original.recipe(script, is_cuda=True)
    arguments = parse_arguments([word for name, value in recipe.items() for word in (f"--{name}", value)])
    options = arguments.train
    assert options.fp16 and not options.bf16 and options.per_device_train_batch_size == 48
    curve = learning_rate_curve(options.lr_scheduler_type, options.warmup_steps, 200, arguments.schedule_kwargs())
    for step in range(201):
        if step < 20:
            expected = 1e-3 * step / 20
        else:
            expected = 1.28e-6 + (1e-3 - 1.28e-6) * 0.5 * (1 + math.cos(math.pi * (step - 20) / 180))
        assert options.learning_rate * curve(step) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_samples_end_at_their_first_end_token_and_decode_to_the_mesh_before_it():
    tokenizer = IFlameTokenizer()
    start, face, end = [130] * 9, [1, 2, 3, 4, 5, 6, 7, 8, 90], [131] + [129] * 8
    tokens = torch.tensor([start + face + end, start + face + face[::-1]])
    ended, cut = cut_at_end(tokens, 4, 0, tokenizer)
    assert (ended.number, ended.ended, len(ended.ids)) == (4, True, 19)
    assert (cut.number, cut.ended, len(cut.ids)) == (5, False, 27)
    assert [len(tokenizer.decode_mesh(each.ids).faces) for each in (ended, cut)] == [1, 2]


def require_figures(figures, data, out):
    assert (figures["held_out"]["meshes"], figures["held_out"]["labels"]) == (5, HELD_OUT_LABELS)
    assert 0 < figures["useful_tokens_per_second"] < figures["tokens_per_second"]
    assert figures == json.loads((out / "peer.json").read_text())
    (samples,) = read_sets(out / "samples", 3, 1, 0, 128)
    assert samples.count == figures["samples"]["meshes"] == 3


@pytest.fixture(scope="module")
def llama(data, tmp_path_factory):
    """The folder of a Llama's run of one and a half passes, and its figures."""
    out = tmp_path_factory.mktemp("llama")
    tokens = 1.5 * 12 * 9 * 6
    more = ("--tokens", str(tokens), "--width", "32", "--layers", "1", "--heads", "2", "--learning_rate", "0.01")
    return out, peers.run_peer(peers.read_options(words(data, out, "llama", *more)))


def test_a_llama_is_trained_judged_and_sampled(data, llama):
    out, figures = llama
    require_figures(figures, data, out)
    # Rows of 20 faces hold two meshes of seven: an epoch has six, three steps of two rows.
    assert (figures["steps"], figures["epochs"]) == (4, pytest.approx(8 / 6))
    assert figures["labels"] == 8 * 2 * 54 and figures["tokens"] == 8 * 180
    assert figures["held_out"]["loss"] < math.log(132)
    assert [json.loads(line)["step"] for line in (out / "run" / "log.jsonl").read_text().splitlines()] == [3, 4]


def test_what_was_trained_is_told_though_sampling_fails(data, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "write_samples", lambda *_: next(iter([])))
    more = ("--tokens", "648", "--width", "32", "--layers", "1", "--heads", "2")
    with pytest.raises(StopIteration):
        peers.run_peer(peers.read_options(words(data, tmp_path, "llama", *more)))
    figures = json.loads((tmp_path / "peer.json").read_text())
    assert figures["held_out"]["labels"] == HELD_OUT_LABELS and figures["labels"] >= 648
    assert "samples" not in figures


def test_a_run_of_train_py_is_judged_as_it_judges_itself(data, llama, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers.launching, "run_program", lambda command, said, limit: train.main(command[2:]))
    more = [*ROWS, *NETWORK]
    assert peers.main(words(data, tmp_path, "iflame", "--tokens", "1296", rows=more)) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    require_figures(figures, data, tmp_path.resolve())
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    (own,) = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert figures["held_out"]["loss"] == pytest.approx(own, rel=1e-5)
    assert figures["steps"] == 6 and figures["labels"] == 12 * 2 * 54

    paths = [str(llama[0] / "peer.json"), str(tmp_path / "peer.json")]
    assert peers.main(["--table", *paths]) == 0
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len({len(line) for line in table}) == 1 and [line[0] for line in table[2:]] == ["| llama", "| iflame"]

    (tmp_path / "peer.json").write_text(json.dumps({**figures, "held_out": {**figures["held_out"], "labels": 7}}))
    assert peers.main(["--table", *paths]) == 1
    assert "judged by different labels" in capsys.readouterr().err


@pytest.mark.skipif(ORIGINAL is None, reason="IFLAME_ORIGINAL names no folder of the original code")
def test_the_original_is_trained_judged_and_sampled(data, tmp_path):
    more = ("--tokens", "432", "--reference", ORIGINAL)
    network = [*ROWS, *NETWORK[:4]]
    figures = peers.run_peer(peers.read_options(words(data, tmp_path, "original", *more, rows=network)))
    require_figures(figures, data, tmp_path)
    # One mesh of seven faces in each row of twenty.
    assert figures["steps"] == 4 and figures["labels"] == 8 * 54 and figures["rows"] == 2


@pytest.mark.parametrize(
    ("more", "rows", "message"),
    [
        ([], ROWS, "give --minutes or --tokens"),
        (["--tokens", "5", "--minutes", "1"], ROWS, "give --minutes or --tokens"),
        (["--tokens", "-5"], ROWS, "--tokens must be above 0, got -5"),
        (["--tokens", "5"], [*ROWS, "--ema_decay", "0.9"], "not all of them know --ema_decay"),
        (["--tokens", "5"], [*ROWS, "--attn_implementation", "flex"], "must be sdpa, torch_varlen"),
        (["--tokens", "5", "--data", "nowhere"], ROWS, "nowhere has no data/train-*.parquet"),
        (["--tokens", "5", "--peer", "original"], ROWS, "--peer original needs --reference"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_plain_words(data, tmp_path, capsys, more, rows, message):
    try:
        status = peers.main(words(data, tmp_path, "llama", *more, rows=rows))
    except SystemExit as end:
        status = end.code
    assert status in (1, 2) and message in capsys.readouterr().err.splitlines()[-1]

"""Options from a yaml file and the command line."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import Accelerator
from small_models import small_model

from iflame_hf import IFlameTokenizer
from training.arguments import parse_arguments
from training.run import create
from training.run.create import create_accelerator, sampling_settings

CONFIGS = Path(__file__).resolve().parents[1] / "training" / "configs"


def create_model(arguments):
    return create.create_model(arguments, Accelerator(cpu=True))


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


def error_of(capsys, *argv):
    with pytest.raises(SystemExit) as caught:
        parse_arguments(list(argv))
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_without_arguments_it_is_the_demo():
    assert parse_arguments([]).to_dict() == parse_arguments([str(CONFIGS / "demo.yaml")]).to_dict()
    assert parse_arguments([]).to_dict() != parse_arguments(["--seed", "42"]).to_dict()


@pytest.mark.parametrize(("name", "parameters"), [("demo", 2_405_758), ("published", 75_732_598)])
def test_the_configurations_make_models_of_these_sizes(name, parameters):
    _, model = create_model(parse_arguments([str(CONFIGS / f"{name}.yaml")]))
    assert model.num_parameters() == parameters


def test_the_command_line_goes_before_the_file(tmp_path):
    text = """
        learning_rate: 1e-3
        max_steps: 7
        stage_layers: [1, 2, 3, 2, 1]
        bf16: true
        scale_augmentation: 0
        save_total_limit: null
        lr_scheduler_kwargs: {min_lr_rate: 0.1}
    """
    arguments = parse_arguments([write(tmp_path, text), "--max_steps", "9", "--row-length", "180"])
    assert arguments.train.learning_rate == 1e-3 and arguments.train.max_steps == 9
    assert arguments.model.stage_layers == [1, 2, 3, 2, 1]
    assert arguments.train.bf16 is True and arguments.data.scale_augmentation == 0
    assert arguments.schedule_kwargs() == {"min_lr_rate": 0.1}
    assert arguments.data.row_length == 180 and arguments.train.save_total_limit is None
    assert parse_arguments(["--no_shift_augmentation"]).data.shift_augmentation is False


def test_values_of_the_file_have_the_types_of_their_options(tmp_path):
    text = 'learning_rate: 1e-3\nweight_decay: 1\nbf16: "no"\nfp16: "yes"\ntrain_file: a\nrun_name: 5\nseed: "7"'
    arguments = parse_arguments([write(tmp_path, text)])
    train = arguments.train
    found = [train.learning_rate, train.weight_decay, train.bf16, train.fp16, train.run_name, train.seed]
    assert found == [1e-3, 1.0, False, True, "5", 7]
    assert [type(value) for value in found] == [float, float, bool, bool, str, int]
    assert arguments.data.train_file == ["a"]
    assert arguments.given == {*("learning_rate", "weight_decay", "bf16", "fp16", "train_file", "run_name", "seed")}


def test_null_in_the_file_is_no_value_where_an_option_needs_none(tmp_path):
    path = write(tmp_path, "save_total_limit: null\nmax_minutes: null\ntrain_file: ~\n")
    train = parse_arguments([path]).train
    assert train.save_total_limit is None and train.max_minutes is None
    assert parse_arguments([path, "--save_total_limit", "2"]).train.save_total_limit == 2
    assert parse_arguments(["--seed", "1"]).train.save_total_limit == 3, "what a file says is for its own run"


def test_steps_or_epochs_on_the_command_line_are_taken_whatever_the_file_says_of_the_end(tmp_path):
    path = write(tmp_path, "max_steps: 2000\nmax_minutes: 8\nrequired_eval_loss: 0.1\n")

    def end(*argv):
        train = parse_arguments([path, *argv]).train
        return train.max_steps, train.max_minutes, train.required_eval_loss

    assert end() == (2000, 8, 0.1) and end("--seed", "1") == (2000, 8, 0.1)
    assert end("--max_steps", "500") == end("--max-steps=500") == (500, None, None)
    assert end("--max_steps", "500", "--max_minutes", "3") == (500, 3, None)
    assert end("--max_steps", "500", "--required-eval-loss", "2") == (500, None, 2)
    assert end("--num_train_epochs", "2") == end("--num-train-epochs=2") == (-1, None, None)
    assert end("--num_train_epochs", "2", "--max_steps", "500") == (500, None, None)
    assert end("--max_minutes", "20") == (2000, 20, 0.1)
    assert end("--train_file", "a.parquet") == (2000, 8, None), "the loss is one of other meshes"


def test_every_option_is_in_the_dictionary_that_checkpoints_keep():
    named = parse_arguments(["--hidden_size", "64", "--train_file", "a", "b", "--seed", "3"]).to_dict()
    assert (named["hidden_size"], named["train_file"], named["seed"]) == (64, ["a", "b"], 3)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lerning_rate", "1"], "no such option: --lerning_rate (did you mean learning_rate?)"),
        (["--max_steps", "many"], "invalid int value: 'many'"),
        (["--row_length", "100"], "row_length must be a multiple of nine"),
        (["--bf16", "--fp16"], "bf16 and fp16"),
        (["--max_steps", "0"], "nothing to train"),
        (["--logging_steps", "0"], "logging_steps must be at least 1"),
        (["--lr_scheduler_kwargs", "{min: 1}"], "lr_scheduler_kwargs must be JSON"),
        (["--lr_scheduler_kwargs", "[1]"], "lr_scheduler_kwargs must be a JSON object"),
        (["--validation_file", "a.parquet"], "needs a train_file"),
        (["--long_meshes", "shorten"], "invalid choice: 'shorten'"),
        (["--save_steps", "-1"], "save_steps must be at least 0"),
        (["--warmup_steps", "-3"], "warmup_steps must be at least 0"),
        (["--max_train_samples", "0"], "max_train_samples must be at least 1"),
        (["--dataloader_num_workers", "-1"], "dataloader_num_workers must be at least 0"),
        (["--ema_decay", "2"], "ema_decay must lie between 0 and 1"),
        (["--load_best_model_at_end", "--eval_steps", "3", "--save_steps", "5"], "a multiple of eval_steps"),
        (["--load_best_model_at_end", "--save_steps", "0"], "an evaluation of every checkpoint"),
        (["--required_eval_loss", "0"], "required_eval_loss must be above 0"),
        (["--required_eval_loss", "1", "--num_procedural_validation_meshes", "0"], "needs held-out meshes"),
        (["--required_eval_loss", "1", "--train_file", "a.parquet"], "needs held-out meshes"),
        (["nowhere.yaml"], "no configuration file nowhere.yaml"),
    ],
)
def test_what_makes_no_sense_is_said_in_a_line(capsys, argv, message):
    assert message in error_of(capsys, *argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "no such option: learning_rat (did you mean learning_rate?)"),
        ("- learning_rate", "lines of the form"),
        ("a: [1", "is not valid yaml"),
        ("max_steps: many", "config.yaml: max_steps: invalid int value: 'many'"),
        ("hidden_size: 1.5", "config.yaml: hidden_size: invalid int value: '1.5'"),
        ("hidden_size: true", "config.yaml: hidden_size: invalid int value: 'True'"),
        ("hidden_size: [64]", "config.yaml: hidden_size: one value is expected, got [64]"),
        ("stage_layers: [1, two]", "config.yaml: stage_layers: invalid int value: 'two'"),
        ("report_to: []", "config.yaml: report_to: expected at least one value"),
        ("output_dir: {a: 1}", "config.yaml: output_dir: one value is expected, got {'a': 1}"),
        ("bf16: maybe", "config.yaml: bf16: Truthy value expected: got maybe"),
        ("optim: sgd", "config.yaml: optim: invalid choice: 'sgd' (choose from 'muon', 'adamw_torch')"),
        ("max_steps: null", "max_steps cannot be null: give a value, or leave the line out"),
        ("seed:", "seed cannot be null"),
        ("bf16: no\nseed: 1\nbf16: yes", "is not valid yaml: bf16 is given twice"),
    ],
)
def test_a_fault_in_the_file_is_named(tmp_path, capsys, text, message):
    assert message in error_of(capsys, write(tmp_path, text))


def test_a_tracker_that_is_missing_or_unknown_is_told_before_anything_is_done(tmp_path):
    for name, message in (("aim", "pip install aim"), ("nonsense", "report_to must be none or some of all, aim")):
        arguments = parse_arguments([f"--output_dir={tmp_path}", "--report_to", name])
        with pytest.raises(ValueError, match=message):
            create_accelerator(arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small"
    small_model().save_pretrained(folder)
    IFlameTokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--hidden_size", "128"], "--hidden_size 128 (its own is 32)"),  # the value that it has without being given
        (["--num_attention_heads", "2"], "--num_attention_heads 2 (its own is 4)"),
        (["--stage_layers", "2", "2", "4", "2", "2"], "--stage_layers 2 2 4 2 2 (its own is 1 1 2 1 1)"),
        (["--intermediate_size=100"], "--intermediate_size 100 (its own is 85)"),
        (["--full-attention-interval", "4"], "--full_attention_interval 4 (its own is 2)"),
        (["--initializer_range", "0.5"], "--initializer_range 0.5 (its own is 0.02)"),
        (["--up_axis", "z"], "--up_axis z (its own is y)"),
    ],
)
def test_a_size_that_is_not_that_of_the_model_to_start_from_is_refused(model, given, message):
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        create_model(parse_arguments(["--model_name_or_path", str(model), *given]))
    assert str(model) in str(refused.value)


@pytest.mark.parametrize("row_length", [918, 144_018])
def test_a_mesh_may_be_as_long_as_a_row(model, row_length):
    for start in (["--hidden_size", "32"], ["--model_name_or_path", str(model)]):
        _, made = create_model(parse_arguments([*start, "--row_length", str(row_length)]))
        assert made.config.max_position_embeddings == max(90_000, row_length)


def test_sizes_of_a_file_count_as_given_and_those_of_the_model_itself_are_no_contradiction(model, tmp_path):
    start = ["--model_name_or_path", str(model)]
    with pytest.raises(ValueError, match="hidden_size 64 .*num_attention_heads 8 "):
        create_model(parse_arguments([write(tmp_path, "hidden_size: 64\nnum_attention_heads: 8"), *start]))
    own = "hidden_size: 32\nstage_layers: [1, 1, 2, 1, 1]\nmax_train_samples: null\nup_axis: y"
    for argv in (start, [write(tmp_path, own), "--num_attention_heads", "4", *start]):
        assert create_model(parse_arguments(argv))[1].config.hidden_size == 32


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("outputs/nope", "there is no folder outputs/nope"),
        ("./smal", "there is no folder ./smal (did you mean small?)"),
        ("small/config.json", "small/config.json is a file"),
        (".", ". holds no model"),
    ],
)
def test_a_model_that_can_only_be_a_folder_and_is_none_is_refused_at_once(model, monkeypatch, name, message):
    monkeypatch.chdir(model.parent)
    with pytest.raises(OSError, match=re.escape(message)):
        create_model(parse_arguments(["--model_name_or_path", name]))


def test_a_model_of_another_kind_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="is no iFlame model: its model_type is 'llama'"):
        create_model(parse_arguments(["--model_name_or_path", str(tmp_path)]))


@pytest.mark.skipif(sys.platform != "linux", reason="torch has another OpenMP there")
@pytest.mark.parametrize(("given", "spins"), [({}, "1500"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_threads_that_wait_for_one_another_soon_sleep(given, spins):
    """As OpenMP itself says when torch loads it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment |= {"OMP_DISPLAY_ENV": "verbose", **given}
    script = CONFIGS.parent / "train.py"
    said = subprocess.run([sys.executable, script, "--help"], env=environment, capture_output=True, text=True)
    assert f"GOMP_SPINCOUNT = '{spins}'" in said.stderr and said.returncode == 0


def test_a_model_to_start_from_is_sampled_as_its_folder_says_where_no_option_says_otherwise():
    model = small_model()
    fresh = sampling_settings(parse_arguments(["--top_p", "0.7"]), model)
    assert fresh == {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 0.7}
    began_from = parse_arguments(["--model_name_or_path", "somewhere", "--top_k", "5"])
    assert sampling_settings(began_from, model) == {**fresh, "top_k": 5, "top_p": 0.95}, "it says nothing of sampling"
    model.generation_config.update(do_sample=True, top_p=0.9, closing_strength=3.0)
    assert sampling_settings(began_from, model) == {"do_sample": True, "top_k": 5}

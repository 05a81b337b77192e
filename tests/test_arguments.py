"""Options from a yaml file and the command line."""

from pathlib import Path

import pytest

from training.arguments import parse_arguments
from training.create import create_accelerator, create_model

CONFIGS = Path(__file__).resolve().parents[1] / "training" / "configs"


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


def test_options_alone_need_no_file():
    assert parse_arguments(["--seed", "7"]).train.seed == 7


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
        scale_augmentation: false
        save_total_limit: null
        lr_scheduler_kwargs: {min_lr_rate: 0.1}
    """
    arguments = parse_arguments([write(tmp_path, text), "--max_steps", "9", "--row-length", "180"])
    assert arguments.train.learning_rate == 1e-3 and arguments.train.max_steps == 9
    assert arguments.model.stage_layers == [1, 2, 3, 2, 1]
    assert arguments.train.bf16 is True and arguments.data.scale_augmentation is False
    assert arguments.schedule_kwargs() == {"min_lr_rate": 0.1}
    assert arguments.data.row_length == 180 and arguments.train.save_total_limit is None
    assert parse_arguments(["--no_shift_augmentation"]).data.shift_augmentation is False


def test_null_in_the_file_is_no_value_where_an_option_needs_none(tmp_path):
    path = write(tmp_path, "save_total_limit: null\nmax_minutes: null\ntrain_file: ~\n")
    train = parse_arguments([path]).train
    assert train.save_total_limit is None and train.max_minutes is None
    assert parse_arguments([path, "--save_total_limit", "2"]).train.save_total_limit == 2
    assert parse_arguments(["--seed", "1"]).train.save_total_limit == 3, "what a file says is for its own run"


def test_steps_on_the_command_line_are_taken_whatever_the_file_says_of_the_end(tmp_path):
    path = write(tmp_path, "max_steps: 2000\nmax_minutes: 8\nrequired_eval_loss: 0.1\n")

    def end(*argv):
        train = parse_arguments([path, *argv]).train
        return train.max_steps, train.max_minutes, train.required_eval_loss

    assert end() == (2000, 8, 0.1) and end("--seed", "1") == (2000, 8, 0.1)
    assert end("--max_steps", "500") == end("--max-steps=500") == (500, None, None)
    assert end("--max_steps", "500", "--max_minutes", "3") == (500, 3, None)
    assert end("--max_steps", "500", "--required-eval-loss", "2") == (500, None, 2)
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
        ("max_steps: many", "invalid int value: 'many'"),
        ("bf16: maybe", "bf16"),
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

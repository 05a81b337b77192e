"""The model in the repository, models/iflame-artist: small, whole, and with the code that is here."""

from pathlib import Path

from huggingface_hub import ModelCard

from hub_upload import published_files, saved_dtype
from iflame_hf import IFlameConfig
from training.run.card import sections_of

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "models" / "iflame-artist"


def test_its_code_is_that_of_the_project():
    ours, its = ({path.name: path.read_bytes() for path in folder.glob("*_iflame.py")} for folder in (
        ROOT / "iflame_hf", FOLDER
    ))  # fmt: skip
    assert its == ours, "cp iflame_hf/*_iflame.py models/iflame-artist"


def test_it_is_small_and_nothing_else_is_in_its_folder():
    sizes = published_files(FOLDER)
    assert sizes["model.safetensors"] < 32e6 and sum(sizes.values()) < 33e6
    assert str(saved_dtype(FOLDER)) == "torch.bfloat16"


def test_it_can_be_asked_and_its_card_tells_what_it_is():
    config = IFlameConfig.from_pretrained(FOLDER)
    assert {"chair", "table", "tree", "building"} <= set(config.categories) and config.num_faces_range[0] <= 40
    card = ModelCard.load(FOLDER / "README.md")
    assert card.data.license and card.data.eval_results
    wanted = {"Use", "Asking for something", "Sampling", "Limits", "Evaluation", "Data", "Training", "Licence"}
    assert wanted | {"Licences and credits of the data"} <= set(sections_of(card.text))

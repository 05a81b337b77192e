"""
Teaches a trained model a handful of meshes of your own, and shows what it makes of them.

    python examples/fine_tune.py my_meshes/ --steps 300

Ten meshes are learnt by heart, not understood: samples repeat them, or fall to pieces where memory fails. It needs
this repository with its training packages (pip install ".[train]"), and prints the two commands that it runs.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as parquet

ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("meshes", type=Path, help="folder of mesh files, or an archive of them")
    parser.add_argument("--model", default="models/iflame-artist", help="folder or Hub name to start from")
    parser.add_argument("--out", type=Path, default=Path("outputs/fine-tuned"), help="folder to write to")
    parser.add_argument("--max-faces", type=int, default=200, help="larger meshes are left out")
    parser.add_argument("--up-axis", choices=("y", "z"), default="y", help="vertical axis of the files")
    parser.add_argument("--steps", type=int, default=300, help="of the optimiser")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="highest; lower it for a large model")
    parser.add_argument("--augment", action="store_true", help="stretch and move the meshes, anew in every epoch")
    parser.add_argument("--samples", type=int, default=8, help="meshes to generate at the end")
    options = parser.parse_args(argv)
    if not Path(options.model).is_dir() and Path(options.model).parent.is_dir():
        parser.error(f"there is no folder {options.model}, and a model on the Hub has a name like user/name")

    data = options.out / "data"
    prepare = [sys.executable, "-m", "training.prepare_data", options.meshes.resolve(), "--out", data.resolve()]
    prepare += ["--max_faces", options.max_faces, "--up_axis", options.up_axis]
    run("1. meshes to a data set", [*prepare, "--validation_share", 0, "--overwrite"])
    files = sorted((data / "data").glob("train-*.parquet"))
    faces = [len(mesh) for file in files for mesh in parquet.read_table(file, columns=["faces"])["faces"]]
    print(f"{len(faces)} meshes of {min(faces)} to {max(faces)} faces", flush=True)

    model = Path(options.model).resolve() if Path(options.model).exists() else options.model
    row_length = 9 * (max(faces) + 2)  # the longest mesh with its start and end face
    train = [sys.executable, ROOT / "training" / "train.py", "--model_name_or_path", model]
    train += ["--output_dir", (options.out / "model").resolve(), "--train_file", *[file.resolve() for file in files]]
    train += ["--row_length", row_length, "--max_steps", options.steps, "--learning_rate", options.learning_rate]
    train += ["--save_steps", 0, "--num_samples", options.samples, "--sample_max_faces", 2 * max(faces)]
    train += ["--scale_augmentation", 0.25 if options.augment else 0, "--shift_augmentation", options.augment]
    run("2. training, then samples", [*train, "--top_p", 0.8])

    lines = [json.loads(line) for line in (options.out / "model" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last (nats a token)")
    print(f"the model, samples.png and glb files are in {options.out / 'model'}")


def run(title: str, command: list) -> None:
    """Prints a command and runs it; ends this program with its status if it fails."""
    command = [str(part) for part in command]
    print(f"{title}\n  {shlex.join(command)}", flush=True)
    if status := subprocess.run(command, cwd=ROOT).returncode:
        sys.exit(status)


if __name__ == "__main__":
    main()

"""
Draw generated meshes beside real ones.

    python -m training.drawing.contact_sheet outputs/mine --data data/mine/data/validation-*.parquet --out sheet.png

The upper rows are real meshes, drawn from the files by a seed; the lower ones are the generated meshes of the folder
in the order of their names, none chosen.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from iflame_cli.render import render_meshes
from iflame_hf.mesh_files_iflame import load_mesh
from training.rows.meshes import ParquetMeshes
from training.run.ending import ends_in_words


def contact_sheet(folder: Path, files: list[str], out: Path, columns: int = 8, rows: int = 2, seed: int = 0) -> None:
    """
    Args:
        folder: of generated meshes, `sample-*.glb` as train.py writes them.
        files: parquet files with real meshes.
        rows: of each kind.

    Raises:
        ValueError: there are no generated meshes in the folder, or no real ones in the files.
    """
    count = columns * rows
    paths = sorted(folder.glob("*.glb"))[:count]
    if not paths:
        raise ValueError(f"there are no generated meshes (*.glb) in {folder}")
    data = ParquetMeshes(files)
    chosen = np.random.default_rng(seed).permutation(len(data.num_faces))[:count]
    table = data.read(chosen.tolist())
    real = [load_mesh(table[place]) for place in range(len(chosen))]
    # Both kinds begin a row of their own.
    real_titles = [f"real, {len(faces)} faces" for _, faces in real]
    spare = -len(real) % columns
    generated = [load_mesh(path) for path in paths]
    titles = [f"generated, {len(faces)} faces" for _, faces in generated]
    render_meshes(
        [*real, *[None] * spare, *generated], out, columns=columns, titles=[*real_titles, *[""] * spare, *titles]
    )


@ends_in_words("contact_sheet")
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m training.drawing.contact_sheet",
    )
    parser.add_argument(
        "folder", type=Path, help="generated meshes: the output folder of a run, or of iflame generate"
    )
    parser.add_argument("--data", nargs="+", required=True, help="parquet files of real meshes")
    parser.add_argument("--out", type=Path, required=True, help="the picture, a png")
    parser.add_argument("--columns", type=int, default=8)
    parser.add_argument("--rows", type=int, default=2, help="rows of real and rows of generated meshes")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of real meshes")
    options = parser.parse_args(argv)
    contact_sheet(options.folder, options.data, options.out, options.columns, options.rows, options.seed)
    print(options.out)


if __name__ == "__main__":
    sys.exit(main())

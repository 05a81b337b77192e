"""
Sample many meshes with Accelerate, on as many GPUs and machines as there are.

    accelerate launch training/generate.py --model models/iflame-artist --num 10000 --out outputs/meshes
    python training/generate.py --help

Mesh i has the seed --seed + i, or with --best_of that of the best of its candidates, and is the same however the work
is split. Run the same command again to go on after an interruption, or with a larger --num for more meshes.
"""

import argparse
import signal
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, this module must find its siblings

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from torch.distributed.elastic.multiprocessing.errors import record

from iflame_cli.making import load_generator
from iflame_cli.models import check_model
from iflame_hf.ranking_iflame import generate_best
from training.run.ending import ends_in_words
from training.run.interruption import Interruption, Stopped
from training.run.resume import lock, raise_on_all
from training.sampling.folder import MeshFolder, RecordReader
from training.sampling.options import parse_options
from training.sampling.pace import AfterEachFace, Pace
from training.sampling.settings import ASKED_SETTINGS, SAMPLING_SETTINGS, asked_settings, digest_of, sampling_settings
from training.sampling.write import MeshWriter

# One process may come to its end so long before another.
LONGEST_WAIT = timedelta(days=1)


@ends_in_words("generate")
def main(arguments: list[str] | None = None) -> int:
    """0 when all meshes are there, 1 on an error or if none has a face, 130 and 143 after Ctrl-C and SIGTERM."""
    options = parse_options(arguments, __doc__)
    check_model(options.model)
    interruption = Interruption("the meshes that are finished are written")
    # Weights have the precision that they are asked for in: there is nothing to cast.
    waiting = InitProcessGroupKwargs(timeout=LONGEST_WAIT)
    accelerator = Accelerator(cpu=options.use_cpu, mixed_precision="no", kwargs_handlers=[waiting])
    dtype = options.dtype or ("bfloat16" if accelerator.device.type == "cuda" else "float32")
    generator = load_generator(
        options.model, options.revision, str(accelerator.device), dtype, options.trust_remote_code
    )
    settings = settings_of(options, generator)
    with lock(options.out, accelerator, "generates", "--out"), interruption:
        folder = MeshFolder(options.out)
        failure = None
        if accelerator.is_main_process:
            try:
                folder.begin(settings | {"weights": digest_of(generator.model)}, options.overwrite)
            except (OSError, ValueError) as error:
                failure = error
        raise_on_all(failure)
        options.out.mkdir(parents=True, exist_ok=True)  # on a machine that does not share it
        status = sample(folder, options, settings, generator, accelerator, interruption)
    accelerator.end_training()
    return status


def settings_of(options: argparse.Namespace, generator: Any) -> dict[str, Any]:
    """What decides over the meshes, with the model's own values where nothing is given.

    Raises ValueError for what the model cannot be asked for.
    """
    return {
        "model": options.model,
        "revision": options.revision,
        "dtype": str(generator.model.dtype).removeprefix("torch."),
        "seed": options.seed,
        "best_of": options.best_of,
        **sampling_settings(options, generator),
        **asked_settings(options, generator),
        "format": options.format,
    }


def sample(
    folder: MeshFolder,
    options: argparse.Namespace,
    settings: dict[str, Any],
    generator: Any,
    accelerator: Accelerator,
    interruption: Interruption,
) -> int:
    """Make the meshes that are not there yet; this process makes its share of them. Returns the exit status."""
    done = {record.number for record in gather_object(list(folder.records().values()))}
    numbers = [number for number in range(options.num) if number not in done]
    say = partial(print, file=sys.stderr) if accelerator.is_main_process else lambda _: None
    there = options.num - len(numbers)
    say(
        f"{len(numbers):,} meshes to make with {accelerator.num_processes} x {accelerator.device.type}"
        + (f", {there:,} are there" if there else "")
    )
    pace = None
    if accelerator.is_main_process and numbers:
        pace = Pace(RecordReader(folder.path), there, options.num)
    own = numbers[accelerator.process_index :: accelerator.num_processes]
    meshes = generate_best(
        generator.model,
        [options.seed + number for number in own],
        options.best_of,
        rows=options.rows,
        stopping_criteria=[AfterEachFace(interruption, pace)],
        **{name: settings[name] for name in SAMPLING_SETTINGS + ASKED_SETTINGS},
    )
    try:
        with MeshWriter(folder.path, options.format, generator.tokenizer, accelerator.process_index) as writer:
            for mesh in meshes:
                writer.put(own[mesh.number], mesh)
        records = gather_object(list(folder.records().values()))
    except (Stopped, RuntimeError):  # the latter where another process, which stops too, does not come to its end
        if not interruption.asked:
            raise
        if pace is not None:
            pace.end()
        there = sum(number < options.num for number in folder.records())
        say(f"stopped: {there:,} of {options.num:,} meshes are in {folder.path}; the same command goes on")
        return 130 if interruption.number == signal.SIGINT else 143
    if pace is not None:
        pace.show()
        pace.end()
    records = {record.number: record for record in records}
    if accelerator.is_main_process:
        folder.finish(records.values())
    with_faces = sum(record.file is not None for record in records.values())
    without = len(records) - with_faces
    say(
        f"{with_faces:,} meshes are in {folder.path}"
        + (f"; {without:,} have no face and no file" if without else "")
        + ("" if with_faces else ": try another --seed, or a model that has been trained for longer")
    )
    return 0 if with_faces else 1


if __name__ == "__main__":
    sys.exit(record(main)())  # a process that fails tells the launcher, which names it and ends the others

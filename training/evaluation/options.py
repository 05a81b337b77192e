"""The options of training/evaluate.py."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from training.evaluation.meshes import HALVES
from training.sampling.options import Parser, add_sampling_options, check_sampling_options, number, scale, whole

NORMALISATIONS = ("unit_sphere", "longest_side")
SPLITS = ("test", "validation")


def parse_options(arguments: Sequence[str] | None, description: str) -> argparse.Namespace:
    parser = Parser("training/evaluate.py", description)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="folder of a data set, as prepare_data writes it")
    add("--model", metavar="DIR|NAME", help="folder of a model, or its name on the Hub")
    add("--samples", type=Path, metavar="DIR", help="mesh files to evaluate in place of the model's samples")
    add("--output", type=Path, metavar="DIR", help="where the results go (default: evaluation in the model's folder)")
    add("--save_samples", action="store_true", help="write the model's samples to OUTPUT/samples")
    add("--num_samples", type=whole(1), default=1000, metavar="N", help="samples of a set (default 1000)")
    add("--num_sets", type=whole(1), default=2, metavar="N", help="sets of samples, each of its own seeds (default 2)")
    add("--seed", type=whole(0), default=0, metavar="N", help="of the first sample, and of all choices (default 0)")
    add("--min_p", type=number(1), metavar="P", help="from tokens only with P times the chance of the likeliest")
    add("--mesh_grammar", action=argparse.BooleanOptionalAction, default=None, help="sample only what is a mesh")
    add_sampling_options(parser)
    add("--references", choices=SPLITS, help="split to compare with (default: test, or validation if there is none)")
    add("--half", choices=HALVES, help="of the references, by a hash of their names: settings that were chosen on the "
        "first half, as choose_sampling.py does, are reported on the second (default: all)")  # fmt: skip
    add("--ask", action="store_true", help="ask a model with conditions for what training meshes are, drawn at "
        "random, their categories and numbers of faces (default: for nothing)")  # fmt: skip
    add("--control", action="store_true", help="also ask a model with conditions for held-out meshes' categories and "
        "numbers of faces, and measure whether it makes them")  # fmt: skip
    add("--guidance_scales", type=scale, nargs="+", default=[1.0, 2.0], metavar="S", help="of guidance with "
        "--control; 1 is without (default 1 2)")  # fmt: skip
    add("--classifier_points", type=whole(1), metavar="N", help="of a mesh, for the classifier of --control (default: "
        "1024 on a GPU, else 128)")  # fmt: skip
    add("--classifier_epochs", type=whole(1), metavar="N", help="for it (default: 60 on a GPU, else 10)")
    add("--num_references", type=whole(1), metavar="N", help="references (default: as many as --num_samples)")
    add("--num_training", type=whole(1), metavar="N", help="training meshes to look at, at random (default: all)")
    add("--points", type=whole(1), default=2048, metavar="N", help="points of a mesh (default 2048)")
    add("--normalisation", choices=NORMALISATIONS, default=NORMALISATIONS[0], help="of clouds (default unit_sphere)")
    add("--repeats", type=whole(1), default=3, metavar="N", help="with fresh points and choices (default 3)")
    add("--emd", action="store_true", help="COV, MMD and 1-NNA by earth mover's distance too; slow")
    add("--emd_meshes", type=whole(2), default=64, metavar="N", help="meshes of a set there (default 64)")
    add("--emd_points", type=whole(1), default=256, metavar="N", help="points of a mesh there (default 256)")
    add("--search_points", type=whole(1), default=256, metavar="N", help="of a mesh in the search for the nearest "
        "training meshes; the best of them are compared by --points (default 256)")  # fmt: skip
    add("--resolution", type=whole(2), metavar="N", help="steps of the grid that all meshes are put on (default: the "
        "model's, else 128)")  # fmt: skip
    add("--eval_batch_size", type=whole(1), default=4, metavar="N", help="rows at a time for the likelihood")
    options = parser.parse_args(arguments)
    check_sampling_options(parser, options)
    if options.model is None and options.samples is None:
        parser.error("give --model, or --samples with meshes of another generator, or both")
    if options.control and options.model is None:
        parser.error("--control asks a model for meshes: give --model")
    if options.ask and options.samples is not None:
        parser.error("--ask asks a model for meshes, and --samples are made: leave out one of the two")
    if options.ask and options.control:
        parser.error("--control compares with samples that are asked for nothing: leave out --ask")
    if options.save_samples and options.samples is not None:
        parser.error("--samples are files already: leave out --save_samples")
    if options.emd and options.emd_points > options.points:
        parser.error(f"--emd_points {options.emd_points} are more than --points {options.points}")
    if options.search_points > options.points:
        options.search_points = options.points
    return options

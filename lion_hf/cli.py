"""The command line: `lion-hf COMMAND`, one command per task.

Nothing here imports torch before a command has something to run, so `--help` answers at once.
"""

import argparse
import difflib
import io
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from . import startup
from .status import FAILED, FAILURES, INTERRUPTED, MISTAKEN, MISTAKES, status_of

# Commands whose options are dataclasses or a parser of their own: the module with their
# main(argv, prog), and what they do. What `--help` shows is in `SETTINGS`.
TASKS = {
    "mlm": ("lion_hf.tasks.mlm", "pretrain a masked language model"),
    "glue": ("lion_hf.tasks.glue", "fine-tune on GLUE, or on your own sentences or pairs"),
    "images": ("lion_hf.tasks.image_classification", "train an image classifier"),
    "demo": ("lion_hf.tasks.demo", "train two small models in minutes and show what they learnt"),
}
# Modules with the options and their explanation, for commands that need torch to read them.
SETTINGS = {
    "mlm": "lion_hf.tasks.mlm_settings",
    "glue": "lion_hf.tasks.glue_settings",
    "images": "lion_hf.tasks.image_settings",
}
LINEARIZE = "turn a pretrained softmax encoder, such as BERT or ViT, into LION"
HELP, HELP_ALL = ("-h", "--help"), ("--help_all", "--help-all")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The exit status: 0 for success; 2 if arguments, settings or data do not fit; 1 if the work
        failed or was declined; 130 after an interruption. An error's message goes to stderr.

    Raises:
        SystemExit: after `--help`, and for arguments that do not fit.
    """
    started = argv is None
    argv = list(sys.argv[1:] if argv is None else argv)
    if started:
        _show_all_characters()
    parser = _parser()
    if not argv:
        parser.print_help(sys.stderr)
        return MISTAKEN
    _check_command(parser, argv[0])
    try:
        if argv[0] in TASKS:
            return _run_task(argv[0], argv[1:], started)
        if argv[0] == "linearize":  # its options are those of two dataclasses, as in the tasks
            return _linearize(argv[1:], started)
        args = parser.parse_args(argv)
        startup.register()
        return args.run(args)
    except (*MISTAKES, *FAILURES) as error:
        return status_of(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def run_script(name: str) -> None:
    """Runs a command of `TASKS` with the arguments of the process, as a file of run_scripts/ does.

    Raises:
        SystemExit: as `main`, and with its status for an error, whose message goes to stderr.
    """
    _show_all_characters()
    try:
        import_module(TASKS[name][0]).main()
    except (*MISTAKES, *FAILURES) as error:
        sys.exit(status_of(error))


def _show_all_characters() -> None:
    """Shows characters that the terminal's encoding lacks as escapes, as stderr does.

    The names of classes, tasks and files may have any.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # there may be none, or another program's
        sys.stdout.reconfigure(errors="backslashreplace")


def _run_task(name: str, argv: list[str], started: bool) -> int:
    """Runs a command of `TASKS`; `started` says whether the command has this process to itself."""
    if any(word in HELP for word in argv):
        if name in SETTINGS:
            _show_help(name)
    elif not any(word in HELP_ALL for word in argv):
        _prepare_process(started)
    import_module(TASKS[name][0]).main(argv, prog=f"lion-hf {name}")
    return 0


def _show_help(name: str) -> NoReturn:
    """Shows the options that a command has beside those of transformers, and ends the process."""
    from .training.settings import print_help

    settings = import_module(SETTINGS[name])
    print_help(settings.USAGE, *settings.OPTIONS, prog=f"lion-hf {name}")
    sys.exit(0)


def _prepare_process(started: bool) -> None:
    """Makes the process ready for a command, and starts others where a launcher asks for them."""
    startup.register()
    if started:
        from .training.processes import start_processes

        start_processes()


def _check_command(parser: argparse.ArgumentParser, name: str) -> None:
    """Ends the process if there is no such command, with the name of the nearest one."""
    names = [*TASKS, "linearize", "convert", "export", "publish"]
    if name not in names and not name.startswith("-"):
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        parser.error(f"unknown command {name}: did you mean {nearest}? (--help lists all commands)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lion-hf",
        description="LION, bidirectional linear attention, in Hugging Face transformers.",
        epilog="`lion-hf COMMAND --help` shows the options of a command.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for name, (_, text) in TASKS.items():
        commands.add_parser(name, help=text)
    commands.add_parser("linearize", help=LINEARIZE)
    _add_convert(commands)
    _add_export(commands)
    _add_publish(commands)
    return parser


def _add_convert(commands: argparse._SubParsersAction) -> None:
    convert = commands.add_parser(
        "convert",
        help="turn a checkpoint of the original LION code into a transformers folder",
        description="Turns a checkpoint of the original LION code (images: checkpoint.pth; text:"
        " latest-rank0.pt) into a folder for from_pretrained. The settings come from the file; the"
        " options give what the file does not say. Nothing in the file is executed.",
    )
    convert.add_argument("checkpoint", metavar="CHECKPOINT", help="the file to read")
    convert.add_argument(
        "output",
        metavar="OUTPUT",
        help="the folder to write: a new name, or an empty folder",
    )
    convert.add_argument(
        "--num-attention-heads",
        type=int,
        metavar="N",
        help="number of heads of a LION-lit model, if the file does not say",
    )
    convert.add_argument(
        "--classifier-pooling",
        choices=("cls", "mean"),
        help="for image files without stored arguments: cls (trained with --cls_tok) or mean",
    )
    convert.add_argument(
        "--use-ema",
        action="store_true",
        help="take the moving average of an image model's weights",
    )
    convert.add_argument(
        "--tokenizer", metavar="NAME_OR_FOLDER", help="tokenizer to save with a text model"
    )
    convert.set_defaults(run=_convert)


def _add_export(commands: argparse._SubParsersAction) -> None:
    export = commands.add_parser(
        "export",
        help="write a model for ONNX Runtime, which serves it on CPUs without torch",
        description="Writes a LION folder as an ONNX model that ONNX Runtime runs at any batch"
        " size and length, compares it with torch, and prints the difference, the size and the"
        " time. A folder of sentence-transformers keeps its modules.",
    )
    export.add_argument("folder", metavar="FOLDER", help="the folder of the model")
    export.add_argument(
        "output", metavar="OUT", help="the folder to write: a new name, or an empty folder"
    )
    export.add_argument("--onnx", action="store_true", required=True, help="the format")
    export.add_argument(
        "--int8",
        action="store_true",
        help="also write onnx/model_int8.onnx, with weights of 8 bits: smaller, less exact",
    )
    export.set_defaults(run=_export)


def _add_publish(commands: argparse._SubParsersAction) -> None:
    publish = commands.add_parser(
        "publish",
        help="upload a folder to the Hugging Face Hub",
        description="Uploads a folder written by lion_hf.save_for_hub to the Hugging Face Hub. It"
        " shows what it will upload, and asks first.",
    )
    publish.add_argument("folder", metavar="FOLDER", help="the folder")
    publish.add_argument(
        "repo_id",
        metavar="REPO_ID",
        help="repository on the Hub, owner/name; created if it does not exist",
    )
    publish.add_argument("--private", action="store_true", help="into a private repository")
    publish.add_argument(
        "--revision",
        metavar="BRANCH",
        help="branch to upload to, by default main; created if it does not exist",
    )
    publish.add_argument("--yes", action="store_true", help="do not ask")
    publish.set_defaults(run=_publish)


def _convert(args: argparse.Namespace) -> int:
    from .convert.conversion import convert_checkpoint

    conversion = convert_checkpoint(
        args.checkpoint,
        args.output,
        num_attention_heads=args.num_attention_heads,
        classifier_pooling=args.classifier_pooling,
        use_ema=args.use_ema,
        tokenizer=args.tokenizer,
    )
    config = conversion.config
    print(
        f"{conversion.folder}: {conversion.architecture}, mask_type={config.mask_type},"
        f" {config.num_hidden_layers} layers of width {config.hidden_size} with"
        f" {config.num_attention_heads} heads"
    )
    for note in conversion.notes:
        print(f"note: {note}")
    return 0


def _export(args: argparse.Namespace) -> int:
    from .tasks.export import export_onnx

    made = export_onnx(args.folder, args.output, int8=args.int8)
    print(f"{made.folder}: {made.architecture}, mask_type={made.mask_type}, {made.seconds:.0f} s")
    for file in made.files:
        print(
            f"{file.name:>24} {file.megabytes:8.1f} MB, differs from torch by at most"
            f" {file.difference:.1e} of the largest output"
        )
    return 0


def _linearize_settings(argv: list[str]) -> tuple:
    """Source, output, `Copying` and `Distillation`; arguments that do not fit end the process."""
    from .linearize.families import FAMILIES
    from .linearize.settings import Copying, Distillation
    from .training.settings import parse_settings

    source, output, copying, distillation = parse_settings(
        "Turns a pretrained softmax encoder into a LION folder for from_pretrained. It is one of\n"
        f"{', '.join(FAMILIES)}.\n"
        "A folder of sentence-transformers keeps its other modules. Everything but the attention\n"
        "is copied. With --train_file, --dataset or --data_path the new attention learns from\n"
        "the old one. No code of the source is run.",
        Copying,
        Distillation,
        argv=argv,
        prog="lion-hf linearize",
        positional={
            "source": "folder or Hub name of a model of transformers, or of sentence-transformers",
            "output": "the folder to write: a new name, or an empty folder",
        },
    )
    if not distillation.has_data and distillation != Distillation():
        raise ValueError(
            "there are options for the distillation, but no data: give --train_file, --dataset or"
            " --data_path"
        )
    return source, output, copying, distillation


def _linearize(argv: list[str], started: bool = False) -> int:
    source, output, copying, distillation = _linearize_settings(argv)
    _prepare_process(started)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("lion_hf.linearize").setLevel(logging.INFO)
    from .linearize.checkpoint import linearize_checkpoint
    from .linearize.run_folder import run_folder_of

    try:
        made = linearize_checkpoint(
            source,
            output,
            distillation=distillation if distillation.has_data else None,
            **vars(copying),
        )
    except KeyboardInterrupt:
        left = run_folder_of(Path(output)).is_dir()  # not before the first checkpoint
        then = "goes on from here" if left else "starts anew, because nothing was learned yet"
        print(f"interrupted: the same command {then}", file=sys.stderr)
        return INTERRUPTED
    if os.environ.get("RANK", "0") != "0":  # the first process speaks for all
        return 0
    print(
        f"{made.folder}: {made.architecture}, mask_type={made.config.mask_type},"
        f" feature_map={made.config.feature_map}"
    )
    for name, value in made.metrics.items():
        print(f"{name:>24} {value:.4f}")
    for note in made.notes:
        print(f"note: {note}")
    return 0


def _publish(args: argparse.Namespace) -> int:
    from .hub import content_size, files_to_publish, public_files, publish

    files_to_publish(args.folder, args.repo_id)  # checks both
    files = public_files(args.folder)
    for name, content in files.items():
        print(f"{content_size(content):>15,}  {name}")
    total = sum(map(content_size, files.values()))
    kind = "private" if args.private else "public unless it is private"
    branch = args.revision or "main"
    print(f"{total:>15,}  bytes in {len(files)} files, to {args.repo_id}, branch {branch}, {kind}")
    cut = [name for name, content in files.items() if isinstance(content, bytes)]
    if cut:
        print(f"note: paths of this machine are cut to their last part in {', '.join(cut)}.")
    if f'"{args.repo_id}"' not in Path(args.folder, "README.md").read_text(encoding="utf-8"):
        print(
            f"note: the example in README.md does not load {args.repo_id};"
            " save_for_hub(..., repo_id=...) writes one that does."
        )
    if not args.yes:
        if sys.stdin is None or not sys.stdin.isatty():
            raise ValueError("there is no terminal to ask at: give --yes to upload without asking")
        if not _confirmed("Upload? [y/N] "):
            print("Nothing was uploaded.")
            return FAILED
    print(publish(args.folder, args.repo_id, private=args.private, revision=args.revision))
    return 0


def _confirmed(question: str) -> bool:
    """Whether the user says yes; Ctrl-D means no."""
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False


if __name__ == "__main__":
    sys.exit(main())

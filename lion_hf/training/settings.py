"""Settings: dataclasses filled from a YAML file and from the command line, which wins."""

import argparse
import difflib
import enum
import functools
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from transformers import HfArgumentParser

from ..folders import write_text
from ..presets import find_recipe

if TYPE_CHECKING:  # it loads torch, which `--help` does without
    from transformers import PreTrainedConfig

SETTINGS_FILE = "settings.yaml"
# What a program is asked to do with a run. It is not one of the run's settings.
ACTIONS = ("do_train", "do_eval", "do_predict")
MOST_VALUES = 100_000  # of a YAML file, whose aliases may repeat a value without end
ALL = "--help_all"  # lists the options of transformers, too, for which it loads torch
ALL_HINT = (
    "All options of transformers.TrainingArguments work too, such as --max_steps, --learning_rate\n"
    f"and --bf16: {ALL} lists them."
)
SWITCHES = {"yes": True, "on": True, "no": False, "off": False}  # of configurations


class _Loader(yaml.SafeLoader):
    """Reads no, on, 12:30 and 007 as text, and 1e-3 as a number, close to YAML 1.2."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader`, or a reader of YAML 1.1, would take for something else."""


FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$"
)
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", re.compile("(true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    ("null", re.compile("(~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("int", re.compile("([-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+)$"), "-+0123456789"),
    ("float", FLOAT, "-+.0123456789"),
    ("float", re.compile(r"\.(nan|NaN|NAN)$"), "."),
    ("merge", re.compile("<<$"), "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list(_first))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def load_yaml(text: str) -> Any:
    """Plain values from YAML; `no`, `yes`, `on`, `off`, dates and 007 stay text.

    Raises:
        ValueError: if the text is not YAML, or its aliases stand for more than `MOST_VALUES`.
    """
    try:
        content = yaml.load(text, Loader=_Loader)
        if _count(content, {}) > MOST_VALUES:
            raise ValueError(f"it stands for more than {MOST_VALUES} values")
    except (yaml.YAMLError, RecursionError, TypeError) as error:  # TypeError of unhashable keys
        raise ValueError(" ".join(str(error).split())) from error
    return content


def _count(value: Any, known: dict[int, int]) -> int:
    """The number of values that would be written without aliases."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = MOST_VALUES + 1  # while it is counted: it may hold itself
        inner = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(x, known) for x in inner)
    return known[id(value)]


RENAMED = {"resume_from_checkpoint": "resume"}  # options of transformers that do nothing here


def parse_settings(
    description: str,
    *types: type,
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    positional: Mapping[str, str] | None = None,
) -> tuple:
    """Dataclass instances from the options and from `--config FILE.yaml`, which they override.

    Args:
        description: what `--help` says first; the script's docstring.
        *types: dataclasses; every field is an option, spelt with underscores or hyphens, and a key
            of the file.
        argv: the command line without the program's name; None for the program's own.
        prog: the program's name for messages; None for that of the running one.
        positional: arguments that are required and have no option's name, and their help.

    Returns:
        The positional arguments, then one instance of each type.

    Raises:
        SystemExit: with a message, for an unknown key or option (it names the nearest legal one), a
            file that cannot be read, a value of the wrong type, or a ValueError of the dataclasses.
    """
    if argv is None:
        from .processes import start_processes  # torch, which `--help` does without

        start_processes()
    argv = list(sys.argv[1:] if argv is None else argv)
    own = [getattr(cls, "own_options", cls) for cls in types]
    show = (
        None if own == list(types) else functools.partial(print_help, description, *own, prog=prog)
    )
    parser = _parser(description, types, prog, positional or {}, show)
    legal = sorted(
        {
            option
            for action in parser._actions
            for option in action.option_strings
            if option.startswith("--")
        }
    )
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    file = first.parse_known_args(argv)[0].config
    if file is not None:
        argv = [*_options_of_file(parser, file, legal), *argv]
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(_unknown("option", unknown[0].split("=")[0], legal) + _hint(legal))
    values = vars(namespace)
    for name, other in RENAMED.items():
        if other in values and values.get(name) is not None:
            parser.error(f"--{name}: its name here is --{other}")
    instances = [values[name] for name in positional or {}]
    for cls in types:
        try:
            instances.append(
                cls(**{field.name: values[field.name] for field in fields(cls) if field.init})
            )
        except ValueError as error:
            parser.error(str(error))
    return tuple(instances)


def print_help(description: str, *types: type, prog: str | None = None) -> None:
    """Prints the help of a command that takes all options of transformers beside its own.

    Args:
        description: as in `parse_settings`.
        *types: the dataclasses of its own options.
        prog: as in `parse_settings`.
    """
    parser = _parser(description, types, prog, {}, lambda: None)
    parser.epilog = ALL_HINT
    parser.print_help()


def save_settings(folder: str | os.PathLike, *instances: Any) -> dict[str, Any]:
    """Writes the fields that have a value to `settings.yaml`, for `--config`; returns them."""
    settings = resolved_settings(*instances)
    Path(folder).mkdir(parents=True, exist_ok=True)
    text = yaml.dump(settings, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    write_text(Path(folder, SETTINGS_FILE), text)
    return settings


def resolved_settings(*instances: Any) -> dict[str, Any]:
    """The instances' fields as plain values.

    Empty ones, tokens of the Hub, the number of the process and `ACTIONS` are left out.
    """
    settings = {
        field.name: _plain(getattr(x, field.name))
        for x in instances
        for field in fields(x)
        if field.init
    }
    if settings.get("report_to") == []:  # what "none" has become
        settings["report_to"] = "none"
    hidden = ("hub_token", "local_rank", *ACTIONS)
    return {
        name: value
        for name, value in settings.items()
        if value not in (None, "", [], {}) and name not in hidden
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Settings that differ between two runs, each with both values in words.

    Files of older versions hold `ACTIONS` too, which are left out.
    """
    names = [
        name
        for name in {**before, **now}
        if name not in ACTIONS and before.get(name) != now.get(name)
    ]
    return {name: f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in names}


def parse_mapping(text: str | None) -> dict[str, Any]:
    """Values by name from `name=value,name=value`, or from a mapping in YAML.

    Raises:
        ValueError: for a text of another form.
    """
    if not text:
        return {}
    try:
        return load_yaml(text if text.startswith("{") else "{" + text.replace("=", ": ") + "}")
    except ValueError as error:
        raise ValueError(f"{text!r}: expected name=value,name=value") from error


def parse_overrides(text: str | None, config: "PreTrainedConfig") -> dict[str, Any]:
    """Fields of a configuration as `parse_mapping` reads them.

    Raises:
        ValueError: for a text of another form, or a name that the configuration does not have (it
            names the nearest one).
    """
    overrides = parse_mapping(text)
    legal = sorted(set(config.to_dict()) - {"model_type", "architectures", "transformers_version"})
    for name in overrides:
        if name not in legal:
            raise ValueError(_unknown("field", str(name), legal))
        if isinstance(getattr(config, name, None), bool) and overrides[name] in SWITCHES:
            overrides[name] = SWITCHES[overrides[name]]
    return overrides


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, and the description as it is written."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(indent + line for line in text.splitlines(keepends=True))


class _ShowOwn(argparse.Action):
    """Prints the help for a command's own options, and ends the process."""

    def __init__(self, option_strings: Sequence[str], show: Callable[[], None], **kwargs: Any):
        super().__init__(option_strings, nargs=0, **kwargs)
        self.show = show

    def __call__(self, *_: Any) -> None:
        self.show()
        sys.exit(0)


def _parser(
    description: str,
    types: Sequence[type],
    prog: str | None,
    positional: Mapping[str, str],
    show_own: Callable[[], None] | None,
) -> HfArgumentParser:
    """A parser of the dataclasses' fields; with `show_own`, `--help` calls it."""
    parser = HfArgumentParser(
        types,
        prog=prog,
        description=description,
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
        add_help=show_own is None,
    )
    if show_own is not None:
        only = {"default": argparse.SUPPRESS, "dest": argparse.SUPPRESS}
        parser.add_argument(
            "-h",
            "--help",
            action=_ShowOwn,
            show=show_own,
            help="Show the command's own options and exit.",
            **only,
        )
        parser.add_argument(ALL, "--help-all", action="help", help="Show all options and exit.")
    for name, text in positional.items():
        parser.add_argument(name, metavar=name.upper(), help=text)
    places = "".join(f" {name.upper()}" for name in positional)
    parser.usage = (
        f"%(prog)s{places} [--config FILE.yaml] [--option value ...]"  # the full one fills a screen
    )
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="Settings, one per line, by the options' names: a file, or the name of a recipe of the"
        " package.",
    )
    return parser


def _options_of_file(parser: argparse.ArgumentParser, file: str, legal: list[str]) -> list[str]:
    """The settings of a YAML file as a command line."""
    try:
        text = Path(find_recipe(file)).read_text(encoding="utf-8")
        settings, words = load_yaml(text) or {}, yaml.load(text, yaml.BaseLoader)
    except (OSError, ValueError) as error:
        parser.error(f"--config {file} cannot be read: {error}")
    if not isinstance(settings, dict):
        parser.error(
            f"--config {file} holds a {type(settings).__name__}: expected lines of the form"
            " `key: value`"
        )
    options = []
    for key, value in settings.items():
        option = f"--{key}"
        if option not in legal or option in ("--config", "--help", "--help-all", ALL):
            keys = [name.removeprefix("--") for name in legal]
            parser.error(f"--config {file}: {_unknown('key', str(key), keys)}{_hint(legal)}")
        if type(value) in (int, float):
            value = words.get(key, value)  # as it is written, since it may be meant as text
        if isinstance(value, list):
            options += [option, *map(str, words.get(key, value))]
        elif value is not None:
            options.append(f"{option}={json.dumps(value) if isinstance(value, dict) else value}")
    return options


def _unknown(kind: str, name: str, legal: list[str]) -> str:
    nearest = difflib.get_close_matches(name, legal, n=1, cutoff=0.0)[0]
    return f"unknown {kind} {name}: did you mean {nearest}?"


def _hint(legal: list[str]) -> str:
    """How to see all options."""
    return f" ({ALL if ALL in legal else '--help'} shows all)"


def _plain(value: Any) -> Any:
    """A value that YAML has words for."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, dict):
        return {str(name): _plain(x) for name, x in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(x) for x in value]
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)

"""Settings of the scripts: dataclasses filled from a YAML file and from the command line, which wins."""

import argparse
import difflib
import enum
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, PreTrainedConfig

from ..presets import find_recipe
from .processes import start_processes

SETTINGS_FILE = "settings.yaml"
# What a program is asked to do with a run. It is no part of the run's settings.
ACTIONS = ("do_train", "do_eval", "do_predict")


def parse_settings(
    description: str,
    *types: type,
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    positional: Mapping[str, str] | None = None,
) -> tuple:
    """Dataclass instances from `--config FILE.yaml` and the options beside it, which overrule the file.

    Args:
        description: what `--help` says first; the script's docstring.
        *types: dataclasses; every field is an option, spelt with underscores or hyphens, and a key of the file.
        argv: the command line without the program's name; None for the program's own.
        prog: the program's name for messages; None for that of the running one.
        positional: arguments that are required and have no option's name, and their help.

    Returns:
        The positional arguments, then one instance of each type.

    Raises:
        SystemExit: with a message for an unknown key or option, which names the nearest legal one, a file that cannot be
            read, a value of the wrong type, or what the dataclasses' own checks raise as ValueError.
    """
    if argv is None:
        start_processes()
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(
        types,
        prog=prog,
        description=description,
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
    )
    for name, text in (positional or {}).items():
        parser.add_argument(name, metavar=name.upper(), help=text)
    places = "".join(f" {name.upper()}" for name in positional or {})
    parser.usage = (
        f"%(prog)s{places} [--config FILE.yaml] [--option value ...]"  # the full one fills a screen
    )
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="Settings, one per line, by the options' names: a file, or a recipe of the package by name.",
    )
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
        parser.error(_unknown("option", unknown[0].split("=")[0], legal))
    values = vars(namespace)
    instances = [values[name] for name in positional or {}]
    for cls in types:
        try:
            instances.append(
                cls(**{field.name: values[field.name] for field in fields(cls) if field.init})
            )
        except ValueError as error:
            parser.error(str(error))
    return tuple(instances)


def save_settings(folder: str | os.PathLike, *instances: Any) -> dict[str, Any]:
    """Writes the instances' fields that have a value to `settings.yaml` in the folder, for `--config`; returns them."""
    settings = resolved_settings(*instances)
    Path(folder).mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    Path(folder, SETTINGS_FILE).write_text(text, encoding="utf-8")
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
        return yaml.safe_load(text if text.startswith("{") else "{" + text.replace("=", ": ") + "}")
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{text!r}: expected name=value,name=value") from error


def parse_overrides(text: str | None, config: PreTrainedConfig) -> dict[str, Any]:
    """Fields of a configuration as `parse_mapping` reads them.

    Raises:
        ValueError: for a text of another form, or a name that the configuration does not have, with the nearest one.
    """
    overrides = parse_mapping(text)
    legal = sorted(set(config.to_dict()) - {"model_type", "architectures", "transformers_version"})
    for name in overrides:
        if name not in legal:
            raise ValueError(_unknown("field", str(name), legal).replace(" (--help shows all)", ""))
    return overrides


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, and the description as it is written."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(indent + line for line in text.splitlines(keepends=True))


def _options_of_file(parser: argparse.ArgumentParser, file: str, legal: list[str]) -> list[str]:
    """The settings of a YAML file as a command line."""
    try:
        settings = yaml.safe_load(Path(find_recipe(file)).read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        parser.error(f"--config {file} cannot be read: {error}")
    if not isinstance(settings, dict):
        parser.error(
            f"--config {file} holds a {type(settings).__name__}: expected lines of the form `key: value`"
        )
    options = []
    for key, value in settings.items():
        option = f"--{key}"
        if option not in legal or option in ("--config", "--help"):
            parser.error(
                f"--config {file}: {_unknown('key', str(key), [name.removeprefix('--') for name in legal])}"
            )
        if isinstance(value, list):
            options += [option, *map(str, value)]
        elif value is not None:
            options.append(f"{option}={json.dumps(value) if isinstance(value, dict) else value}")
    return options


def _unknown(kind: str, name: str, legal: list[str]) -> str:
    nearest = difflib.get_close_matches(name, legal, n=1, cutoff=0.0)[0]
    return f"unknown {kind} {name}: did you mean {nearest}? (--help shows all)"


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

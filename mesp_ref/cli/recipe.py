"""finetune --config: the options of a run from a YAML or JSON file, as if they had been typed."""

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

from mesp_ref.cli.meant import meant_option
from mesp_ref.errors import MespRefError, shown
from mesp_ref.files.strict import parse_json, read_bytes

_LIMIT = 1 << 20  # bytes
_OTHER = {"form": "format"}  # fields whose option has another name
# Of a run's own place and state: a run that is repeated has its own.
_OF_THE_RUN = ("out", "overwrite", "resume", "inexact")
_TYPED_ONLY = ("config", "resume", "help")


def with_config(args: argparse.Namespace) -> argparse.Namespace:
    """What --config says, overruled by what the command line says.

    Raises MespRefError, naming the file, for a key that is no option and for a value that it refuses
    """
    if args.config is None:
        return args
    if args.resume:
        raise MespRefError(
            "--config: found beside --resume, which takes the options of the run; expected one of them"
        )
    parser = args.parser
    try:
        merged = parser.parse_args(_arguments(_read(args.config), parser))
    except MespRefError as error:
        raise MespRefError(f"{args.config}: {error}") from None
    for name, value in vars(args).items():
        if value is not None and value is not False and value != parser.get_default(name):
            setattr(merged, name, value)
    return merged


def _read(path: str) -> dict[str, Any]:
    """The file's keys and values; of a run's run.json those of its options."""
    try:
        text = read_bytes(Path(path), _LIMIT).decode("utf-8-sig")
        found = parse_json(text) if text.lstrip()[:1] == "{" else _yaml(text)
    except OSError as error:
        raise MespRefError(f"--config: {error.strerror or error}") from None
    except ValueError as error:
        raise MespRefError(f"--config: {error}") from None
    run = isinstance(found, dict) and isinstance(found.get("options"), dict)
    values = found["options"] if run else found
    if not isinstance(values, dict):
        raise MespRefError(f"found {shown(values)}, expected options and their values")
    flat = {name: value for name, value in values.items() if name != "train"}
    train = values.get("train", {})
    if not isinstance(train, dict):
        raise MespRefError(f"train: found {shown(train)}, expected options and their values")
    twice = flat.keys() & train.keys()
    if twice:
        raise MespRefError(f"{min(twice)}: found twice, expected it once")
    flat |= train
    return {n: v for n, v in flat.items() if not (run and n in _OF_THE_RUN)}


def _yaml(text: str) -> Any:
    """YAML, in which no key may stand twice."""
    try:
        yaml: Any = importlib.import_module("yaml")
    except ImportError:
        raise MespRefError(
            "--config: YAML needs the pyyaml package: pip install 'mesp-ref[config]', or write JSON"
        ) from None

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key) for key, _ in node.value]
            for i, key in enumerate(keys):
                if key in keys[:i]:
                    raise ValueError(f"{shown(key)} is given twice")
            return super().construct_mapping(node, deep)

    try:
        return Loader(text).get_single_data() or {}
    except (yaml.YAMLError, RecursionError, TypeError) as error:
        raise ValueError(f"not readable as YAML: {' '.join(str(error).split())}") from None


def _arguments(values: dict[str, Any], parser: Any) -> list[str]:
    """The command line that says the same."""
    options = {
        name.removeprefix("--").replace("-", "_"): action
        for name, action in parser._option_string_actions.items()
        if name.startswith("--") and name.removeprefix("--") not in _TYPED_ONLY
    }
    arguments: list[str] = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        name = _OTHER.get(name, name)
        if name not in options:
            option = f"--{name.replace('_', '-')}"
            raise MespRefError(
                f"{shown(key)}: no such option{meant_option(option, _names(options))}"
            )
        arguments += _spelled(name, value, is_flag=options[name].nargs == 0)
    return arguments


def _names(options: dict[str, Any]) -> str:
    return " ".join(f"--{name.replace('_', '-')}" for name in options)


def _spelled(name: str, value: Any, is_flag: bool) -> list[str]:
    """One option with its value; nothing for one that is not said."""
    option = f"--{name.replace('_', '-')}"
    if is_flag and not isinstance(value, bool | None):
        raise MespRefError(f"{name}: found {shown(value)}, expected true or false")
    if value is None or (value is False and is_flag):
        return []
    if is_flag:
        return [option]
    if isinstance(value, list) and name == "targets":
        value = ",".join(map(str, value))
    if isinstance(value, bool | list | dict):
        raise MespRefError(f"{name}: found {shown(value)}, expected one value")
    return [f"{option}={value if isinstance(value, str) else json.dumps(value, default=str)}"]

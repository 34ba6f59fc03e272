"""run.json read back: the options a run was started with, every field of its type."""

import dataclasses
from pathlib import Path
from typing import Any

from mesp_ref.errors import MespRefError, shown
from mesp_ref.files.strict import inside, read_object
from mesp_ref.job.finetune import FinetuneOptions
from mesp_ref.train.trainer import TrainConfig


def saved_options(directory: Path) -> dict[str, Any]:
    """The options in a run's run.json: fields of FinetuneOptions, `train` fields of TrainConfig.

    Raises MespRefError for a directory without a run, and for the first field that is missing,
    unknown or of another type.
    """
    file = directory / "run.json"
    if not file.exists():
        raise MespRefError(
            f"{directory}: --resume: found no run.json, expected the directory of a run; leave "
            "--resume out to start one"
        )
    found = read_object(inside(directory, "run.json"), "the options of a run").get("options")
    options = _typed(FinetuneOptions, found, f"{file}: options")
    train = _typed(TrainConfig, options["train"], f"{file}: options: train")
    try:
        FinetuneOptions(**options | {"train": TrainConfig(**train)})
    except MespRefError as error:
        raise MespRefError(f"{file}: options: {error}") from None
    return options | {"train": train}


def _typed(kind: type, found: Any, where: str) -> dict[str, Any]:
    """The fields of a dataclass; a whole number may stand for a float, as JSON has them."""
    advice = "the file is damaged, or of another version: restore it, or start a new run"
    if not isinstance(found, dict):
        raise MespRefError(f"{where}: found {shown(found)}, expected an object; {advice}")
    fields: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(kind)}
    for name in found.keys() ^ fields.keys():
        wrong = "unknown" if name in found else "missing"
        raise MespRefError(f"{where}: {shown(name)}: {wrong}; {advice}")
    values = {}
    for name, expected in fields.items():
        value = found[name]
        if expected is TrainConfig:
            expected = dict
        if type(value) is int and not isinstance(value, expected) and isinstance(0.0, expected):
            value = float(value)
        if not isinstance(value, expected) or (type(value) is bool and expected is not bool):
            named = getattr(expected, "__name__", str(expected))
            raise MespRefError(f"{where}: {name}: found {shown(value)}, expected {named}; {advice}")
        values[name] = value
    return values

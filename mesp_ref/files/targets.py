"""Which modules PEFT adapts, by the fields of adapter_config.json.

Adapted   a name that target_modules selects, in a layer of layers_to_transform where that is given,
          unless exclude_modules selects it
Selects   a list: a whole name or its last parts ("q_proj" of model.layers.0.self_attn.q_proj);
          a text: a regular expression for the whole name, or "all-linear"
Source    peft 0.21, check_target_module_exists
"""

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from mesp_ref.errors import MespRefError, shown

_SECONDS = 10  # for a regular expression, which can take longer than the universe lasts
_PEFT_DEFAULT = ["q_proj", "v_proj"]  # of qwen2, where target_modules is null
# A stranger's regular expression is run where it can be ended.
_PROGRAM = """\
import json, re, sys
pattern, names = json.load(sys.stdin)
print(json.dumps([re.fullmatch(pattern, name) is not None for name in names]))
"""


def adapted(modules: Iterable[str], fields: Mapping[str, Any], source: object) -> set[str]:
    """Those of `modules`, such as model.layers.0.self_attn.q_proj, that PEFT would adapt.

    Raises MespRefError for a regular expression that is none or takes longer than ten seconds, and
    for layers_to_transform beside one, which PEFT refuses too.
    """
    names, targets = list(modules), fields.get("target_modules", _PEFT_DEFAULT)
    found = _selected(names, targets, f"{source}: target_modules")
    if fields.get("exclude_modules"):
        where = f"{source}: exclude_modules"
        found -= _selected(names, fields["exclude_modules"], where)
    layers = fields.get("layers_to_transform", [])
    if isinstance(layers, int) or layers:
        if isinstance(targets, str):
            raise MespRefError(
                f"{source}: layers_to_transform: found {shown(layers)} beside target_modules "
                f"{shown(targets)}, expected a list of target_modules, as PEFT does"
            )
        kept = {layers} if isinstance(layers, int) else set(layers)
        whole = set(targets)  # a name given in full counts whatever its layer
        found = {name for name in found if name in whole or int(name.split(".")[2]) in kept}
    return found


def _selected(names: list[str], wanted: str | list[str], where: str) -> set[str]:
    """Those of the names that a list or a regular expression selects."""
    if isinstance(wanted, list):
        ends = tuple(f".{end}" for end in wanted)
        return {name for name in names if name in wanted or name.endswith(ends)}
    if wanted == "all-linear" and where.endswith("target_modules"):
        return set(names)
    return {name for name, hit in zip(names, _matches(wanted, names, where), strict=True) if hit}


def _matches(pattern: str, names: list[str], where: str) -> list[bool]:
    """Whether a regular expression matches each of some names as a whole."""
    command = [sys.executable, "-I", "-S", "-c", _PROGRAM]
    try:
        done = subprocess.run(
            command, input=json.dumps([pattern, names]), capture_output=True, check=True,
            text=True, encoding="ascii", timeout=_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        raise MespRefError(
            f"{where}: found {shown(pattern)}, expected a regular expression that is evaluated "
            f"within {_SECONDS} seconds; write the names of the modules instead"
        ) from None
    hits: list[bool] = json.loads(done.stdout)
    return hits

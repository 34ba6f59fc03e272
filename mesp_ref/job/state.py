"""The saved state of a run: one safetensors file that is either the old state or the new one.

Arrays are written one after another from where they live, so saving needs no second copy of the
optimiser; whatever the rest of a run consists of is JSON in the file's metadata.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from mesp_ref.api import METHODS
from mesp_ref.engine.model import Model
from mesp_ref.errors import MespRefError, shown
from mesp_ref.files.checkpoint import weight_files
from mesp_ref.files.config import config_fields
from mesp_ref.files.output import write_aside
from mesp_ref.files.safetensors import MappedFile
from mesp_ref.files.strict import open_regular, parse_json
from mesp_ref.files.writer import Writer
from mesp_ref.job.patience import Best
from mesp_ref.lean.activations import KINDS
from mesp_ref.ops import Array

_SAMPLES, _SAMPLE_BYTES = 64, 4096


def save_state(path: str | Path, arrays: Mapping[str, Array], facts: Mapping[str, Any]) -> None:
    """Write arrays and facts to one file, whole or not at all.

    Raises MespRefError when the disk is full or the file cannot be written; the old file stays.
    """
    specs = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    with write_aside(path) as aside, aside.open("wb") as file:
        writer = Writer(file, specs, {"facts": json.dumps(facts)})
        for name, array in arrays.items():
            writer.put(name, array)


def load_state(path: str | Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """Arrays (views of the mapped file) and facts.

    Raises MespRefError for a file that is missing, damaged or not a saved state.
    """
    file = MappedFile(path)
    try:
        facts = parse_json(file.metadata["facts"])
    except (KeyError, ValueError, TypeError):
        raise MespRefError(f"{path}: facts: missing, expected a state saved by finetune") from None
    return {name: file.raw(name) for name in file}, facts


def _count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _when(value: object) -> bool:
    with contextlib.suppress(TypeError, ValueError):
        return bool(datetime.fromisoformat(value))  # type: ignore[arg-type]
    return False


def _three(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_count, value))


def _named(value: object) -> bool:
    return isinstance(value, dict)


def _best(value: object) -> bool:
    if not isinstance(value, dict):
        return value is None
    lowest, latest = value.get("loss"), value.get("latest")
    return (
        value.keys() == set(Best._fields)
        and all(_count(value[name]) for name in ("step", "waited"))
        and (lowest is None or type(lowest) in (int, float))  # JSON here has no NaN
        and (type(latest) is int and latest >= -1)
    )


def _identity(value: object) -> bool:
    known = {"method": tuple(METHODS), "checkpoints": KINDS}
    return (
        isinstance(value, dict)
        and all(value.get(name) in allowed for name, allowed in known.items())
        and _count(value.get("steps"))
    )


def check_facts(path: str | Path, facts: Any) -> dict[str, Any]:
    """The facts of a run's saved state, every field of its type; MespRefError for the first other.

    step, tokens: counts; cursor: three counts; started: when; identity: names to values, a method,
    checkpoints and a number of steps among them; environment: names to values; best: the fields of
    Best, or missing
    """

    fields = {"step": _count, "tokens": _count, "cursor": _three, "started": _when,
              "identity": _identity, "environment": _named, "best": _best}  # fmt: skip
    for field, holds in fields.items():
        found = facts.get(field) if isinstance(facts, dict) else facts
        if not holds(found):
            raise MespRefError(
                f"{path}: {field}: found {shown(found)}, expected what finetune saves; the file is "
                "damaged, start a new run"
            )
    return dict(facts)


def model_fingerprint(model: Model) -> str:
    """A short hash that tells one checkpoint from another without reading it whole.

    SHA-256 over the configuration and over 64 evenly spaced pieces of 4 KiB of each mapped file
    (or of each tensor, for a model in memory): any training changes all of them.
    """
    digest = hashlib.sha256(json.dumps(config_fields(model.config), sort_keys=True).encode())
    if model.path is None:
        for name in model.weights:
            flat = np.ascontiguousarray(model.weights[name][...]).reshape(-1)
            digest.update(flat[:: max(flat.size // _SAMPLES, 1)].tobytes())
        return digest.hexdigest()
    for path in weight_files(model.path):
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{path.name} {size}".encode())
            for i in range(_SAMPLES):
                file.seek(max(size - _SAMPLE_BYTES, 0) * i // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def arrays_hash(arrays: Mapping[str, Array]) -> str:
    """SHA-256 over arrays in their order."""
    digest = hashlib.sha256()
    for array in arrays.values():
        digest.update(array.tobytes())
    return digest.hexdigest()


def environment() -> dict[str, str]:
    """What decides the bits of a GEMM besides its inputs: NumPy, its BLAS, and the thread count."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    names = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    stated = next((os.environ[name] for name in names if os.environ.get(name)), None)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "numpy": np.__version__,
        "blas": f"{blas.get('name')} {blas.get('version')}",
        "threads": stated or str(usable),
    }

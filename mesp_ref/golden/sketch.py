"""A sketch of a real model's gradients: small enough for a pull request, sharp enough to check.

For a batch it holds the loss and, of every LoRA gradient g, the norm and 64 projections ⟨g, r⟩ on
random signs r = ±1. The projections of another backend's g' differ by ⟨g' − g, r⟩, whose mean square
is ‖g' − g‖²: so 64 numbers measure the relative error of a tensor of any size to about 9 %.
Source    Achlioptas 2003, random projections with signs
"""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from mesp_ref.api import loss_and_grads
from mesp_ref.errors import MespRefError, shown
from mesp_ref.files.config import config_fields
from mesp_ref.files.models import load_model
from mesp_ref.files.output import write_aside
from mesp_ref.files.peft import load_adapter
from mesp_ref.files.strict import read_object
from mesp_ref.golden.check import own_type, usual_type
from mesp_ref.golden.suite import DTYPES, read_tensors
from mesp_ref.golden.tolerance import UNITS
from mesp_ref.ops import Array

FORMAT, PROJECTIONS, MARGIN = "mesp-ref gradient sketch 1", 64, 4.0
_PIECE = 1 << 20


def project(name: str, g: Array) -> list[float]:
    """⟨g, r⟩ for the signs that belong to a tensor's name."""
    flat, sums = g.reshape(-1), np.zeros(PROJECTIONS)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    for start in range(0, flat.size, _PIECE):
        piece = flat[start : start + _PIECE].astype(np.float64)
        for j in range(PROJECTIONS):
            signs = rng.integers(0, 2, piece.size, dtype=np.int8)
            sums[j] += 2 * float(piece[signs == 1].sum()) - float(piece.sum())
    return [float(s) for s in sums]


def _relative(a: Array, b: Array) -> float:
    size = float(np.linalg.norm(b))
    return float(np.linalg.norm(a - b)) / size if size else float(np.any(a))


def make_sketch(model: str, adapter: str, input_ids: Any, labels: Any) -> dict[str, Any]:
    """The sketch of a batch: values in float64, and how far our own float32 is from them.

    Raises MespRefError as load_model, load_adapter and loss_and_grads do
    """
    runs = []
    for dtype in ("float64", "float32"):
        opened = load_model(model, dtype=dtype)
        lora = load_adapter(adapter, dtype=dtype, config=opened.config)
        runs.append(loss_and_grads(opened, lora, input_ids, labels))
    (loss, grads), (narrow_loss, narrow) = runs
    return {
        "format": FORMAT,
        "config": config_fields(opened.config),
        "lora": {"rank": lora.rank, "alpha": lora.alpha, "use_rslora": lora.use_rslora},
        "input_ids": np.asarray(input_ids).tolist(),
        "labels": np.asarray(labels).tolist(),
        "loss": loss,
        "loss_drift": abs(narrow_loss - loss),
        "tensors": {
            name: {
                "shape": list(g.shape),
                "norm": float(np.linalg.norm(g)),
                "drift": _relative(narrow[name].astype(np.float64), g),
                "projections": project(name, g),
            }
            for name, g in grads.items()
        },
    }


def save_sketch(sketch: dict[str, Any], path: str | Path, overwrite: bool = True) -> None:
    """Write the JSON file, whole or not at all."""
    with write_aside(path, overwrite=overwrite) as aside:
        aside.write_text(json.dumps(sketch, indent=1) + "\n", encoding="utf-8")


def load_sketch(path: str | Path) -> dict[str, Any]:
    """Read a sketch; MespRefError for what is none."""
    sketch = read_object(Path(path), "a gradient sketch")
    if sketch.get("format") != FORMAT:
        found = shown(sketch.get("format"))
        raise MespRefError(f"{path}: format: found {found}, expected {FORMAT!r}")
    tensors = sketch.get("tensors")
    numbers = _numbers([sketch.get("loss"), sketch.get("loss_drift")])
    if not numbers or not isinstance(tensors, dict) or not tensors:
        raise MespRefError(f"{path}: loss, loss_drift, tensors: expected numbers and an object")
    for name, entry in tensors.items():
        if not _is_entry(entry):
            raise MespRefError(
                f"{path}: {shown(name)}: found {shown(entry)}, expected shape, norm, drift and "
                f"{PROJECTIONS} projections"
            )
    return sketch


def _numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) in (int, float) for v in values)


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and _numbers([entry.get("norm"), entry.get("drift")])
        and _numbers(entry.get("shape"))
        and _numbers(entry.get("projections"))
        and len(entry["projections"]) == PROJECTIONS
    )


def check_sketch(
    sketch: dict[str, Any], gradients: str | Path, dtype: str | None = None
) -> list[dict[str, Any]]:
    """Per tensor of the sketch: estimated relative error of a safetensors file of gradients.

    Names are PEFT's, with or without .grad behind. Gate: four times our own float32's error, scaled
    to the roundings of the precision; floor of one rounding, for tensors whose drift happens to be
    small.
    dtype     precision that the backend computed in; by default float32, or 16 bits where most
              tensors are stored in them
    """
    found = {n.removesuffix(".grad"): a for n, a in read_tensors(Path(gradients)).items()}
    if not set(found) & set(sketch["tensors"]):
        raise MespRefError(f"{gradients}: found none of the sketch's tensors, such as "
                           f"{next(iter(sketch['tensors']))}")  # fmt: skip
    stored = max(usual_type(found.values()), "float32", key=("", *DTYPES).index)
    with np.errstate(all="ignore"):  # what is not finite is judged, not warned of
        return [
            _compare(name, entry, got, dtype or own_type(got, stored))
            for name, entry in sketch["tensors"].items()
            for got in [found.get(name)]
        ]


def _compare(name: str, entry: dict[str, Any], got: Array | None, dtype: str) -> dict[str, Any]:
    unit, narrow = UNITS[dtype].store, UNITS["float32"].store
    gate = MARGIN * max(entry["drift"] * unit / narrow, unit)
    problem, error, ratio = "", math.inf, math.nan
    if got is None:
        problem = "missing"
    elif list(got.shape) != entry["shape"]:
        problem = f"shape: found {list(got.shape)}, expected {shown(entry['shape'])}"
    elif got.dtype.name not in DTYPES:
        problem = f"dtype: found {got.dtype}, expected one of {', '.join(DTYPES)}"
    elif not np.isfinite(got.astype(np.float64)).all():
        problem = "not finite"
    else:
        wide = got.astype(np.float64)
        off = np.array(project(name, wide)) - entry["projections"]
        size = entry["norm"] or 1.0
        error, ratio = float(np.sqrt((off**2).mean())) / size, float(np.linalg.norm(wide)) / size
        problem = "" if error <= gate else "differs"
    return {"name": name, "dtype": dtype, "problem": problem, "error": error, "gate": gate,
            "norm_ratio": ratio}  # fmt: skip

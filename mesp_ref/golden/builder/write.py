"""The files of a suite: tensors, manifest, hashes."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mesp_ref.files.manifest import NAME as MANIFEST
from mesp_ref.files.output import write_aside
from mesp_ref.files.writer import Writer
from mesp_ref.golden.suite import DATE, FORMAT, RELEASE, VERSION, Case, Tensor, Vectors, Wrong
from mesp_ref.golden.tolerance import UNITS
from mesp_ref.ops import Array

CONVENTIONS = {
    "layout": "row major, little endian",
    "linear": "y = x Wᵀ + b with W [out, in]",
    "lora": "h = x Aᵀ, y += s h Bᵀ with A [R, in], B [out, R], s = alpha/R",
    "rmsnorm": "n = sqrt(mean(x²) + eps), eps inside the root; y = w x / n",
    "rope": "half-split: element i turns with element i + D/2; angle t·theta^(−2i/D)",
    "attention": "scores q·k/√D; causal, aligned at the bottom right; query head h reads "
    "key/value head h // (H/G)",
    "masked_attention": "query i sees keys j ≤ i with i − j < window and i − j ≤ positions[i]; "
    "positions count from 0 in each document; scale takes the place of 1/√D",
    "fused": "y of qkv_lora is q, k and v, of add_norm norm(x + f) and x + f, side by side in the "
    "last axis",
    "gemma3_text": "a norm's gain is 1 + weight; its names and sizes stand in config",
    "swiglu": "silu(gate) ⊙ up",
    "geglu": "gelu(gate) ⊙ up, gelu(x) = x/2·(1 + tanh(√(2/π)·(x + 0.044715·x³)))",
    "loss": "mean cross entropy over labels ≠ −100; in e2e labels are shifted inside: "
    "position t predicts label t + 1",
    "gradient": "of <cotangent, output>; in e2e of the loss. The gradient with respect to x is dx "
    "in ops and blocks; x.grad is the gradient with respect to the tensor called x",
    "letters": "N batch, T tokens, C hidden, H query heads, G key/value heads, D head size, "
    "F MLP width, V vocabulary, R rank",
}


def write_tensors(path: Path, arrays: Mapping[str, Array]) -> None:
    """One safetensors file; float64, float32, 16-bit types and integers as they are."""
    specs = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    with write_aside(path) as aside, aside.open("wb") as file:
        writer = Writer(file, specs, {})
        for name, array in arrays.items():
            writer.put(name, array)


def rounded_up(mag: Array) -> Array:
    """float64 magnitudes as the next float32 that is not below."""
    low = mag.astype(np.float32)
    return np.where(low < mag, np.nextafter(low, np.float32(np.inf)), low).astype(np.float32)


def write_case(root: Path, case: Case, vectors: Vectors) -> None:
    """A case file."""
    arrays = {f"in/{n}": a for n, a in vectors.inputs.items() if n not in case.generated}
    arrays |= {f"want/{name}": np.asarray(a, np.float64) for name, a in vectors.want.items()}
    arrays |= {f"whole/{name}": array for name, array in vectors.whole.items()}
    arrays |= {f"rows/{name}": array for name, array in vectors.rows.items()}
    arrays |= {f"mag/{name}": rounded_up(np.asarray(m)) for name, m in vectors.mag.items()}
    write_tensors(root / case.file, arrays)


def _tensor(tensor: Tensor) -> dict[str, Any]:
    entry = asdict(tensor)
    for name in ("k", "s") if tensor.gates else ("gates",):
        del entry[name]
    optional = ("samples", "stream", "norms", "biases")
    return {name: value for name, value in entry.items() if value or name not in optional}


def _case(case: Case) -> dict[str, Any]:
    entry = asdict(case) | {"tensors": [_tensor(tensor) for tensor in case.tensors]}
    return {
        name: value
        for name, value in entry.items()
        if value or name not in ("generated", "undecided")
    }


def write_manifest(root: Path, cases: list[Case], wrong: list[Wrong]) -> None:
    """manifest.json, and SHA256SUMS over every file that is there."""
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "release": RELEASE,
        "date": DATE,
        "conventions": CONVENTIONS,
        "units": {name: unit._asdict() for name, unit in UNITS.items()},
        "cases": [_case(c) for c in cases],
        "wrong": [asdict(w) for w in wrong],
    }
    with write_aside(root / "manifest.json") as aside:
        aside.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", "utf-8")
    files = sorted(
        p for p in root.rglob("*") if p.is_file() and p.name not in ("SHA256SUMS", MANIFEST)
    )
    lines = [
        f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(root).as_posix()}\n"
        for p in files
    ]
    with write_aside(root / "SHA256SUMS") as aside:
        aside.write_text("".join(lines), "ascii")

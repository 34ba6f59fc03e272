"""A golden suite on disk: manifest.json, SHA256SUMS and one safetensors file per case.

A case file holds `in/<name>` (what the backend computes from), `want/<name>` (float64) and, for
ops, `mag/<name>` (float32, rounded up). A backend answers with a file of the same path whose
tensors are called <name>.
"""

import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mesp_ref.errors import MespRefError, shown
from mesp_ref.files.safetensors import MappedFile
from mesp_ref.files.strict import inside, open_regular, read_bytes, read_object
from mesp_ref.golden.generate import PROJECTIONS, made, places, projections
from mesp_ref.golden.tolerance import UNITS, bound
from mesp_ref.ops import Array

FORMAT, VERSION = "mesp-ref golden suite", 2
RELEASE, DATE = "2.1", "2026-11-26"  # of the archive: a number that grows, and the day it was made
SHIPPED = Path(__file__).parent / "data"
DTYPES = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Tensor:
    """One expected tensor: role "result" or "inner", direction "forward" or "backward".

    Op tensors carry k and s of the tolerance, model tensors a gate per dtype. One that is too large
    to be stored whole is known by `samples` of its entries, 32 projections on signs and the sums of
    its rows (see generate); `stream` says which. norms and biases are gates, by dtype, on the
    relative error of the whole tensor and on that of Σ|row|, by the root mean square over rows.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    direction: str
    k: int = 0
    s: int = 0
    gates: dict[str, float] = field(default_factory=dict)
    samples: int = 0
    stream: int = 0
    norms: dict[str, float] = field(default_factory=dict)
    biases: dict[str, float] = field(default_factory=dict)

    def sampled(self, array: Array) -> Array:
        """What is compared entry by entry: the tensor, or its samples."""
        if not self.samples:
            return array
        return array.reshape(-1)[places(array.size, self.samples, self.stream)]

    def seen(self, array: Array) -> Array:
        """All that is known of the tensor, as one vector: samples, then projections."""
        if not self.samples:
            return array
        return np.concatenate([self.sampled(array), projections(array, self.stream)])

    def whole_tolerance(self, vectors: "Vectors", dtype: str) -> float:
        """Largest right error of a projection: the norm of the entries' tolerances.

        And what 64-bit sums of so many terms round themselves, in any order.
        """
        mag, size = vectors.whole[self.name][-2:]
        own = math.sqrt(math.prod(self.shape)) * UNITS["float64"].sum * size
        return float(bound(np.array(mag), self.k, self.s, dtype) + own)

    def tolerance(self, vectors: "Vectors", dtype: str) -> Array:
        """Largest right deviation of every element, or sample."""
        if self.gates:
            return np.full(self.shape, self.gates[dtype])
        return bound(vectors.mag[self.name], self.k, self.s, dtype)


@dataclass(frozen=True)
class Case:
    """One file of inputs and expected values; its tensors stand in execution order."""

    name: str
    kind: str
    file: str
    note: str
    source: str
    dtypes: tuple[str, ...]
    attributes: dict[str, Any]
    tensors: tuple[Tensor, ...]
    generated: dict[str, dict[str, Any]] = field(default_factory=dict)  # inputs, see generate
    undecided: tuple[str, ...] = ()  # entries that are 0 within 400 bits, not proven to be 0


@dataclass(frozen=True)
class Wrong:
    """A deliberately wrong answer to the case `of`, and the dtypes in which it must be refused."""

    name: str
    of: str
    bug: str
    file: str
    dtypes: tuple[str, ...]


class Vectors(NamedTuple):
    """The arrays of a case; of a sampled tensor want and mag hold the samples.

    whole   of a sampled tensor: its projections, then the norms of mag and of want
    rows    of a tensor with a gate on biases: Σ|row|
    """

    inputs: dict[str, Array]
    want: dict[str, Array]
    mag: dict[str, Array]
    whole: dict[str, Array] = {}  # noqa: RUF012 (never written)
    rows: dict[str, Array] = {}  # noqa: RUF012


class Suite:
    """A suite whose manifest has been held against its hash; each file is when it is read.

    Raises MespRefError for a directory that is no suite, another version, and a hash that differs
    """

    def __init__(self, root: str | Path = SHIPPED):
        self.root = Path(root)
        self._sums = self._read_sums()
        manifest = self._read_manifest()
        try:
            self.release, self.date = str(manifest["release"]), str(manifest["date"])
            self.conventions: dict[str, str] = dict(manifest["conventions"])
            self.cases = {c["name"]: _case(c) for c in manifest["cases"]}
            self.wrong = [_wrong(w) for w in manifest["wrong"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = shown(" ".join(str(error).split()))
            raise MespRefError(
                f"{self.root / 'manifest.json'}: found an entry that manifest.schema.json does "
                f"not allow ({reason})"
            ) from None

    def _read_sums(self) -> dict[str, str]:
        file = inside(self.root, "SHA256SUMS")
        try:
            lines = read_bytes(file).decode("ascii").splitlines()
            return {path: digest for digest, path in (line.split("  ", 1) for line in lines)}
        except (OSError, ValueError):
            raise MespRefError(
                f"{file}: not readable, expected a golden suite with manifest.json and SHA256SUMS"
            ) from None

    def _read_manifest(self) -> dict[str, Any]:
        file = inside(self.root, "manifest.json")
        manifest = read_object(file, "a golden suite")
        found = manifest.get("format"), manifest.get("version")
        if found != (FORMAT, VERSION):
            raise MespRefError(
                f"{file}: found {shown(found[0])} version {shown(found[1])}, expected {FORMAT!r} "
                f"version {VERSION}; use the mesp-ref that made it"
            )
        self.verify("manifest.json")
        return manifest

    def verify(self, path: str) -> Path:
        """The file, once its SHA-256 agrees with SHA256SUMS; MespRefError otherwise."""
        file = inside(self.root, path)
        try:
            with open_regular(file) as opened:
                found = hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError:
            raise MespRefError(f"{file}: missing, but listed in SHA256SUMS") from None
        if self._sums.get(path) != found:
            raise MespRefError(
                f"{file}: SHA-256 found {found[:12]}…, expected "
                f"{self._sums.get(path, 'an entry')[:12]}… from SHA256SUMS; fetch the suite again"
            )
        return file

    def verify_all(self) -> int:
        """Hold every listed file against its hash; returns how many there are."""
        for path in self._sums:
            self.verify(path)
        return len(self._sums)

    def read(self, case: Case) -> Vectors:
        """Inputs, expected values and magnitudes of a case."""
        groups: dict[str, dict[str, Array]] = {n: {} for n in GROUPS}
        file = self.verify(case.file)
        for key, array in read_tensors(file).items():
            group, _, name = key.partition("/")
            if group not in groups:
                raise MespRefError(f"{file}: {shown(key)}: found, expected {', '.join(GROUPS)}")
            groups[group][name] = array
        for tensor in case.tensors:
            for group in ("want",) if tensor.gates else ("want", "mag"):
                _require_numbers(file, group, groups[group].get(tensor.name), tensor)
            if tensor.samples and groups["whole"][tensor.name].size != PROJECTIONS + 2:
                raise MespRefError(
                    f"{file}: whole/{tensor.name}: expected {PROJECTIONS + 2} numbers"
                )
        inputs = groups["in"] | {name: made(entry) for name, entry in case.generated.items()}
        return Vectors(inputs, *(groups[n] for n in GROUPS[1:]))

    def read_wrong(self, wrong: Wrong) -> dict[str, Array]:
        """The tensors that a wrong answer gives, by name."""
        file = self.verify(wrong.file)
        arrays = read_tensors(file)
        for tensor in self.cases[wrong.of].tensors if wrong.of in self.cases else ():
            if tensor.name in arrays:
                _require_numbers(file, "", arrays[tensor.name], tensor)
        return arrays


GROUPS = ("in", "want", "mag", "whole", "rows")


def _require_numbers(file: Path, group: str, array: Array | None, tensor: Tensor) -> None:
    """Raise MespRefError unless an array of the suite is the finite one that the manifest promises."""
    found = "nothing" if array is None else f"{array.dtype} {list(array.shape)}"
    shape = (tensor.samples,) if tensor.samples and group else tensor.shape
    if array is None or array.shape != shape or not _is_finite(array):
        raise MespRefError(
            f"{file}: {group}/{tensor.name}: found {found}, expected finite numbers "
            f"{list(shape)} as manifest.json says"
        )


def _is_finite(array: Array) -> bool:
    return array.dtype.name in DTYPES and bool(np.isfinite(array.astype(np.float64)).all())


def read_tensors(file: Path) -> dict[str, Array]:
    """Every tensor of a safetensors file, as stored."""
    mapped = MappedFile(file)
    return {name: mapped.raw(name) for name in mapped}


def _case(entry: dict[str, Any]) -> Case:
    case = Case(
        **entry
        | {"dtypes": _dtypes(entry), "tensors": tuple(map(_tensor, entry["tensors"]))}
        | {"undecided": tuple(entry.get("undecided", ()))}
    )
    _require_texts(case.name, case.kind, case.file, case.note, case.source, *case.undecided)
    if not isinstance(case.generated, dict) or not all(map(_is_made, case.generated.values())):
        raise ValueError(f"{case.name}: generated")
    if not _sane(case.attributes) or not case.tensors:
        raise ValueError(f"{case.name}: attributes or tensors")
    if any(t.gates and not set(case.dtypes) <= set(t.gates) for t in case.tensors):
        raise ValueError(f"{case.name}: gates")
    return case


# What an entry of `generated` may hold, by its kind: the fields, and the type of each.
MADE = {
    "numbers": {
        "shape": list,
        "stream": int,
        "scale": float,
        "offset": float,
        "ramp": float,
        "rows": bool,
    },
    "integers": {"shape": list, "stream": int, "high": int, "ignored": int},
}


def _is_made(entry: object) -> bool:
    """Whether an input can be generated from an entry, at a size that fits a machine."""
    if not isinstance(entry, dict) or entry.get("kind") not in MADE:
        return False
    types = MADE[entry["kind"]]
    if set(entry) - {"kind"} - set(types) or not {"shape", "stream"} <= set(entry):
        return False
    if not all(type(value) is types[n] for n, value in entry.items() if n != "kind"):
        return False
    shape, sizes = entry["shape"], [entry["stream"], entry.get("high", 1), entry.get("ignored", 0)]
    if not all(type(n) is int and 0 < n < 2**24 for n in shape) or math.prod(shape) > 2**24:
        return False
    return all(0 <= n < 2**24 for n in sizes) and entry.get("high", 1) > 0


def _sane(attributes: object) -> bool:
    """Whether what `explain` computes with are positive numbers."""
    if not isinstance(attributes, dict):
        return False
    config, names = attributes.get("config"), ("rank", "alpha", "s")
    used = [attributes[name] for name in names if name in attributes]
    if config is not None:
        if not isinstance(config, dict):
            return False
        sizes = ("head_dim", "num_attention_heads", "num_key_value_heads")
        used += [config.get(name) for name in sizes]
        if not all(type(config.get(name)) is int for name in sizes):
            return False
    return all(type(value) in (int, float) and 1e-9 < value < 1e9 for value in used)


def _tensor(entry: dict[str, Any]) -> Tensor:
    tensor = Tensor(**entry | {"shape": tuple(entry["shape"])})
    _require_texts(tensor.name, tensor.role, tensor.direction)
    sizes = [(n, 0) for n in (tensor.k, tensor.s, tensor.samples, tensor.stream)]
    sizes += [(n, 1) for n in tensor.shape]
    if not all(type(n) is int and least <= n < 2**31 for n, least in sizes):
        raise ValueError(f"{tensor.name}: shape, k, s or samples")
    gates = [g for d in (tensor.gates, tensor.norms, tensor.biases) for g in dict(d).values()]
    if not all(type(gate) in (int, float) and gate >= 0 for gate in gates):
        raise ValueError(f"{tensor.name}: gates")
    return tensor


def _wrong(entry: dict[str, Any]) -> Wrong:
    wrong = Wrong(**entry | {"dtypes": _dtypes(entry)})
    _require_texts(wrong.name, wrong.of, wrong.bug, wrong.file)
    return wrong


def _dtypes(entry: dict[str, Any]) -> tuple[str, ...]:
    if not entry["dtypes"] or not set(entry["dtypes"]) <= set(DTYPES):
        raise ValueError("dtypes")
    return tuple(entry["dtypes"])


def _require_texts(*values: object) -> None:
    if not all(isinstance(value, str) and value for value in values):
        raise ValueError("a name or a text")

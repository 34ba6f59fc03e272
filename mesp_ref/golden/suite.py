"""A golden suite on disk: manifest.json, SHA256SUMS and one safetensors file per case.

A case file holds `in/<name>` (what the backend computes from), `want/<name>` (float64) and, for
ops, `mag/<name>` (float32, rounded up). A backend answers with a file of the same path whose
tensors are called <name>.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mesp_ref.errors import MespRefError
from mesp_ref.golden.tolerance import bound
from mesp_ref.ops import Array
from mesp_ref.weights import MappedFile

FORMAT, VERSION = "mesp-ref golden suite", 1
SHIPPED = Path(__file__).parent / "data"
DTYPES = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Tensor:
    """One expected tensor: role "result" or "inner", direction "forward" or "backward".

    Op tensors carry k and s of the tolerance, model tensors a gate per dtype.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    direction: str
    k: int = 0
    s: int = 0
    gates: dict[str, float] = field(default_factory=dict)

    def tolerance(self, vectors: "Vectors", dtype: str) -> Array:
        """Largest right deviation of every element."""
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


@dataclass(frozen=True)
class Wrong:
    """A deliberately wrong answer to the case `of`, and the dtypes in which it must be refused."""

    name: str
    of: str
    bug: str
    file: str
    dtypes: tuple[str, ...]


class Vectors(NamedTuple):
    """The arrays of a case."""

    inputs: dict[str, Array]
    want: dict[str, Array]
    mag: dict[str, Array]


class Suite:
    """A suite whose manifest has been held against its hash; each file is when it is read.

    Raises MespRefError for a directory that is no suite, another version, and a hash that differs
    """

    def __init__(self, root: str | Path = SHIPPED):
        self.root = Path(root)
        self._sums = self._read_sums()
        manifest = self._read_manifest()
        self.conventions: dict[str, str] = manifest["conventions"]
        self.cases = {c["name"]: _case(c) for c in manifest["cases"]}
        self.wrong = [Wrong(**w | {"dtypes": tuple(w["dtypes"])}) for w in manifest["wrong"]]

    def _read_sums(self) -> dict[str, str]:
        file = self.root / "SHA256SUMS"
        try:
            lines = file.read_text(encoding="ascii").splitlines()
            return {path: digest for digest, path in (line.split("  ", 1) for line in lines)}
        except (OSError, ValueError):
            raise MespRefError(
                f"{file}: not readable, expected a golden suite with manifest.json and SHA256SUMS"
            ) from None

    def _read_manifest(self) -> dict[str, Any]:
        file = self.root / "manifest.json"
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
            found = manifest["format"], manifest["version"]
        except (OSError, ValueError, KeyError, TypeError):
            raise MespRefError(f"{file}: not readable, expected a golden suite") from None
        if found != (FORMAT, VERSION):
            raise MespRefError(
                f"{file}: found {found[0]!r} version {found[1]!r}, expected {FORMAT!r} version "
                f"{VERSION}; use the mesp-ref that made it"
            )
        self.verify("manifest.json")
        return dict(manifest)

    def verify(self, path: str) -> Path:
        """The file, once its SHA-256 agrees with SHA256SUMS; MespRefError otherwise."""
        file = self.root / path
        try:
            found = hashlib.sha256(file.read_bytes()).hexdigest()
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
        groups: dict[str, dict[str, Array]] = {"in": {}, "want": {}, "mag": {}}
        for key, array in read_tensors(self.verify(case.file)).items():
            group, _, name = key.partition("/")
            groups[group][name] = array
        return Vectors(groups["in"], groups["want"], groups["mag"])

    def read_wrong(self, wrong: Wrong) -> dict[str, Array]:
        """The tensors that a wrong answer gives, by name."""
        return read_tensors(self.verify(wrong.file))


def read_tensors(file: Path) -> dict[str, Array]:
    """Every tensor of a safetensors file, as stored."""
    mapped = MappedFile(file)
    return {name: mapped.raw(name) for name in mapped}


def _case(entry: dict[str, Any]) -> Case:
    tensors = tuple(Tensor(**t | {"shape": tuple(t["shape"])}) for t in entry["tensors"])
    return Case(**entry | {"dtypes": tuple(entry["dtypes"]), "tensors": tensors})

"""A coverage and waiver file: what a backend has, and which deviations it accepts, and why.

    backend = "my-kernels 1.2"
    covers = ["ops/rmsnorm", "tile/rmsnorm"]   # what it has: nothing else is asked of it

    [[waive]]
    case = "ops/rmsnorm/large"                 # a pattern
    tensor = "d*"                              # a pattern; all tensors without it
    dtype = "float16"                          # one precision; all without it
    most = 3.0                                 # times the tolerance; beyond it the waiver does not hold
    why = "x² overflows in this casting mode: a choice for speed"

A waiver that nothing needs any more is told, so that the file shrinks as a backend gets better.
"""

import fnmatch
import math
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mesp_ref.errors import MespRefError, escaped, named, shown
from mesp_ref.files.strict import read_bytes
from mesp_ref.golden.check import CaseReport, Report, Verdict
from mesp_ref.golden.suite import DTYPES

FIELDS = {"case": str, "tensor": str, "dtype": str, "most": float, "why": str}


@dataclass(frozen=True)
class Waiver:
    """One accepted deviation."""

    case: str
    why: str
    tensor: str = "*"
    dtype: str = ""
    most: float = math.inf

    def holds(self, report: CaseReport, verdict: Verdict) -> bool:
        """Whether it accepts a failed tensor: of its size, and no missing or misshapen one."""
        return (
            verdict.problem == "differs"
            and verdict.margin <= self.most
            and self.dtype in ("", report.dtype)
            and fnmatch.fnmatchcase(report.case, self.case)
            and fnmatch.fnmatchcase(verdict.tensor, self.tensor)
        )


@dataclass(frozen=True)
class Coverage:
    """The file: the backend's name, patterns of cases that it has, waivers."""

    backend: str = ""
    covers: tuple[str, ...] = ()
    waivers: tuple[Waiver, ...] = field(default_factory=tuple)


def read_coverage(path: str | Path) -> Coverage:
    """Read a coverage file; MespRefError, naming entry and field, for what is none."""
    try:
        found = tomllib.loads(read_bytes(Path(path)).decode("utf-8"))
    except OSError as error:
        raise MespRefError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise MespRefError(f"{path}: not TOML: {shown(str(error))}") from None
    unknown = set(found) - {"backend", "covers", "waive"}
    if unknown:
        raise MespRefError(
            f"{path}: found {shown(min(unknown))}, expected backend, covers or waive"
        )
    backend, covers, entries = (
        found.get("backend", ""), found.get("covers", []), found.get("waive", [])
    )  # fmt: skip
    if not isinstance(backend, str) or not _texts(covers) or not isinstance(entries, list):
        raise MespRefError(
            f"{path}: expected backend as a text, covers as a list of texts, waive as [[waive]]"
        )
    waivers = tuple(_waiver(path, number, entry) for number, entry in enumerate(entries, 1))
    return Coverage(backend, tuple(covers), waivers)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) and v for v in value)


def _waiver(path: str | Path, number: int, entry: Any) -> Waiver:
    where = f"{path}: waive {number}"
    if not isinstance(entry, dict):
        raise MespRefError(f"{where}: found {shown(entry)}, expected a table")
    for name, value in entry.items():
        kind = FIELDS.get(name)
        right = isinstance(value, kind) if kind else False
        if kind is float:
            right = type(value) in (int, float) and value > 0
        if not right:
            raise MespRefError(
                f"{where}: {shown(name)}: found {shown(value)}, expected one of {', '.join(FIELDS)}, "
                "texts, and most a number above 0"
            )
    for name in ("case", "why"):
        if not entry.get(name, "").strip():
            raise MespRefError(f"{where}: {name}: found nothing, expected a text")
    if entry.get("dtype", "float32") not in DTYPES:
        raise MespRefError(f"{where}: dtype: found {shown(entry['dtype'])}, expected one of "
                           f"{', '.join(DTYPES)}")  # fmt: skip
    return Waiver(**entry)


def waive(report: Report, waivers: tuple[Waiver, ...]) -> tuple[Report, list[str]]:
    """The report with accepted deviations as passed, and a line for each waiver, used or not."""
    used = dict.fromkeys(waivers, 0)
    cases = []
    for case in report.cases:
        verdicts = []
        for verdict in case.verdicts:
            found = next((w for w in waivers if w.holds(case, verdict)), None)
            if found:
                used[found] += 1
                verdict = replace(verdict, problem="")
            verdicts.append(verdict)
        waived = verdicts != case.verdicts
        like = [] if waived and all(v.passed for v in verdicts) else case.like
        cases.append(replace(case, verdicts=verdicts, like=like))
    lines = [
        f"waived: {named(w.case)}: {n} tensors: {escaped(w.why)}"
        if n
        else f"no longer needed: the waiver of {named(w.case)}: nothing there deviates"
        for w, n in used.items()
    ]
    return replace(report, cases=cases), lines

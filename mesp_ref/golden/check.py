"""Compare what a backend wrote with the suite, tensor by tensor."""

import fnmatch
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mesp_ref.errors import MespRefError
from mesp_ref.files.strict import inside
from mesp_ref.golden.explain import explain
from mesp_ref.golden.generate import places, projections, row_sums
from mesp_ref.golden.suite import DTYPES, Case, Suite, Tensor, Vectors, read_tensors
from mesp_ref.ops import Array

ROLES = ("result", "inner", "base")


@dataclass(frozen=True)
class Verdict:
    """One tensor. `margin` is the error as a fraction of the tolerance where it is largest.

    problem   "" where it passes; "differs", "missing", "unexpected", "shape", "dtype", "not finite"
    """

    tensor: str
    direction: str
    problem: str
    margin: float
    text: str
    index: tuple[int, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.problem


@dataclass
class CaseReport:
    """The tensors of one case in execution order, and what the differences look like.

    narrower   tensors that are stored in fewer bits than `dtype` and were held to their own rounding
    """

    case: str
    dtype: str
    narrower: int = 0
    verdicts: list[Verdict] = field(default_factory=list)
    like: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(verdict.passed for verdict in self.verdicts)

    def first(self, direction: str) -> Verdict | None:
        """The first diverging tensor of the forward or backward in execution order."""
        wrong = (v for v in self.verdicts if v.direction == direction and not v.passed)
        return next(wrong, None)


@dataclass
class Report:
    """All cases that were asked for, and which part of the suite that is."""

    cases: list[CaseReport]
    asked: int
    total: int
    uncovered: list[str]

    @property
    def passed(self) -> bool:
        return all(case.passed for case in self.cases)


def check(
    actual: str | Path,
    suite: Suite | None = None,
    *,
    dtype: str | None = None,
    only: Sequence[str] = (),
    roles: Sequence[str] = ROLES,
    present: bool = False,
) -> Report:
    """Hold the files under `actual` against the suite.

    dtype     precision that the backend computed in; by default the one that most tensors of each
              file are stored in (a tensor stored in fewer bits is held to those), and for a missing
              file that of the files that are there
    only      patterns of cases (ops/rmsnorm, block/*) or tensors (e2e/tied:*lora*); default all
    roles     "result" outputs, loss and gradients of inputs and LoRA; "base" gradients of base
              weights; "inner" intermediates
    present   cases without a file are not asked for
    Raises    MespRefError for a directory without any file of the suite, unknown dtype, role or
              pattern, and a dtype that covers nothing that was asked for
    """
    suite = suite or Suite()
    for name, allowed in [(r, ROLES) for r in roles] + [(d, DTYPES) for d in [dtype] if d]:
        if name not in allowed:
            raise MespRefError(f"found {name!r}, expected one of {', '.join(allowed)}")
    asked = select(suite, only, roles)
    root = Path(actual)
    files = [_answer_file(root, case) for case, _ in asked]
    if not any(files):
        raise MespRefError(
            f"{root}: found none of the {len(asked)} files asked for, expected such as "
            f"{asked[0][0].file}; write them with the names of the suite"
        )
    if present:
        asked = [pair for pair, file in zip(asked, files, strict=True) if file]
        files = [file for file in files if file]
    answers = [read_tensors(file) if file else {} for file in files]
    usual = dtype or usual_type(array for got in answers for array in got.values()) or "float32"
    with np.errstate(all="ignore"):  # what is not finite is judged, not warned of
        reports = [
            _check_case(suite, case, tensors, got, dtype, _computed_in(case, got) or usual)
            for (case, tensors), got in zip(asked, answers, strict=True)
        ]
    covered = [report for report in reports if report is not None]
    uncovered = [c.name for (c, _), r in zip(asked, reports, strict=True) if r is None]
    if not covered:
        raise MespRefError(f"{root}: {usual}: found no case that covers it among those asked for")
    return Report(covered, len(asked), len(suite.cases), uncovered)


def select(
    suite: Suite, only: Sequence[str], roles: Sequence[str]
) -> list[tuple[Case, list[Tensor]]]:
    """The cases asked for with their tensors; MespRefError for a pattern that matches nothing."""
    found: dict[str, list[Tensor]] = {}
    for pattern in only or ("*",):
        cases, _, tensors = pattern.rstrip("/").partition(":")
        hits = 0
        for case in suite.cases.values():
            if not _matches(case.name, cases):
                continue
            for tensor in case.tensors:
                if tensor.role in roles and fnmatch.fnmatchcase(tensor.name, tensors or "*"):
                    found.setdefault(case.name, [])
                    if tensor not in found[case.name]:
                        found[case.name].append(tensor)
                    hits += 1
        if not hits:
            raise MespRefError(
                f"only: {pattern!r} matches nothing, expected a case such as ops/rmsnorm, "
                "block/usual or e2e/tied:*lora*"
            )
    ordered = (case for case in suite.cases.values() if case.name in found)
    return [(case, [t for t in case.tensors if t in found[case.name]]) for case in ordered]


def _matches(case: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(case, pattern) or fnmatch.fnmatchcase(case, f"{pattern}/*")


def _answer_file(root: Path, case: Case) -> Path | None:
    """What the backend wrote for a case; None where it wrote nothing."""
    file = inside(root, case.file)
    try:
        return file if file.is_file() else None
    except OSError as error:  # a suite may name what no file system takes
        raise MespRefError(f"{file}: cannot be read: {error.strerror}") from None


def _computed_in(case: Case, got: dict[str, Array]) -> str:
    return usual_type(got[tensor.name] for tensor in case.tensors if tensor.name in got)


def _check_case(
    suite: Suite, case: Case, tensors: list[Tensor], got: dict[str, Array],
    said: str | None, stored: str,
) -> CaseReport | None:  # fmt: skip
    """None where the case does not cover the dtype: the one said, else the one stored."""
    dtype, narrower = (said, ()) if said else (stored, case.dtypes)
    if dtype not in case.dtypes:
        return None
    vectors, report = suite.read(case), CaseReport(case.name, dtype)
    for tensor in tensors:
        array = got.get(tensor.name)
        own = own_type(array, dtype, narrower)
        report.narrower += own != dtype
        report.verdicts.append(judge(tensor, array, vectors, own))
    known = {tensor.name for tensor in case.tensors}
    for name in sorted(set(got) - known):
        report.verdicts.append(
            Verdict(name, "backward", "unexpected", math.inf, "the suite has no such tensor")
        )
    failed = [t for t, v in zip(tensors, report.verdicts, strict=False) if not v.passed]
    if failed:
        asked = {t.name: got[t.name] for t in tensors if t.name in got}
        report.like = explain(suite, case, vectors, asked, dtype, failed)
    return report


def usual_type(arrays: Iterable[Array]) -> str:
    """The floating type of most tensors, of two the wider; "" where there is none.

    A few stored wider, such as a loss, do not make a file exact, and a few stored narrower do not
    excuse the others: those are judged by `own_type`.
    """
    types = Counter(array.dtype.name for array in arrays if array.dtype.name in DTYPES)
    return max(DTYPES, key=lambda name: types[name]) if types else ""


def own_type(array: Array | None, dtype: str, allowed: Sequence[str] = DTYPES) -> str:
    """What a tensor is held to: the file's precision, or its own where that is narrower."""
    own = dtype if array is None else array.dtype.name
    is_narrower = own in allowed and DTYPES.index(own) > DTYPES.index(dtype)
    return own if is_narrower else dtype


def judge(tensor: Tensor, got: Array | None, vectors: Vectors, dtype: str) -> Verdict:
    """One tensor: there, of the right shape, finite, and within its tolerance everywhere."""

    def failed(problem: str, text: str) -> Verdict:
        return Verdict(tensor.name, tensor.direction, problem, math.inf, text)

    if got is None:
        return failed("missing", f"expected {list(tensor.shape)}")
    if got.dtype.name not in DTYPES:
        return failed("dtype", f"found {got.dtype}, expected one of {', '.join(DTYPES)}")
    if got.shape != tensor.shape:
        return failed("shape", f"found {list(got.shape)}, expected {list(tensor.shape)}")
    value = got.astype(np.float64)
    if not np.isfinite(value).all():
        return failed("not finite", f"{int((~np.isfinite(value)).sum())} of {value.size} entries")
    found = [_entries(tensor, value, vectors, dtype), *_whole(tensor, value, vectors, dtype)]
    return max(found, key=lambda verdict: verdict.margin)


def _entries(tensor: Tensor, value: Array, vectors: Vectors, dtype: str) -> Verdict:
    """Every entry, or every sample, against its tolerance."""
    want, allowed = vectors.want[tensor.name], tensor.tolerance(vectors, dtype)
    value = tensor.sampled(value)
    error = np.abs(value - want)
    ratio = np.divide(error, allowed, out=np.full(error.shape, np.inf), where=allowed > 0)
    ratio[error == 0] = 0
    at = np.unravel_index(int(ratio.argmax()), ratio.shape)
    index, margin = tuple(int(i) for i in at), float(ratio.max())
    text = f"got {value[index]:.9g}, want {want[index]:.9g}, tolerance {allowed[index]:.2g}"
    if tensor.samples:
        at = np.unravel_index(
            places(math.prod(tensor.shape), tensor.samples, tensor.stream)[index[0]], tensor.shape
        )
        index = tuple(int(i) for i in at)
    problem = "" if margin <= 1 else "differs"
    return Verdict(tensor.name, tensor.direction, problem, margin, text, index)


def _whole(tensor: Tensor, value: Array, vectors: Vectors, dtype: str) -> Iterator[Verdict]:
    """The tensor as a whole: its error by projections, and by row a bias that roundings lack."""

    def verdict(what: str, error: float, allowed: float) -> Verdict:
        margin = error / allowed if allowed else math.inf if error else 0.0
        text = f"{what}: {error:.3g}, tolerance {allowed:.3g}"
        return Verdict(
            tensor.name, tensor.direction, "" if margin <= 1 else "differs", margin, text
        )

    if tensor.samples:
        whole = vectors.whole[tensor.name]
        off = projections(value, tensor.stream) - whole[:-2]
        error, size = float(np.sqrt(np.mean(off**2))), float(whole[-1])
        yield verdict("norm of the error", error, tensor.whole_tolerance(vectors, dtype))
        if dtype in tensor.norms:
            yield verdict("relative norm of the error", error / (size or 1.0), tensor.norms[dtype])
    if dtype in tensor.biases:
        rows = vectors.rows[tensor.name]
        off = np.divide(row_sums(value) - rows, rows, out=np.zeros(rows.shape), where=rows > 0)
        yield verdict(
            "bias of whole rows, relative", float(np.sqrt(np.mean(off**2))), tensor.biases[dtype]
        )

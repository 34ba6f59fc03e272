"""A report as text for people and as JSON for programs."""

import math
from collections import Counter
from typing import Any

from mesp_ref.errors import escaped, named
from mesp_ref.golden.check import CaseReport, Report, Verdict


def percent(margin: float) -> str:
    """Error as a share of the tolerance: 37%, or 120× where it is far beyond."""
    if not math.isfinite(margin):
        return "—"
    if 0 < margin < 1e-4:
        return "<0.01%"
    if margin < 10:
        return f"{100 * margin:.3g}%"
    return f"{float(f'{margin:.3g}'):,.0f}×" if margin < 1e6 else f"{margin:.1e}×"


def line(verdict: Verdict) -> str:
    """One failed tensor."""
    at = f" at {list(verdict.index)}" if verdict.index else ""
    size = f" {percent(verdict.margin)} of the tolerance" if math.isfinite(verdict.margin) else ""
    return f"{named(verdict.tensor)}: {verdict.problem}{size}{at}: {verdict.text}"


def case_lines(case: CaseReport, limit: int = 5) -> list[str]:
    """A case: one line when it passes, otherwise the first divergences, the rest counted.

    Names are those of a stranger's files: whatever they hold, a line stays one line.
    """
    if case.passed:
        worst = max(case.verdicts, key=lambda v: v.margin)
        return [
            f"ok    {title(case)}: {len(case.verdicts)} tensors, worst {named(worst.tensor)} "
            f"{percent(worst.margin)} of its tolerance"
        ]
    wrong = [v for v in case.verdicts if not v.passed]
    lines = [f"FAIL  {title(case)}: {len(wrong)} of {len(case.verdicts)} tensors"]
    for direction in ("forward", "backward"):
        first = case.first(direction)
        if first is not None:
            lines.append(f"        first in the {direction}: {line(first)}")
    firsts = {id(case.first(d)) for d in ("forward", "backward")}
    others = [v for v in wrong if id(v) not in firsts]
    lines += [f"        {line(v)}" for v in others[:limit]]
    if len(others) > limit:
        lines.append(f"        and {len(others) - limit} more")
    likes = (f"looks {text}" if text.startswith("like") else text for text in case.like)
    return lines + [f"        {escaped(text)}" for text in likes]


def title(case: CaseReport) -> str:
    """A case and the precision it was held to."""
    narrower = f", {case.narrower} narrower" if case.narrower else ""
    return f"{named(case.case)} ({case.dtype}{narrower})"


def summary(report: Report) -> list[str]:
    """Coverage and verdict."""
    tensors = [v for case in report.cases for v in case.verdicts]
    passed = sum(v.passed for v in tensors)
    lines = [
        f"{sum(c.passed for c in report.cases)} of {len(report.cases)} cases and {passed} of "
        f"{len(tensors)} tensors agree; {len(report.cases)} of the suite's {report.total} cases "
        "were checked"
    ]
    if report.uncovered:
        lines.append(f"not covered in this precision: {', '.join(map(named, report.uncovered))}")
    likes = Counter(text for case in report.cases for text in case.like)
    lines += [f"in {n} cases: {escaped(text)}" for text, n in likes.most_common(5) if n > 1]
    return lines


def _is_absent(case: CaseReport) -> bool:
    return all(v.problem == "missing" for v in case.verdicts)


def as_text(report: Report) -> str:
    """The whole report; cases of which there is nothing share a line."""
    lines = [x for case in report.cases if not _is_absent(case) for x in case_lines(case)]
    absent = [case.case for case in report.cases if _is_absent(case)]
    if absent:
        some = ", ".join(map(named, absent[:3])) + (", …" if len(absent) > 3 else "")
        lines.append(f"FAIL  {len(absent)} cases without a file: {some}; --only checks a part")
    return "\n".join(lines + summary(report))


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def as_json(report: Report) -> dict[str, Any]:
    """The whole report; margin is null where there is no number to compare."""
    cases = []
    for case in report.cases:
        firsts = {d: case.first(d) for d in ("forward", "backward")}
        cases.append(
            {
                "case": case.case,
                "dtype": case.dtype,
                "narrower": case.narrower,
                "passed": case.passed,
                "first": {d: v.tensor if v else None for d, v in firsts.items()},
                "like": case.like,
                "tensors": [
                    {
                        "name": v.tensor,
                        "direction": v.direction,
                        "passed": v.passed,
                        "problem": v.problem,
                        "margin": _number(v.margin),
                        "index": list(v.index),
                        "text": v.text,
                    }
                    for v in case.verdicts
                ],
            }
        )
    return {
        "passed": report.passed,
        "coverage": {
            "checked": len(report.cases),
            "asked": report.asked,
            "suite": report.total,
            "uncovered": report.uncovered,
        },
        "cases": cases,
    }

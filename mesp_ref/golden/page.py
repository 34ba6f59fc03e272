"""A report as one self-contained HTML page: summary, heat map of layers × tensors, every tensor."""

import math
import re
from typing import Any

from mesp_ref.errors import escaped, named
from mesp_ref.files.html import html_template
from mesp_ref.golden.check import CaseReport, Report, Verdict
from mesp_ref.golden.report import line, percent, summary, title

_LAYER = re.compile(r"(?:base_model\.model\.)?model\.layers\.([0-9]{1,6})(?:\.|$)")


def colour(margin: float) -> str:
    """White at 0, green up to the tolerance, yellow to red beyond, violet without a number."""
    if not math.isfinite(margin):
        return "#c9a3dd"
    if margin <= 1:
        return f"hsl(130 45% {97 - 22 * margin:.0f}%)"
    return f"hsl({max(0, 48 - 24 * math.log10(margin)):.0f} 90% 68%)"


def heat(case: CaseReport) -> dict[str, Any]:
    """Rows by the tensor's name inside its layer, columns by layer, in execution order."""
    rows: dict[str, dict[str, Verdict]] = {}
    columns: list[str] = []
    for verdict in case.verdicts:
        match = _LAYER.match(verdict.tensor)
        column = f"layer {match[1]}" if match else "model"
        name = verdict.tensor[match.end() :] if match else verdict.tensor
        rows.setdefault(name or "block output", {})[column] = verdict
        if column not in columns:
            columns.append(column)
    return {"rows": rows, "columns": sorted(columns, key=lambda c: (c == "model", c))}


def matrix(report: Report) -> dict[str, list[dict[str, Any]]]:
    """Cases by the folder they lie in, each with its worst margin and its place on the page."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for number, case in enumerate(report.cases, 1):
        group, _, name = case.case.rpartition("/")
        margins = [v.margin if math.isfinite(v.margin) else math.inf for v in case.verdicts]
        cell = {
            "case": case,
            "name": named(name),
            "number": number,
            "margin": max(margins, default=0),
        }
        rows.setdefault(named(group or "cases"), []).append(cell)
    return rows


def as_html(report: Report, backend: str = "", when: str = "") -> str:
    """The page, which names the backend and says when it was checked.

    Names and texts from a backend's files and a suite are escaped, twice over: as text of a line and
    as text of HTML.
    """
    return html_template("mesp_ref.golden", "page.html.j2").render(
        report=report, summary=summary(report), colour=colour, percent=percent, heat=heat,
        line=line, title=title, named=named, escaped=escaped, inf=math.inf,
        matrix=matrix(report), backend=named(backend), when=when,
    )  # fmt: skip

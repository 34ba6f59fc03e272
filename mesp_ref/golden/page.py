"""A report as one self-contained HTML page: summary, heat map of layers × tensors, every tensor."""

import math
import re
from typing import Any

import jinja2

from mesp_ref.golden.check import CaseReport, Report, Verdict
from mesp_ref.golden.report import line, percent, summary

_LAYER = re.compile(r"(?:base_model\.model\.)?model\.layers\.(\d+)(?:\.|$)")

_TEMPLATE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Golden check: {{ "agrees" if report.passed else "differs" }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem;
  color: #1c1c1c; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin: 2rem 0 .4rem }
.verdict { font-weight: 600 } .ok { color: #17622f } .bad { color: #a3161b }
table { border-collapse: collapse; font-size: .8rem } td, th { padding: .15rem .5rem; text-align: left;
  font-weight: normal } th { color: #555 } tr.head th { border-bottom: 1px solid #bbb }
td.cell { min-width: 3.4rem; text-align: right; border: 1px solid #fff;
  font-variant-numeric: tabular-nums }
.like { background: #fff4d6; padding: .4rem .8rem; border-left: 4px solid #d79b00 }
details { margin: .4rem 0 } code { font-size: .85em }
.legend span { padding: .1rem .6rem }
</style>
<h1>Golden check: <span class="verdict {{ 'ok' if report.passed else 'bad' }}">
{{- "agrees" if report.passed else "differs" }}</span></h1>
{% for text in summary %}<p>{{ text }}</p>{% endfor %}
<p class="legend">Error as a share of the tolerance:
{% for margin in (0.0, 0.3, 0.9, 1.5, 30, inf) %}<span style="background: {{ colour(margin) }}">
{{- percent(margin) }}</span>{% endfor %} (— : missing, of another shape, or not finite)</p>
{% for case in report.cases %}
<h2 class="{{ 'ok' if case.passed else 'bad' }}">{{ case.case }} ({{ case.dtype }})</h2>
{% for text in case.like %}<p class="like">{{ text }}</p>{% endfor %}
{% for direction in ("forward", "backward") if case.first(direction) %}
<p>First in the {{ direction }}: <code>{{ line(case.first(direction)) }}</code></p>
{% endfor %}
{% set grid = heat(case) %}
<table>
{% if grid.columns|length > 1 %}<tr class="head"><th>tensor</th>
{% for column in grid.columns %}<th>{{ column }}</th>{% endfor %}</tr>{% endif %}
{% for name, cells in grid.rows.items() %}
<tr><th>{{ name }}</th>
{% for column in grid.columns %}{% set v = cells.get(column) %}
{% if v %}<td class="cell" style="background: {{ colour(v.margin) }}" title="{{ line(v) }}">
{{- percent(v.margin) }}</td>{% else %}<td></td>{% endif %}{% endfor %}</tr>
{% endfor %}
</table>
{% endfor %}
</html>
"""


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


def as_html(report: Report) -> str:
    """The page. Names from a backend's files are escaped."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_TEMPLATE).render(
        report=report, summary=summary(report), colour=colour, percent=percent, heat=heat,
        line=line, inf=math.inf,
    )  # fmt: skip

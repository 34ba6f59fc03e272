"""Timelines as one HTML page that needs nothing else: drawings in SVG, tables, light and dark."""

import html
import itertools
import math
from collections.abc import Mapping

import numpy as np

from mesp_ref.memory.timeline import COLOURS, Timeline
from mesp_ref.ops import Array

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 960, 250, 64, 30, 34  # of one drawing, in pixels
_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --page: #ffffff; --soft: #666; --line: #ddd; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececec; --page: #16181c; --soft: #a8a8a8; --line: #3a3d43; } }
@media print { .row { break-inside: avoid; }
  :root { --ink: #000; --page: #fff; --soft: #444; --line: #ccc; } }
* { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.35rem; } h2 { font-size: 1.1rem; margin: 1.6rem 0 0; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--ink); font-size: 12px; }
svg path { shape-rendering: crispEdges; }
svg .soft { fill: var(--soft); } svg .grid { stroke: var(--line); } svg .axis { stroke: var(--soft); }
svg .mark { fill: var(--ink); stroke: var(--page); } svg .peak { font-weight: 600; }
svg .hit { fill: transparent; } svg .hit:hover { fill: var(--ink); fill-opacity: .18; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; padding: 0; list-style: none; }
.legend i { display: inline-block; width: .9em; height: .9em; margin-right: .4em;
  vertical-align: -.1em; }
table { border-collapse: collapse; margin: .4rem 0 0 4rem; font-size: .9rem; }
td, th { padding: .1rem .8rem; border-bottom: 1px solid var(--line); text-align: left; }
td + td, th + th { text-align: right; font-variant-numeric: tabular-nums; }
"""


def page(rows: Mapping[str, Timeline], title: str) -> str:
    """The page: one legend, and for each method a drawing and what lives at its peak."""
    seen = [name for name in COLOURS if any(name in row.kinds for row in rows.values())]
    legend = "".join(
        f"<li><i style='background:{COLOURS[n]}'></i>{html.escape(n)}</li>" for n in seen
    )
    name = html.escape(title)
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width'>"
        f"<title>{name}</title><style>{_STYLE}</style><h1>Memory of one training step</h1>"
        f"<p>{name}. MB are 10⁶ bytes, above weights, LoRA parameters and optimiser state. Each "
        "method has its own scale. Point at the drawing for a single op.</p>"
        f"<ul class=legend>{legend}</ul>"
        + "".join(_row(method, row) for method, row in rows.items())
        + "</html>\n"
    )


def _row(method: str, row: Timeline) -> str:
    at = [(name, y[row.top]) for name, y in row.kinds.items() if y[row.top]]
    cells = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{size:,.3f}</td></tr>"
        for name, size in sorted(at, key=lambda item: -item[1])
    )
    name = html.escape(method)
    return (
        f"<section class=row><h2>{name}</h2>{_drawing(method, row)}"
        f"<table><tr><th>alive at the peak, in {html.escape(row.ops[row.top])}</th><th>MB</th></tr>"
        f"{cells}<tr><th>sum</th><th>{row.total[row.top]:,.3f}</th></tr></table></section>"
    )


def _steps(y: Array, down: bool) -> str:
    """A staircase through y, pixel rows per op, in path commands; backwards when `down`."""
    x = _LEFT + np.arange(len(y) + 1) * (_WIDTH - _LEFT) / len(y)
    turns = [0, *(np.flatnonzero(np.diff(y)) + 1), len(y)]
    runs = [(x[a], x[b], y[a]) for a, b in itertools.pairwise(turns)]
    if down:
        return "".join(f"V{h:.1f}H{a:.1f}" for a, _, h in reversed(runs))
    return "".join(f"V{h:.1f}H{b:.1f}" for _, b, h in runs)


def _ticks(high: float) -> list[float]:
    """Round numbers from 0 to `high`, four or five of them."""
    step = 10.0 ** math.floor(math.log10(high / 2))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if high / (m * step) <= 5)
    return [i * step for i in range(int(high / step) + 1)]


def _drawing(method: str, row: Timeline) -> str:
    high = 1.12 * float(row.total.max())
    floor, room = _HEIGHT - _BOTTOM, _HEIGHT - _BOTTOM - _TOP

    def pixels(y: Array) -> Array:
        return floor - y / high * room

    below, shapes = np.zeros(len(row.ops)), []
    for name, y in row.kinds.items():
        top = pixels(below + y)
        path = f"M{_LEFT},{pixels(below)[0]:.1f}{_steps(top, False)}{_steps(pixels(below), True)}Z"
        shapes.append(f"<path d='{path}' fill='{COLOURS[name]}'/>")
        below = below + y
    grid = "".join(
        f"<line class=grid x1={_LEFT} x2={_WIDTH} y1={h:.1f} y2={h:.1f} />"
        f"<text x={_LEFT - 8} y={h + 4:.1f} text-anchor=end>{tick:g}</text>"
        for tick, h in ((tick, floor - tick / high * room) for tick in _ticks(high))
    )
    label = html.escape(f"{method}: {row.label()}")
    return (
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role=img aria-label='{label}'>{grid}"
        f"<text class=soft x=12 y={_TOP + room / 2} text-anchor=middle "
        f"transform='rotate(-90 12 {_TOP + room / 2})'>MB</text>"
        f"{''.join(shapes)}{_marks(row, pixels(row.total))}{_hits(row)}</svg>"
    )


def _marks(row: Timeline, heights: Array) -> str:
    """Axis, the end of the forward, and the peak with its name."""
    floor, each = _HEIGHT - _BOTTOM, (_WIDTH - _LEFT) / len(row.ops)
    head, x, y = _LEFT + row.head * each, _LEFT + (row.top + 0.5) * each, heights[row.top]
    left = row.top > 0.6 * len(row.ops)
    side, by = ("end", -9) if left else ("start", 9)
    middle = (_LEFT + _WIDTH) / 2
    return (
        f"<line class=axis x1={_LEFT} x2={_WIDTH} y1={floor} y2={floor} />"
        f"<line class=axis x1={head:.1f} x2={head:.1f} y1={_TOP - 18} y2={floor} "
        "stroke-dasharray='4 3'/>"
        f"<text class=soft x={head - 6:.1f} y={_TOP - 8} text-anchor=end>forward</text>"
        f"<text class=soft x={head + 6:.1f} y={_TOP - 8}>head, then backward</text>"
        f"<text class=soft x={middle} y={_HEIGHT - 8} text-anchor=middle>"
        f"{len(row.ops)} ops of the step, in order</text>"
        f"<path class=mark d='M{x:.1f},{y - 1:.1f}l-5,-8h10z'/>"
        f"<text class=peak x={x + by:.1f} y={y - 3:.1f} text-anchor={side}>"
        f"{html.escape(row.label())}</text>"
    )


def _hits(row: Timeline) -> str:
    """A strip over every op that says its name and bytes."""
    each = (_WIDTH - _LEFT) / len(row.ops)
    return "".join(
        f"<rect class=hit x={_LEFT + i * each:.1f} y={_TOP} width={max(each, 0.5):.2f} "
        f"height={_HEIGHT - _BOTTOM - _TOP}><title>{html.escape(op)}: {total:,.2f} MB</title></rect>"
        for i, (op, total) in enumerate(zip(row.ops, row.total, strict=True))
    )

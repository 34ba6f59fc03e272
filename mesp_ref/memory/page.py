"""Timelines as one HTML page that needs nothing else: drawings in SVG, tables, light and dark.

What is computed is here, the page itself is page.html.j2 beside this file.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mesp_ref.errors import escaped
from mesp_ref.files.html import html_template
from mesp_ref.memory.timeline import COLOURS, Timeline
from mesp_ref.ops import Array

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 960, 250, 64, 30, 34  # of one drawing, in pixels
_FLOOR = _HEIGHT - _BOTTOM
_ROOM = _FLOOR - _TOP
_SIZE = {
    "width": _WIDTH, "height": _HEIGHT, "left": _LEFT, "top": _TOP, "floor": _FLOOR,
    "middle": _TOP + _ROOM / 2,
}  # fmt: skip


def page(rows: Mapping[str, Timeline], title: str) -> str:
    """The page: one legend, and for each method a drawing and what lives at its peak."""
    high = max(_high(row) for row in rows.values())
    seen = [name for name in COLOURS if any(name in row.kinds for row in rows.values())]
    return html_template("mesp_ref.memory", "page.html.j2").render(
        title=escaped(title), size=_SIZE, px="{:.1f}".format,
        legend={name: COLOURS[name] for name in seen},
        rows=[_row(method, row, high) for method, row in rows.items()],
    )  # fmt: skip


def _high(row: Timeline) -> float:
    return 1.12 * float(row.total.max())


def _row(method: str, row: Timeline, highest: float) -> dict[str, Any]:
    """What the page says and draws of one method: on the scale of all, and on its own."""
    high = _high(row)
    each = (_WIDTH - _LEFT) / len(row.ops)
    alive = [(name, y[row.top]) for name, y in row.kinds.items() if y[row.top]]
    is_late = row.top > 0.6 * len(row.ops)
    return {
        "method": method,
        "label": row.label(),
        "op": row.ops[row.top],
        "alive": [(n, f"{mb:,.3f}") for n, mb in sorted(alive, key=lambda item: -item[1])],
        "sum": f"{row.total[row.top]:,.3f}",
        "scales": {
            scale: {
                "ticks": [{"name": f"{t:g}", "y": _FLOOR - t / top * _ROOM} for t in _ticks(top)],
                "y": _FLOOR - float(row.total[row.top]) / top * _ROOM,
            }
            for scale, top in (("shared", highest), ("own", high))
        },
        "share": f"{high / highest:.5f}",
        "shapes": _shapes(row, high),
        "head": _LEFT + row.head * each,
        "x": _LEFT + (row.top + 0.5) * each,
        "side": "end" if is_late else "start",
        "aside": -9 if is_late else 9,
        "width": f"{max(each, 0.5):.2f}",
        "hits": [
            {"name": f"{op}: {row.total[i]:,.2f} MB{_alive(row, i)}", "x": _LEFT + i * each}
            for i, op in enumerate(row.ops)
        ],
    }


def _alive(row: Timeline, i: int) -> str:
    """What lives while an op runs, a line each, the largest first; none that rounds to nothing."""
    parts = sorted(((float(y[i]), name) for name, y in row.kinds.items()), reverse=True)
    return "".join(f"\n{megabytes:,.2f} {name}" for megabytes, name in parts if megabytes >= 0.005)


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


def _shapes(row: Timeline, high: float) -> list[dict[str, str]]:
    """The areas of the kinds, one above the other."""
    below, shapes = np.zeros(len(row.ops)), []
    for name, y in row.kinds.items():
        floor, top = (_FLOOR - level / high * _ROOM for level in (below, below + y))
        path = f"M{_LEFT},{floor[0]:.1f}{_steps(top, False)}{_steps(floor, True)}Z"
        shapes.append({"path": path, "colour": COLOURS[name]})
        below = below + y
    return shapes

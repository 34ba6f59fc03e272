"""Ledgers as a picture: bytes alive over the ops of a step, coloured by kind of tensor."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mesp_ref.files.figure import METHOD_COLOURS, new_figure
from mesp_ref.files.output import write_aside
from mesp_ref.memory.ledger import Ledger
from mesp_ref.memory.timeline import COLOURS, Timeline, timeline


def plot_timelines(
    ledgers: Mapping[str, Ledger], path: str | Path, title: str, rank: int, overwrite: bool = True
) -> None:
    """All methods on one scale, then each on its own, as .png or as one self-contained .html page.

    Raises MespRefError when the file cannot be written.
    """
    from mesp_ref.memory.page import page  # needs jinja2, which nothing else here does

    rows = {method: timeline(ledger, rank) for method, ledger in ledgers.items()}
    is_picture = Path(path).suffix == ".png"
    data = _picture(rows, title) if is_picture else page(rows, title).encode()
    with write_aside(path, overwrite=overwrite) as aside:
        aside.write_bytes(data)


def _picture(rows: Mapping[str, Timeline], title: str) -> bytes:
    image = io.BytesIO()
    size = (11, 1.1 + 2.3 * (len(rows) + (len(rows) > 1)))
    with new_figure(figsize=size, dpi=130, layout="constrained") as figure:
        _fill(figure, rows, title)
        said = "; ".join(f"{method}: {row.label()}" for method, row in rows.items())
        about = {"Title": title, "Description": said}  # so that a test can tell a stale picture
        figure.savefig(image, format="png", facecolor="white", metadata=about)
    return image.getvalue()


def _fill(figure: Any, rows: Mapping[str, Timeline], title: str) -> None:
    from matplotlib.patches import Patch

    figure.suptitle(title, fontsize=11)
    several = len(rows) > 1
    grid = figure.subplots(len(rows) + several, 1, squeeze=False)[:, 0]
    if several:
        _draw_together(grid[0], rows)
    for axes, (method, row) in zip(grid[several:], rows.items(), strict=True):
        _draw(axes, method, row)
    grid[-1].set_xlabel("ops of the step, in order")
    seen = [name for name in COLOURS if any(name in row.kinds for row in rows.values())]
    patches = [Patch(facecolor=COLOURS[name], edgecolor="white", label=name) for name in seen]
    figure.legend(
        handles=patches[::-1], loc="outside right center", frameon=False, fontsize=8,
        title="alive, by kind", alignment="left",
    )  # fmt: skip


def _draw_together(axes: Any, rows: Mapping[str, Timeline]) -> None:
    """Every method on one scale, over the share of its step that has passed."""
    for method, row in rows.items():
        share = np.arange(len(row.ops)) / len(row.ops)
        label = f"{method}: {row.total[row.top]:,.1f} MB"
        axes.step(
            share, row.total, where="post", color=METHOD_COLOURS[method], linewidth=1, label=label
        )
    axes.set_title("all on one scale", loc="left", fontsize=10, fontweight="bold")
    axes.set(ylabel="MB (10⁶ bytes)", xlim=(0, 1), ylim=(0, None))
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    legend = axes.legend(
        loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8, title="peak",
        alignment="left",
    )  # fmt: skip  # beside the curves, which cross all that is inside
    legend.set_in_layout(False)  # it stands above the other, in the same column
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _draw(axes: Any, method: str, row: Timeline) -> None:
    """One method: stacked steps, the end of the forward, the peak."""
    edges = np.arange(len(row.ops) + 1)
    stack = [np.append(y, y[-1]) for y in row.kinds.values()]
    colours = [COLOURS[name] for name in row.kinds]
    axes.stackplot(edges, *stack, colors=colours, step="post", linewidth=0, antialiased=False)
    high, x = row.total.max(), row.top + 0.5
    left = row.top > 0.6 * len(row.ops)
    axes.plot([x], [high], "v", color="black", markersize=5, clip_on=False)
    axes.annotate(
        row.label(), (x, high), (-8 if left else 8, 1), textcoords="offset points", fontsize=8.5,
        ha="right" if left else "left", va="bottom", fontweight="bold",
    )  # fmt: skip
    axes.axvline(row.head, color="#333333", linewidth=0.8, linestyle=(0, (4, 3)))
    if 0 < row.head < len(row.ops):
        axes.text(
            row.head, 1.17 * high, " head, then backward", fontsize=8, va="top", color="#333333"
        )
        axes.text(
            row.head, 1.17 * high, "forward ", fontsize=8, va="top", ha="right", color="#333333"
        )
    axes.set_title(f"{method}, on its own scale", loc="left", fontsize=10, fontweight="bold")
    axes.set(ylabel="MB (10⁶ bytes)", xlim=(0, len(row.ops)), ylim=(0, 1.2 * high))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)

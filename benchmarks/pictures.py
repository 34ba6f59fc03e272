"""Pictures of the papers' tables: white ground, colours that colour-blind readers can tell apart."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cells import DISK, STORE_H, Cell, Peak
from common import COLOURS, save_figure
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator
from waterfall import Step

MARKS = {
    "store_all": "s", "mebp": "o", "mesp": "^", "mesp_tiled": "D", "mesp_streamed": "P", "mezo": "v",
    DISK: "d", STORE_H: "<",
}  # fmt: skip


def colour(variant: str) -> str:
    """A variant has the colour of its method."""
    return COLOURS[variant.split(",")[0]]


def style(variant: str) -> dict[str, Any]:
    """Colour, marker and dashes of a variant's line."""
    dashes = ":" if "," in variant else "-"
    return {"color": colour(variant), "marker": MARKS[variant], "ls": dashes, "ms": 5, "lw": 1.5}


def axes_in_a_row(count: int, width: float, height: float, **options: Any) -> tuple[Figure, Any]:
    """A white figure with panels side by side."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    return figure, figure.subplots(1, count, squeeze=False, **options)[0]


def draw_memory(
    path: Path,
    peaks: Mapping[Cell, Mapping[str, Peak]],
    published: Mapping[Cell, Mapping[str, float]],
    tables: Sequence[Sequence[Cell]],
) -> None:
    """Peaks of Tables 1 to 3: ours as lines, the published as hollow marks on broken lines."""
    figure, panels = axes_in_a_row(3, 12, 4.6, sharey=True)
    names = ("Qwen2.5 shape, 256 tokens", "tokens, 0.5B", "rank, 0.5B")
    fields = ("shape", "tokens", "rank")
    for axes, cells, name, field in zip(panels, tables, names, fields, strict=True):
        ticks = [str(getattr(cell, field)) for cell in cells]
        for variant in (v for v in peaks[cells[0]] if v != STORE_H):
            values = [peaks[cell][variant].total / 1e6 for cell in cells]
            axes.plot(ticks, values, **style(variant), label=variant)
        for variant, label in (("mebp", "MeBP, published"), ("mesp", "MeSP, published")):
            values = [published[cell][variant] for cell in cells]
            hollow = style(variant) | {"ls": "--", "mfc": "white"}
            axes.plot(ticks, values, **hollow, label=label)
        axes.set(xlabel=name, yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("peak memory of a step, MB")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    save_figure(figure, path)


def draw_ratios(
    path: Path, panels: Mapping[str, Sequence[tuple[str, float, float | None]]]
) -> None:
    """MeSP over MeBP in each setting: the published ratio hollow, ours filled."""
    figure, axes_of = axes_in_a_row(len(panels), 12, 4)
    for axes, (title, rows) in zip(axes_of, panels.items(), strict=True):
        for y, (_, published, ours) in enumerate(rows):
            axes.plot(
                published, y, "o", ms=8, color=colour("mesp"), mfc="white", mew=2,
                label="" if y else "published",
            )  # fmt: skip
            if ours is not None:
                axes.plot(ours, y, "D", ms=7, color=colour("mesp"), label="" if y else "here")
        axes.axvline(1, color="#555555", lw=1)
        axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
        most = max(1, *(ratio for row in rows for ratio in row[1:] if ratio is not None))
        axes.set(xlabel=title, xlim=(0, 1.08 * most), ylim=(len(rows) - 0.5, -0.5))
        axes.grid(alpha=0.3)
    axes_of[0].legend(frameon=True, loc="lower left")
    save_figure(figure, path)


def _shown(steps: Iterable[Step], least: float) -> list[tuple[str, float]]:
    """MB of the steps that can be seen; the others together as one."""
    steps = list(steps)
    large = [(s.name, s.size / 1e6) for s in steps if abs(s.size) >= least * 1e6]
    rest = sum(s.size for s in steps if abs(s.size) < least * 1e6) / 1e6
    return [*large, ("all others", rest)] if rest else large


def draw_waterfall(
    path: Path, peaks: Mapping[str, tuple[float, float]], steps: Mapping[str, Sequence[Step]]
) -> None:
    """One panel per setting: from MeBP's peak, tensor by tensor, down to MeSP's."""
    figure = Figure(figsize=(10, 9), layout="constrained", facecolor="white")
    for axes, (title, (mebp, mesp)) in zip(
        figure.subplots(len(peaks), 1), peaks.items(), strict=True
    ):
        bars = _shown(steps[title], 0.005 * mebp)
        names, at = ["MeBP's peak", *(name for name, _ in bars), "MeSP's peak"], mebp
        axes.barh(0, mebp, color=COLOURS["mebp"])
        axes.text(mebp, 0, f" {mebp:.2f}", va="center")
        for y, (_, size) in enumerate(bars, 1):
            axes.barh(y, -size, left=at, color="#555555" if size < 0 else "#cccccc")
            axes.text(max(at, at - size), y, f" {-size:+.2f}".replace("-", "−"), va="center")
            at -= size
        axes.barh(len(bars) + 1, mesp, color=COLOURS["mesp"])
        axes.text(mesp, len(bars) + 1, f" {mesp:.2f}", va="center")
        axes.set_yticks(range(len(names)), names)
        axes.set(title=title, xlabel="MB", ylim=(len(names) - 0.5, -0.5))
        highest = max(mebp, mesp, mebp - sum(size for _, size in bars if size < 0))
        axes.set_xlim(0, 1.12 * highest)
        axes.grid(alpha=0.3, axis="x")
    save_figure(figure, path)


class Curve(NamedTuple):
    """One variant over one axis: a line, and marks where it was measured."""

    variant: str
    at: Sequence[int]
    line: Sequence[float]
    measured_at: Sequence[int]
    measured: Sequence[float]


def draw_curves(
    path: Path, panels: Sequence[Sequence[Curve]], units: Sequence[str], y: str
) -> None:
    """Curves over each axis, both scales logarithmic, with the axis's own numbers as ticks."""
    figure = Figure(figsize=(12, 8), layout="constrained", facecolor="white")
    grid = figure.subplots(2, 2, sharey=True)
    for axes, curves, unit in zip(grid.flat, panels, units, strict=True):
        for curve in curves:
            look = style(curve.variant)
            axes.plot(curve.at, curve.line, color=look["color"], ls=look["ls"], lw=1.5)
            axes.plot(
                curve.measured_at, curve.measured, ls="", ms=6, color=look["color"],
                marker=look["marker"], mec="white", mew=0.6,
            )  # fmt: skip
        ticks = sorted({*curves[0].at, *curves[0].measured_at})
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.set(xlabel=unit)
        axes.grid(alpha=0.3)
    low, high = grid[0, 0].get_ylim()
    for axes in grid[:, 0]:
        axes.set_ylabel(y)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
    lines = [Line2D([], [], label=curve.variant, **style(curve.variant)) for curve in panels[0]]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False)
    save_figure(figure, path)

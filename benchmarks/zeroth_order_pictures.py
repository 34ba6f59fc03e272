"""Pictures of zeroth_order.md: white ground, colours that colour-blind readers can tell apart."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import COLOURS, save_figure
from estimates import Averages, Slope, cosine_quantiles
from matplotlib.figure import Figure
from race import Curve, smooth

from mesp_ref.engine.mezo import expected_cosine
from mesp_ref.ops import Array

# Okabe & Ito 2008, for seven projections
PROJECTION_COLOURS = (
    "#0072b2", "#56b4e9", "#009e73", "#000000", "#e69f00", "#d55e00", "#cc79a7",
)  # fmt: skip
THEORY: dict[str, Any] = {"color": "#333333", "lw": 1.2, "zorder": 1}
PARTS = {"matrix": "one matrix", "layer": "one layer", "all": "all LoRA parameters"}
KINDS = {  # of parts of the adapter: marker, size, colour
    "matrix": (".", 5, "#bbbbbb"),
    "projection": ("o", 4, "#56b4e9"),
    "layer": ("s", 5, "#d55e00"),
    "all": ("*", 15, "#000000"),
}


def _panels(count: int, width: float, height: float, **options: Any) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    panels = figure.subplots(1, count, squeeze=False, **options)[0]
    for axes in panels:
        axes.grid(alpha=0.3)
    return figure, panels


def draw_curves(path: Path, curves: Sequence[Curve], width: int) -> None:
    """Training loss, smoothed, and held-out loss. Equal curves lie on each other, thick and thin."""
    figure, (train, held) = _panels(2, 11, 4.4)
    dashes = dict(zip(_rates(curves), (":", "--", "-"), strict=False))
    top = 1.1 * max(c.held[0][1] for c in curves)
    bottom = 0.97 * min(loss for c in curves for _, loss in c.held)
    for curve in curves:
        name = {"mebp": "MeBP", "mesp": "MeSP", "mezo": "MeZO"}[curve.method]
        style: dict[str, Any] = {
            "color": COLOURS[curve.method], "label": f"{name}, lr {curve.lr:g}",
            "lw": 5 if curve.method == "mebp" else 1.8,
            "ls": dashes[curve.lr] if curve.method == "mezo" else "-",
        }  # fmt: skip
        loss = smooth(curve.losses, width)
        train.plot(np.arange(1, len(loss) + 1), loss, **style)
        held.plot(*zip(*curve.held, strict=True), marker="o", ms=4, **style)
    train.set(xlabel="step", ylabel="loss, nats per token", ylim=(bottom, top))
    train.set_title(f"training batch, running mean over {width} steps", fontsize=10)
    held.set(xlabel="step", ylim=(bottom, top))
    held.set_title("held-out rows", fontsize=10)
    figure.legend(*held.get_legend_handles_labels(), loc="outside right center", frameon=False)
    save_figure(figure, path)


def _rates(curves: Sequence[Curve]) -> list[float]:
    """MeZO's learning rates, smallest first."""
    return sorted({curve.lr for curve in curves if curve.method == "mezo"})


def draw_dimension(path: Path, parts: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Mean |cos| against the number of perturbed parameters, theory as a line."""
    figure, (axes,) = _panels(1, 7.2, 4.8)
    sizes = [d for points in parts.values() for d, _ in points]
    line = np.geomspace(min(sizes) / 2, 2 * max(sizes), 50)
    axes.plot(line, np.sqrt(2 / np.pi / line), label="theory: sqrt(2/(π·d))", **THEORY)
    for kind, points in parts.items():
        marker, size, colour = KINDS[kind]
        label = {"all": "all LoRA parameters", "projection": "one projection of one layer (A, B)"}
        axes.plot(
            *zip(*points, strict=True), marker, color=colour, ms=size,
            label=label.get(kind, f"one {kind}"),
        )  # fmt: skip
    axes.set(
        xscale="log", yscale="log", xlabel="d, parameters perturbed",
        ylabel="mean |cos| of MeZO's estimate with the gradient",
    )  # fmt: skip
    axes.legend(frameon=False)
    save_figure(figure, path)


def draw_parts(
    path: Path, panels: Mapping[str, Mapping[str, Iterable[tuple[float, float, float]]]]
) -> None:
    """Measured against expected, a panel per quantity, a point per layer and projection."""
    figure, axes_of = _panels(len(panels), 12.5, 4.4)
    for axes, (quantity, projections) in zip(axes_of, panels.items(), strict=True):
        expected: list[float] = []
        for (name, points), colour in zip(projections.items(), PROJECTION_COLOURS, strict=True):
            wanted, got, errors = zip(*points, strict=True)
            axes.errorbar(
                wanted, got, errors, fmt="o", ms=4, elinewidth=0.4, alpha=0.7, color=colour,
                label=name,
            )  # fmt: skip
            expected += wanted
        ends = (min(expected), max(expected))
        axes.plot(ends, ends, label="measured = expected", **THEORY | {"zorder": 3})
        axes.set(xlabel=f"{quantity}, expected", ylabel="measured")
    axes_of[-1].set(xscale="log", yscale="log")
    handles = axes_of[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right center", frameon=False)
    save_figure(figure, path)


def draw_slopes(path: Path, slopes: Sequence[Slope]) -> None:
    """g of two forwards against <∇, z>, a panel per eps, all parameters perturbed."""
    figure, panels = _panels(len(slopes), 12, 4.2)
    for axes, slope in zip(panels, slopes, strict=True):
        ends = [min(slope.projected), max(slope.projected)]
        axes.plot(ends, ends, **THEORY)
        axes.plot(slope.projected, slope.g, "o", ms=4, color="#0072b2")
        axes.set(xlabel="<gradient, z>")
        axes.set_title(f"eps {slope.eps:g}", fontsize=10)
    panels[0].set_ylabel("g of two forwards")
    save_figure(figure, path)


def draw_averages(path: Path, averages: Sequence[Averages]) -> None:
    """Cosine of the mean of n estimates: expected line, 5 to 95% band, measured means."""
    figure, (axes,) = _panels(1, 8, 5)
    parts = list(dict.fromkeys(found.part for found in averages))
    colours = dict(zip(parts, ("#009e73", "#d55e00", "#0072b2"), strict=True))
    for found in averages:
        colour, ns = colours[found.part], np.array([n for n, _ in found.cosines])
        means = [mean.value for _, mean in found.cosines]
        if found.measured:
            axes.plot(ns, means, "D", ms=8, mfc="none", color=colour, mew=1.4)
            continue
        errors = [2 * (mean.error or 0) for _, mean in found.cosines]
        label = f"{PARTS[found.part]}: d = {found.parameters:,}"
        axes.errorbar(ns, means, errors, fmt="o", ms=4, color=colour, label=label)
        _band(axes, found.parameters, ns, colour)
    axes.plot([], [], "D", ms=8, mfc="none", color="#0072b2", label="all, g from two forwards")
    axes.plot([], [], "-", label="theory, and its 5 to 95% band", **THEORY)
    axes.set(
        yscale="log", ylim=(1e-5, 1.5), xlabel="n, perturbations averaged (2n forwards)",
        ylabel="cosine of the mean with the gradient",
    )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.legend(frameon=False, loc="lower right")
    save_figure(figure, path)


def _band(axes: Any, d: int, ns: Array, colour: str) -> None:
    limits = np.array([cosine_quantiles(d, int(n), (0.05, 0.95)) for n in ns]).T
    axes.fill_between(ns, *limits, color=colour, alpha=0.12, lw=0)
    axes.plot(ns, [expected_cosine(d, int(n)) for n in ns], **THEORY | {"color": colour})

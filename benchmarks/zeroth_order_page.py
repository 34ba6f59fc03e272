"""zeroth_order.md: what was measured, as tables, pictures and sentences."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from common import markdown_table, write_report
from estimates import (
    Averages,
    Mean,
    Part,
    Slope,
    cosine_of_part,
    norm_ratio,
    perturbations_for,
)
from race import Curve, smooth
from zeroth_order_pictures import (
    PARTS,
    draw_averages,
    draw_curves,
    draw_dimension,
    draw_parts,
    draw_slopes,
)

from mesp_ref.engine.config import PROJECTIONS
from mesp_ref.engine.mezo import expected_cosine
from mesp_ref.errors import MespRefError

SOURCES = {  # by name of model directory, and by digest of the text
    "smollm2": "`smollm2` is SmolLM2-135M-Instruct as a Qwen2 directory: `python "
    "benchmarks/convert_smollm2.py smollm2`. ",
    "6329d86d316461ec": "The text is the Book of Proverbs in the King James version, in the public "
    "domain and not in this repository; Debian's package `bible-kjv` prints it: `bible -f "
    "'Proverbs1:1-31:31' | cut -d' ' -f2- > proverbs.txt`. ",
}
WIDTH = 9  # steps of the running mean
NAMES = {"mebp": "MeBP", "mesp": "MeSP", "mezo": "MeZO"}


class Results(NamedTuple):
    """All that was measured. `parts`: "all", "layer 3", "k_proj", "3 k_proj", "3 k_proj A"."""

    facts: dict[str, Any]
    curves: list[Curve]
    slopes: list[Slope]
    parts: dict[str, Part]
    averages: list[Averages]

    def per_layer(self) -> dict[str, dict[int, Part]]:
        """By projection and layer."""
        layers = range(self.facts["layers"])
        return {name: {i: self.parts[f"{i} {name}"] for i in layers} for name in PROJECTIONS}

    def curve(self, method: str) -> Curve:
        return next(curve for curve in self.curves if curve.method == method)


def save(results: Results, path: Path) -> None:
    write_report(path, json.dumps(results, separators=(",", ":")))


def load(path: Path) -> Results:
    """What `save` wrote."""
    if not path.is_file():
        raise MespRefError(f"{path}: not found, expected an earlier run's; run without --redraw")
    facts, curves, slopes, parts, averages = json.loads(path.read_text(encoding="utf-8"))
    return Results(
        facts,
        [Curve(*curve) for curve in curves],
        [Slope(*slope) for slope in slopes],
        {
            name: Part(d, share, Mean(*alone), Mean(*cosine), Mean(*signs), *rest)
            for name, (d, share, alone, cosine, signs, *rest) in parts.items()
        },
        [
            Averages(part, d, measured, [(n, Mean(*value)) for n, value in cosines])
            for part, d, measured, cosines in averages
        ],
    )


def draw(results: Results, folder: Path) -> None:
    """All pictures."""
    draw_curves(folder / "zeroth_order-curves.png", results.curves, WIDTH)
    whole = results.facts["parameters"]
    scanned = [slope for slope in results.slopes if slope.parameters == whole]
    draw_slopes(folder / "zeroth_order-slopes.png", scanned)
    draw_dimension(folder / "zeroth_order-dimension.png", _by_dimension(results.parts))
    panels = {
        quantity: {
            name: [_point(part, quantity) for part in layers.values()]
            for name, layers in results.per_layer().items()
        }
        for quantity in ("cosine", "signs that agree, % above 50", "norm ratio")
    }
    draw_parts(folder / "zeroth_order-parts.png", panels)
    draw_averages(folder / "zeroth_order-averages.png", results.averages)


def _by_dimension(parts: Mapping[str, Part]) -> dict[str, list[tuple[int, float]]]:
    """(d, mean |cos|) with nothing else perturbed, by kind of part."""
    kinds: dict[str, list[tuple[int, float]]] = {}
    for name, part in parts.items():
        words = name.split()
        kind = {3: "matrix", 2: "layer" if words[0] == "layer" else "projection"}.get(len(words))
        if kind or name == "all":
            kinds.setdefault(kind or "all", []).append((part.parameters, part.alone.value))
    return {kind: kinds[kind] for kind in ("matrix", "projection", "layer", "all")}


def _point(part: Part, quantity: str) -> tuple[float, float, float]:
    """Expected, measured, standard error (that of the norm ratio is shared and not drawn)."""
    if quantity == "cosine":
        wanted = cosine_of_part(part.parameters, part.share)
        return wanted, part.cosine.value, part.cosine.error or 0
    if quantity == "norm ratio":
        return norm_ratio(part.parameters, part.share), part.norm, 0
    signs = part.signs
    return 100 * (part.signs_expected - 0.5), 100 * (signs.value - 0.5), 100 * (signs.error or 0)


# Tables


def curves_table(results: Results) -> str:
    rows = []
    for curve in results.curves:
        loss = smooth(curve.losses, WIDTH)
        held = [value for _, value in curve.held]
        rows.append(
            [
                NAMES[curve.method], f"{curve.lr:g}", f"{loss[0]:.3f} → {loss[-1]:.3f}",
                " → ".join(f"{value:.4f}" for value in held),
                f"{held[0] - held[-1]:+.4f}" if not curve.diverged else "diverged",
                f"`{curve.digest[:12]}`",
            ]
        )  # fmt: skip
    steps = ", ".join(str(step) for step, _ in results.curves[0].held)
    header = [
        "method", "learning rate", "training loss, running mean", f"held-out loss, steps {steps}",
        "gained", "SHA-256 of losses and adapter",
    ]  # fmt: skip
    return markdown_table(header, rows)


def slopes_table(slopes: Iterable[Slope]) -> str:
    rows = [
        [
            f"{PARTS[s.part]}, d = {s.parameters:,}", f"{s.eps:g}", len(s.g),
            f"{s.correlation:.6f}", f"{s.error:.2%}", f"{s.right_signs} of {len(s.g)}",
        ]
        for s in slopes
    ]  # fmt: skip
    header = ["perturbed", "eps", "seeds", "correlation", "rms difference", "same sign"]
    return markdown_table(header, rows)


def _error(mean: Mean, form: str, scale: float = 1.0) -> str:
    error = "" if mean.error is None else f" ± {scale * mean.error:{form}}"
    return f"{scale * mean.value:{form}}{error}"


def parts_table(parts: Mapping[str, Part]) -> str:
    """Measured beside expected, one line per part."""
    rows = []
    for name, part in parts.items():
        d, share = part.parameters, part.share
        excess = Mean(part.signs.value - 0.5, part.signs.error)
        rows.append(
            [
                name, f"{d:,}", f"{share:.3f}",
                f"{1e3 * part.alone.value:.3f} ({1e3 * expected_cosine(d):.3f})",
                f"{_error(part.cosine, '.3f', 1e3)} ({1e3 * cosine_of_part(d, share):.3f})",
                f"{_error(excess, '.4f', 100)} ({100 * (part.signs_expected - 0.5):.4f})",
                f"{part.norm:,.0f} ({norm_ratio(d, share):,.0f})",
            ]
        )  # fmt: skip
    header = [
        "part", "d", "share of the norm", "mean abs. cos alone, 10⁻³", "mean cos, 10⁻³",
        "signs right, % above 50", "norm ratio, rms",
    ]  # fmt: skip
    return markdown_table(header, rows)


def averages_table(averages: Iterable[Averages]) -> str:
    """Measured cosine (expected) by n."""
    averages = list(averages)
    found = [dict(a.cosines) for a in averages]
    rows = []
    for n in sorted({n for cosines in found for n in cosines}):
        row = [str(n)]
        for a, cosines in zip(averages, found, strict=True):
            if n not in cosines:
                row.append("–")
                continue
            wanted, mean = f"({expected_cosine(a.parameters, n):.5f})", cosines[n]
            few = max(cosines) // n < 8  # means of n: too few to tell an error from
            row.append(f"{_error(Mean(mean.value, None) if few else mean, '.5f')} {wanted}")
        rows.append(row)
    names = [
        f"{PARTS[a.part]}, d = {a.parameters:,}" + (", two forwards" if a.measured else "")
        for a in averages
    ]
    return markdown_table(["n", *names], rows)


# Sentences


def equality(results: Results) -> str:
    """Whether MeBP and MeSP drew one curve, and for how long."""
    mebp, mesp = results.curve("mebp"), results.curve("mesp")
    if mebp.digest == mesp.digest and mebp.held == mesp.held:
        return (
            f"MeBP and MeSP agree bit for bit: all {len(mebp.losses)} training losses, all "
            f"{len(mebp.held)} held-out losses and the adapter at the end"
        )
    pairs = enumerate(zip(mebp.losses, mesp.losses, strict=False))
    first = next((i for i, (a, b) in pairs if a != b), len(mebp.losses))
    return f"MeBP and MeSP differ: their training losses are equal for {first} steps only"


def behind(results: Results) -> str:
    """What MeZO gained of what MeSP gained, by learning rate."""
    mesp = results.curve("mesp").held
    gained = mesp[0][1] - mesp[-1][1]
    found = []
    for curve in results.curves:
        if curve.method == "mezo":
            change = curve.held[-1][1] - curve.held[0][1]
            rose = f"went up to {curve.held[-1][1]:.2f}" if change > 0 else ""
            verdict = (
                "diverged" if curve.diverged else rose or f"gained {-change / gained:.1%} of that"
            )
            found.append(f"{verdict} at rate {curve.lr:g}")
    return f"MeSP lowered the held-out loss by {gained:.3f}; MeZO {', '.join(found)}"


def within(results: Results) -> str:
    """How many parts lie within two standard errors of the theory."""
    parts = [part for layers in results.per_layer().values() for part in layers.values()]

    def near(mean: Mean, wanted: float) -> bool:
        return mean.error is not None and abs(mean.value - wanted) <= 2 * mean.error

    alone = sum(near(p.alone, expected_cosine(p.parameters)) for p in parts)
    cosine = sum(near(p.cosine, cosine_of_part(p.parameters, p.share)) for p in parts)
    signs = sum(near(p.signs, p.signs_expected) for p in parts)
    whole = results.parts["all"]
    bias = whole.norm / norm_ratio(whole.parameters)
    return (
        f"Of the {len(parts)} projections of all layers, {alone} have a mean |cos|, {cosine} a mean "
        f"cosine and {signs} a sign agreement within two standard errors of the theory; 95% of "
        f"{len(parts)} are {0.95 * len(parts):.0f}. The norm ratio of the whole is {bias:.3f} of the "
        f"expected one, where {results.facts['seeds']} seeds leave a standard error of "
        f"{1 / math.sqrt(2 * results.facts['seeds']):.3f}, shared by all parts, for they share g."
    )


def cost(results: Results) -> str:
    """What a gradient of cosine 1/2 would take."""
    d, work = results.facts["parameters"], results.facts["flops"]
    n = perturbations_for(0.5, d)
    exact = work["mesp"] / (work["mezo"] / 2)
    return (
        f"For a cosine of 0.5 with all {d:,} parameters, n is {n:,.0f}: {2 * n:,.0f} forwards. One "
        f"exact gradient by MeSP costs the FLOPs of {exact:.2f} forwards"
    )


def page(results: Results) -> str:
    facts, parts = results.facts, results.parts
    whole = parts["all"]
    layers = {name: part for name, part in parts.items() if name.startswith("layer ")}
    kinds = {name: parts[name] for name in PROJECTIONS}
    lines = "\n".join(f"- {line}" for line in facts["machine"])
    sources = "".join(SOURCES.get(key, "") for key in (facts["model"], facts["sha256"][:16]))
    return TEMPLATE.format(
        **facts, sources=sources, lines=lines, alpha=2 * facts["rank"], width=WIDTH,
        lrs=", ".join(f"{c.lr:g}" for c in results.curves if c.method == "mezo"),
        exact_lr=f"{results.curve('mesp').lr:g}", equality=equality(results),
        behind=behind(results), curves=curves_table(results), slopes=slopes_table(results.slopes),
        expected=expected_cosine(whole.parameters), found=whole.alone.value,
        within=within(results), kinds=parts_table({"all": whole} | kinds),
        layer_table=parts_table(layers), averages=averages_table(results.averages),
        cost=cost(results), mezo_forwards=facts["flops"]["mesp"] / facts["flops"]["mezo"],
        paper_ratio=math.sqrt(whole.parameters),
    )  # fmt: skip


TEMPLATE = """\
# Backpropagation and MeZO on a real model

Regenerate with `python benchmarks/zeroth_order.py --model {model} --data {data}`; it takes about
a quarter of an hour on one core.

{sources}The text has {bytes:,} bytes, SHA-256 `{sha256:.16}…`. All numbers are in
[zeroth_order.json](zeroth_order.json).

{lines}

## What came out

- {equality}.
- {behind}.
- The mean |cos| between MeZO's estimate and the gradient in all {parameters:,} LoRA parameters is
  {found:.2e}; sqrt(2/(π·d)) is {expected:.2e}. It is an effect of dimension alone: neither the model
  nor the text enters.
- {cost}.

## 1. Loss curves

![Training and held-out loss](zeroth_order-curves.png)

MeBP's line is drawn thick below MeSP's. What rises out of the picture is in the table.

{curves}

Rank {rank}, alpha {alpha}, all seven projections, B = 0 at the start, {steps} steps on the same
batches of {batch_size} × {seq_len} tokens, seed {seed}, float32. The held-out loss is that of
{held_rows} rows of {seq_len} tokens from pages that are not trained on.

**Learning rates.** Every method is plain SGD with a constant rate and no clipping, as in both
papers' algorithms; each method needs a rate of its own. MeBP and MeSP have {exact_lr}, the library's
default for SGD (in trials of 24 steps 0.02 was slower and 0.5 diverged). MeZO has 10⁻⁴ with eps
{mezo_eps:g}, which Malladi et al. 2023 use for LoRA, and ten and a hundred times that ({lrs}). Their
runs take 20,000 steps, this one {steps}: it shows how far the methods get on equal batches, not where
MeZO would end. A MeSP step takes {mezo_forwards:.2f} times the FLOPs of a MeZO step of two forwards. The
mean of g·z over z is the gradient, so with equal rates MeZO would on average go where SGD goes; but its
step is sqrt(d) times as long (section 2), and that is what bounds its rate.

## 2. The estimate and the gradient

MeZO's estimate is g·z with z ~ N(0, I) and g = (L(θ + eps·z) − L(θ − eps·z))/(2·eps). As eps → 0, g is
<∇, z>, so the cosine of g·z with ∇ is |<∇, z>|/(|∇|·|z|), that of a random direction with a fixed
one: E|cos| = Γ(d/2)/(sqrt(π)·Γ((d+1)/2)), about sqrt(2/(π·d)).

Measured at the adapter that MeSP ended with (B ≠ 0), on one row of {seq_len} tokens with loss
{loss:.3f} and |∇| = {gradient_norm:.3f}.

### Is g what it should be?

{slopes}

![g against the directional derivative](zeroth_order-slopes.png)

The rms difference is relative to the rms of <∇, z>. g enters the cosine by its sign alone, so the
last column says in how many seeds two forwards and <∇, z> give the very same cosine. With that, the
statistics below take g = <∇, z>, for {seeds} seeds. The library's `loss_and_grads(method="mezo",
perturbations=4)` differs from the mean of these g·z by {checked:.1e} of its norm.

### Cosine against dimension

![Mean |cos| against d](zeroth_order-dimension.png)

Each point perturbs that part of the adapter and nothing else.

### By projection and layer

When everything is perturbed, g is common to all parts. Let share = |∇_part|/|∇| and d be the size of
the part. Then on the part

- E cos = share·sqrt(2/(π·d)), for g has the sign that suits the part only as often as its share says;
- an entry has the right sign with probability 1/2 + arcsin(|∇_i|/|∇|)/π;
- |g·z_part|/|∇_part| has the root mean square sqrt(2 + d/share²): MeZO's step is as much longer than
  the gradient's, {paper_ratio:,.0f} times in all, which is why it needs a smaller learning rate.

Measured (expected); ± is one standard error. "Alone" perturbs the part only, the other columns
everything. The excess of right signs is so small that for most parts {seeds:,} seeds leave an error
larger than itself; the expected value is the one to rely on there.

{kinds}

![Measured against expected](zeroth_order-parts.png)

A point per layer and projection, with its standard error.

{within}

{layer_table}

## 3. Averaging n perturbations

With u = ∇/|∇| and a_i = <z_i, u>, the mean of n estimates is |∇|/n·Σ a_i·z_i. Along u it has
Σ a_i² ~ χ²_n; across u, given a, it is |a| times a standard normal vector of d − 1 entries. So cos² is
χ²_n/(χ²_n + χ²_(d−1)), a Beta(n/2, (d−1)/2) variable, and

E cos = Γ((n+1)/2)·Γ((n+d−1)/2) / (Γ(n/2)·Γ((n+d)/2)), about sqrt(n/(n+d−1)) from a few n on.

![Cosine against n](zeroth_order-averages.png)

{averages}

Measured ± one standard error, where there are at least eight means of n (expected). All n of a column
share their seeds, so neighbours err together. `perturbations=n` averages in the library; the length of
the step falls with n, to a root mean square of sqrt(1 + (d+1)/n) times the gradient's, so the learning
rate may grow.
"""

"""The papers' figures on a real model: backpropagation against MeZO, and why MeZO lies behind.

    python benchmarks/zeroth_order.py --model smollm2 --data proverbs.txt    about a quarter of an hour
    python benchmarks/zeroth_order.py --redraw        pictures and page again from zeroth_order.json

Writes zeroth_order.md, its pictures and zeroth_order.json, all that was measured, to docs/benchmarks.
The model comes from benchmarks/convert_smollm2.py; any Qwen2 directory and any UTF-8 text will do.
Needs `pip install 'mesp-ref[benchmarks]'`.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import flops, machine, write_report
from estimates import (
    Averages,
    Part,
    Point,
    Slope,
    Tally,
    averaged_cosines,
    part_statistics,
    stack,
    tally,
)
from race import Curve, Text, open_text, race
from zeroth_order_page import Results, draw, load, page, save

from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.config import PROJECTIONS
from mesp_ref.engine.mezo import perturbation_seeds
from mesp_ref.engine.model import Model
from mesp_ref.errors import MespRefError
from mesp_ref.files.models import load_model
from mesp_ref.ops import Array
from mesp_ref.train.rows import as_batch
from mesp_ref.train.trainer import DEFAULT_LR, TrainConfig

EXACT_LR = DEFAULT_LR["sgd"]
MEZO_LR = (1e-4, 1e-3, 1e-2)  # the first is the paper's for LoRA
RUNS = (("mebp", EXACT_LR), ("mesp", EXACT_LR), *(("mezo", lr) for lr in MEZO_LR))
MEZO_EPS = 1e-2  # the paper's for LoRA
SCANNED_EPS = (1e-4, 1e-3, 1e-2)
HELD_ROWS = 16
EVALUATIONS = 3  # beside the one before training
SMALL_SEEDS = {"matrix": 16384, "layer": 4096}


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {line}", file=sys.stderr, flush=True)


def measure(args: argparse.Namespace) -> Results:
    """Everything, in the order of the page."""
    model = load_model(args.model)
    text = open_text(model, args.data, args.seq_len, HELD_ROWS, args.seed)
    runs = {run: curve_of(model, text, args, *run) for run in RUNS}
    point = point_of(model, runs["mesp", EXACT_LR][1], text)
    slopes, checked = slopes_of(point, args)
    parts, averages = statistics_of(point, args, slopes[-1])
    facts = facts_of(point, text, args) | {"checked": checked}
    return Results(facts, [curve for curve, _ in runs.values()], slopes, parts, averages)


def facts_of(point: Point, text: Text, args: argparse.Namespace) -> dict[str, Any]:
    """Settings, the point at which estimates are measured, and the machine."""
    config = point.model.config
    options = ("steps", "batch_size", "seq_len", "rank", "seed", "seeds", "forwards")
    return {name: getattr(args, name) for name in options} | {
        "model": args.model.name, "data": args.data.name, "sha256": text.sha256,
        "bytes": text.size, "held_rows": len(text.held), "mezo_eps": MEZO_EPS,
        "layers": config.num_hidden_layers, "loss": point.loss, "parameters": point.theta.size,
        "gradient_norm": float(np.linalg.norm(point.gradient)), "machine": machine(),
        "flops": {
            name: flops(config, name, args.seq_len, args.rank, args.batch_size)
            for name in ("mebp", "mesp", "mezo")
        },
    }  # fmt: skip


def curve_of(
    model: Model, text: Text, args: argparse.Namespace, method: str, lr: float
) -> tuple[Curve, Adapter]:
    """What a method does with a learning rate, and the adapter that it ends with."""
    config = TrainConfig(
        method=method, optimizer="sgd", lr=lr, schedule="constant", steps=args.steps,
        batch_size=args.batch_size, accumulate=1, seq_len=args.seq_len, clip=0,
        eps=MEZO_EPS, seed=args.seed,
    )  # fmt: skip
    return race(model, text, config, args.rank, -(-args.steps // EVALUATIONS), say)


def point_of(model: Model, adapter: Adapter, text: Text) -> Point:
    """The adapter on the first row that was trained on."""
    return Point(model, adapter, *as_batch(text.stream().take(1))[:2])


def named_parts(point: Point) -> dict[str, list[int]]:
    """The middle layer's k_proj B, that layer, and everything, as tensor numbers."""
    layers = sum(".self_attn.q_proj.lora_A" in name for name in point.names)
    layer = f".layers.{layers // 2}."
    return {
        "matrix": point.members(f"{layer}self_attn.k_proj.lora_B"),
        "layer": point.members(layer),
        "all": point.members(""),
    }


def slopes_of(point: Point, args: argparse.Namespace) -> tuple[list[Slope], float]:
    """g of two forwards beside <∇, z>, and how far the library's own mean estimate is from ours."""
    seeds = perturbation_seeds(args.seed, 2 * args.forwards)
    slopes = []
    for part, members in named_parts(point).items():
        span = point.span(members)
        for eps in SCANNED_EPS if part == "all" else SCANNED_EPS[1:2]:
            used = seeds if (part, eps) == ("all", MEZO_EPS) else seeds[: args.forwards]
            exact = [float(point.noise(s)[span] @ point.gradient[span]) for s in used]
            g = list(point.two_forwards(span, used, eps))
            slopes.append(Slope(part, span.stop - span.start, eps, g, exact))
            say(f"{part}, eps {eps:g}: correlation {slopes[-1].correlation:.6f}")
    own = sum(g * point.noise(s) for g, s in zip(slopes[-1].g[:4], seeds, strict=False)) / 4
    library = point.mezo(args.seed, 4, MEZO_EPS)
    return slopes, float(np.linalg.norm(library - own) / np.linalg.norm(own))


def statistics_of(
    point: Point, args: argparse.Namespace, slope: Slope
) -> tuple[dict[str, Part], list[Averages]]:
    """Of every part over many seeds with g = <∇, z>, and of means of n estimates.

    `slope` has g of two forwards with all parameters perturbed.
    """
    rows: list[Tally] = []

    def estimates() -> Iterator[Array]:
        for seed in perturbation_seeds(args.seed, args.seeds):
            z = point.noise(seed)
            rows.append(tally(z, point.gradient, point.starts))
            yield np.float32(rows[-1].dot.sum()) * z
            if len(rows) % 128 == 0:
                say(f"{len(rows)} of {args.seeds} seeds")

    groups = named_parts(point)
    averages = [small_averages(point, part, groups[part], args.seed) for part in SMALL_SEEDS]
    found = averaged_cosines(point.gradient, estimates())
    averages.append(Averages("all", point.theta.size, False, found))
    averages.append(measured_averages(point, slope, args.seed))
    whole = stack(rows)
    parts = {
        name: part_statistics(whole, point.gradient, point.slices, members)
        for name, members in all_parts(point).items()
    }
    return parts, averages


def small_averages(point: Point, part: str, members: list[int], seed: int) -> Averages:
    """With one part perturbed and g = <∇, z>."""
    gradient = point.gradient[point.span(members)]
    rng = np.random.default_rng([seed, len(gradient)])
    noise = (rng.standard_normal(len(gradient), np.float32) for _ in range(SMALL_SEEDS[part]))
    found = averaged_cosines(gradient, ((z @ gradient) * z for z in noise))
    return Averages(part, len(gradient), False, found)


def measured_averages(point: Point, slope: Slope, seed: int) -> Averages:
    """With everything perturbed and g of two forwards."""
    seeds = perturbation_seeds(seed, len(slope.g))
    noise = (np.float32(g) * point.noise(s) for g, s in zip(slope.g, seeds, strict=True))
    return Averages("all", point.theta.size, True, averaged_cosines(point.gradient, noise))


def all_parts(point: Point) -> dict[str, list[int]]:
    """Tensor numbers of the whole, each layer, each projection, each layer's, each matrix."""
    parts = {"all": point.members("")}
    parts |= {name: point.members(f".{name}.") for name in PROJECTIONS}
    for layer in itertools.takewhile(lambda i: point.members(f".layers.{i}."), itertools.count()):
        members = point.members(f".layers.{layer}.")
        parts[f"layer {layer}"] = members
        for name in PROJECTIONS:
            pair = [i for i in members if f".{name}." in point.names[i]]
            parts[f"{layer} {name}"] = pair
            parts |= {f"{layer} {name} {m}": [i] for m, i in zip("AB", pair, strict=True)}
    return parts


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="MeBP, MeSP and MeZO on a real model.")
    parser.add_argument("--model", type=Path, metavar="DIR", help="Qwen2 directory")
    parser.add_argument("--data", type=Path, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--redraw", action="store_true", help="measure nothing, draw again")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), metavar="DIR")
    for name, value, what in (
        ("steps", 60, "of training"),
        ("batch-size", 2, "rows per batch"),
        ("seq-len", 64, "tokens per row"),
        ("rank", 8, "of the adapter; alpha is twice that"),
        ("seed", 0, "of the adapter, the data's order and the noise"),
        ("seeds", 1024, "of noise for the statistics"),
        ("forwards", 32, "seeds whose two forwards are run, per eps and part"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=value, metavar="N", help=f"{what} (default: {value})"
        )
    args = parser.parse_args()
    if not args.redraw and (args.model is None or args.data is None):
        parser.error("--model and --data are needed, except with --redraw")
    return args


def main() -> int:
    """Measure, save, draw, write; a user's mistake is one line and exit code 2."""
    args = parse()
    file = args.out / "zeroth_order.json"
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if not args.redraw:
            save(measure(args), file)
        results = load(file)
        draw(results, args.out)
        write_report(args.out / "zeroth_order.md", page(results))
    except MespRefError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(args.out / "zeroth_order.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())

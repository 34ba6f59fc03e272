"""Where the time of a step goes beside its products: op by op, for each method.

    OPENBLAS_NUM_THREADS=1 python benchmarks/where.py       writes docs/benchmarks/where.md; two minutes

CPU seconds of one thread on Qwen2.5-0.5B's shape, 256 tokens, two blocks and a small vocabulary. An op's
products take its FLOPs ÷ the rate that this BLAS has on the products of the method; what is left are
passes over activations, decoding, page faults and Python. Methods take turns, each with a probe of its
products; of steps and probes the fastest count, which a busy machine disturbs least. As on the command
line the C library keeps freed arrays. where.json keeps the figures for the table of all pages.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from common import (
    COLOURS,
    SHAPES,
    adapter_and_batch,
    gemm_rate,
    gemms,
    machine,
    markdown_table,
    save_figure,
    write_report,
)

import mesp_ref as mr
from mesp_ref.files.affine import Affine
from mesp_ref.files.random import write_random_checkpoint
from mesp_ref.memory import Shapes, dry_run
from mesp_ref.memory.ledger import _OPS

SHAPE, RANK, TOKENS = "qwen2.5-0.5b", 8, 256
CONFIG = dataclasses.replace(SHAPES[SHAPE], num_hidden_layers=2, vocab_size=16_384)
WAYS = {"store_all": "ram", "mesp": "ram", "mesp_tiled": "disk", "mesp_streamed": "disk"}
PACKED = "mesp_tiled, 4-bit"
GOAL = 1.15  # step ÷ products, and 4-bit ÷ dense
BETWEEN = "between ops"
OUT = Path(__file__).resolve().parent.parent / "docs/benchmarks"


class Run(NamedTuple):
    """A method: the fastest step, op by op, and the fastest probe of its products."""

    seconds: dict[str, float]
    work: Counter[str]  # FLOPs by op
    rate: float

    @property
    def whole(self) -> float:
        return sum(self.seconds.values())

    @property
    def over(self) -> float:
        """The step by its products."""
        return self.whole * self.rate / sum(self.work.values())


class Clock:
    """CPU seconds of every op while active, and of what runs between them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._op: FrameType | None = None

    def __enter__(self) -> "Clock":
        self._last = time.process_time()
        sys.setprofile(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        self._book(BETWEEN)

    def _book(self, name: str) -> None:
        now = time.process_time()
        self.seconds[name] += now - self._last
        self._last = now

    def _listen(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and self._op is None and frame.f_code in _OPS:
            self._op = frame
            self._book(BETWEEN)
        elif event == "return" and frame is self._op:
            self._op = None
            self._book(frame.f_code.co_name)


def measure(
    config: mr.Qwen2Config, tokens: int, rounds: int, ways: Sequence[str]
) -> dict[str, Run]:
    """Every way in turns, the first round not counted."""
    with tempfile.TemporaryDirectory(prefix="where-") as folder:
        models = {}
        for name, dtype, affine in (
            ("dense", "float32", None),
            ("4-bit", "float16", Affine(4, 64)),
        ):
            write_random_checkpoint(config, Path(folder) / name, dtype=dtype, affine=affine)
            models[name] = mr.load_model(Path(folder) / name)
        adapter, ids, _ = adapter_and_batch(config, tokens, RANK)
        steps: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(rounds + 1):
            for way in ways:
                method, _, base = way.partition(", ")
                with Clock() as clock:
                    mr.loss_and_grads(
                        models[base or "dense"], adapter, ids, ids, method=method,
                        checkpoints=WAYS[method], on_gradients=lambda number, grads: None,
                    )  # fmt: skip
                products = gemms(config, method, tokens, RANK, checkpoints=WAYS[method])
                if turn:
                    steps[way].append(clock.seconds)
                    rates[way].append(gemm_rate(products, time.process_time))
                    found = Run(clock.seconds, flops(config, method, tokens), rates[way][-1])
                    print(
                        f"{way}: {found.whole:.2f} s, {found.over:.2f}", file=sys.stderr, flush=True
                    )
    return {
        way: Run(
            min(steps[way], key=lambda seconds: sum(seconds.values())),
            flops(config, way.partition(", ")[0], tokens), max(rates[way]),
        )
        for way in ways
    }  # fmt: skip


def flops(config: mr.Qwen2Config, method: str, tokens: int) -> Counter[str]:
    """FLOPs of products by op."""
    found: Counter[str] = Counter()
    shapes = Shapes(config, 1, tokens, RANK, disk=WAYS[method] == "disk")
    for moment in dry_run(method, shapes).ledger.moments:
        found[moment.op.split(" ")[0]] += moment.flops
    return found


def table(run: Run) -> str:
    """Op by op, those that take most beside their products first."""
    seconds, work, rate, whole = run.seconds, run.work, run.rate, run.whole
    beside = {op: spent - work[op] / rate for op, spent in seconds.items()}
    rows: list[list[object]] = []
    for op in sorted(seconds, key=lambda op: -beside[op]):
        if seconds[op] >= 0.005 * whole:
            cells = seconds[op], work[op] / rate, beside[op]
            rows.append([f"`{op}`" if op != BETWEEN else op, *(f"{1e3 * x:.0f}" for x in cells),
                         f"{beside[op] / whole:.1%}"])  # fmt: skip
    products = sum(work.values()) / rate
    rows.append(["all", f"{1e3 * whole:.0f}", f"{1e3 * products:.0f}",
                 f"{1e3 * (whole - products):.0f}", f"{(whole - products) / whole:.1%}"])  # fmt: skip
    return markdown_table(["op", "ms", "its products, ms", "beside, ms", "of the step"], rows)


NOTES = """\
## What was tried

- Passes in blocks of rows, so that a tile's arrays stay in the first caches: 0.96 to 1.6 of the time of
  whole passes over the tiles in use, whose 655 kB stay in the second cache already.
- Wider tiles of the MLP with AVX-512's faster products, 384 to 2,432 columns: 0.99 to 1.05 of the time,
  alone and with two workers.
- One temporary file for all steps of a run in place of one a step: 0.94 to 0.98 of the time with
  offloaded activations, and no less with checkpoints alone; but its pages then live long enough to be
  written to the disk, which those of a file that vanishes with its step are not.
- `scipy.linalg.blas.sgemm` with beta = 1 in place of product and sum: 0.95 to 1.12 of its time.
- One exponential in place of two in the gate, since the other is of zeros: the selection by a mask that
  replaces it takes eight times as long. An exponential takes a third of a nanosecond a number here.
- Row sums of the head by einsum: 0.01 in place of 0.035 ms of a tile that takes 5; it would change bits.
- Four bits, taken: bytes spread by a shift and a mask in place of a table of 256 KiB (0.04 in place of
  0.11 ms of the 0.6 that a tile of 640 rows took, and the table stays out of the caches), and pieces of
  131,072 numbers: with 65,536 two workers hand the GIL over so often that each decodes at half its
  speed (a step of two workers 1.23 of the dense one in place of 1.17), with 262,144 one alone takes a
  tenth longer. What is left are the two roundings to 16 bits that MLX's values
  need, 0.25 ms, and two passes with a scalar a group, 0.16. NumPy's own cast to float16 takes 35 ms."""


def name(way: str) -> str:
    method, comma, base = way.partition(", ")
    return f"`{method}`" + f"{comma}{base} base" * bool(base)


def summary(runs: Mapping[str, Run]) -> str:
    """Every way in a line."""
    rows = []
    for way, run in runs.items():
        dense = runs.get(way.partition(", ")[0], run)
        against = f"{run.whole / dense.whole:.2f}" if dense is not run else "–"
        rows.append((name(way), f"{1e3 * run.whole:.0f}", f"{run.over:.2f}", against))
    head = ("method", "step, ms", f"step ÷ products (goal {GOAL})", f"÷ dense base (goal {GOAL})")
    return markdown_table(head, rows)


def draw(runs: Mapping[str, Run], path: Path) -> None:
    """The step over the limit that its products set, one bar a method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 0.9 + 0.55 * len(runs)), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for row, (way, run) in enumerate(runs.items()):
        axes.barh(row, run.over, color=COLOURS[way.partition(", ")[0]])
        axes.text(0.97, row, f"{run.over:.2f}", va="center", ha="right", color="white")
    axes.axvline(1, color="black", lw=1)
    axes.axvline(GOAL, color="black", ls="--", lw=1)
    axes.set_yticks(range(len(runs)), [name(way).replace("`", "") for way in runs])
    axes.set(xlim=(0, 1.1 * max(run.over for run in runs.values())), xlabel="step ÷ its products")
    axes.set_title(
        "Time over the limit that matrix products set (line; dashed: the goal)", fontsize=11
    )
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def report(config: mr.Qwen2Config, tokens: int, rounds: int, runs: Mapping[str, Run]) -> str:
    """The page."""
    parts = [
        "# Where the time goes beside the products",
        "Written by `benchmarks/where.py`. " + "; ".join(machine()) + ".",
        f"CPU milliseconds of one step, {config.num_hidden_layers} blocks of {SHAPE}, a vocabulary of "
        f"{config.vocab_size:,}, {tokens} tokens, rank {RANK}, float32, the fastest of {rounds}, "
        "methods in turns. Products are counted at the rate that this BLAS has on the method's shapes.",
        summary(runs),
        "![time over the limit of the products](where.png)",
        *(
            f"## {name(way)}, {run.rate / 1e9:.0f} GFLOP/s\n\n{table(run)}"
            for way, run in runs.items()
        ),
        NOTES,
    ]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument(
        "--out", default=OUT, type=Path, help="directory (default: docs/benchmarks)"
    )
    args = parser.parse_args()
    mr.keep_freed_memory()
    runs = measure(CONFIG, args.tokens, args.rounds, (*WAYS, PACKED))
    args.out.mkdir(parents=True, exist_ok=True)
    draw(runs, args.out / "where.png")
    write_report(args.out / "where.md", report(CONFIG, args.tokens, args.rounds, runs))
    dense = runs["mesp_tiled"].whole
    figures = {"over": {way: run.over for way, run in runs.items()},
               "packed": runs[PACKED].whole / dense, "machine": machine()}  # fmt: skip
    write_report(args.out / "where.json", json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

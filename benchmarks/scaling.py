"""What a step costs against sequence length, rank, number of blocks and vocabulary.

    python benchmarks/scaling.py                  after papers.py: some five minutes more
    python benchmarks/scaling.py --only memory    the ledger's part alone; any machine, no report
    mpiexec -n 4 -hosts a,b,c,d python benchmarks/scaling.py --mpi    cells shared by four machines

Writes docs/benchmarks/scaling.md and its pictures. Shares what papers.py has measured (cells.py).
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cells import DISK, Bench, Cell, Peak, Time, open_cache, predict
from common import machines, markdown_table, on_ranks, write_report
from pictures import Curve, draw_curves
from prose import tidy

from mesp_ref.api import METHODS
from mesp_ref.cli.options import add_ranks
from mesp_ref.lean.allocator import keep_freed_memory
from mesp_ref.train.ranks import ALONE, Ranks

VARIANTS = (*METHODS, DISK)


@dataclass(frozen=True)
class Sweep:
    """One axis: the cells that are measured, and where the closed form draws its line."""

    axis: str
    unit: str
    cells: tuple[Cell, ...]
    line: tuple[Cell, ...]

    def at(self, cell: Cell) -> int:
        config = cell.config
        sizes = {"tokens": cell.tokens, "rank": cell.rank}
        sizes |= {"layers": config.num_hidden_layers, "vocabulary": config.vocab_size}
        return sizes[self.axis]


def _sweep(axis: str, unit: str, measured: Sequence[int], line: Sequence[int]) -> Sweep:
    published = {"layers": 24, "vocabulary": 151936}  # the very cell of the other tables
    found = [
        tuple(Cell(**{axis: None if published.get(axis) == value else value}) for value in values)  # type: ignore[arg-type]
        for values in (measured, line)
    ]
    return Sweep(axis, unit, *found)


SWEEPS = (
    _sweep("tokens", "tokens", (128, 256, 512, 1024), [2**i for i in range(5, 14)]),
    _sweep("rank", "rank", (4, 8, 16, 32), [2**i for i in range(9)]),
    _sweep("layers", "blocks", (2, 6, 12, 24), (2, 4, 6, 12, 24, 48)),
    _sweep(
        "vocabulary",
        "vocabulary",
        (8192, 32768, 151936),
        (4096, 8192, 32768, 65536, 151936, 303872),
    ),
)


@dataclass
class Results:
    """Measured peaks and times by cell."""

    peaks: dict[Cell, dict[str, Peak]]
    times: dict[Cell, dict[str, Time]]


def measure_all(bench: Bench, timed: bool, ranks: Ranks = ALONE) -> Results:
    """Every measured cell of every sweep; methods that race each other stay on one rank."""
    cells = list(dict.fromkeys(cell for sweep in SWEEPS for cell in sweep.cells))
    peaks = bench.peaks([(cell, variant) for cell in cells for variant in VARIANTS], ranks)
    times = ranks.shared(cells, bench.times) if timed else []
    return Results(peaks, dict(zip(cells, times, strict=False)))


def _predicted(cell: Cell, variant: str) -> float:
    found = predict(cell.config, cell.tokens, cell.rank, variant)
    assert found is not None
    return found / 1e6


def memory_table(sweep: Sweep, results: Results) -> str:
    """Measured peaks, and the closed form's where nothing was measured: in italics."""
    rows = []
    for variant in VARIANTS:
        row = [f"`{variant}`"]
        for cell in sweep.line:
            peak = results.peaks.get(cell, {}).get(variant)
            row.append(f"{peak.total / 1e6:.2f}" if peak else f"*{_predicted(cell, variant):.2f}*")
        rows.append(row)
    return markdown_table([f"peak MB, {sweep.unit}", *_heads(sweep, sweep.line)], rows)


def time_table(sweep: Sweep, results: Results) -> str:
    """Median seconds, and over MeBP's."""
    rows = []
    for method in METHODS:
        row = [f"`{method}`"]
        for cell in sweep.cells:
            found = results.times[cell]
            ratio = found[method].seconds / found["mebp"].seconds
            row.append(f"{found[method].seconds:.2f} ({ratio:.2f})")
        rows.append(row)
    return markdown_table([f"seconds (÷ MeBP), {sweep.unit}", *_heads(sweep, sweep.cells)], rows)


def _heads(sweep: Sweep, cells: Sequence[Cell]) -> list[str]:
    return [f"{sweep.at(cell):,}" for cell in cells]


def _growth(variant: str, sweep: Sweep) -> float:
    """Factor of the predicted peak over the last doubling of an axis."""
    before, after = sweep.line[-2:]
    return _predicted(after, variant) / _predicted(before, variant)


def growth_table() -> str:
    """By what a peak grows when its axis doubles at the far end."""
    doubling = [
        sweep for sweep in SWEEPS if sweep.at(sweep.line[-1]) == 2 * sweep.at(sweep.line[-2])
    ]
    header = ["×", *(" → ".join(_heads(s, s.line[-2:])) + f" {s.unit}" for s in doubling)]
    rows = [[f"`{v}`", *(f"{_growth(v, s):.2f}" for s in doubling)] for v in VARIANTS]
    return markdown_table(header, rows)


def curves(results: Results) -> tuple[list[list[Curve]], list[list[Curve]]]:
    """Lines and dots of the two pictures, panel by panel."""
    memory, time = [], []
    for sweep in SWEEPS:
        at, lines = [sweep.at(cell) for cell in sweep.cells], [sweep.at(c) for c in sweep.line]
        memory.append(
            [
                Curve(
                    variant, lines, [_predicted(cell, variant) for cell in sweep.line],
                    at, [results.peaks[cell][variant].total / 1e6 for cell in sweep.cells],
                )
                for variant in VARIANTS
            ]
        )  # fmt: skip
        seconds: list[Curve] = []
        for method in METHODS:
            found = [results.times[cell][method].seconds for cell in sweep.cells]
            seconds.append(Curve(method, at, found, at, found))
        time.append(seconds)
    return memory, time


def _furthest(peaks: Mapping[Cell, Mapping[str, Peak]]) -> int:
    found = [p for cell in peaks.values() for p in cell.values()]
    return max(abs(p.total - p.predicted) for p in found if p.predicted is not None)


def report(results: Results, rounds: int, machine: Sequence[str]) -> str:
    """The page."""
    tables = "\n\n".join(
        f"## {sweep.unit.capitalize()}\n\n{memory_table(sweep, results)}\n\n"
        f"{time_table(sweep, results)}"
        for sweep in SWEEPS
    )
    lines = "\n".join(f"- {line}" for line in machine)
    return f"""\
# Cost against sequence length, rank, blocks and vocabulary

Regenerate with `python benchmarks/papers.py` and then `python benchmarks/scaling.py`, which shares
its measurements.

Qwen2.5-0.5B (24 blocks, vocabulary 151,936), 256 tokens, rank 8 on seven projections, batch 1,
float32, with one of the four changed. Memory is NumPy bytes above weights, LoRA parameters and
optimiser state, gradients used block by block; MB are 10⁶ bytes. Checkpoints are in RAM, except in
"{DISK}". Upright figures and marks are measured with the ledger at full depth; *figures in
italics* and lines are the closed form, which is at most {_furthest(results.peaks) / 1e3:.0f} kB from
what was measured. Times are medians of {rounds} rounds in which the methods take turns.

{lines}

![Memory against the four axes](scaling-memory.png)

![Time against the four axes](scaling-time.png)

## How fast memory grows

The closed form where an axis doubles at its far end. A factor of 4 is an array of T² elements: the
attention probabilities, which `mesp_tiled` never forms.

{growth_table()}

{tables}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description="Cost of a step against its sizes.")
    parser.add_argument("--only", choices=("memory",), help="measure memory, write nothing")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), metavar="DIR")
    add_ranks(parser, "the cells")
    args = parser.parse_args()
    keep_freed_memory()  # as the command line does
    if args.rounds < 1:
        parser.error(f"--rounds: found {args.rounds}, expected at least 1")
    return on_ranks(args, partial(run, args))


def run(args: argparse.Namespace, ranks: Ranks) -> int:
    """Measure, on all ranks, and write."""
    ranks.alike({})
    bench = Bench(args.rounds, open_cache(ranks.rank))
    results, machine = measure_all(bench, args.only is None, ranks), machines(ranks)
    if args.only or ranks.rank:
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    memory, time = curves(results)
    units = [sweep.unit for sweep in SWEEPS]
    draw_curves(args.out / "scaling-memory.png", memory, units, "peak memory of a step, MB")
    draw_curves(args.out / "scaling-time.png", time, units, "seconds per step")
    write_report(args.out / "scaling.md", tidy(report(results, args.rounds, machine)))
    print(f"{args.out}/scaling.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

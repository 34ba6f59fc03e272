"""The tables of the MeSP paper with this engine, the published figures beside ours.

    python benchmarks/papers.py --only memory    the ledger's part: some ten minutes, on any machine
    python benchmarks/papers.py                  the times, a quarter of an hour on a quiet machine
                                                 (and the memory if it is missing), and the report

Writes docs/benchmarks/papers.md and its pictures. Progress is kept (see cells.py): a run that was
broken off goes on where it stopped. Needs `pip install 'mesp-ref[benchmarks]'`.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from cells import DISK, STORE_H, Bench, Cell, Peak, Time, open_cache
from common import machines, markdown_table, on_ranks, write_report
from families import without_section
from pictures import draw_memory, draw_ratios, draw_waterfall
from prose import tidy
from waterfall import H, Step, contents, waterfall

from mesp_ref.api import METHODS
from mesp_ref.cli.options import add_ranks
from mesp_ref.lean.allocator import keep_freed_memory
from mesp_ref.memory import Shapes
from mesp_ref.train.ranks import ALONE, Ranks

BASE, MIB = Cell(), 2**20
TABLE_1 = (BASE, Cell("1.5B"), Cell("3B"))
TABLE_2 = tuple(Cell(tokens=t) for t in (128, 256, 512, 1024))
TABLE_3 = tuple(Cell(rank=r) for r in (4, 8, 16, 32))
FALLS = (BASE, TABLE_2[-1], TABLE_1[-1])
SOURCE = "Park et al. 2026, arXiv 2602.13069"


class Figure(NamedTuple):
    """A published figure: MB and seconds per step."""

    mb: float
    seconds: float | None = None


# 4-bit base, bfloat16, iPhone 17 Pro, memory as the operating system counts it (phys_footprint)
PUBLISHED: dict[Cell, dict[str, Figure]] = {
    BASE: {"mebp": Figure(360.8, 0.68), "mesp": Figure(136.2, 0.86)},
    TABLE_1[1]: {"mebp": Figure(516.2, 1.66), "mesp": Figure(262.6, 2.17)},
    TABLE_1[2]: {
        "mebp": Figure(637.6, 3.21), "mesp": Figure(368.4, 4.09), STORE_H: Figure(398.5, 3.85),
    },
    TABLE_2[0]: {"mebp": Figure(252.7), "mesp": Figure(110.7)},
    TABLE_2[2]: {"mebp": Figure(582.4), "mesp": Figure(245.8)},
    TABLE_2[3]: {"mebp": Figure(1050.3), "mesp": Figure(513.6)},
    TABLE_3[0]: {"mebp": Figure(355.2), "mesp": Figure(132.8)},
    TABLE_3[2]: {"mebp": Figure(372.4), "mesp": Figure(143.5)},
    TABLE_3[3]: {"mebp": Figure(395.8), "mesp": Figure(158.2)},
}  # fmt: skip
# Song & Tang 2025, arXiv 2510.03425, iPhone 15 Pro Max
MEBP_PAPER = {
    BASE: {"mezo": Figure(319, 2.68), "mebp": Figure(320, 3.85)},
    TABLE_1[1]: {"mezo": Figure(452, 5.47), "mebp": Figure(460, 9.09)},
    TABLE_1[2]: {"mezo": Figure(554, 10.28), "mebp": Figure(662, 17.96)},
}


@dataclass(frozen=True)
class Results:
    """All that was measured. `times` has no entry for a cell that was not timed."""

    peaks: dict[Cell, dict[str, Peak]]
    times: dict[Cell, dict[str, Time]]

    def mb(self, cell: Cell, variant: str) -> float:
        return self.peaks[cell][variant].total / 1e6

    def ratio(self, cell: Cell, over: str = "mesp", under: str = "mebp") -> float:
        """Ratio of two peaks."""
        return self.mb(cell, over) / self.mb(cell, under)

    def slower(self, cell: Cell, over: str = "mesp", under: str = "mebp") -> float | None:
        """Ratio of two median times; None where the cell was not timed."""
        above, below = self.seconds(cell, over), self.seconds(cell, under)
        return above / below if above and below else None

    def seconds(self, cell: Cell, variant: str) -> float | None:
        """Median time; None where the cell was not timed."""
        return self.times[cell][variant].seconds if cell in self.times else None


def measure_all(bench: Bench, timed: bool, three_billion: bool, ranks: Ranks = ALONE) -> Results:
    """Every cell of every table; methods that race each other stay on one rank."""
    cells = list(dict.fromkeys((*TABLE_1, *TABLE_2, *TABLE_3)))
    wanted = [
        (cell, variant)
        for cell in cells
        for variant in (*METHODS, DISK, *((STORE_H,) if cell in TABLE_1 else ()))
    ]
    peaks = bench.peaks(wanted, ranks)
    raced = [cell for cell in cells if timed and (cell.shape != "3B" or three_billion)]
    return Results(peaks, dict(zip(raced, ranks.shared(raced, bench.times), strict=True)))


# Tables


def _beside(value: float | None, base: float | None, form: str) -> str:
    """A value, and in brackets its ratio to MeBP's."""
    if value is None:
        return "–"
    return f"{value:{form}} ({value / base:.2f})" if base else f"{value:{form}}"


def memory_table(results: Results, head: str, cells: Sequence[Cell], labels: Sequence[str]) -> str:
    """Peak MB of each variant and, in brackets, over MeBP's; the published ones below."""
    rows: list[list[str]] = []
    variants = [v for v in results.peaks[cells[0]] if all(v in results.peaks[c] for c in cells)]
    for variant in variants:
        values = [(results.mb(c, variant), results.mb(c, "mebp")) for c in cells]
        rows.append([f"`{variant}`", *(_beside(*pair, ".2f") for pair in values)])
    rows += _published(cells, lambda figure: figure.mb, ".1f")
    return markdown_table([f"peak MB (÷ MeBP), {head}", *labels], rows)


def _published(
    cells: Sequence[Cell], value: Callable[[Figure], float | None], form: str
) -> list[list[str]]:
    found = []
    for variant, name in (("mebp", "MeBP"), (STORE_H, "MeSP, h stored"), ("mesp", "MeSP")):
        figures = [PUBLISHED[cell].get(variant) for cell in cells]
        if any(figure and value(figure) for figure in figures):
            row = [
                _beside(figure and value(figure), value(PUBLISHED[cell]["mebp"]), form)
                for cell, figure in zip(cells, figures, strict=True)
            ]
            found.append([f"published {name}", *row])
    return found


def _judged(time: Time) -> str:
    return f"{time.of_gemm:.2f} ({time.flops / 1e9:,.0f})"


def time_table(results: Results, head: str, cells: Sequence[Cell], labels: Sequence[str]) -> str:
    """Median seconds (over MeBP's), then each time over what its own GEMMs take."""
    first = next((results.times[c] for c in cells if c in results.times), {})
    names = [v for v in first if all(v in results.times.get(c, first) for c in cells)]
    rows, relative = [], []
    for name in names:
        row, judged = [f"`{name}`"], [f"`{name}`"]
        for cell in cells:
            pair = results.seconds(cell, name), results.seconds(cell, "mebp")
            row.append(_beside(*pair, ".2f"))
            judged.append(_judged(results.times[cell][name]) if cell in results.times else "–")
        rows.append(row)
        relative.append(judged)
    rows += _published(cells, lambda figure: figure.seconds, ".2f")
    return "\n\n".join(
        [
            markdown_table([f"seconds (÷ MeBP), {head}", *labels], rows),
            markdown_table([f"seconds ÷ (FLOPs ÷ GEMM rate), (GFLOP), {head}", *labels], relative),
        ]
    )


def table_5(results: Results) -> str:
    """Storing h against rebuilding it: our memory at three shapes, our time at 0.5B."""
    rows = []
    for variant in ("mebp", STORE_H, "mesp"):
        row = [f"`{variant}`"]
        row += [
            _beside(results.mb(cell, variant), results.mb(cell, "mebp"), ".3f") for cell in TABLE_1
        ]
        pair = results.seconds(BASE, variant), results.seconds(BASE, "mebp")
        rows.append([*row, _beside(*pair, ".3f")])
    cells = (TABLE_1[-1],)
    memory, time = (
        _published(cells, value, form)
        for value, form in ((lambda f: f.mb, ".1f"), (lambda f: f.seconds, ".2f"))
    )
    for (name, mb), (_, published) in zip(memory, time, strict=True):
        rows.append([name, "–", "–", mb, f"3B: {published}"])
    header = ["MB (÷ MeBP)", "0.5B", "1.5B", "3B", "0.5B, seconds (÷ MeBP)"]
    return markdown_table(header, rows)


def mezo_table(results: Results) -> str:
    """What MeBP costs beside MeZO, theirs and ours."""
    rows = []
    for cell, theirs in MEBP_PAPER.items():
        mezo, mebp = theirs["mezo"], theirs["mebp"]
        assert mezo.seconds
        assert mebp.seconds
        slower = results.slower(cell, "mebp", "mezo")
        rows.append(
            [
                cell.shape, f"{mezo.mb:.0f} → {mebp.mb:.0f} ({mebp.mb / mezo.mb:.2f})",
                f"{results.mb(cell, 'mezo'):.1f} → {results.mb(cell, 'mebp'):.1f} "
                f"({results.ratio(cell, 'mebp', 'mezo'):.2f})",
                f"{mezo.seconds} → {mebp.seconds} ({mebp.seconds / mezo.seconds:.2f})",
                f"{slower:.2f}" if slower else "–",
            ]
        )  # fmt: skip
    header = ["MeZO → MeBP", "published MB", "our MB", "published seconds", "our time ratio"]
    return markdown_table(header, rows)


def falls(results: Results) -> dict[Cell, list[Step]]:
    """The waterfalls from MeBP's peak to MeSP's."""
    return {
        cell: waterfall(results.peaks[cell]["mebp"], results.peaks[cell]["mesp"]) for cell in FALLS
    }


def waterfall_table(results: Results) -> str:
    """Each tensor's bytes in MeBP's peak minus those in MeSP's; the columns add up."""
    found = {cell: dict(steps) for cell, steps in falls(results).items()}
    names = list(dict.fromkeys(name for steps in found.values() for name in steps))
    peaks = [(results.peaks[cell]["mebp"], results.peaks[cell]["mesp"]) for cell in FALLS]
    rows = [["MeBP's peak", *(f"{mebp.total:,}" for mebp, _ in peaks)]]
    rows += [[name, *(f"{-found[cell].get(name, 0):+,}" for cell in FALLS)] for name in names]
    rows += [
        ["MeSP's peak", *(f"{mesp.total:,}" for _, mesp in peaks)],
        ["the two peak in", *(f"`{mebp.op}`, `{mesp.op}`" for mebp, mesp in peaks)],
        ["h, share of the saving", *(_share(results, cell) for cell in FALLS)],
    ]
    return markdown_table(["bytes", *map(_label, FALLS)], rows)


def _label(cell: Cell) -> str:
    return f"{cell.shape}, {cell.tokens} tokens"


def _share(results: Results, cell: Cell) -> str:
    """Of what MeSP saves, the part that is h."""
    mebp, mesp = results.peaks[cell]["mebp"], results.peaks[cell]["mesp"]
    saved = mebp.total - mesp.total
    return f"{contents(mebp)[H] / saved:.1%}" if saved else "nothing is saved"


def inventory() -> list[tuple[str, list[float]]]:
    """What a step has to hold in the paper's setting, MB at 16 bits, from shapes alone."""
    columns = []
    for cell in TABLE_1:
        s = Shapes(cell.config, 1, cell.tokens, cell.rank, itemsize=2)
        blocks, every = cell.config.num_hidden_layers, s.targets
        lora, h = blocks * s.lora(every), s.h(every)
        published = PUBLISHED[cell]
        column = {
            "logits, once": s.of(cell.config.vocab_size),
            "checkpoints of all blocks and the last output": (blocks + 1) * s.x,
            "LoRA parameters; as much again for their gradients": lora,
            "MeSP's eight intermediates of one block": 4 * s.x + s.p + s.q + 2 * s.m,
            "what MeBP keeps beside them: q, k, v, silu(gate), z, h": s.q + 2 * s.k + 2 * s.m + h,
            "of that, h": h,
            "h of all blocks at once": blocks * h,
            "**published: MeBP − MeSP**": (published["mebp"].mb - published["mesp"].mb) * 1e6,
        }
        columns.append(column)
    return [(name, [column[name] / 1e6 for column in columns]) for name in columns[0]]


# The report


def _range(values: Sequence[float], form: str = ".2f") -> str:
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return low if low == high else f"{low} to {high}"


def summary(results: Results) -> str:
    """The findings, each from the figures."""
    theirs = {c: p["mesp"].mb / p["mebp"].mb for c, p in PUBLISHED.items()}
    ours = [results.ratio(cell) for cell in theirs]
    tiled = [results.ratio(cell, "mesp_tiled") for cell in theirs]
    lines = [
        f"- Memory of MeSP over MeBP: published {_range(list(theirs.values()))}, here "
        f"{_range(ours)}. `mesp_tiled` over MeBP: {_range(tiled)}."
    ]
    slower = [ratio for cell in theirs if (ratio := results.slower(cell))]
    if slower:
        published = [
            p["mesp"].seconds / p["mebp"].seconds
            for p in PUBLISHED.values()
            if p["mesp"].seconds and p["mebp"].seconds
        ]
        judged = [t.of_gemm for found in results.times.values() for t in found.values()]
        lines += [
            f"- Time of MeSP over MeBP: published {_range(published)}, here {_range(slower)}. By "
            f"matrix products alone it would be {_flops_ratio(results)}: MeSP repeats the "
            "projections of q, k and v and every x·Aᵀ, nothing else.",
            f"- Each method takes {_range(judged)} times what its own matrix products take at the "
            "rate that the probe beside it reached. Between the fastest and the slowest round of a "
            f"method lie at most {_spread(results):.0%} of its median.",
        ]
    return "\n".join(lines)


def _spread(results: Results) -> float:
    """Largest distance between the fastest and the slowest round, over the median."""
    times = [time for found in results.times.values() for time in found.values()]
    return max((time.most - time.least) / time.seconds for time in times)


def _largest(results: Results) -> str:
    """The three tensors that MeSP's peak lacks most of."""
    steps = falls(results)[BASE][:3]
    return ", ".join(f"{step.name} ({step.size / 1e6:.2f} MB)" for step in steps)


def _flops_ratio(results: Results) -> str:
    return _range([t["mesp"].flops / t["mebp"].flops for t in results.times.values()])


def why(results: Results) -> str:
    """Why our memory ratio is not the published one."""
    mebp, mesp = results.peaks[BASE]["mebp"], results.peaks[BASE]["mesp"]
    kept = dict(inventory())
    saved = kept["**published: MeBP − MeSP**"]
    more = kept["what MeBP keeps beside them: q, k, v, silu(gate), z, h"]
    h, all_h = kept["of that, h"], kept["h of all blocks at once"]
    storing = results.peaks[TABLE_1[-1]][STORE_H].total - results.peaks[TABLE_1[-1]]["mesp"].total
    times = _range([a / b for a, b in zip(saved, more, strict=True)], ".0f")
    header = ["MB at 16 bits", *(cell.shape for cell in TABLE_1)]
    table = [[name, *(f"{value:.2f}" for value in row)] for name, row in kept.items()]
    return f"""\
Both methods keep the same checkpoints, run the same head and need the same gradients. They differ
in what one block leaves for its backward, so only that can differ between their peaks. The
waterfall lists it from the ledgers of two steps: each tensor's bytes in MeBP's peak minus those in
MeSP's, in float32. A tensor that is dropped and then rebuilt inside an op moves to "results and
scratch", where it counts as much as before.

{waterfall_table(results)}

![From MeBP's peak to MeSP's](papers-waterfall.png)

At 0.5B and 256 tokens MeSP saves {(mebp.total - mesp.total) / 1e6:.2f} MB of
{mebp.total / 1e6:.2f}; h is {contents(mebp)[H] / 1e6:.3f} MB ({_share(results, BASE)} of the
saving). The largest steps down are {_largest(results)}.

The published saving is of another size. This is what a step has to hold in the paper's setting,
from the shapes alone:

{markdown_table(header, table)}

The published saving is {times} times what MeBP keeps of a block beside MeSP's eight intermediates,
and {_range([a / b for a, b in zip(saved, all_h, strict=True)], ".0f")} times the h of all blocks
together. Storing h cost {PUBLISHED[TABLE_1[-1]][STORE_H].mb - PUBLISHED[TABLE_1[-1]]["mesp"].mb:.1f}
MB on the phone at 3B; one block's h is {h[-1]:.3f} MB there, and {storing / 1e6:.3f} MB here in
float32. So the published difference is more than the tensors in which the two methods differ. What it is
cannot be seen from outside; candidates are tensors that automatic differentiation keeps longer than
its own rule asks for, logits and copies of them in one of the two, and pages that an allocator holds
back, all of which `phys_footprint` counts. Here both methods are written by hand on the same ops,
with one LM head whose logits never exist whole, and NumPy's arrays are counted, so none of that is
in the difference: MeBP looks better than in the paper, and MeSP's advantage is smaller.

The published figures also contain what "peak" leaves out here: LoRA parameters (with rank they grow
by {_lora_growth():.1f} MB from 4 to 32 at 16 bits; the published MeBP grows by
{PUBLISHED[TABLE_3[-1]]["mebp"].mb - PUBLISHED[TABLE_3[0]]["mebp"].mb:.1f} MB, MeSP by
{PUBLISHED[TABLE_3[-1]]["mesp"].mb - PUBLISHED[TABLE_3[0]]["mesp"].mb:.1f}), resident pages of the
4-bit base, and the process itself.
"""


def _lora_growth() -> float:
    """MB at 16 bits that the LoRA parameters of 0.5B grow by from rank 4 to 32."""
    low, high = (Shapes(c.config, rank=c.rank, itemsize=2) for c in (TABLE_3[0], TABLE_3[-1]))
    return BASE.config.num_hidden_layers * (high.lora(high.targets) - low.lora(low.targets)) / 1e6


def _agreement(results: Results) -> str:
    """How far ledger, closed form and tracemalloc are apart over all cells."""
    peaks = [peak for cell in results.peaks.values() for peak in cell.values()]
    form = max(abs(p.total - p.predicted) for p in peaks if p.predicted is not None)
    traced = max(p.traced - p.total for p in peaks)
    return (
        f"All {len(peaks)} peaks are measured at full depth. The closed form of `mesp-ref memory` is "
        f"at most {form / 1e3:.0f} kB away (small temporaries and Python objects), tracemalloc's own "
        f"peak at most {traced / 1e3:.0f} kB above."
    )


def report(results: Results, rounds: int, machine: Sequence[str]) -> str:
    """The page."""
    pick: list[tuple[str, tuple[Cell, ...], list[str]]] = [
        ("shape", TABLE_1, [c.shape for c in TABLE_1]),
        ("tokens, 0.5B", TABLE_2, [str(c.tokens) for c in TABLE_2]),
        ("rank, 0.5B", TABLE_3, [str(c.rank) for c in TABLE_3]),
    ]
    titles = ["Table 1: three shapes", "Table 2: sequence length", "Table 3: rank"]
    tables = "\n\n".join(
        f"## {title}\n\n{memory_table(results, *what)}\n\n{time_table(results, *what)}"
        for title, what in zip(titles, pick, strict=True)
    )
    lines = "\n".join(f"- {line}" for line in machine)
    return f"""\
# The papers' tables, with this engine

Regenerate with `python benchmarks/papers.py`. Published figures: MeSP, {SOURCE}: 4-bit base,
bfloat16 LoRA, iPhone 17 Pro, memory as the operating system counts it (`phys_footprint`). Ours:
float32 base of random weights and float32 LoRA on a CPU, memory as NumPy bytes above weights, LoRA
parameters and optimiser state. Absolute figures cannot be compared, ratios within a column can.
Nothing was tuned to match.

Batch 1, sequence 256, rank 8 on seven projections unless the column says otherwise, SGD on each
block's gradients as they come. MB are 10⁶ bytes. Checkpoints are in RAM, except in
"{DISK}".

{lines}

## What came out

{summary(results)}
- {_agreement(results)}

![Memory, published and ours](papers-memory.png)

![MeSP over MeBP, published and ours](papers-ratios.png)

Times are medians of {rounds} rounds in which the methods
take turns, after one step that does not count; the GEMM rate is probed after each step on the shapes
of that step's own products. "–" was not measured: 3B with float32 weights takes
{_gigabytes(TABLE_1[-1]):.0f} GB (`--time-3b`).

{tables}

## Table 5: storing h, or rebuilding it

`{STORE_H}` is MeSP with h taken out of the set of tensors that it drops.

{table_5(results)}

## Why the memory ratio is not the published one

{why(results)}
## MeZO beside MeBP

Published by Song & Tang 2025, arXiv 2510.03425, iPhone 15 Pro Max.

{mezo_table(results)}

MeZO runs two forwards and holds one block's activations at a time, never a gradient or a checkpoint.
"""


def _gigabytes(cell: Cell) -> float:
    """Size of the float32 weights."""
    shapes = cell.config.weight_shapes().values()
    return sum(4 * shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes) / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description="The MeSP paper's tables, with this engine.")
    parser.add_argument("--only", choices=("memory",), help="measure memory, write nothing")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default: %(default)s)")
    parser.add_argument(
        "--time-3b", action="store_true", help="time 3B, too: needs 20 GB of memory"
    )
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
    results = measure_all(bench, args.only is None, args.time_3b, ranks)
    machine = machines(ranks)
    if args.only or ranks.rank:
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    mb = {
        cell: {name: figure.mb for name, figure in figures.items()}
        for cell, figures in PUBLISHED.items()
    }
    draw_memory(args.out / "papers-memory.png", results.peaks, mb, (TABLE_1, TABLE_2, TABLE_3))
    draw_ratios(args.out / "papers-ratios.png", ratios(results))
    peaks = {_label(c): (results.mb(c, "mebp"), results.mb(c, "mesp")) for c in FALLS}
    steps = {_label(cell): found for cell, found in falls(results).items()}
    draw_waterfall(args.out / "papers-waterfall.png", peaks, steps)
    page = args.out / "papers.md"
    _, families = without_section(page.read_text(encoding="utf-8") if page.exists() else "")
    write_report(page, f"{tidy(report(results, args.rounds, machine))}\n\n{families}".rstrip())
    print(page)
    return 0


def ratios(results: Results) -> dict[str, list[tuple[str, float, float | None]]]:
    """MeSP over MeBP by setting, published and ours, in memory and in time."""
    memory: list[tuple[str, float, float | None]] = []
    time: list[tuple[str, float, float | None]] = []
    for cell, figures in sorted(PUBLISHED.items(), key=lambda item: (item[0].shape, item[0])):
        mebp, mesp = figures["mebp"], figures["mesp"]
        name = f"{cell.shape}, {cell.tokens} tokens, rank {cell.rank}"
        memory.append((name, mesp.mb / mebp.mb, results.ratio(cell)))
        if mebp.seconds and mesp.seconds:
            time.append((name, mesp.seconds / mebp.seconds, results.slower(cell)))
    return {"peak memory, MeSP ÷ MeBP": memory, "time of a step, MeSP ÷ MeBP": time}


if __name__ == "__main__":
    raise SystemExit(main())

"""Pictures of papers.md and scaling.md, drawn again from the tables that stand on the pages.

    python benchmarks/stored.py [DIR]    DIR: docs/benchmarks

Nothing is measured. So a picture cannot say anything else than its page, and a test compares the two.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import papers
import scaling
from cells import Cell, Peak, Time
from pictures import Curve, draw_curves, draw_memory, draw_ratios, draw_waterfall
from waterfall import Step

_NUMBER = re.compile(r"\*?([-+]?[\d,]+(?:\.\d+)?)\*?")


class Table(NamedTuple):
    """A table of a page: what its first cell says, the names of its columns, rows by their name."""

    head: str
    columns: list[str]
    rows: dict[str, list[str]]

    def numbers(self, row: str) -> dict[str, float]:
        """By column: the number in a cell, without what stands behind it; none where there is none."""
        found = {c: _NUMBER.match(x) for c, x in zip(self.columns, self.rows[row], strict=True)}
        return {c: float(x[1].replace(",", "")) for c, x in found.items() if x}


def tables(page: Path) -> Iterator[Table]:
    """Every table of a page in order."""
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        cells = [
            [c.strip().strip("`") for c in line.strip("|").split("|")]
            for line in block.splitlines()
        ]
        (head, *columns), _, *rows = cells
        yield Table(head, columns, {name: values for name, *values in rows})


def _found(page: Path, head: str) -> Table:
    return next(table for table in tables(page) if table.head == head)


def _peak(mb: float) -> Peak:
    return Peak(round(mb * 1e6), "", {}, 0, 0, 0, None)


def _results(page: Path) -> papers.Results:
    """Peaks and median seconds of Tables 1 to 3, as papers.md has them."""
    peaks: dict[Cell, dict[str, Peak]] = {}
    times: dict[Cell, dict[str, Time]] = {}
    places = {"shape": papers.TABLE_1, "tokens, 0.5B": papers.TABLE_2, "rank, 0.5B": papers.TABLE_3}
    for head, cells in places.items():
        memory, seconds = (
            _found(page, f"{what} (÷ MeBP), {head}") for what in ("peak MB", "seconds")
        )
        by_column = dict(zip(memory.columns, cells, strict=True))
        for name in (n for n in memory.rows if not n.startswith("published")):
            for column, mb in memory.numbers(name).items():
                peaks.setdefault(by_column[column], {})[name] = _peak(mb)
            for column, s in seconds.numbers(name).items() if name in seconds.rows else ():
                times.setdefault(by_column[column], {})[name] = Time(s, s, s, 1.0, 1)
    return papers.Results(peaks, times)


def _falls(page: Path) -> tuple[dict[str, tuple[float, float]], dict[str, list[Step]]]:
    """Both peaks in MB, and the bytes of each step down, by setting."""
    table = _found(page, "bytes")
    names = list(table.rows)
    between = names[1 : names.index("MeSP's peak")]
    first, last = table.numbers(names[0]), table.numbers("MeSP's peak")
    steps = {
        c: [Step(n, -round(size)) for n in between if (size := table.numbers(n)[c])]
        for c in table.columns
    }
    return {c: (first[c] / 1e6, last[c] / 1e6) for c in table.columns}, steps


def _curves(page: Path, head: str, variants: Iterable[str]) -> list[list[Curve]]:
    """Panel by panel: a line through a row of a table, and dots where it was measured."""
    panels = []
    for sweep in scaling.SWEEPS:
        table = _found(page, f"{head}, {sweep.unit}")
        at = {column: int(column.replace(",", "")) for column in table.columns}
        measured = {f"{sweep.at(cell):,}" for cell in sweep.cells}
        panel = []
        for variant in (v for v in variants if v in table.rows):
            row = table.numbers(variant)
            dots = [c for c in row if c in measured]
            panel.append(
                Curve(
                    variant, [at[c] for c in row], list(row.values()),
                    [at[c] for c in dots], [row[c] for c in dots],
                )
            )  # fmt: skip
        panels.append(panel)
    return panels


def draw(folder: Path) -> None:
    """All five pictures."""
    page, results = folder / "papers.md", _results(folder / "papers.md")
    published: Mapping[Cell, Mapping[str, float]] = {
        cell: {name: figure.mb for name, figure in figures.items()}
        for cell, figures in papers.PUBLISHED.items()
    }
    shown = (papers.TABLE_1, papers.TABLE_2, papers.TABLE_3)
    draw_memory(folder / "papers-memory.png", results.peaks, published, shown)
    draw_ratios(folder / "papers-ratios.png", papers.ratios(results))
    draw_waterfall(folder / "papers-waterfall.png", *_falls(page))
    page, units = folder / "scaling.md", [sweep.unit for sweep in scaling.SWEEPS]
    memory = _curves(page, "peak MB", scaling.VARIANTS)
    draw_curves(folder / "scaling-memory.png", memory, units, "peak memory of a step, MB")
    time = _curves(page, "seconds (÷ MeBP)", scaling.METHODS)
    draw_curves(folder / "scaling-time.png", time, units, "seconds per step")


if __name__ == "__main__":
    draw(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/benchmarks"))

"""Gemma 3 beside Qwen2.5 in the setting of the papers' tables, with this engine.

    python benchmarks/families.py      some minutes of one core; needs no quiet machine

Writes the last section of docs/benchmarks/papers.md anew: peaks predicted of whole models, on float32
and on 4 bits, and measured on two blocks of each Gemma, one with a window and one without.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cells import DISK, Bench, Cell, Peak, open_cache
from common import machine, markdown_table, write_report
from prose import tidy

from mesp_ref.engine.config import Qwen2Config
from mesp_ref.files.affine import Affine
from mesp_ref.lean.allocator import keep_freed_memory
from mesp_ref.memory import Base, Shapes, peak
from mesp_ref.train.ranks import ALONE

HEADING = "## Gemma 3 beside Qwen2.5"
QWEN, GEMMA = ("0.5B", "1.5B", "3B"), ("gemma-3-270m", "gemma-3-1b", "gemma-3-4b")
VARIANTS = ("store_all", "mebp", "mesp", "mesp_tiled", DISK, "mesp_streamed", "mezo")
ON_DISK = ("mebp", "mesp", "mesp_tiled", "mesp_streamed", "mezo")
DEPTH = 2


def _mb(config: Qwen2Config, variant: str, base: Base | None = None, disk: bool = False) -> str:
    """The closed form's peak in MB."""
    disk = disk or variant in (DISK, "mesp_streamed")
    shapes = Shapes(config, 1, Cell().tokens, Cell().rank, disk=disk, base=base or Base())
    return f"{peak('mesp_tiled' if variant == DISK else variant, shapes).total / 1e6:.2f}"


def predicted_table(names: Sequence[str]) -> str:
    """All blocks, float32, block inputs in RAM."""
    configs = [Cell(name).config for name in names]
    rows = [[f"`{variant}`", *(_mb(c, variant) for c in configs)] for variant in VARIANTS]
    return markdown_table(["predicted peak MB, float32", *names], rows)


def packed_table(names: Sequence[str]) -> str:
    """All blocks, 4 bits in groups of 64, block inputs in a file."""
    configs = [Cell(name).config for name in names]
    bases = [Base.uniform(c, "bfloat16", Affine()) for c in configs]
    rows = [
        [f"`{variant}`", *(_mb(c, variant, b, True) for c, b in zip(configs, bases, strict=True))]
        for variant in ON_DISK
    ]
    return markdown_table(["predicted peak MB, 4 bits, file", *names], rows)


def measured_table(cells: Sequence[Cell], peaks: dict[Cell, dict[str, Peak]]) -> str:
    """Two blocks: measured, and in brackets predicted."""
    rows = []
    for variant in VARIANTS:
        found = [peaks[cell][variant] for cell in cells]
        values = [f"{p.total / 1e6:.2f} ({(p.predicted or 0) / 1e6:.2f})" for p in found]
        rows.append([f"`{variant}`", *values])
    return markdown_table(
        [f"measured (predicted) peak MB, {DEPTH} blocks", *(cell.shape for cell in cells)], rows
    )


def section(cells: Sequence[Cell], peaks: dict[Cell, dict[str, Peak]]) -> str:
    """The section of the page."""
    names = [*QWEN, *(cell.shape for cell in cells)]
    most = max(
        abs(p.total - (p.predicted or 0)) for found in peaks.values() for p in found.values()
    )
    return f"""\
{HEADING}

Regenerate with `python benchmarks/families.py`. MeBP's paper fine-tunes models of 0.5B to 4B parameters,
Qwen2.5 and Gemma 3; only its figures for Qwen2.5 are known to us, and stand above. Batch 1,
{Cell().tokens} tokens, rank {Cell().rank}, the text part of Gemma 3 alone, everything as above.

{predicted_table(names)}

{packed_table(names)}

Gemma's vocabulary of 262,144 costs little here, because logits never exist whole; its heads of 256 and
its wide MLP are what counts. Two blocks of each, one with a window and one without, measured on weights
of zeros with the vocabulary whole; ledger and closed form differ by at most {most / 1e3:.0f} kB:

{measured_table(cells, peaks)}

{"; ".join(machine())}.
"""


def without_section(page: str) -> tuple[str, str]:
    """The page, and the section where it has one."""
    start = page.find(f"\n{HEADING}\n")
    return (page, "") if start < 0 else (page[: start + 1], page[start + 1 :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), metavar="DIR")
    args = parser.parse_args()
    keep_freed_memory()
    cells = [Cell(name, layers=DEPTH) for name in GEMMA]
    wanted = [(cell, variant) for cell in cells for variant in VARIANTS]
    peaks = Bench(1, open_cache(0)).peaks(wanted, ALONE)
    page = args.out / "papers.md"
    rest, _ = without_section(page.read_text(encoding="utf-8"))
    write_report(page, f"{rest.rstrip()}\n\n{tidy(section(cells, peaks))}")
    print(page)


if __name__ == "__main__":
    main()

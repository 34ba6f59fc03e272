"""All benchmark pages in one table: docs/benchmarks/README.md from the figures that the others keep.

    python benchmarks/index.py        after frameworks.py, job.py, where.py and length.py

A figure that was not measured is a dash. Memory against length is the closed form's.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import SHAPES, markdown_table, write_report
from frameworks_report import NONE, PEERS, PLAIN, is_ours, name

from mesp_ref.memory import Shapes, at, peak, torch_peak

KERNELS = "AVX2", "AVX-512"  # of OpenBLAS; figures of the second lie in a folder of their own
WAYS = {"store_all": "", "mesp": "", "mesp_tiled": "disk", "mesp_streamed": "disk"}  # in where.py
OUT = Path(__file__).resolve().parent.parent / "docs/benchmarks"
SHAPE, RANK, LONG = "qwen2.5-0.5b", 8, 8192
PAGES = (
    (
        "frameworks.md",
        "one step beside torch, torch.compile and JAX; generation; the whole process",
    ),
    ("avx512/frameworks.md", "the same with the AVX-512 kernels of OpenBLAS"),
    ("job.md", "`mesp-ref finetune` beside peft and transformers' Trainer on SmolLM2-135M"),
    ("where.md", "where the time of a step goes beside its products"),
    ("avx512/where.md", "the same with the AVX-512 kernels of OpenBLAS"),
    ("length.md", "memory and time against length"),
    ("papers.md", "the tables of the MeSP and MeBP papers with this engine"),
    ("scaling.md", "cost against length, rank, depth and vocabulary"),
    ("zeroth_order.md", "what MeZO's estimate is worth"),
)
Facts = dict[str, Any]


def read(path: Path) -> Facts:
    """What a benchmark kept, or nothing."""
    found: Facts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def cell(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def steps(kernels: Sequence[Facts], limits: Sequence[Facts]) -> str:
    """One line a system: time with either kernel, beside the fastest peer, and memory."""
    held = [kernel.get("256", {}) for kernel in kernels]
    systems = dict.fromkeys(system for facts in held for system in facts.get("systems", {}))
    rows = []
    for system in systems:
        cells: list[str] = [name(system)]
        for facts in held:
            mine = facts.get("systems", {}).get(system, {})
            peer = facts.get("systems", {}).get(facts.get("fastest peer"), {}).get("seconds")
            seconds = mine.get("seconds")
            ratio = seconds / peer if seconds and peer else None
            cells += [cell(seconds, ".2f"), cell(ratio, ".2f")]
        first = next(
            facts["systems"][system] for facts in held if system in facts.get("systems", {})
        )
        over = [facts.get("over", {}).get(_way(system)) for facts in limits]
        cells.append(" / ".join(cell(found, ".2f") for found in over) if any(over) else NONE)
        cells += [cell(first["above"], ",.0f"), cell(_long(system), ",.0f")]
        rows.append(cells)
    head = ["one step, 256 tokens"]
    for kernel in KERNELS:
        head += [f"{kernel}, s", "÷ fastest peer"]
    return markdown_table(
        [*head, "÷ its products", "MiB above the model", f"MB at {LONG:,} tokens"], rows
    )


def _way(system: str) -> str:
    """A system of frameworks.py as where.py calls it; in RAM only the plain methods are there."""
    method, _, base = system.partition(", ")
    method, _, place = method.partition(" ")
    return (f"{method}, {base}" if base else method) if WAYS.get(method, "") == place else system


def _long(system: str) -> float | None:
    """MB at LONG tokens: the closed form, torch by the line through what was measured."""
    if not is_ours(system):
        lines = list(torch_peak(np.array(LONG)).values())
        return float(lines[PEERS.index(system)]) if system in PEERS[:2] else None
    if "4-bit" in system or system == "mezo":
        return None
    method, _, place = system.partition(" ")
    return peak(method, at(Shapes(SHAPES[SHAPE], 1, LONG, RANK), place or "ram")).total / 1e6


def others(kernels: Sequence[Facts], limits: Sequence[Facts], job: Facts) -> str:
    """The job, generation, and 4 bits: ours, the peer, their ratio and the goal."""
    rows: list[Sequence[str]] = []
    jobs = job.get("jobs", {})
    if jobs:
        rates = {name: found["tokens a second"] for name, found in jobs.items()}
        ours = max((n for n in rates if n.startswith("mesp")), key=lambda n: rates[n])
        peer = max((n for n in rates if not n.startswith("mesp")), key=lambda n: rates[n])
        rows.append(
            _line(f"whole job, tokens a second (`{ours}`; {peer})", rates[ours], rates[peer], 1.3)
        )
    for kernel, facts in zip(KERNELS, kernels, strict=True):
        said = facts.get("256", {}).get("generation", {})
        for batch in (1, 8):
            ours_, peer_ = (said.get(f"{s}, batch {batch}") for s in ("store_all", PLAIN))
            if ours_ and peer_:
                what = f"generated tokens a second, batch {batch}, {kernel} (transformers)"
                rows.append(_line(what, ours_, peer_, None))
    for kernel, facts in zip(KERNELS, limits, strict=True):
        if "packed" in facts:
            rows.append((f"4-bit base ÷ dense base, time of `mesp_tiled`, {kernel}", NONE, NONE,
                         f"{facts['packed']:.2f}", "≤ 1.15"))  # fmt: skip
    return markdown_table(("more", "mesp_ref", "peer", "ratio", "goal"), rows)


def _line(what: str, ours: float, peer: float, goal: float | None) -> tuple[str, ...]:
    return (
        what,
        f"{ours:.1f}",
        f"{peer:.1f}",
        f"{ours / peer:.2f}",
        NONE if goal is None else f"≥ {goal}",
    )


def _measured(facts: Facts) -> str:
    """The machine of some figures, on one line."""
    clock = {True: "CPU seconds", False: "seconds of the clock"}.get(facts.get("cpu", NONE), "")
    return "; ".join([*facts.get("machine", ["not measured"]), *([clock] if clock else [])])


def report(out: Path) -> str:
    """The page."""
    kernels = [read(out / "frameworks.json"), read(out / "avx512/frameworks.json")]
    limits = [read(out / "where.json"), read(out / "avx512/where.json")]
    job = read(out / "job.json")
    pages = "\n".join(
        f"- [{path}]({path}): {what}" for path, what in PAGES if (out / path).exists()
    )
    return "\n\n".join((
        "# Benchmarks in one table",
        f"One LoRA step of {SHAPE}, rank {RANK} on seven projections, batch 1, float32. Every system is "
        "a process of its own on the same mapped weights; losses and gradients were compared, then they "
        "took turns. In the columns AVX2 all of them are held to it, as on a processor without more; "
        "what compiles has compiled before. JAX is faster alone than in turns "
        "([why](frameworks.md#how-it-is-measured)). *÷ its products* is a step over what its matrix "
        "products alone take at the rate of this BLAS, with AVX2 and with AVX-512. "
        "`make benchmarks` redoes all pages.",
        steps(kernels, limits),
        others(kernels, limits, job),
        "![memory against length](length-memory.png)",
        "![time over the limit of the products](where.png)",
        "## What each page answers",
        pages,
        "## Measured on",
        "\n".join(
            f"- {what}: {_measured(facts)}"
            for what, facts in (
                *((f"steps, {kernel}", kernels[i]) for i, kernel in enumerate(KERNELS)),
                *((f"products, {kernel}", limits[i]) for i, kernel in enumerate(KERNELS)),
                ("job", job),
            )
        ),
    ))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=OUT, help="directory (default: docs/benchmarks)"
    )
    args = parser.parse_args()
    write_report(args.out / "README.md", report(args.out))


if __name__ == "__main__":
    main()

"""Memory and time against length: every method predicted, mesp_streamed measured, torch by its line.

    python benchmarks/length.py peaks          its measured peaks, at depth 2: some minutes
    python benchmarks/length.py time           CPU seconds from 512 to 8,192 tokens, at depth 2
    python benchmarks/length.py attention      what attention alone runs at
    python benchmarks/length.py ratio          beside mesp_tiled at 1,024 tokens, in turns
    python benchmarks/length.py full           one step of all 24 blocks at 8,192 tokens: 15 minutes
    python benchmarks/length.py large          one step of Qwen2.5-7B's shape on 4 bits, 256 tokens, by
                                               two methods: 6 minutes of CPU, 4.3 GB of disk
    python benchmarks/length.py report         writes docs/benchmarks/length.md from what was measured

Each part writes what it found into docs/benchmarks/length.json, where the report finds it. Times are CPU
seconds of one thread, which a busy machine lengthens less than the hours of a clock.
"""

import argparse
import dataclasses
import json
import multiprocessing
import sys
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    COLOURS,
    SHAPES,
    interleaved,
    machine,
    markdown_table,
    median,
    model_and_batch,
    save_figure,
    write_report,
)
from matplotlib.figure import Figure

import mesp_ref as mr
from mesp_ref.files.affine import Affine
from mesp_ref.files.models import random_checkpoint
from mesp_ref.memory import Base, PeakResident, Shapes, cost, measure_speed, peak, torch_peak
from mesp_ref.memory.longest import TORCH

SHAPE, RANK, DEPTH, LR = "qwen2.5-0.5b", 8, 2, 1e-4
LARGE, LARGE_TOKENS, LARGE_METHODS = "qwen2.5-7b", 256, ("mesp_tiled", "mesp_streamed")
VOCABULARY = 16_384  # of the timed steps: the head takes a share of their time as in a deep model
PEAKS_AT, TIMES_AT = (256, 1024, 8192), (512, 1024, 2048, 4096, 8192)
LINE = [2**i for i in range(8, 18)]
OUT = Path(__file__).resolve().parent.parent / "docs/benchmarks"
FACTS = OUT / "length.json"
WAYS = (
    ("store_all", False), ("mebp", False), ("mesp", False), ("mesp_tiled", False), ("mesp_tiled", True),
    ("mesp_streamed", True),
)  # fmt: skip


def _config(**changed: Any) -> mr.Qwen2Config:
    return dataclasses.replace(SHAPES[SHAPE], **changed)


def _step(config: mr.Qwen2Config, tokens: int) -> Callable[..., None]:
    """A step on random weights, gradients handed over block by block."""
    model, adapter, ids, _ = model_and_batch(config, tokens, RANK)

    def run(method: str, tokens: int = tokens) -> None:
        checkpoints = None if method == "mesp_streamed" else "disk"
        mr.loss_and_grads(
            model, adapter, ids[:, :tokens], ids[:, :tokens], method=method, checkpoints=checkpoints,
            on_gradients=lambda number, grads: None,
        )  # fmt: skip

    return run


def _traced(run: Callable[[], object]) -> int:
    """tracemalloc's peak of a call."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    run()
    most = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    return most


def peaks(tokens: tuple[int, ...]) -> dict[str, Any]:
    """Measured beside predicted, at depth 2 and with the small vocabulary."""
    config = _config(num_hidden_layers=DEPTH, vocab_size=VOCABULARY)
    run, found = _step(config, max(tokens)), {}
    run("mesp_streamed", 256)  # caches of Python and NumPy fill once
    for t in tokens:
        predicted = peak("mesp_streamed", Shapes(config, 1, t, RANK, disk=True)).total
        found[str(t)] = {
            "measured": _traced(lambda t=t: run("mesp_streamed", t)),  # type: ignore[misc]
            "predicted": predicted,
        }
        print(t, found[str(t)], file=sys.stderr, flush=True)
    return found


def times(rounds: int) -> dict[str, list[float]]:
    """CPU seconds of mesp_streamed, lengths in turns."""
    run = _step(_config(num_hidden_layers=DEPTH, vocab_size=VOCABULARY), max(TIMES_AT))
    run("mesp_streamed", 256)
    found: dict[str, list[float]] = {str(t): [] for t in TIMES_AT}
    for _ in range(rounds):
        for t in TIMES_AT:
            begin = time.process_time()
            run("mesp_streamed", t)
            found[str(t)].append(time.process_time() - begin)
            print(t, found[str(t)][-1], file=sys.stderr, flush=True)
    return found


def ratio(rounds: int) -> dict[str, list[float]]:
    """CPU seconds at 1,024 tokens of mesp_tiled and mesp_streamed, in turns."""
    run = _step(_config(num_hidden_layers=DEPTH), 1024)
    methods = ("mesp_tiled", "mesp_streamed")
    timed = interleaved(
        {m: lambda m=m: run(m) for m in methods}, rounds, clock=time.process_time  # type: ignore[misc]
    )  # fmt: skip
    return timed.seconds


def attention() -> float:
    """FLOP/s of attention, forward and backward, its exponentials included."""
    return measure_speed(SHAPES[SHAPE], time.process_time).attention


def full(tokens: int) -> dict[str, Any]:
    """One step of all blocks, on a checkpoint that is mapped."""
    return _whole(random_checkpoint(SHAPE, "float32", None), tokens, "mesp_streamed")


def large() -> dict[str, Any]:
    """The same of a shape whose weights are 4.3 GB in 4 bits, each method in a process of its own."""
    random_checkpoint(LARGE, "bfloat16", Affine())
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:
        return {method: pool.submit(_large, method).result() for method in LARGE_METHODS}


def _large(method: str) -> dict[str, Any]:
    return _whole(random_checkpoint(LARGE, "bfloat16", Affine()), LARGE_TOKENS, method)


def _whole(model: mr.Model, tokens: int, method: str) -> dict[str, Any]:
    """One step of all blocks with SGD, which changes a block as soon as its gradients are there."""
    mr.keep_freed_memory()
    adapter = mr.init_lora(model.config, rank=RANK, b_std=0.02)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, tokens))
    begin, clock = time.process_time(), time.perf_counter()

    def update(number: int, grads: dict[str, Any]) -> None:
        for name, grad in grads.items():
            grad *= LR
            adapter.weights[name] -= grad
        seconds = time.process_time() - begin
        print(f"block {number}: {seconds:.0f} s of CPU", file=sys.stderr, flush=True)

    def run() -> None:
        mr.loss_and_grads(
            model, adapter, ids, ids, method=method, checkpoints="disk", on_gradients=update
        )  # fmt: skip

    with PeakResident(0.05) as seen:
        traced = _traced(run)
    return {
        "tokens": tokens, "cpu": time.process_time() - begin, "wall": time.perf_counter() - clock,
        "traced": traced, "own_before": seen.before.anonymous, "own_peak": seen.peak.anonymous,
        "mapped": seen.peak.mapped,
    }  # fmt: skip


def fit(found: dict[str, list[float]]) -> tuple[np.ndarray, dict[int, float]]:
    """a, b, c of a + b·T + c·T², every length counting alike; and (time − a − c·T²)/T of each."""
    t = np.array([int(name) for name in found], float)
    seconds = np.array([min(values) for values in found.values()])
    terms = np.stack([t**0, t, t**2], axis=1)
    a, b, c = np.linalg.lstsq(terms / seconds[:, None], np.ones(len(t)), rcond=None)[0]
    flat = (seconds - a - c * t**2) / t
    return np.array([a, b, c]), dict(zip(map(int, t), flat, strict=True))


def draw(path: Path) -> None:
    """Memory against length, both scales logarithmic."""
    figure = Figure(figsize=(9.5, 5.2), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for method, disk in WAYS:
        at = LINE if method == "mesp_streamed" else LINE[:6]
        mb = [peak(method, Shapes(SHAPES[SHAPE], 1, t, RANK, disk=disk)).total / 1e6 for t in at]
        name = f"{method}, file" if disk else method
        dotted = ":" if method == "mesp_tiled" and not disk else "-"
        axes.plot(at, mb, dotted, color=COLOURS[method], marker="o", ms=3.5, label=name)
    for dash, (name, line) in zip(
        ("--", "-."), torch_peak(np.array(LINE[:6])).items(), strict=True
    ):
        axes.plot(LINE[:6], line, dash, color="#222222", lw=1, label=f"{name}: by its line")
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="MB above the model")
    axes.set_xticks(LINE, [f"{t:,}" for t in LINE], rotation=30)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", frameon=False, fontsize=9)
    axes.set_title(f"A step of {SHAPE}, rank {RANK}, batch 1, float32", fontsize=11)
    save_figure(figure, path)


def _memory_table() -> str:
    lengths = (256, 1024, 8192, 32_768, 131_072)
    rows = []
    for method, disk in WAYS:
        shown = lengths if method == "mesp_streamed" else lengths[:3]
        shapes = [Shapes(SHAPES[SHAPE], 1, t, RANK, disk=disk) for t in shown]
        cells = [f"{peak(method, s).total / 1e6:,.1f}" for s in shapes]
        rows.append([f"`{method}`" + ", file" * disk, *cells, *["–"] * (5 - len(cells))])
    for name, mb in torch_peak(np.array(lengths)).items():
        rows.append([f"{name}, by its line", *(f"{x:,.0f}" for x in mb)])
    return markdown_table(["MB above the model", *(f"{t:,} tokens" for t in lengths)], rows)


def _peaks_section(found: dict[str, Any]) -> str:
    rows = [
        [f"{int(t):,}", f"{x['measured'] / 1e6:.2f}", f"{x['predicted'] / 1e6:.2f}"]
        for t, x in found.items()
    ]
    table = markdown_table(["tokens", "measured, MB", "predicted, MB"], rows)
    words = f"tracemalloc's peak of a step of {DEPTH} blocks and a vocabulary of {VOCABULARY:,}."
    return f"## Measured\n\n{words}\n\n{table}"


def _time_section(found: dict[str, list[float]]) -> str:
    (a, b, c), flat = fit(found)
    rows = [
        [
            f"{int(t):,}",
            f"{min(s):.2f}",
            f"{1e3 * flat[int(t)]:.3f}",
            f"{flat[int(t)] / b - 1:+.1%}",
        ]
        for t, s in found.items()
    ]
    head = ["tokens", "CPU seconds", "linear part, ms a token", "off b"]
    return (
        f"## Time against length\n\n{DEPTH} blocks, a vocabulary of {VOCABULARY:,}, the fastest of "
        f"{len(next(iter(found.values())))}; one thread. Fit {a:.2f} s + {1e3 * b:.3f} ms·T + "
        f"{1e9 * c:.1f} ns·T².\n\n{markdown_table(head, rows)}"
    )


def _attention_section(facts: dict[str, Any]) -> str:
    """The quadratic part beside what attention alone would take."""
    config = _config(num_hidden_layers=DEPTH, vocab_size=VOCABULARY)
    half, whole = (
        cost("mesp_streamed", Shapes(config, 1, t, RANK, disk=True)).flops for t in (4096, 8192)
    )
    work = 2 * (whole - 2 * half) / 8192**2  # of a·T + c·T²
    own, (_, _, c) = work / facts["attention"], fit(facts["time"])[0]
    return (
        f"Attention alone, whose products grow by {work:,.0f}·T² and run at "
        f"{facts['attention'] / 1e9:.0f} GFLOP/s with their exponentials, "
        f"would take {1e9 * own:.1f} ns·T²: c is off by {c / own - 1:+.0%}."
    )


def _ratio_section(found: dict[str, list[float]]) -> str:
    tiled, streamed = (median(found[m]) for m in ("mesp_tiled", "mesp_streamed"))
    return (
        f"At 1,024 tokens and {DEPTH} blocks, in turns: `mesp_streamed` {streamed:.2f} s, `mesp_tiled` "
        f"on disk {tiled:.2f} s of CPU, medians of {len(found['mesp_tiled'])}: "
        f"**{streamed / tiled:.2f}**."
    )


def _full_section(found: dict[str, Any]) -> str:
    own = (found["own_peak"] - found["own_before"]) / 2**20
    return (
        f"## A whole step of {found['tokens']:,} tokens\n\nAll 24 blocks, weights mapped, one thread: "
        f"{found['cpu'] / 60:.1f} minutes of CPU; NumPy's peak {found['traced'] / 1e6:.2f} MB; the "
        f"process took {own:.0f} MiB of its own above the model."
    )


def _mapped(found: dict[str, Any]) -> float:
    """The most GB of mapped files that were resident."""
    return max(x["mapped"] for x in found.values()) / 1e9


def _large_section(found: dict[str, Any]) -> str:
    config, rows = SHAPES[LARGE], []
    base = Base.uniform(config, "bfloat16", Affine())
    for method, x in found.items():
        shapes = Shapes(config, 1, x["tokens"], RANK, disk=True, base=base)
        own, known = (x["own_peak"] - x["own_before"]) / 1e6, cost(method, shapes)
        rows.append(
            [
                f"`{method}`", f"{peak(method, shapes).total / 1e6:.2f}", f"{x['traced'] / 1e6:.2f}",
                f"{own:.1f}", f"{known.file / 1e6:,.0f}", f"{x['cpu']:,.0f}",
                f"{known.flops / 1e9:,.0f}",
            ]
        )  # fmt: skip
    head = [
        "method", "predicted, MB", "NumPy's peak, MB", "process, MB", "its file, MB", "CPU seconds",
        "GFLOP",
    ]  # fmt: skip
    return (
        f"## A 7B shape on 4 bits\n\nOne exact LoRA step with SGD of {LARGE}, {LARGE_TOKENS} tokens, "
        f"rank {RANK}, all {config.num_hidden_layers} blocks: weights random and mapped, 4 bits in "
        "groups of 64, checkpoints in a file, one thread; the first step of a process, whose caches "
        "count. MB are above weights, LoRA parameters and optimiser state; those of the process are its "
        f"own memory, buffers of BLAS included. The {_mapped(found):.1f} GB of mapped files that it has "
        f"read come on top: pages that the system may drop.\n\n{markdown_table(head, rows)}"
    )


def report(facts: dict[str, Any]) -> str:
    """The page."""
    file = cost("mesp_streamed", Shapes(SHAPES[SHAPE], 1, 32_768, RANK, disk=True)).file
    torch = "; ".join(f"{n} {a:,.0f} and {b:,.0f} MiB" for n, (a, b) in TORCH.items())
    parts = [
        "# Memory and time against length",
        "Written by `benchmarks/length.py`. " + "; ".join(machine()) + ".",
        f"One LoRA step of {SHAPE}, rank {RANK}, batch 1, float32. MB are 10⁶ bytes that NumPy holds "
        "above weights, LoRA parameters and optimiser state, predicted to the byte; torch is the line "
        f"through what `frameworks.py` measured on 25 November 2026 at 256 and 1,024 tokens: {torch}.",
        "![memory against length](length-memory.png)",
        _memory_table(),
        f"The file of `mesp_streamed` takes {file / 32_768 / 1e3:.0f} kB a token: {file / 1e9:.1f} GB "
        "at 32,768.",
    ]
    for name, section in SECTIONS.items():
        if name in facts:
            parts.append(section(facts[name]))
        if name == "time" and {"time", "attention"} <= facts.keys():
            parts.append(_attention_section(facts))
    return "\n\n".join(parts)


SECTIONS: dict[str, Callable[[Any], str]] = {
    "peaks": _peaks_section, "time": _time_section, "ratio": _ratio_section, "full": _full_section,
    "large": _large_section,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=(*SECTIONS, "attention", "report"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs="+", default=PEAKS_AT)
    args = parser.parse_args()
    facts = json.loads(FACTS.read_text()) if FACTS.exists() else {}
    if args.part == "report":
        draw(OUT / "length-memory.png")
        write_report(OUT / "length.md", report(facts))
        return
    parts: dict[str, Callable[[], Any]] = {
        "peaks": lambda: peaks(tuple(args.tokens)), "time": lambda: times(args.rounds),
        "ratio": lambda: ratio(args.rounds), "full": lambda: full(args.tokens[-1]),
        "attention": attention, "large": large,
    }  # fmt: skip
    found = parts[args.part]()
    facts = json.loads(FACTS.read_text()) if FACTS.exists() else {}
    write_report(FACTS, json.dumps(facts | {args.part: found}, indent=1))


if __name__ == "__main__":
    main()

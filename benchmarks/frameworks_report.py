"""The report of frameworks.py: goals beside what was measured, tables, pictures, machine.

Everything here is computed from `Measured`; no figure is typed.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import common
from common import COLOURS, Gemms, Timed, markdown_table, median
from contender import NEW, PROMPT

PLAIN, CHECKPOINTED, JAX = "torch", "torch checkpointed", "jax"
PEERS = (PLAIN, CHECKPOINTED, "torch compiled", JAX)
DISK, OFFLOAD, STREAMED = "mesp_tiled disk", "mesp_tiled offload", "mesp_streamed disk"
FOUR_BIT = f"{DISK}, 4-bit"
NAMES = {
    PLAIN: "torch + peft",
    CHECKPOINTED: "torch + peft, gradient checkpointing",
    "mesp_tiled ram": "`mesp_tiled`, checkpoints in RAM",
    DISK: "`mesp_tiled`, checkpoints on disk",
    OFFLOAD: "`mesp_tiled`, activations on disk",
    FOUR_BIT: "`mesp_tiled`, on disk, 4-bit base",
    STREAMED: "`mesp_streamed`",
    PEERS[2]: "torch + peft, torch.compile",
    JAX: "JAX, jit",
    "mlx": "mlx-lm",
}


@dataclass
class Facts:
    """What is known of one system at one sequence length."""

    system: str
    stages: dict[str, float]  # MiB of anonymous memory after each stage of loading
    versions: list[str]
    compiling: float = 0.0  # seconds, before the first step
    peak: float = 0.0  # MiB, highest anonymous memory in any step
    loss: float = 0.0  # of the first step
    difference: float | None = None  # of its gradients from torch's
    traced: int | None = None  # NumPy's bytes above the model
    file: int = 0  # bytes of the temporary file that a step writes and reads
    rate: float = 0.0  # FLOP/s of its own GEMM
    reads: list[int] = field(default_factory=list)  # waits for the disk in each timed step

    @property
    def loaded(self) -> float:
        """MiB of anonymous memory once the model is there, before anything is compiled."""
        return [mib for stage, mib in self.stages.items() if stage != "compiled"][-1]

    @property
    def above(self) -> float:
        """Peak of the process above the loaded model, MiB."""
        return self.peak - self.loaded


class Talk(NamedTuple):
    """One generation."""

    system: str
    batch: int
    rate: float  # tokens a second


@dataclass
class Measured:
    """One sequence length; `products` are the matrix products of a step of each of our systems."""

    seq: int
    facts: dict[str, Facts]
    timed: Timed
    products: Mapping[str, Gemms] = field(default_factory=dict)
    talks: Sequence[Talk] = ()

    def fastest_peer(self) -> str:
        """The peer with the least median time."""
        return min((s for s in self.facts if s in PEERS), key=self.timed.median)

    def of_gemm(self, system: str) -> float:
        """Median time by that of its products, at the median of all probes beside our systems: what
        disturbs the steps of one run disturbs the probes of the whole run as much."""
        rate = median(rate for name in self.products for rate in self.timed.rates[name])
        return self.timed.median(system) * rate / common.total_flops(self.products[system])


class Goal(NamedTuple):
    """A figure to stay within."""

    what: str
    limit: float
    found: float
    least: bool = False  # a limit from below

    def row(self) -> tuple[str, str, str, str]:
        off = self.limit / self.found if self.least else self.found / self.limit
        missed = f"{off - 1:.0%} {'below' if self.least else 'above'}"
        sign = "≥" if self.least else "≤"
        return (
            self.what,
            f"{sign} {self.limit:g}",
            f"{self.found:.3g}",
            missed if off > 1 else "met",
        )


class Ratio(NamedTuple):
    """A goal on one time by another; to None is the fastest peer of the run."""

    limit: float
    seq: int
    system: str
    to: str | None


RATIOS = (
    *(Ratio(0.85, 256, system, None) for system in (DISK, OFFLOAD, STREAMED)),
    Ratio(0.85, 256, "store_all", PLAIN),
    *(Ratio(0.7, seq, system, CHECKPOINTED) for seq in (256, 1024) for system in (DISK, STREAMED)),
    Ratio(1.15, 256, FOUR_BIT, DISK),
)
OF_GEMM, PROCESS, FASTER = 1.15, 60.0, 1.3
NONE = "–"


def name(system: str) -> str:
    return NAMES.get(system, f"`{system}`")


def goals(measured: Sequence[Measured]) -> list[Goal]:
    """Every goal whose systems were measured."""
    found = []
    for ratio in RATIOS:
        for m in (m for m in measured if m.seq == ratio.seq):
            to = ratio.to or m.fastest_peer()
            if {ratio.system, to} <= m.timed.seconds.keys():
                share = m.timed.ratio(ratio.system, to)
                fastest = " (the fastest peer)" if ratio.to is None else ""
                what = f"time of {name(ratio.system)} / {name(to)}{fastest}, {m.seq} tokens"
                if fastest:
                    what += f"; its products alone: {share / m.of_gemm(ratio.system):.2f}"
                found.append(Goal(what, ratio.limit, share))
    for m in measured:
        for system in m.products:
            if "4-bit" not in system:
                what = f"time of {name(system)} / its FLOPs ÷ GEMM rate, {m.seq} tokens"
                found.append(Goal(what, OF_GEMM, m.of_gemm(system)))
        if FOUR_BIT in m.facts:
            what = f"whole process, {name(FOUR_BIT)}, {m.seq} tokens: MiB"
            found.append(Goal(what, PROCESS, m.facts[FOUR_BIT].peak))
        for (system, batch), rate in talk_rates(m).items():
            if is_ours(system) and (PLAIN, batch) in talk_rates(m):
                what = f"tokens a second, generated, batch {batch}: ours / transformers"
                found.append(Goal(what, FASTER, rate / talk_rates(m)[PLAIN, batch], least=True))
    return found


def talk_rates(m: Measured) -> dict[tuple[str, int], float]:
    """Median tokens a second of each system and batch."""
    rates: dict[tuple[str, int], list[float]] = {}
    for system, batch, rate in m.talks:
        rates.setdefault((system, batch), []).append(rate)
    return {key: median(found) for key, found in rates.items()}


def talk_table(m: Measured) -> str:
    """Generation: tokens a second."""
    rates = talk_rates(m)
    batches = sorted({batch for _, batch in rates})
    rows = [
        ("mesp_ref" if is_ours(system) else "transformers + peft",
         *(f"{rates[system, batch]:.1f}" for batch in batches))
        for system in dict.fromkeys(system for system, _ in rates)
    ]  # fmt: skip
    return markdown_table(("tokens a second", *(f"batch {batch}" for batch in batches)), rows)


def is_ours(system: str) -> bool:
    return system not in PEERS and system != "mlx"


def time_table(m: Measured) -> str:
    """Medians, ratios, and the probe beside each."""
    rows = []
    for system, seconds in m.timed.seconds.items():
        ratios = [
            f"{m.timed.ratio(system, to):.2f}" if to in m.timed.seconds else NONE
            for to in (PLAIN, CHECKPOINTED)
        ]
        work, of_gemm = NONE, NONE
        if system in m.products:
            work = f"{common.total_flops(m.products[system]) / 1e9:.0f}"
            of_gemm = f"{m.of_gemm(system):.2f}"
        rates = [rate / 1e9 for rate in m.timed.rates[system]]
        rows.append(
            (
                name(system), f"{median(seconds):.2f}", f"{min(seconds):.2f} – {max(seconds):.2f}",
                *ratios, f"{median(rates):.0f}", f"{min(rates):.0f} – {max(rates):.0f}",
                work, of_gemm,
            )
        )  # fmt: skip
    header = ("system", "median, s", "range, s", "/ torch", "/ checkpointed")
    more = ("GEMM probe, GFLOP/s", "range", "GFLOP of the step", "time / GEMM time")
    return markdown_table((*header, *more), rows)


def memory_table(m: Measured) -> str:
    rows = []
    for system, facts in m.facts.items():
        compiling = f"{facts.compiling:.0f}" if facts.compiling else NONE
        traced = NONE if facts.traced is None else f"{facts.traced / 1e6:.2f}"
        file = f"{facts.file / 1e6:.0f}" if facts.file else NONE
        rows.append(
            (name(system), traced, f"{facts.above:.1f}", f"{facts.peak:.1f}", file, compiling)
        )
    header = ("system", "NumPy, MB", "process above the model, MiB", "whole process, MiB")
    return markdown_table((*header, "temporary file, MB", "compiling, s"), rows)


def agreement(m: Measured) -> str:
    """Losses and gradients against torch's."""
    want = m.facts[PLAIN].loss
    rows = [
        (
            name(system),
            f"{facts.loss:.7f}",
            f"{abs(facts.loss - want) / want:.1e}",
            NONE if facts.difference is None else f"{facts.difference:.1e}",
        )
        for system, facts in m.facts.items()
    ]
    return markdown_table(("system", "loss", "from torch's", "gradients from torch's"), rows)


def process_table(facts: Facts) -> str:
    """What the anonymous memory of a process consists of, stage by stage, in MiB."""
    return markdown_table(
        ("stage", "MiB", "sum"), [(n, f"{d:.1f}", f"{s:.1f}") for n, d, s in parts(facts)]
    )


def parts(facts: Facts) -> list[tuple[str, float, float]]:
    """Each stage, what it added, and the sum so far; the step comes last."""
    found, before = [], 0.0
    for stage, total in (*facts.stages.items(), ("a training step", facts.peak)):
        found.append((stage, total - before, total))
        before = total
    return found


def _colour(system: str) -> str:
    peers = dict(zip(PEERS, ("#332288", "#aa4499", "#6699cc", "#555555"), strict=True))
    return COLOURS.get(system.split()[0], peers.get(system, "#aa4499"))


def _bars(
    axes: Any, systems: Sequence[str], values: Sequence[float], ends: Sequence[float]
) -> None:
    """Bars with their values written behind `ends`."""
    labels = [name(system).replace("`", "").replace(", ", ",\n", 1) for system in systems]
    axes.barh(labels, values, color=[_colour(system) for system in systems])
    for row, (value, end) in enumerate(zip(values, ends, strict=True)):
        said = f"  {value:,.0f}" if value >= 100 else f"  {value:.3g}"
        axes.text(end, row, said, va="center")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def draw(m: Measured, path: Path) -> None:
    """Time of a step with every round and what GEMMs alone would take; memory above the model."""
    from matplotlib.figure import Figure

    systems = list(m.facts)
    figure = Figure(figsize=(13, 1.5 + 0.5 * len(systems)), layout="constrained")
    figure.suptitle(f"One LoRA step of Qwen2.5-0.5B, {m.seq} tokens, rank 8, float32")
    clock, memory = figure.subplots(1, 2)
    medians = [m.timed.median(system) for system in systems]
    slowest = [max(m.timed.seconds[system]) for system in systems]
    _bars(clock, systems, medians, slowest)
    for row, system in enumerate(systems):
        seconds = m.timed.seconds[system]
        clock.plot(seconds, [row] * len(seconds), "k|", ms=10, alpha=0.5)
        if system in m.products:
            alone = m.timed.median(system) / m.of_gemm(system)
            clock.plot([alone, alone], [row - 0.4, row + 0.4], color="white", lw=2)
    clock.set(xlabel="seconds: median, each round (|), its GEMMs alone (white)")
    clock.set_xlim(0, 1.15 * max(slowest))
    above = [m.facts[system].above for system in systems]
    _bars(memory, systems, above, above)
    memory.set(xlabel="MiB of the process above the loaded model, log scale", xscale="log")
    memory.set_xlim(min(above) / 2, 2 * max(above))
    memory.set_yticklabels([])
    common.save_figure(figure, path)


def draw_process(facts: Facts, path: Path) -> None:
    """The process of the 4-bit training run as one stacked bar."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.8), layout="constrained")
    axes = figure.subplots()
    shades = ("#dddddd", "#bbbbbb", "#88ccee", "#999933", "#117733", "#ddcc77", "#cc3311")
    for (stage, size, total), colour in zip(parts(facts), shades, strict=False):
        label = f"{stage}: {size:.1f}"
        axes.barh([0], [size], left=total - size, color=colour, label=label)
    axes.axvline(PROCESS, color="black", ls="--", lw=1)
    axes.text(PROCESS, 0.45, f" goal: {PROCESS:.0f}", va="top")
    axes.set(xlabel="MiB of anonymous memory", yticks=[], xlim=(0, 1.12 * max(PROCESS, facts.peak)))
    axes.set_title("Training Qwen2.5-0.5B on a 4-bit base: everything the process holds for itself")
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.25), frameon=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    common.save_figure(figure, path)


def _mlx(found: tuple[list[str], float] | None, ours: float) -> str:
    """What a look at MLX on this machine says."""
    if found is None:
        return "MLX is not installed here."
    versions, rate = found
    said = (
        f"{', '.join(versions)}: its own product [256, 896]·[896, 4864] runs at {rate / 1e9:.2f}\n"
    )
    said += f"GFLOP/s, NumPy's at {ours / 1e9:.0f}, {ours / rate:.1f} times as fast. "
    if crippled(rate, ours):
        return said + "So it is left out: its step\nwould measure that product and nothing else."
    return said + "It is in the tables above."


def crippled(rate: float, ours: float) -> bool:
    """Whether a framework's product is so slow here that its step would measure nothing else."""
    return rate < ours / 4


TEXT = """\
# One LoRA step beside torch + transformers + peft, torch.compile and JAX

Qwen2.5-0.5B with random float32 weights, LoRA of rank 8 on the seven projections, batch 1, one SGD
step. Every system runs in a process of its own with {threads} threads and maps the same file of
weights, torch by `torch.from_numpy`; attention there is `sdpa`. In each of them glibc keeps freed
memory (`mesp_ref.keep_freed_memory`), as our command line sets it. Ours have {threads} workers with
one BLAS thread each, as with `--workers {threads}`. `torch.compile` and `jax.jit` compile before
the first step; what that took stands apart. JAX runs `benchmarks/jax_step.py`, the whole step as one
function, on the same weights. The systems take turns, round after round. `make benchmarks`
regenerates this page and its pictures; [all pages in one table]({index}).

## Goals

{goals}

{sections}
## Do they compute the same?

The first step from the same adapter (B ≠ 0). Losses as relative differences, gradients as the
largest difference in any tensor by that tensor's largest entry. A 4-bit base is another model, and
`mezo` estimates, from two losses beside the point; neither has gradients to compare.

{agreement}

{process}
{talks}## How it is measured

- **Time** is {clock} of one step: forward, backward, update. Ratios are ratios of medians
  over {rounds}.
- Mapped weights lay in memory: in {waits} of the {steps} timed steps a system waited for the disk
  more than 100 times.
- **GEMM probe**: right after each step NumPy multiplies matrices of the shapes of that step (for
  torch those of an MLP layer), each shape that has 1% of the FLOPs. It shows how much of the machine
  was to be had at that moment. *time / GEMM time* is the median time by that of the step's products
  at the median rate of all probes beside our systems, whose rounds they share; the FLOPs are those
  of every product that the method really performs, rebuilds included.
- The product [256, 896]·[896, 4864], best of half a second: {torch_rate:.0f} GFLOP/s by torch's own
  library, {numpy_rate:.0f} by NumPy's.
- **NumPy, MB** (10⁶ bytes) is the peak above weights, LoRA parameters and optimiser state, by
  tracemalloc.
- **Process, MiB** (2²⁰ bytes) is resident anonymous memory (RssAnon): what belongs to the process and
  to no file. It is looked at every 2 ms in the first step and every 20 ms later; *above the model* is
  the peak less what stood when the model, the adapter and the libraries were loaded; what a compiler
  keeps is above it. What lies on
  disk is in neither: pages of a **temporary file**, which the system keeps while it has room and
  writes out and drops as it likes. Its size is given beside; it vanishes with the step.
- Where `OPENBLAS_CORETYPE` holds NumPy's products to AVX2 (*Machine*), the environment holds the peers
  to it, too, as on a processor that has no more (`AVX2` in frameworks.py); of `torch.compile` only the
  products, since what torch 2.13 compiles for AVX2 stops with an index out of bounds.
- JAX gives the memory of a step back and pays for it in the next one, more so after others had their
  turn: each of its timed steps follows one that does not count. Alone, step after step, it is faster
  still.
- torch: plain, and `gradient_checkpointing_enable(use_reentrant=False)`; `use_cache=False`; nothing
  else is set. The 4-bit base has groups of 64 with float16 scales.

## MLX

{mlx}

## Machine

{machine}
"""
SECTION = """\
## {seq} tokens

![time and memory](frameworks-{seq}.png)

{time}

{memory}

"""
TALKS = """\
## Generation

Greedy from prompts of {prompt} tokens, {new} tokens each, a cache of keys and values, the adapter beside
the weights. Both say the same tokens.

{table}

"""
WHOLE = """\
## The whole process

![anonymous memory of a process](frameworks-process.png)

Training on the 4-bit base, checkpoints on disk, SGD block by block: anonymous memory of the whole
Python process, imports included, at its highest in {steps} steps. Of the step's {step:.1f} MiB, NumPy's
arrays are {traced:.1f} MiB (tracemalloc); the rest are the threads' buffers of BLAS, Python objects and
what the C library keeps of freed memory. The process of torch + peft holds {torch:,.0f} MiB plain and
{checkpointed:,.0f} checkpointed.

{table}

"""


def write(
    out: Path,
    measured: Sequence[Measured],
    threads: int,
    mlx: tuple[list[str], float] | None,
    cpu: bool = False,
) -> str:
    """Write frameworks.md, its pictures and its figures into `out`; returns the table of goals."""
    out.mkdir(parents=True, exist_ok=True)
    for m in measured:
        draw(m, out / f"frameworks-{m.seq}.png")
    table = markdown_table(
        ("what", "goal", "measured", "verdict"), (goal.row() for goal in goals(measured))
    )
    first = measured[0]
    reads_of_all = [reads for m in measured for facts in m.facts.values() for reads in facts.reads]
    text = TEXT.format(
        threads=threads,
        index="../README.md" if out.name == "avx512" else "README.md",
        goals=table,
        sections="".join(_section(m) for m in measured),
        agreement="\n\n".join(f"{m.seq} tokens:\n\n{agreement(m)}" for m in measured),
        process=_process(first, out / "frameworks-process.png"),
        rounds=_rounds(measured),
        talks=_talks(first),
        clock="the CPU seconds" if cpu else "the wall clock",
        waits=sum(reads > 100 for reads in reads_of_all),
        steps=len(reads_of_all),
        torch_rate=first.facts[PLAIN].rate / 1e9,
        numpy_rate=_numpy_rate(first) / 1e9,
        mlx=_mlx(mlx, _numpy_rate(first)),
        machine="\n".join(f"- {line}" for line in common.machine()),
    )
    common.write_report(out / "frameworks.md", text)
    held = {str(m.seq): figures(m) for m in measured} | {"machine": common.machine(), "cpu": cpu}
    common.write_report(out / "frameworks.json", json.dumps(held, indent=1))
    return table


def figures(m: Measured) -> dict[str, Any]:
    """What other pages show: seconds, memory and time over the products of each system, generation."""
    systems = {
        system: {
            "seconds": m.timed.median(system), "above": facts.above, "traced": facts.traced,
            "compiling": facts.compiling,
            "of_gemm": m.of_gemm(system) if system in m.products else None,
        }
        for system, facts in m.facts.items()
    }  # fmt: skip
    talks = {f"{system}, batch {batch}": rate for (system, batch), rate in talk_rates(m).items()}
    return {"systems": systems, "generation": talks, "fastest peer": m.fastest_peer()}


def _talks(m: Measured) -> str:
    if not m.talks:
        return ""
    return TALKS.format(prompt=PROMPT, new=NEW, table=talk_table(m))


def _section(m: Measured) -> str:
    return SECTION.format(seq=m.seq, time=time_table(m), memory=memory_table(m))


def _process(m: Measured, picture: Path) -> str:
    """The section on the whole process; empty where it was not measured."""
    if FOUR_BIT not in m.facts or CHECKPOINTED not in m.facts:
        return ""
    facts = m.facts[FOUR_BIT]
    draw_process(facts, picture)
    return WHOLE.format(
        steps=1 + len(m.timed.seconds[FOUR_BIT]),
        step=facts.above,
        traced=(facts.traced or 0) / 2**20,
        torch=m.facts[PLAIN].peak,
        checkpointed=m.facts[CHECKPOINTED].peak,
        table=process_table(facts),
    )


def _numpy_rate(m: Measured) -> float:
    return max(facts.rate for system, facts in m.facts.items() if is_ours(system))


def _rounds(measured: Iterable[Measured]) -> str:
    found = [
        f"{len(next(iter(m.timed.seconds.values())))} rounds at {m.seq} tokens" for m in measured
    ]
    return " and ".join(found)

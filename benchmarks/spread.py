"""What N ranks cost a step: measured here on 1 to 4, and predicted for up to 1,024.

    python benchmarks/spread.py                   the prediction alone; any machine, a second
    python benchmarks/spread.py --measure         with mpiexec: times on 1 to 4 ranks of this machine
    python benchmarks/spread.py --measure --ranks 2 --mbit 1000    the same over a slower network
    python benchmarks/spread.py --measure --layers 4 --tokens 32
    python benchmarks/spread.py --memory          memory of a rank beside one process; a few minutes

Prints the tables of docs/spread.md. The shape is Qwen2.5-0.5B with LoRA of rank 8, random weights;
its blocks share one array of each kind, so that a rank needs 0.6 GB instead of 2.
"""

import argparse
import json
import math
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import markdown_table, median

from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.config import Qwen2Config
from mesp_ref.engine.init import init_lora
from mesp_ref.engine.model import Model
from mesp_ref.memory.process import PeakResident
from mesp_ref.ops import Array
from mesp_ref.spread.ranks import SpreadRanks
from mesp_ref.spread.start import join
from mesp_ref.spread.world import World
from mesp_ref.train.ranks import ALONE, Ranks
from mesp_ref.train.rows import Cursor, Row
from mesp_ref.train.trainer import TrainConfig, Trainer

SIZES = (8, 32, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Network:
    """One message of n bytes takes latency + n/bandwidth seconds.

    wait   seconds that a collective takes beside its messages: ranks wait for each other asleep and
           look every 2 ms at most, half of that in the mean, and a thread must get a core
    """

    name: str
    latency: float  # seconds
    bandwidth: float  # bytes a second
    wait: float = 1e-3


@dataclass(frozen=True)
class Shape:
    """What is measured: blocks of the 0.5B model, tokens of a rank in a step, and how many rounds."""

    layers: int = 24
    tokens: int = 64
    times: int = 5


@dataclass(frozen=True)
class Work:
    """What one rank does in a step."""

    forward: float  # seconds
    backward: float  # seconds
    update: float  # seconds: norm, clipping, optimiser; every rank does all of it
    gradient: float  # bytes
    blocks: int
    tokens: int  # of a rank in a step
    row: float = 2e-4  # seconds to read and tokenise a row; every rank reads the rows of all


ETHERNET = Network("1 Gbit/s Ethernet", 60e-6, 117e6)
FAST = Network("25 Gbit/s Ethernet", 15e-6, 2.9e9)


def faster_by(factor: float, work: Work) -> Work:
    """The work on ranks that compute faster, over the same network."""
    times = {
        name: getattr(work, name) / factor for name in ("forward", "backward", "update", "row")
    }
    return replace(work, **times)


def sending(work: Work, network: Network, ranks: int) -> float:
    """Seconds in which all gradients of a step travel, when nothing else goes on.

    A block: N−1 messages of its N-th part to all (Alltoall), a ring of N−1 as long (Allgather), and
    two barriers of ⌈log₂N⌉ messages.
    """
    if ranks == 1:
        return 0.0
    piece = work.gradient / work.blocks / ranks
    messages = 2 * (ranks - 1)
    barriers = 2 * math.ceil(math.log2(ranks))
    block = messages * (network.latency + piece / network.bandwidth) + barriers * network.latency
    return work.blocks * (block + 2 * network.wait)


def step_seconds(work: Work, network: Network, ranks: int, slowest: float = 1.0) -> float:
    """A step: gradients travel beside the backward, from its first block's end to one block after it.

    slowest   how much longer than one rank's the slowest rank's forward and backward take
    """
    send = sending(work, network, ranks)
    backward, share = slowest * work.backward, 1 / work.blocks
    overlapped = max(backward + send * share, backward * share + send)
    return ranks * work.row + slowest * work.forward + overlapped + work.update


def simulated(
    work: Work, network: Network, ranks: int, *, jitter: float, pauses: float, steps: int = 400
) -> float:
    """Mean seconds a step when every rank's time is drawn anew in every step.

    jitter   standard deviation of the logarithm of a rank's time
    pauses   probability that a rank stops for 5 s in a step: a disk, another program
    """
    rng = np.random.default_rng(ranks)
    total, alone = 0.0, work.forward + work.backward
    for _ in range(steps):
        factors = np.exp(jitter * rng.standard_normal(ranks))
        factors += (rng.random(ranks) < pauses) * 5.0 / alone
        total += step_seconds(work, network, ranks, float(factors.max()))
    return total / steps


def prediction(work: Work) -> str:
    """Efficiency, tokens a second of N ranks over N times those of one, for two networks."""
    lines = []
    one = step_seconds(work, ETHERNET, 1)
    for ranks in SIZES:
        cells = [f"{ranks:,}"]
        for network in (ETHERNET, FAST):
            even = step_seconds(work, network, ranks)
            uneven = simulated(work, network, ranks, jitter=0.05, pauses=1e-4)
            cells += [
                f"{sending(work, network, ranks):.2f} s",
                f"{one / even:.0%}",
                f"{one / uneven:.0%}",
            ]
        lines.append(cells)
    heads = ["ranks"]
    for network in (ETHERNET, FAST):
        heads += [f"{network.name}: sending", "efficiency", "with stragglers"]
    return markdown_table(heads, lines)


def config(layers: int) -> Qwen2Config:
    """Qwen2.5-0.5B, with fewer blocks and a small vocabulary where time is short."""
    return Qwen2Config(
        vocab_size=4096, hidden_size=896, intermediate_size=4864, num_hidden_layers=layers,
        num_attention_heads=14, num_key_value_heads=2, head_dim=64,
    )  # fmt: skip


def model_of(shape: Qwen2Config) -> tuple[Model, Adapter]:
    """Random weights, the same arrays in every block."""
    rng, kinds, arrays = np.random.default_rng(0), {}, {}
    for name, size in shape.weight_shapes().items():
        kind = (name.rsplit(".layers.")[-1].split(".", 1)[-1], size)
        if kind not in kinds:
            kinds[kind] = rng.standard_normal(size, np.float32) * np.float32(0.02)
        arrays[name] = kinds[kind]
    return Model(shape, arrays), init_lora(shape, rank=8)


class Same:
    """The same row again and again."""

    def __init__(self, tokens: int):
        ids = np.random.default_rng(1).integers(0, 4096, tokens)
        self.row, self.cursor = Row(ids, ids.copy()), Cursor(0, 0, 0)

    def take(self, count: int) -> list[Row]:
        return [self.row] * count


def timed(job: Callable[[], Any]) -> tuple[float, float]:
    """Seconds by the clock, and of this process's cores."""
    begin, busy = time.perf_counter(), time.process_time()
    job()
    return time.perf_counter() - begin, time.process_time() - busy


class Slow(World):
    """A communicator over a slower network: each transfer takes at least what it would take there.

    The time is slept, so that no core is busy with it, as with a network card that does the work.
    """

    def __init__(self, world: World, network: Network):
        super().__init__(world.communicator, world.waiting)
        self.network = network

    def _later(self, messages: int, size: float) -> None:
        time.sleep(messages * (self.network.latency + size / self.network.bandwidth))

    def slices(self, own: Array) -> Array:
        self._later(self.size - 1, own.nbytes / self.size)
        return super().slices(own)

    def joined(self, own: Array, out: Array) -> None:
        self._later(self.size - 1, own.nbytes)
        super().joined(own, out)


def network_here(world: World, times: int) -> Network:
    """Latency and bandwidth of a message to the next rank, when all send at once."""

    def message(size: int) -> float:
        own, found = np.zeros(size, np.uint8), np.empty(size, np.uint8)
        to, source = (world.rank + 1) % world.size, (world.rank - 1) % world.size
        world.assemble()
        exchange = partial(world.communicator.Sendrecv, own, to, recvbuf=found, source=source)
        return min(timed(exchange)[0] for _ in range(5 * times))

    size = 1 << 18
    short, long = message(1), message(size)
    tiny, blocks = np.zeros((world.size, 1), np.float32), 24
    wait = timed(lambda: [world.slices(tiny) for _ in range(blocks)])[0] / blocks  # the mean
    return Network("here", short, size / max(long - short, 1e-9), wait)


def trainer_of(shape: Shape, ranks: Ranks, **settings: Any) -> Trainer:
    """A training of the 0.5B shape."""
    model, adapter = model_of(config(shape.layers))
    train = TrainConfig(seq_len=shape.tokens, steps=10_000, **settings)
    return Trainer(model, adapter, Same(shape.tokens), train, ranks=ranks)


def memory_main(shape: Shape, parts: int, rank: bool) -> None:
    """Most memory of a step of `parts` batches, on this process alone or as a rank; prints JSON."""
    ranks, watch = join({}, 600) if rank else (ALONE, None)
    trainer = trainer_of(shape, ranks, accumulate=parts)

    def step() -> None:
        if isinstance(ranks, SpreadRanks) and ranks.rank:
            ranks.listen()
        trainer.advance()

    with PeakResident() as seen:
        for _ in range(3):
            step()
    tracemalloc.start()
    step()
    arrays = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    found = [(seen.peak.anonymous, arrays)]
    if isinstance(ranks, SpreadRanks):
        found = ranks.main.gathered(found[0])
        ranks.part()
    if ranks.rank == 0:
        print(json.dumps({"own": [f[0] for f in found], "arrays": [f[1] for f in found]}))
    if watch is not None:
        watch.wait()


def told_by(command: Sequence[str]) -> dict[str, Any]:
    """What a process of this file prints last."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def memory(shape: Shape, sizes: Sequence[int]) -> str:
    """The largest rank beside one process that computes as many batches a step."""
    here = [sys.executable, __file__, *sized(shape), "--memory"]
    lines = []
    for size in sizes:
        alone = told_by([*here, "--parts", str(size)])
        start = [str(MPIEXEC), "-n", str(size)]
        spread = told_by([*start, *here, "--parts", str(size), "--rank"])
        row = [str(size)]
        for kind in ("arrays", "own"):
            one, most = alone[kind][0] / 1e6, max(spread[kind]) / 1e6
            row += [f"{one:.1f} MB", f"{most:.1f} MB", f"{most - one:+.1f} MB"]
        lines.append(row)
    heads = ["ranks"]
    for kind in ("arrays of a step", "memory of its own"):
        heads += [f"{kind}: one process", "largest rank", "more"]
    return markdown_table(heads, lines)


def jobs_of(shape: Shape, ranks: SpreadRanks, beside_workers: bool) -> dict[str, Callable[[], Any]]:
    """A step of all ranks, its computing alone, its sending alone; two workers on rank 0 alone."""
    model, adapter = model_of(config(shape.layers))
    train = TrainConfig(accumulate=ranks.size, seq_len=shape.tokens, steps=10_000)

    def trainer(of: Ranks, **changed: Any) -> Trainer:
        settings, own = replace(train, **changed), adapter.astype(np.float32)
        return Trainer(model, own, Same(shape.tokens), settings, ranks=of)

    together, alone = trainer(ranks), trainer(ALONE, accumulate=1)
    gradients = {name: np.ones_like(array) for name, array in together.params.items()}

    def step() -> None:
        if ranks.rank:
            ranks.listen()
        together.advance()

    def send() -> None:
        tally = ranks.tally(ranks.size)
        for layer in reversed(range(shape.layers)):
            mark = f".layers.{layer}."
            tally.add({name: grad.copy() for name, grad in gradients.items() if mark in name})
        tally.close()

    jobs = {"step": step, "compute": alone.advance, "send": send}
    if beside_workers:
        workers = trainer(ALONE, accumulate=2, workers=2)
        jobs["workers"] = workers.advance if ranks.rank == 0 else lambda: None
    return jobs


def rank_main(shape: Shape, network: Network | None) -> None:
    """On every rank: the jobs in turns; rank 0 prints the medians."""
    ranks, watch = join({}, 600)
    if network is not None:
        ranks.sums = Slow(ranks.sums, network)
    jobs = jobs_of(shape, ranks, beside_workers=ranks.size == 2 and network is None)
    turns: dict[str, list[Any]] = {name: [] for name in jobs}
    for turn in range(-1, shape.times):
        for name, job in jobs.items():
            ranks.main.assemble()
            seconds = ranks.main.gathered(timed(job))
            if turn >= 0:
                turns[name].append(np.array(seconds))
    here = network or network_here(ranks.main, shape.times)
    gradient = 4 * sum(a.size for a in model_of(config(shape.layers))[1].weights.values())
    work = Work(0, 0, 0, gradient, shape.layers, shape.tokens)
    if ranks.rank == 0:
        found = {name: [float(turn[:, 0].max()) for turn in of] for name, of in turns.items()}
        found |= {f"{name} busy": [float(t[:, 1].sum()) for t in of] for name, of in turns.items()}
        print(json.dumps(found | {"predicted": sending(work, here, ranks.size)}), flush=True)
    ranks.part()
    if watch is not None:
        watch.wait()


def measured(shape: Shape, sizes: Sequence[int], link: Sequence[str]) -> str:
    """Times on some numbers of ranks of this machine, and those of one process with two workers."""
    lines, beside = [], ""
    for size in sizes:
        start = [str(MPIEXEC), "-n", str(size), sys.executable, __file__]
        found = told_by([*start, *sized(shape), *link, "--rank"])
        step, compute, send = (found[name] for name in ("step", "compute", "send"))
        above = median(s / max(c, g) - 1 for s, c, g in zip(step, compute, send, strict=True))
        cells = [f"{median(of):.2f} s" for of in (step, compute, send)]
        cells += [f"{found['predicted']:.2f} s", f"{above:+.0%}"]
        lines.append([str(size), *cells, f"{size * shape.tokens / median(step):.1f}"])
        if "workers" in found:
            beside = beside_workers(shape, found)
    heads = [
        "ranks", "step", "computing alone", "sending alone", "by the model", "above the slower",
        "tokens a second",
    ]  # fmt: skip
    return markdown_table(heads, lines) + beside


def beside_workers(shape: Shape, found: dict[str, list[float]]) -> str:
    """Two ranks and one process with two workers, which took turns."""
    ratio, busy = (
        median(w / s for w, s in zip(found[f"workers{kind}"], found[f"step{kind}"], strict=True))
        for kind in ("", " busy")
    )
    ranks, workers = (2 * shape.tokens / median(found[name]) for name in ("step", "workers"))
    return (
        f"\n\n2 ranks: {ranks:.1f} tokens a second; one process with 2 workers: {workers:.1f}; ratio "
        f"{ratio:.2f}, by seconds of cores {busy:.2f}"
    )


MPIEXEC = Path(sys.executable).with_name("mpiexec")


def sized(shape: Shape) -> list[str]:
    """The options that tell a process the shape."""
    return [f"--{name}={value}" for name, value in asdict(shape).items()]


def link_of(given: argparse.Namespace) -> Network | None:
    """The simulated network, if one is asked for."""
    if given.mbit is None:
        return None
    return Network(f"{given.mbit:g} Mbit/s", given.latency * 1e-6, given.mbit * 1e6 / 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--parts", type=int, help=argparse.SUPPRESS)
    for name, value in asdict(Shape()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--ranks", type=int, nargs="+", default=(1, 2, 3, 4), metavar="N")
    parser.add_argument("--mbit", type=float, help="bandwidth of a simulated network, Mbit/s")
    parser.add_argument("--latency", type=float, default=60.0, help="of it, microseconds")
    given = parser.parse_args()
    shape = Shape(given.layers, given.tokens, given.times)
    if given.parts:
        memory_main(shape, given.parts, given.rank)
        return
    if given.rank:
        rank_main(shape, link_of(given))
        return
    if given.memory:
        print(memory(shape, given.ranks))
        return
    if given.measure:
        link = [] if given.mbit is None else [f"--mbit={given.mbit}", f"--latency={given.latency}"]
        print(measured(shape, given.ranks, link), end="\n\n")
        return
    lora = Work(forward=1.3, backward=2.6, update=0.1, gradient=17.6e6, blocks=24, tokens=64)
    for name, faster in (("this machine's core, 64 tokens a rank", 1), ("ten times as fast", 10)):
        print(f"{name}\n\n{prediction(faster_by(faster, lora))}\n")


if __name__ == "__main__":
    main()

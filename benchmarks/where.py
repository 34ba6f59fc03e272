"""Where the time of a step goes beside its products: op by op, for each method.

    python benchmarks/where.py            writes docs/benchmarks/where.md; two minutes

CPU seconds of one thread on Qwen2.5-0.5B's shape, 256 tokens, two blocks and a small vocabulary. An op's
products take its FLOPs ÷ the rate that this BLAS has on the products of the method; what is left are
passes over activations, page faults and Python. `OPENBLAS_NUM_THREADS=1` makes CPU seconds those of the
work alone.
"""

import argparse
import dataclasses
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from common import SHAPES, gemm_rate, gemms, machine, markdown_table, model_and_batch, write_report

import mesp_ref as mr
from mesp_ref.memory import Shapes, dry_run
from mesp_ref.memory.ledger import _OPS

SHAPE, RANK, TOKENS = "qwen2.5-0.5b", 8, 256
CONFIG = dataclasses.replace(SHAPES[SHAPE], num_hidden_layers=2, vocab_size=16_384)
WAYS = {"store_all": "ram", "mesp": "ram", "mesp_tiled": "disk", "mesp_streamed": "disk"}
BETWEEN = "between ops"
OUT = Path(__file__).resolve().parent.parent / "docs/benchmarks/where.md"


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


def timed(config: mr.Qwen2Config, method: str, tokens: int, rounds: int) -> dict[str, float]:
    """Seconds by op, of the fastest of some steps."""
    model, adapter, ids, _ = model_and_batch(config, tokens, RANK)
    found = []
    for _ in range(rounds + 1):
        with Clock() as clock:
            mr.loss_and_grads(
                model, adapter, ids, ids, method=method, checkpoints=WAYS[method],
                on_gradients=lambda number, grads: None,
            )  # fmt: skip
        found.append(clock.seconds)
    return min(found[1:], key=lambda seconds: sum(seconds.values()))


def flops(config: mr.Qwen2Config, method: str, tokens: int) -> Counter[str]:
    """FLOPs of products by op."""
    found: Counter[str] = Counter()
    shapes = Shapes(config, 1, tokens, RANK, disk=WAYS[method] == "disk")
    for moment in dry_run(method, shapes).ledger.moments:
        found[moment.op.split(" ")[0]] += moment.flops
    return found


def table(seconds: dict[str, float], work: Counter[str], rate: float) -> str:
    """Op by op, those that take most beside their products first."""
    beside = {op: spent - work[op] / rate for op, spent in seconds.items()}
    whole = sum(seconds.values())
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


def report(config: mr.Qwen2Config, tokens: int, rounds: int, methods: Iterable[str]) -> str:
    parts = [
        "# Where the time goes beside the products",
        "Written by `benchmarks/where.py`. " + "; ".join(machine()) + ".",
        f"CPU milliseconds of one step, {config.num_hidden_layers} blocks of {SHAPE}, a vocabulary of "
        f"{config.vocab_size:,}, {tokens} tokens, rank {RANK}, float32, the fastest of {rounds}. "
        "Products are counted at the rate that this BLAS has on the shapes of the method.",
    ]
    for method in methods:
        seconds = timed(config, method, tokens, rounds)
        products = gemms(config, method, tokens, RANK, checkpoints=WAYS[method])
        rate = gemm_rate(products, time.process_time)
        print(method, f"{rate / 1e9:.0f} GFLOP/s", file=sys.stderr, flush=True)
        found = table(seconds, flops(config, method, tokens), rate)
        parts.append(f"## `{method}`, {rate / 1e9:.0f} GFLOP/s\n\n{found}")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--out", default=OUT, type=Path)
    args = parser.parse_args()
    write_report(args.out, report(CONFIG, args.tokens, args.rounds, WAYS))


if __name__ == "__main__":
    main()

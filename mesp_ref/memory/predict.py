"""Peak memory of a step from its shapes alone: the very same methods, run over ghosts.

The step is one forward and backward of LoRA over a mapped base; gradients are handed over block by
block. Of every op, and of the sums before it, the moment at which most lives is a `Peak`. Python
objects, some 100 KB, and the buffers of BLAS are not counted, persistent parameters neither.

The same run tells what a step writes to a file, and its arithmetic. Counted are the products of
matrices, two operations for a multiply-add. What is left out (norms, softmax, the gate, RoPE, decoding,
copies) is the same few passes over the same arrays in every method, and on a CPU about a tenth of the
time.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import pairwise
from typing import NamedTuple

from mesp_ref.lean.steps import METHODS
from mesp_ref.lean.streamed_attention import KEYS
from mesp_ref.memory.dry_run import dry_run
from mesp_ref.memory.kinds import by_kind
from mesp_ref.memory.ledger import Moment
from mesp_ref.memory.shapes import Shapes
from mesp_ref.ops._tiles import SCRATCH

Parts = dict[str, int]  # name -> bytes

END = "what follows the last op"
STREAMED, TILED = "mesp_streamed", "mesp_tiled"
# Tiles are as narrow as they get, and whole, from so many rows on (256 columns of the MLP or of the
# vocabulary, 16 queries); tiles of all kinds begin anew at so many.
_NARROW, _NARROWEST, _ROWS = SCRATCH // 256, SCRATCH // 16, 64
_FEW, _MORE = 2, 3  # blocks of the steps that are run: from these on, each block adds the same


class Peak(NamedTuple):
    """The moment of an op, or of the sums before one, at which most lives."""

    op: str
    held: Parts  # alive between ops, by kind
    added: Parts  # results and scratch of the op

    @property
    def total(self) -> int:
        return sum(self.held.values()) + sum(self.added.values())

    @property
    def parts(self) -> Parts:
        return self.held | {f"{self.op}: {name}": size for name, size in self.added.items()}


class Cost(NamedTuple):
    """What a step takes."""

    peaks: dict[str, Peak]  # by op
    file: int  # bytes of a temporary file, written and read once
    flops: int


@lru_cache(maxsize=512)
def cost(method: str, shapes: Shapes) -> Cost:
    """What a step of a method takes, at full depth and length."""
    return at_length(shapes) if method == STREAMED else at_depth(method, shapes)


def at_length(shapes: Shapes) -> Cost:
    """What a step of mesp_streamed takes, from shorter ones.

    Once there are earlier keys for a whole tile, a chunk takes the memory of the one before it, and its
    attention so much more arithmetic: three short steps tell the quadratic that all lie on, two the line
    of the file. Sequences are alike.
    """
    rows, n, t = shapes.at_once, shapes.batch, shapes.tokens
    few = min(n, 2 if t > rows else 2 * (rows // t) + n % (rows // t))
    left = max(0, (t - KEYS - 2 * rows) // rows)  # chunks of a sequence that need not be run
    first, *others = (
        at_depth(STREAMED, shapes._replace(batch=few, tokens=t - (left - i) * rows))
        for i in range(min(left, 2) + 1)
    )

    files, flops = ([getattr(c, name) for c in (first, *others)] for name in ("file", "flops"))
    file, work = (extended(left, *each) * n // few for each in (files, flops))
    return Cost(first.peaks, file, work)


@lru_cache(maxsize=512)
def at_depth(method: str, shapes: Shapes) -> Cost:
    """What a step of a method takes, at full depth.

    A block adds as much as the one below it, whatever op is running, so a step of two blocks and one
    of three tell what any has; where layers differ, all are run.
    """
    depth = shapes.config.num_hidden_layers
    if depth <= _MORE or shapes.config.layer_types:
        return run_cost(method, shapes)
    few, more = (
        run_cost(
            method, shapes._replace(config=dataclasses.replace(shapes.config, num_hidden_layers=n))
        )
        for n in (_FEW, _MORE)
    )

    steps = depth - _FEW
    peaks = {
        op: Peak(
            op, *(_line(a, b, steps) for a, b in zip(few.peaks[op][1:], high[1:], strict=True))
        )
        for op, high in more.peaks.items()
    }
    return Cost(peaks, extended(steps, few.file, more.file), extended(steps, few.flops, more.flops))


def run_cost(method: str, shapes: Shapes) -> Cost:
    """What a step of a method takes, all of its blocks run."""
    found = _run_of_rows(shapes) if method == TILED else _run(method, shapes)
    peaks: dict[str, Peak] = {}
    for peak in (*found.ops, *found.before):
        if peak.op not in peaks or peak.total > peaks[peak.op].total:
            peaks[peak.op] = peak
    peaks[END] = Peak(END, {}, {"sums": found.after})
    return Cost(peaks, found.file, found.flops)


class _Run(NamedTuple):
    """What a ledger over ghosts tells, moment by moment."""

    ops: list[Peak]
    before: list[Peak]  # what precedes each
    after: int
    file: int
    flops: int


def _run(method: str, shapes: Shapes) -> _Run:
    found = dry_run(method, shapes)
    pairs = [
        _peaks(moment, found.beside.get(number, 0), shapes.rank)
        for number, moment in enumerate(found.ledger.moments)
    ]
    ops, before = ([pair[side] for pair in pairs] for side in (0, 1))
    return _Run(ops, before, found.ledger.after, found.file, found.flops)


def _run_of_rows(shapes: Shapes) -> _Run:
    """A step of mesp_tiled, a long one from three shorter ones.

    Once its tiles are as narrow as they get, and longer than a window, a moment takes so many bytes
    more for each further row; its arithmetic grows as a square.
    """
    share = shapes.config.num_attention_heads // shapes.config.num_key_value_heads
    narrow = max(_NARROW * shapes.workers, _NARROWEST // share) + (
        shapes.config.sliding_window or 0
    )
    unit = math.lcm(_ROWS, shapes.workers)
    left = (shapes.tokens - narrow) // unit - 2
    if left * unit < 3 * narrow:  # it is not worth it
        return _run(TILED, shapes)
    first, second, third = (
        _run(TILED, shapes._replace(tokens=shapes.tokens - (left - i) * unit)) for i in range(3)
    )

    def longer(low: Peak, high: Peak) -> Peak:
        return Peak(low.op, *(_line(a, b, left) for a, b in zip(low[1:], high[1:], strict=True)))

    return _Run(
        list(map(longer, first.ops, second.ops)),
        list(map(longer, first.before, second.before)),
        extended(left, first.after, second.after),
        extended(left, first.file, second.file),
        extended(left, first.flops, second.flops, third.flops),
    )


def _line(low: Parts, high: Parts, steps: int) -> Parts:
    """Parts so many steps on, each of which adds what lies between two."""
    return {n: extended(steps, low.get(n, 0), high.get(n, 0)) for n in {**low, **high}}


def extended(steps: int, *found: int) -> int:
    """The value `steps` on, on the polynomial through those at 0, 1 …: Newton's differences."""
    weight, total, differences = 1, 0, list(found)
    for order in range(len(found)):
        total += weight * differences[0]
        differences = [b - a for a, b in pairwise(differences)]
        weight = weight * (steps - order) // (order + 1)
    return total


def _peaks(moment: Moment, beside: int, rank: int) -> tuple[Peak, Peak]:
    """What lives in an op, and in the sums before it, at most."""
    held = {name: size for name, size in by_kind(moment, rank).items() if size}
    labels = sum(entry.nbytes for entry in moment.live if entry.dtype.kind == "i")  # no ghosts
    unseen = moment.traced + labels - moment.held
    added = {"results and scratch": moment.added, "sums before": unseen, "other workers": beside}
    before = {"sums": moment.between + labels - moment.held, "other workers": beside}
    return Peak(moment.op, held, added), Peak(f"what precedes {moment.op}", held, before)


def _all_peaks(method: str, shapes: Shapes) -> list[Peak]:
    return list(cost(method, shapes).peaks.values())


PEAKS: dict[str, Callable[[Shapes], list[Peak]]] = {
    method: partial(_all_peaks, method) for method in METHODS
}


def peak(method: str, shapes: Shapes) -> Peak:
    """The op at which a method needs most."""
    return max(PEAKS[method](shapes), key=lambda found: found.total)

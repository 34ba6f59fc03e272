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
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from typing import NamedTuple

from mesp_ref.lean import mlp_width, query_tile
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
_STRIDE, _SHORT = 128, (0, 1, 2)  # tokens between short steps, of whole tiles; and which are run
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
    if method == STREAMED:
        return in_chunks(shapes)
    return in_tiles(shapes) if method == TILED else at_depth(method, shapes)


def in_tiles(shapes: Shapes) -> Cost:
    """What a step of mesp_tiled takes, from shorter ones.

    From a length on no tile becomes narrower: what an op holds then grows with the length, and its
    arithmetic with the square. Three short steps tell the quadratic that all lie on.
    """
    config, t, w = shapes.config, shapes.tokens, shapes.workers
    share = max(1, config.num_attention_heads // config.num_key_value_heads // w)
    windows = config.sliding_window or 0 if config.layer_types else 0
    width = mlp_width(t, w)
    # and from there on a row's share of a rank is less than a weight's or a tile's
    steady = max(
        SCRATCH // query_tile(share, t) // share, SCRATCH // width, windows, 2 * width,
        config.hidden_size, config.num_attention_heads * config.head_dim,
    )  # fmt: skip
    left = (t - steady) // (_STRIDE * w) - 1  # steps of the length that need not be run
    if left < len(_SHORT):
        return at_depth(TILED, shapes)
    found = [at_depth(TILED, shapes._replace(tokens=t - (left - i) * _STRIDE * w)) for i in _SHORT]

    def extended(parts: Sequence[Parts]) -> Parts:
        return {name: _extended([p.get(name, 0) for p in parts], left) for name in parts[0]}

    peaks = {
        op: Peak(op, *(extended([c.peaks[op][i] for c in found]) for i in (1, 2)))  # type: ignore[misc]
        for op in found[0].peaks
    }
    return Cost(peaks, *(_extended([c[i] for c in found], left) for i in (1, 2)))  # type: ignore[misc]


def _extended(found: Sequence[int], steps: int) -> int:
    """The polynomial through `found`, at 0, 1, … , at `steps`: Newton's forward differences."""
    factor, differences, total = 1, list(found), 0
    for order in range(len(found)):
        total += factor * differences[0]
        differences = [b - a for a, b in pairwise(differences)]
        factor = factor * (steps - order) // (order + 1)
    return total


def in_chunks(shapes: Shapes) -> Cost:
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

    files, flops = (
        _extended([getattr(c, name) for c in (first, *others)], left) * n // few
        for name in ("file", "flops")
    )
    return Cost(first.peaks, files, flops)


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

    def deeper(low: int, high: int) -> int:
        return low + (depth - _FEW) * (high - low) // (_MORE - _FEW)

    def parts(low: Parts, high: Parts) -> Parts:
        return {name: deeper(low.get(name, 0), high.get(name, 0)) for name in {**low, **high}}

    peaks = {
        op: Peak(op, parts(few.peaks[op].held, high.held), parts(few.peaks[op].added, high.added))
        for op, high in more.peaks.items()
    }
    return Cost(peaks, deeper(few.file, more.file), deeper(few.flops, more.flops))


def run_cost(method: str, shapes: Shapes) -> Cost:
    """What a step of a method takes, all of its blocks run."""
    found = dry_run(method, shapes)
    pairs = [
        _peaks(moment, found.beside.get(number, 0), shapes.rank)
        for number, moment in enumerate(found.ledger.moments)
    ]
    peaks: dict[str, Peak] = {}
    for peak in (*(peak for peak, _ in pairs), *(peak for _, peak in pairs)):  # ops come first
        if peak.op not in peaks or peak.total > peaks[peak.op].total:
            peaks[peak.op] = peak
    peaks[END] = Peak(END, {}, {"sums": found.ledger.after})
    return Cost(peaks, found.file, found.flops)


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

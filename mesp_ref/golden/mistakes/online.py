"""Mistakes of kernels that work tile by tile: rescaling, accumulation, tails."""

from collections.abc import Callable

import numpy as np

from mesp_ref.golden.mistakes.variant import variant
from mesp_ref.golden.plain import Plain
from mesp_ref.ops import Array

TILES = (2, 3, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 32768)


def without_rescale(
    s: Array, tile: int, sums: bool = True, mixes: bool = True
) -> tuple[Array, Array]:
    """exp(s − the maximum up to its tile), as an accumulator holds it that is not rescaled, and sums.

    sums, mixes   which of the two accumulators misses the rescale
    """
    top = np.maximum.accumulate(s, axis=-1)
    last = np.minimum((np.arange(s.shape[-1]) // tile + 1) * tile, s.shape[-1]) - 1
    seen = np.maximum(top[..., last], np.finfo(s.dtype).min)
    stale, true = (
        np.exp(s - seen),
        np.exp(s - np.maximum(s.max(-1, keepdims=True), np.finfo(s.dtype).min)),
    )
    return (stale if mixes else true), (stale if sums else true).sum(axis=-1, keepdims=True)


def attention(tile: int, sums: bool, mixes: bool, backward: bool) -> type[Plain]:
    """The online softmax of attention without the rescale of what was accumulated."""

    def forward(self: Plain, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        scores = self.scores(q, self.share(k)) * self.score_scale()
        s = np.where(self.visible(*scores.shape[-2:]), scores, -np.inf)
        e, total = without_rescale(s, tile, sums, mixes)
        o = self.mix(e / total, self.share(v))
        lse = np.log(total) + np.maximum(s.max(-1, keepdims=True), np.finfo(s.dtype).min)
        return (np.exp(s - lse) if backward else self.probabilities(scores)), o

    what = {(True, True): "", (True, False): " of the sum", (False, True): " of the output"}
    text = f"the online softmax misses the rescale{what[sums, mixes]} to the new maximum"
    text += f" (tiles of {tile} keys)" + ("; the backward uses its log-sum" if backward else "")
    return variant(text, attention=forward)


def entropy(tile: int, backward: bool) -> type[Plain]:
    """The online log-sum of cross entropy without the rescale."""

    def cross_entropy(self: Plain, logits: Array, targets: Array) -> tuple[Array, Array]:
        right, gradient = Plain.cross_entropy(self, logits, targets)
        _, total = without_rescale(logits, tile)
        true = np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)
        share, counted = self.shares(targets), targets != -100
        off = (np.log(total) - np.log(true))[..., 0]
        loss = np.asarray(right + (off * share)[counted].sum())
        if not backward:
            return loss, gradient
        p = np.exp(logits - logits.max(-1, keepdims=True)) / true
        rows = p * (true / total - 1) * (share * counted)[..., None]
        return loss, gradient + rows

    text = f"the online log-sum of cross entropy misses the rescale to the new maximum (tiles of {tile})"
    return variant(
        text + ("; the gradient uses it" if backward else ""), cross_entropy=cross_entropy
    )


def tiles_of(size: int) -> list[int]:
    return [tile for tile in TILES if tile < size]


def accumulated(sentence: str, keep: Callable[[Array], Array], which: str = "both") -> type[Plain]:
    """dk and dv of some query rows only: keep(index of rows) is a mask."""

    def attention_bwd(
        self: Plain, do: Array, q: Array, k: Array, v: Array, p: Array
    ) -> tuple[Array, ...]:
        dq, dk, dv = Plain.attention_bwd(self, do, q, k, v, p)
        rows = keep(np.arange(q.shape[1]))[:, None, None]
        _, dk_part, dv_part = Plain.attention_bwd(self, do * rows, q, k, v, p)
        return dq, dk_part if which != "dv" else dk, dv_part if which != "dk" else dv

    return variant(sentence, attention_bwd=attention_bwd)


def unlocked(length: int) -> list[type[Plain]]:
    """dk and dv where tiles of queries overwrite instead of add, or a tail is left out."""
    return [
        mistake
        for tile in tiles_of(length)
        for which, names in (("both", "dk and dv"), ("dk", "dk"), ("dv", "dv"))
        for mistake in _unlocked(length, tile, which, names)
    ]


def _unlocked(length: int, tile: int, which: str, names: str) -> list[type[Plain]]:
    last, at = (length - 1) // tile, f"(tiles of {tile} queries)"
    only = f"{names} of the last tile of queries only: overwritten, not accumulated over tiles {at}"
    first = f"{names} of the first tile of queries only: not accumulated over tiles {at}"
    tail = f"{names} without the tail of queries behind the last whole tile {at}"
    found = [
        accumulated(only, lambda i: i // tile == last, which),
        accumulated(first, lambda i: i // tile == 0, which),
    ]
    if length % tile:
        found.append(accumulated(tail, lambda i: i < length // tile * tile, which))
    return found


def tail_keys(tile: int, where: str) -> type[Plain]:
    """Keys behind the last whole tile are not seen, or those filled up are."""

    def probabilities(self: Plain, s: Array) -> Array:
        length = s.shape[-1]
        visible = self.visible(*s.shape[-2:])
        if where == "lost":
            visible = visible & (np.arange(length) < length // tile * tile)
            s = np.where(visible, s, -np.inf)
            e = np.exp(s - np.maximum(s.max(-1, keepdims=True), np.finfo(s.dtype).min))
            total = e.sum(-1, keepdims=True)
            return e / np.where(total > 0, total, 1)
        p = Plain.probabilities(self, s)
        top = np.where(visible, s, -np.inf).max(-1, keepdims=True)
        extra = (-length % tile) * np.exp(-top)  # keys of zeros that no mask hides
        lse = top + np.log(np.exp(np.where(visible, s - top, -np.inf)).sum(-1, keepdims=True))
        return p / (1 + extra * np.exp(top - lse))

    texts = {
        "lost": "keys behind the last whole tile are not read",
        "seen": "keys of zeros that fill up the last tile are not masked",
    }
    return variant(f"{texts[where]} (tiles of {tile} keys)", probabilities=probabilities)


def of_keys(queries: int, keys: int) -> list[type[Plain]]:
    """Every mistake of tiles that attention over these lengths can show."""
    found = [
        attention(tile, sums, mixes, backward)
        for tile in tiles_of(keys)
        for sums, mixes in ((True, True), (True, False), (False, True))
        for backward in (False, True)
    ]
    found += unlocked(queries)
    found += [tail_keys(tile, where) for tile in TILES if keys % tile for where in ("lost", "seen")]
    return found


def of_vocabulary(size: int) -> list[type[Plain]]:
    return [entropy(tile, backward) for tile in tiles_of(size) for backward in (False, True)]

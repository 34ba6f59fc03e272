"""Mistakes of windows, of documents in a row, and of a scale of scores that is given."""

from collections.abc import Callable

import numpy as np

from mesp_ref.golden.mistakes.attention import scale
from mesp_ref.golden.mistakes.variant import variant
from mesp_ref.golden.plain import Plain
from mesp_ref.ops import Array


def window(sentence: str, size: Callable[[Plain], int | None]) -> type[Plain]:
    """Another window than the one of the layer."""
    return variant(sentence, window=lambda self: size(self))


def moved(by: int) -> Callable[[Plain], int | None]:
    return lambda plain: None if plain.set.window is None else plain.set.window + by


def last_of_all(self: Plain, tq: int, tk: int) -> Array:
    """The window counted from the last key of all; a query sees itself in any case."""
    seen: Array = Plain.causal(self, tq, tk)
    near = np.arange(tk) > tk - 1 - (self.set.window or tk)
    return seen & (near | np.eye(tq, tk, tk - tq, dtype=bool))


def both_ways(self: Plain, tq: int, tk: int) -> Array:
    """As many keys of the future as of the past."""
    ahead = np.arange(tk) - np.arange(tk - tq, tk)[:, None]
    return ahead < (self.set.window or tk)


WINDOWS: tuple[type[Plain], ...] = (
    window("the window is one key too long: its own is not counted", moved(1)),
    window("the window is one key too short: its own is counted twice", moved(-1)),
    window("the window is ignored: a query sees all keys before it", lambda plain: None),
    window("the window is two keys too long", moved(2)),
    window("the window is half as long", lambda plain: (plain.set.window or 2) // 2 or 1),
    window("the window is twice as long", lambda plain: 2 * (plain.set.window or 1)),
    variant(
        "the window is one of the last keys of all, not of those before the query",
        causal=last_of_all,
        window=lambda self: None,
    ),
    variant("the window reaches into the future, too: no causal mask within it", causal=both_ways),
)
# Of models whose layers differ.
BY_LAYER: tuple[type[Plain], ...] = (
    window(
        "the window is on the wrong layers: on those that see all, not on those that slide",
        lambda plain: plain.whole.window if plain.set.window is None else None,
    ),
    window(
        "the window is on all layers, also on those that see all", lambda plain: plain.whole.window
    ),
)


def seen_if(sentence: str, change: Callable[[Array, Array, Array], Array]) -> type[Plain]:
    """change(seen, ago, positions) in place of the keys of the query's own document."""

    def visible(self: Plain, tq: int, tk: int) -> Array:
        positions, window = self.set.positions, self.window()
        ago = np.arange(tk - tq, tk)[:, None] - np.arange(tk)
        seen = self.causal(tq, tk)
        seen = seen if window is None else seen & (ago < window)
        if positions is None:
            return seen
        at = positions[:, None, :, None]
        return change(np.broadcast_to(seen, (*at.shape[:3], tk)), ago, at)

    return variant(sentence, visible=visible)


def of_documents(sentence: str, chosen: Callable[[Array], Array]) -> type[Plain]:
    """dk and dv of the queries of some documents only; chosen(number of each token's document)."""

    def attention_bwd(
        self: Plain, do: Array, q: Array, k: Array, v: Array, p: Array
    ) -> tuple[Array, ...]:
        dq, dk, dv = Plain.attention_bwd(self, do, q, k, v, p)
        if self.set.positions is None:
            return dq, dk, dv
        kept = chosen((self.set.positions == 0).cumsum(axis=1))[:, :, None, None]
        return dq, *Plain.attention_bwd(self, do * kept, q, k, v, p)[1:]

    return variant(sentence, attention_bwd=attention_bwd)


DOCUMENTS: tuple[type[Plain], ...] = (
    variant(
        "documents are not kept apart: a query sees the keys of those before its own",
        positions=lambda self: None,
    ),
    seen_if(
        "a document's boundary is off by one: a query sees the last key of the document before",
        lambda seen, ago, at: seen & (ago <= at + 1),
    ),
    seen_if(
        "a document's boundary is off by one: a query does not see its document's first key",
        lambda seen, ago, at: seen & ((ago < at) | (ago == 0)),
    ),
    seen_if(
        "a token's position in its document is taken for the first key that it sees",
        lambda seen, ago, at: seen & (np.arange(seen.shape[-1]) >= at),
    ),
    of_documents(
        "dk and dv of the last document only: overwritten, not accumulated over documents",
        lambda number: number == number[:, -1:],
    ),
    of_documents(
        "dk and dv of the first document only: not accumulated over documents",
        lambda number: number == 1,
    ),
)


def whole_documents(self: Plain, tq: int, tk: int) -> Array:
    """Every key of the query's document, those of the future too."""
    positions, window = self.set.positions, self.window()
    ago = np.arange(tk - tq, tk)[:, None] - np.arange(tk)
    seen = np.ones((tq, tk), bool) if window is None else ago < window
    if positions is None:
        return seen
    number = (positions == 0).cumsum(axis=1)
    same: Array = number[:, None, :, None] == number[:, None, None, :]
    return seen & same


def filled(self: Plain, s: Array) -> Array:
    """Hidden scores are 0, not −∞."""
    s = np.where(self.visible(*s.shape[-2:]), s, 0)
    e = np.exp(s - s.max(axis=-1, keepdims=True))
    total: Array = e.sum(axis=-1, keepdims=True)
    return e / total


def masked_late(self: Plain, s: Array) -> Array:
    """Softmax over all keys of the past, then zeros where the mask hides."""
    causal = np.where(self.causal(*s.shape[-2:]), s, -np.inf)
    e = np.exp(causal - causal.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True) * self.visible(*s.shape[-2:])


def unhidden(self: Plain, dp: Array, p: Array) -> Array:
    """Scores that were replaced have no gradient, though their keys have a share."""
    ds: Array = Plain.softmax_bwd(self, dp, p) * self.visible(*p.shape[-2:])
    return ds


HIDING: tuple[type[Plain], ...] = (
    variant(
        "no causal mask within documents: a query sees its document's future",
        visible=whole_documents,
    ),
    variant(
        "hidden scores are set to 0 instead of −∞: the mask weakens keys", probabilities=filled
    ),
    variant(
        "hidden scores are set to 0 instead of −∞: the mask weakens keys",
        probabilities=filled,
        softmax_bwd=unhidden,
    ),
    variant(
        "the mask is applied after the softmax: what is left is not normalised again",
        probabilities=masked_late,
    ),
)


def _head_scale(plain: Plain) -> float:
    return plain.set.head_dim**-0.5


def _given(plain: Plain) -> float:
    return plain.set.score_scale or _head_scale(plain)


SCALES: tuple[type[Plain], ...] = (
    scale("scores scaled by 1/√D instead of the scale given (query_pre_attn_scalar)", _head_scale),
    scale("scores scaled twice: by the square of the scale given", lambda p: _given(p) ** 2),
    scale("scores scaled by 1/√D and by the scale given", lambda p: _given(p) * _head_scale(p)),
    scale(
        "scores scaled in the forward by 1/√D, in the backward by the scale given",
        _head_scale,
        _given,
    ),
    scale(
        "scores scaled in the backward by 1/√D, in the forward by the scale given",
        _given,
        _head_scale,
    ),
)


def of_masks(positions: bool, windowed: bool, scaled: bool) -> list[type[Plain]]:
    """Mistakes of what a case has: documents, a window, a scale of its own."""
    found: list[type[Plain]] = []
    found += WINDOWS if windowed else ()
    found += DOCUMENTS if positions else ()
    found += HIDING if positions or windowed else ()
    return found + list(SCALES if scaled else ())

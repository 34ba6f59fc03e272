"""Exercises: the embedding table, alone and tied to the head."""

from typing import Any

import numpy as np

from mesp_ref import ops
from mesp_ref.learn.exercise import (
    LARGE,
    ONE_TOKEN,
    SMALL,
    UNEVEN,
    Case,
    Exercise,
    Given,
    Outputs,
    Wrong,
    named_outputs,
    of_op,
)
from mesp_ref.learn.exercises.common import only
from mesp_ref.ops import Array
from mesp_ref.registry import OPS, Args, Sizes
from mesp_ref.registry.cases import put, times

_CASES = (
    ("small", "two tokens of a table of five", SMALL),
    ("uneven", "some tokens come several times", UNEVEN),
    ("one token", "T = 1, two sequences", ONE_TOKEN),
    ("repeated", "every token is the same one", UNEVEN._replace(n=2, t=3), put(ids=1)),
    ("large", "a table of thousands", LARGE, times(w=2000.0)),
)


def _numbers(g: Given) -> dict[str, float]:
    n, t = g.ids.shape
    return {
        "the number of tokens": n * t,
        "the batch size N": n,
        "the number of tokens T": t,
        "V": g.w.shape[0],
        "C": g.w.shape[1],
    }


def scattered(ids: Array, dy: Array, w: Array, m: Wrong) -> Any:
    """dw of a lookup, or what is taken for it."""
    v = len(w)
    ids, dy = m.pick(
        (ids, dy), first_sequence=(ids[:1], dy[:1]), last_sequence=(ids[-1:], dy[-1:]),
        first_token=(ids[:, :1], dy[:, :1]), last_token=(ids[:, -1:], dy[:, -1:]),
        without_first=(ids[:, 1:], dy[:, 1:]), without_last=(ids[:, :-1], dy[:, :-1]),
        shifted_ids=(np.roll(ids, -1, axis=1), dy), late_ids=(np.roll(ids, 1, axis=1), dy),
        next_id=((ids + 1) % v, dy), reversed_dy=(ids, dy[:, ::-1]), other_sequence=(ids, np.roll(dy, 1, axis=0)), id_before=((ids - 1) % v, dy),
    )  # fmt: skip
    flat_ids, flat = ids.reshape(-1), dy.reshape(-1, dy.shape[-1])
    dw, overwritten, once = np.zeros((3, *w.shape))
    np.add.at(dw, flat_ids, flat)
    overwritten[flat_ids] = flat
    first = np.unique(flat_ids, return_index=True)[1]
    once[flat_ids[first]] = flat[first]
    counts = np.maximum(1, np.bincount(flat_ids, minlength=v))[:, None]
    zero = dw.copy()
    zero[:1] = 0
    return m.pick(
        dw, overwritten=overwritten, first_kept=once, averaged=dw / counts, over_tokens=dw / flat_ids.size,
        padding=zero, negated=-dw, sum_everywhere=flat.sum(axis=0) + 0 * dw, weighted=dw * w, times_count=dw * counts,
        over_batch=dw / len(dy), over_length=dw / dy.shape[1], over_vocabulary=dw / v,
        root_count=dw / np.sqrt(counts),
    )  # fmt: skip


_OF_LOOKUP = {
    "first_sequence": "only the first sequence of the batch counts.",
    "last_sequence": "only the last sequence of the batch counts.",
    "first_token": "only the first position of each sequence counts.",
    "last_token": "only the last position of each sequence counts.",
    "without_first": "the first position of each sequence is left out.",
    "without_last": "the last position of each sequence is left out.",
    "shifted_ids": "the ids are shifted by one position: row ids[t] gets dy[t].",
    "late_ids": "the ids are one position late (shifted): row ids[t] gets dy[t].",
    "reversed_dy": "dy is taken in reverse order of the positions: row ids[t] gets dy[t].",
    "other_sequence": "dy is taken of another sequence of the batch than the ids.",
    "next_id": "every gradient goes to the next row (id + 1): off by one.",
    "id_before": "every gradient goes to the row before (id − 1): off by one.",
    "overwritten": "repeated tokens overwrite each other: only the last occurrence counts, they must accumulate (np.add.at).",
    "first_kept": "of repeated tokens only the first occurrence counts: they must accumulate.",
    "averaged": "the gradients of a repeated token are averaged by its count: they must be summed.",
    "root_count": "the gradients of a repeated token are divided by the root of its count: they must be summed.",
    "times_count": "the gradients of a repeated token are multiplied by its count.",
    "over_tokens": "dw is divided by the number of tokens, a mean: it is a sum.",
    "over_batch": "dw is divided by the batch size: it is a sum.",
    "over_length": "dw is divided by the number of positions T: it is a sum.",
    "over_vocabulary": "dw is divided by the size V of the vocabulary: it is a sum.",
    "padding": "row 0 gets no gradient, as if token id 0 were padding.",
    "negated": "dw of the lookup has the wrong sign.",
    "sum_everywhere": "every row gets the sum of all dy: row v gets those of its own tokens only.",
    "weighted": "dw is multiplied by the table w: a lookup is linear, ∂y/∂w is 1.",
}


def _embedding(g: Given, m: Wrong) -> Outputs:
    dw = scattered(g.ids, g.dy, g.w, m)
    used = np.zeros((len(g.w), 1))
    used[g.ids.reshape(-1)] = 1
    return {"dw": m.pick(
        dw, plus_w=dw + g.w, rows_of_dy=lambda: g.dy, used_plus_w=dw + used * g.w, stacked=lambda: g.dy.reshape(-1, g.dy.shape[-1]),
    )}  # fmt: skip


def _places(g: Given, want: Outputs) -> dict[str, dict[str, Array]]:
    counts = np.bincount(g.ids.reshape(-1), minlength=len(g.w))
    return {"dw": {
        "in rows of tokens that come more than once": np.broadcast_to((counts > 1)[:, None], g.w.shape),
        "in rows of tokens that do not come at all": np.broadcast_to((counts == 0)[:, None], g.w.shape),
        "in the row of token 0": only(np.ones(g.w.shape), 0, 0) > 0,
    }}  # fmt: skip


EMBEDDING = of_op(
    "embedding",
    params=True,
    title="the gradient of a table of rows that were looked up",
    outputs="dw",
    cases=_CASES,
    formula=_embedding,
    aliases=("embedding", "embedding_bwd"),
    numbers=_numbers,
    places=_places,
    hints=(
        "Which rows of w does the loss depend on, and how often?",
        "A token that comes three times has three gradients for one row: what happens to them?",
    ),
    mistakes=_OF_LOOKUP | {
        "plus_w": "the table w itself is in dw: begin with zeros.",
        "used_plus_w": "the rows of w that were looked up are in dw: begin with zeros.",
        "rows_of_dy": "dy is handed on unchanged: dw has a row for each token of the vocabulary.",
        "stacked": "it is dy, a row for each position: dw has a row for each token of the vocabulary.",
    },
)  # fmt: skip


def tied_embedding_bwd(dx: Array, dlogits: Array, ids: Array, n: Array, w: Array) -> Array:
    """Gradient of a table that is embedding and head at once.

    Forward   x = w[ids];  … blocks and final norm …  n;  logits = n·wᵀ
    Backward  dw = embedding_bwd(dx) + dlogitsᵀ·n: a weight used twice gets the sum of both gradients
    Shapes    dx, n [N, T, C], dlogits [N, T, V], ids [N, T], w [V, C] -> dw [V, C]
    """
    lookup = ops.embedding_bwd_params(dx, ops.EmbeddingRes(ids), w)
    head, _ = ops.linear_bwd_params(dlogits, ops.LinearRes(n), w)
    return lookup + head


def _tied_case(name: str, note: str, z: Sizes, change: Any = None) -> Case:
    def draw(rng: np.random.Generator) -> Args:
        args = OPS["embedding"].sample(rng, z, np.float64)
        args = change(args) if change else args
        dx, n = rng.standard_normal((2, z.n, z.t, z.c))
        dlogits = rng.standard_normal((z.n, z.t, z.v)) / z.v
        return {"dx": dx, "dlogits": dlogits, "ids": args["ids"], "n": n, "w": args["w"]}

    return Case(name, note, draw)


def _tied(g: Given, m: Wrong) -> Outputs:
    lookup = m.pick(scattered(g.ids, g.dx, g.w, m), lookup_of_n=_plain(g.ids, g.n, g.w), lookup_twice=2 * _plain(g.ids, g.dx, g.w))  # fmt: skip
    dlogits, n = g.dlogits.reshape(-1, g.dlogits.shape[-1]), g.n.reshape(-1, g.n.shape[-1])
    embedded, dx = g.w[g.ids].reshape(n.shape), g.dx.reshape(n.shape)
    head = dlogits.T @ n
    head = m.pick(
        head, head_of_embedding=dlogits.T @ embedded, head_of_dx=dlogits.T @ dx, head_mean=head / len(n),
        head_twice=2 * head, head_negated=-head, head_last=g.dlogits[:, -1].T @ g.n[:, -1],
        head_first_sequence=g.dlogits[0].T @ g.n[0], head_used=head * _used(g),
        head_shifted=g.dlogits[:, 1:].reshape(-1, dlogits.shape[1]).T @ g.n[:, :-1].reshape(-1, n.shape[1]),
    )  # fmt: skip
    dw = m.pick(
        lookup + head, no_head=lookup, no_lookup=head, half=(lookup + head) / 2,
        product=lookup * head, lookup_replaces=np.where(_used(g) > 0, lookup, head),
        larger=np.where(abs(lookup) > abs(head), lookup, head), plus_w=lookup + head + g.w,
    )  # fmt: skip
    return {"dw": m.pick(dw, transposed=lambda: dw.T)}


def _plain(ids: Array, dy: Array, w: Array) -> Array:
    dw = np.zeros_like(w)
    np.add.at(dw, ids, dy)
    return dw


def _used(g: Given) -> Array:
    used = np.zeros((len(g.w), 1))
    used[g.ids.reshape(-1)] = 1
    return used


TIED = Exercise(
    name="tied_embedding_bwd",
    title="a table that is embedding and head at once",
    function=tied_embedding_bwd,
    about=(tied_embedding_bwd,),
    named=named_outputs(("dw",)),
    cases=tuple(_tied_case(*case) for case in _CASES),
    formula=_tied,
    aliases=("tied_embedding", "tied", "tied_bwd"),
    numbers=_numbers,
    places=_places,
    given=(
        "dx       gradient of the embedded tokens      n   what the head read\n"
        "dlogits  gradient of the logits               w   the table"
    ),
    hints=(
        "The same w is used at both ends of the model: two gradients arrive at it.",
        "One comes through the lookup (a scatter-add of dx), one through the head (a linear layer's dw).",
    ),
    mistakes={key: f"in the lookup's part, {text}" for key, text in _OF_LOOKUP.items()} | {
        "lookup_of_n": "the lookup's part is formed with n where dx belongs.",
        "lookup_twice": "the lookup's gradient is counted twice.",
        "head_of_embedding": "the head's part is formed with the embedded tokens w[ids] where n, the head's input, belongs.",
        "head_of_dx": "the head's part is formed with dx where n belongs.",
        "head_mean": "the head's part is averaged over the rows, divided by their number: it is a sum.",
        "head_twice": "the head's gradient is counted twice.",
        "head_negated": "the head's gradient has the wrong sign: it is subtracted.",
        "head_last": "the head's part is of the last position only.",
        "head_first_sequence": "the head's part is of the first sequence only.",
        "head_used": "the head's part reaches only the rows that were looked up: every row of w makes a logit.",
        "head_shifted": "the head's part is shifted: n[t] belongs to dlogits[t].",
        "no_head": "the head's gradient is dropped: w is used twice, so both gradients are added.",
        "no_lookup": "the lookup's gradient is dropped: w is used twice, so both gradients are added.",
        "half": "the two gradients are averaged (1/2): they are added.",
        "product": "the two gradients are multiplied (a product): they are added.",
        "lookup_replaces": "in rows that were looked up the head's gradient is overwritten: both are added.",
        "larger": "the larger of the two gradients is taken: they are added.",
        "plus_w": "the table w itself is in dw.",
        "transposed": "dw is transposed: it has the shape of w.",
    },
)  # fmt: skip

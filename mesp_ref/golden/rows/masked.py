"""masked_attention: causal attention within a window, and of several documents in a row."""

from typing import Any

import numpy as np

from mesp_ref import ops
from mesp_ref.ops import Array
from mesp_ref.registry import attention, cases
from mesp_ref.registry.cases import Change, OpCase
from mesp_ref.registry.row import Golden, OpSpec
from mesp_ref.registry.sizes import Args, Sizes
from mesp_ref.registry.twins import Namespace

SQUARE = Sizes(n=2, t=7, past=0, g=2, share=2, d=4)


def first_keys(positions: Any, window: int | None, tokens: Any) -> Any:
    """The first key that each token sees, [N or 1, T]: of its document, and of its window.

    tokens    0 … T − 1, an array of the kind wanted
    positions [N, T], of each token in its document: 0 where one begins; None where there is one
    window    keys that a token sees at most, its own included; None for all
    """
    first = tokens[None] * 0 if positions is None else tokens[None] - positions
    if window is None:
        return first
    begin = tokens[None] - (window - 1)
    inside = begin > first
    return begin * inside + first * (1 - 1 * inside)


def _first(q: Array, positions: Array | None, window: int | None) -> Array:
    found: Array = first_keys(positions, window, np.arange(q.shape[1]))
    return found


def forward(
    q: Array, k: Array, v: Array, positions: Array | None = None, *,
    window: int | None = None, scale: float | None = None,
) -> tuple[Array, ops.AttentionRes]:  # fmt: skip
    """The engine's attention, which is told the first key of each query."""
    return ops.attention(q, k, v, first=_first(q, positions, window), scale=scale)


def sample(rng: np.random.Generator, z: Sizes, dtype: Any) -> Args:
    args = attention.sample(rng, z, dtype)
    return {n: args[n] for n in "qkv"} | {"q": args["q"] * 0.75, "positions": None}


def equation(
    q: Array, k: Array, v: Array, positions: Array | None = None,
    window: Any = None, scale: Any = None,
) -> Array:  # fmt: skip
    """attention whose query i sees the keys j of its document with i − window < j ≤ i"""
    first = np.empty(q.shape[:2], int)
    for n, i in np.ndindex(*first.shape):
        seen = [j for j in range(i + 1) if window is None or i - j < window]
        if positions is not None:
            seen = [j for j in seen if i - j <= positions[n, i]]
        first[n, i] = seen[0]
    return attention.equation(q, k, v, first, scale)


def output_magnitude(
    q: Array, k: Array, v: Array, positions: Any = None, window: Any = None, scale: Any = None
) -> Array:
    return attention.output_magnitude(q, k, v, _first(q, positions, window), scale)


def torch_twin(
    torch: Any, q: Any, k: Any, v: Any, positions: Any = None, window: Any = None, scale: Any = None
) -> Any:
    first = first_keys(positions, window, torch.arange(q.shape[1]))
    return attention.torch_twin(torch, q, k, v, first, scale)


def functional_twin(
    fw: Namespace, q: Any, k: Any, v: Any, positions: Any = None, window: Any = None,
    scale: Any = None,
) -> Any:  # fmt: skip
    first = first_keys(positions, window, fw.xp.array(np.arange(q.shape[1])))
    return attention.functional_twin(fw, q, k, v, first, scale)


def documents(*lengths: tuple[int, ...]) -> Change:
    """Rows of documents of these lengths."""
    positions = np.array([[i for n in row for i in range(n)] for row in lengths])
    return lambda args: args | {"positions": positions}


def within(window: int, *lengths: tuple[int, ...], scale: float | None = None) -> Change:
    """A window, over documents where there are any."""

    def change(args: Args) -> Args:
        args = documents(*lengths)(args) if lengths else args
        return args | {"window": window} | ({"scale": scale} if scale else {})

    return change


CASES = (
    OpCase("window", "a window of 3 keys, the own included", SQUARE, within(3)),
    OpCase("window_of_one", "a window of 1: p = 1, dq = dk = 0", SQUARE, within(1)),
    OpCase("window_as_long", "a window of T keys hides none", SQUARE, within(7)),
    OpCase("window_scaled", "a window of 4, scores times 0.375 (Gemma's query_pre_attn_scalar)",
           SQUARE._replace(g=1, share=3), within(4, scale=0.375)),
    OpCase("documents", "three documents, of 3, 1 and 3 tokens, beside two, of 5 and 2", SQUARE,
           documents((3, 1, 3), (5, 2))),
    OpCase("one_document", "a row of one document beside one of seven", SQUARE,
           documents((7,), (1,) * 7)),
    OpCase("documents_in_a_window", "documents of 5 and 2, and of 1 and 6, in a window of 3",
           SQUARE._replace(g=1, share=2), within(3, (5, 2), (1, 6))),
    OpCase("documents_large_scores", "scores of hundreds, two documents", SQUARE,
           lambda args: cases.times(q=16.0, k=8.0)(documents((4, 3), (2, 5))(args)), cases.WIDE),
)  # fmt: skip

ROW = OpSpec(
    name="masked_attention",
    forward=forward,
    backward=ops.attention_bwd,
    activations=("q", "k", "v"),
    constants=("positions",),
    attributes=("window", "scale"),
    optional=("positions",),
    sample=sample,
    reduction_length=attention.ROW.reduction_length,
    equation=equation,
    magnitude=attention.magnitude,
    golden=Golden(
        cases=CASES,
        roundings={"y": 5, "dq": 8, "dk": 8, "dv": 5},
        forward_length=lambda z: z.d + z.t + z.past,
        output_magnitude=output_magnitude,
        torch=torch_twin,
        functional=functional_twin,
    ),
)

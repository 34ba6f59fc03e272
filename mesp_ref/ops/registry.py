"""One row per operation: what every check, vector, mutant and table iterates over.

Adding an op is one file in `ops` and one row here. A tiled op is a row of its own that names the
`oracle` of the plain op: the same mathematics, another order of summation.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mesp_ref import lean as tiled
from mesp_ref import ops
from mesp_ref.ops import IGNORED, Array

Args = dict[str, Any]


class Sizes(NamedTuple):
    """Axis lengths of an op case, under the letters used everywhere. All defaults differ."""

    n: int = 2  # batch
    t: int = 5  # tokens
    past: int = 3  # earlier keys in a cache: Tk = t + past
    c: int = 7  # hidden
    g: int = 3  # key/value heads
    share: int = 2  # query heads that share one of them: H = g·share
    d: int = 4  # head size, even
    f: int = 9  # MLP width, or a layer's output
    v: int = 11  # vocabulary
    r: int = 6  # LoRA rank

    @property
    def h(self) -> int:
        """Query heads."""
        return self.g * self.share


@dataclass(frozen=True)
class OpSpec:
    """What the world needs to know about one op.

    The arguments of `forward` are named in five kinds: `activations`, LoRA matrices and
    `parameters` have gradients; `constants` (ids, labels, angles) and `attributes` (eps, s) have
    none. `backward` returns the gradients of activations and LoRA matrices in that order,
    `backward_params` those of the parameters; both take again, by name, what they need.

    sample(rng, sizes, dtype)   arguments of one case, ordinary in magnitude, B ≠ 0, a label ignored
    reduction_length(sizes)     the longest sum in the backward: k of the rounding bounds
    droppable                   residual fields that may be None: the backward rebuilds them
    optional                    arguments that may be None
    oracle                      name of the forward in verify.equations
    """

    name: str
    forward: Callable[..., tuple[Array, Any]]
    sample: Callable[[np.random.Generator, Sizes, Any], Args]
    reduction_length: Callable[[Sizes], int]
    oracle: str
    backward: Callable[..., Any] | None = None
    backward_params: Callable[..., Any] | None = None
    activations: tuple[str, ...] = ()
    lora: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    droppable: tuple[str, ...] = ()

    @property
    def differentiable(self) -> tuple[str, ...]:
        """Arguments that have a gradient, in the order of `gradients`."""
        return self.activations + self.lora + self.parameters

    def gradients(self, dy: Array, res: Any, args: Args) -> dict[str, Array]:
        """Every gradient by argument name; an optional argument that is None has none.

        Raises ValueError for a gradient of what is None, and for none of what is not.
        """
        found: dict[str, Array] = {}
        for function, names in (
            (self.backward, self.activations + self.lora),
            (self.backward_params, self.parameters),
        ):
            if function is not None:
                result = function(dy, res, **again(function, args))
                found |= zip(names, result if isinstance(result, tuple) else (result,), strict=True)
        for name, grad in found.items():
            if (grad is None) != (args[name] is None):
                raise ValueError(
                    f"{self.name}: {name}: argument and gradient must be None together"
                )
        return {name: found[name] for name in self.differentiable if found[name] is not None}

    def vjp(self, dy: Array, args: Args) -> dict[str, Array]:
        """Forward, then every gradient."""
        return self.gradients(dy, self.forward(**args)[1], args)


def again(backward: Callable[..., Any], args: Args) -> Args:
    """The arguments that a backward takes again, besides the cotangent and the residuals."""
    names = list(inspect.signature(backward).parameters)[2:]
    return {name: args[name] for name in names if name in args}


def _normal(rng: np.random.Generator, dtype: Any, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(dtype)


def _linear(rng: np.random.Generator, z: Sizes, dtype: Any) -> Args:
    x, w = _normal(rng, dtype, z.n, z.t, z.c), _normal(rng, dtype, z.f, z.c)
    return {"x": x, "w": w, "b": _normal(rng, dtype, z.f)}


def _lora_linear(rng: np.random.Generator, z: Sizes, dtype: Any) -> Args:
    A, B = _normal(rng, dtype, z.r, z.c), _normal(rng, dtype, z.f, z.r)
    return _linear(rng, z, dtype) | {"A": A, "B": B, "s": 0.75}


def _rmsnorm(rng: np.random.Generator, z: Sizes, dtype: Any) -> Args:
    x, w = _normal(rng, dtype, z.n, z.t, z.c), _normal(rng, dtype, z.c)
    return {"x": x, "w": w, "eps": 1e-2}  # large enough that a misplaced eps shows


def _rope(rng: np.random.Generator, z: Sizes, dtype: Any) -> Args:
    cos, sin = ops.rope_tables(z.past, z.past + z.t, z.d, 100.0, np.dtype(dtype))
    return {"x": _normal(rng, dtype, z.n, z.t, z.h, z.d), "cos": cos, "sin": sin}


def _causal_softmax(rng: np.random.Generator, z: Sizes, dtype: Any) -> Args:
    return {"s": _normal(rng, dtype, z.n, z.h, z.t, z.t + z.past)}


def _attention(rng: np.random.Generator, z: Sizes, dtype: Any) -> Args:
    keys = z.n, z.t + z.past, z.g, z.d
    q = _normal(rng, dtype, z.n, z.t, z.h, z.d)
    return {"q": q, "k": _normal(rng, dtype, *keys), "v": _normal(rng, dtype, *keys)}


def _swiglu(rng: np.random.Generator, z: Sizes, dtype: Any) -> Args:
    gate = _normal(rng, dtype, z.n, z.t, z.f)
    return {"gate": gate, "up": _normal(rng, dtype, z.n, z.t, z.f)}


def _embedding(rng: np.random.Generator, z: Sizes, dtype: Any) -> Args:
    ids = rng.integers(0, (z.v + 1) // 2, (z.n, z.t))  # half the table: some rows repeat
    return {"ids": ids, "w": _normal(rng, dtype, z.v, z.c)}


def _labels(rng: np.random.Generator, z: Sizes, rows: int) -> Array:
    labels = rng.integers(0, z.v, rows)
    labels[::3] = IGNORED
    return labels


def _cross_entropy(rng: np.random.Generator, z: Sizes, dtype: Any) -> Args:
    rows = z.n * z.t
    return {"logits": _normal(rng, dtype, rows, z.v), "labels": _labels(rng, z, rows)}


def _lm_loss(rng: np.random.Generator, z: Sizes, dtype: Any) -> Args:
    x, w = _normal(rng, dtype, z.n, z.t, z.c), _normal(rng, dtype, z.v, z.c)
    return {"x": x, "w": w, "labels": _labels(rng, z, z.n * z.t).reshape(z.n, z.t)}


def _tiled_mlp(rng: np.random.Generator, z: Sizes, dtype: Any) -> Args:
    args: Args = {"x": _normal(rng, dtype, z.n, z.t, z.c)}
    for letter, (out, into) in {"g": (z.f, z.c), "u": (z.f, z.c), "d": (z.c, z.f)}.items():
        args[f"w{letter}"] = _normal(rng, dtype, out, into)
        args[f"A{letter}"] = _normal(rng, dtype, z.r, into)
        args[f"B{letter}"] = _normal(rng, dtype, out, z.r)
    return args | {"s": 0.25, "width": 2}


_ROWS = (
    OpSpec(
        "linear", ops.linear, _linear, lambda z: max(z.f, z.n * z.t), "linear",
        ops.linear_bwd, ops.linear_bwd_params,
        activations=("x",), parameters=("w", "b"), optional=("b",),
    ),
    OpSpec(
        "lora_linear", ops.lora_linear, _lora_linear,
        lambda z: max(z.f + z.r, z.n * z.t), "lora_linear",
        ops.lora_linear_bwd, ops.lora_linear_bwd_params,
        activations=("x",), lora=("A", "B"), parameters=("w", "b"), attributes=("s",),
        optional=("b",), droppable=("h",),
    ),
    OpSpec(
        "rmsnorm", ops.rmsnorm, _rmsnorm, lambda z: max(z.c, z.n * z.t), "rmsnorm",
        ops.rmsnorm_bwd, ops.rmsnorm_bwd_params,
        activations=("x",), parameters=("w",), attributes=("eps",),
    ),
    OpSpec(
        "rope", ops.rope, _rope, lambda z: 2, "rope", ops.rope_bwd,
        activations=("x",), constants=("cos", "sin"),
    ),
    OpSpec(
        "causal_softmax", ops.causal_softmax, _causal_softmax,
        lambda z: z.t + z.past, "causal_softmax", ops.causal_softmax_bwd,
        activations=("s",),
    ),
    OpSpec(
        "attention", ops.attention, _attention,
        lambda z: max(z.t + z.past, z.t * z.share) + z.d, "attention", ops.attention_bwd,
        activations=("q", "k", "v"),
    ),
    OpSpec(
        "swiglu", ops.swiglu, _swiglu, lambda z: 1, "swiglu", ops.swiglu_bwd,
        activations=("gate", "up"), droppable=("silu",),
    ),
    OpSpec(
        "embedding", ops.embedding, _embedding, lambda z: z.n * z.t, "embedding",
        backward_params=ops.embedding_bwd_params,
        parameters=("w",), constants=("ids",),
    ),
    OpSpec(
        "cross_entropy", ops.cross_entropy, _cross_entropy, lambda z: z.v, "cross_entropy",
        ops.cross_entropy_bwd,
        activations=("logits",), constants=("labels",),
    ),
    OpSpec(
        "lm_loss", ops.lm_loss, _lm_loss, lambda z: max(z.v, z.n * z.t) + z.c, "lm_loss",
        ops.lm_loss_bwd, ops.lm_loss_bwd_params,
        activations=("x",), parameters=("w",), constants=("labels",), attributes=("width",),
        droppable=("dx",),
    ),
    OpSpec(
        "tiled_attention", tiled.attention,
        lambda rng, z, dtype: _attention(rng, z, dtype) | {"tile": 2},
        lambda z: max(z.t + z.past, z.t * z.share) + z.d, "attention", tiled.attention_bwd,
        activations=("q", "k", "v"), attributes=("tile",),
    ),
    OpSpec(
        "tiled_lm_loss", ops.lm_loss,  # in several tiles
        lambda rng, z, dtype: _lm_loss(rng, z, dtype) | {"width": 2},
        lambda z: max(z.v, z.n * z.t) + z.c, "lm_loss",
        ops.lm_loss_bwd, ops.lm_loss_bwd_params,
        activations=("x",), parameters=("w",), constants=("labels",), attributes=("width",),
        droppable=("dx",),
    ),
    OpSpec(
        "tiled_mlp", tiled.mlp, _tiled_mlp,
        lambda z: max(2 * z.f + 2 * z.r, z.n * z.t, z.c) + z.c + z.r, "mlp",
        tiled.mlp_bwd, tiled.mlp_bwd_params,
        activations=("x",), lora=("Ag", "Bg", "Au", "Bu", "Ad", "Bd"),
        parameters=("wg", "wu", "wd"), attributes=("s", "width"),
    ),
)  # fmt: skip

OPS: dict[str, OpSpec] = {row.name: row for row in _ROWS}

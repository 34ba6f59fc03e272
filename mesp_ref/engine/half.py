"""What both halves of a block share: y = x + f(norm(x)), the seven projections, residuals to take."""

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

from mesp_ref import ops
from mesp_ref.engine.adapter import tensor_name
from mesp_ref.engine.layer import Layer
from mesp_ref.ops import NOTHING, Array

Gradients: TypeAlias = dict[str, Array]  # by tensor name
Forward: TypeAlias = Callable[..., tuple[Array, Any]]  # f(n, layer, *, drop) -> y, residuals
Backward: TypeAlias = Callable[..., tuple[Array, Gradients]]  # f_bwd(dy, n, res, layer, *, params)
Kept = TypeVar("Kept")

_H = frozenset({"h"})


class Residuals:
    """What a forward leaves for its backward: each field is taken at its last use and dies there.

    A field that was dropped, or is taken, reads as None.
    """

    def __init__(self, **fields: Any):
        vars(self).update(fields)

    def keep(self, drop: frozenset[str], **fields: Any) -> None:
        """Set the fields that `drop` does not name."""
        vars(self).update({name: value for name, value in fields.items() if name not in drop})

    def take(self, name: str) -> Any:
        return vars(self).pop(name, None)


def copied(res: Kept) -> Kept:
    """The same arrays in containers of their own: what is taken from the one stays in the other."""
    if isinstance(res, Residuals):
        return type(res)(**copied(vars(res)))
    if isinstance(res, dict):
        return {name: copied(value) for name, value in res.items()}  # type: ignore[return-value]
    return [copied(r) for r in res] if isinstance(res, list) else res  # type: ignore[return-value]


def norm(part: str, x: Array, layer: Layer) -> Array:
    """One of the block's norms."""
    y, _ = ops.rmsnorm(x, layer.weight(part), eps=layer.config.rms_norm_eps)
    layer.show(part, y)
    return y


def norm_bwd(
    part: str, dy: Array, x: Array, layer: Layer, *, params: bool = False
) -> tuple[Array, Gradients]:
    """VJP of a norm: dx, and with `params` the gradient of its weight."""
    layer.show(f"{part}.grad", dy)
    r, w, eps, grads = ops.RmsNormRes(x), layer.weight(part), layer.config.rms_norm_eps, Gradients()
    if params:
        grads[f"{layer.name(part)}.weight"] = ops.rmsnorm_bwd_params(dy, r, w, eps=eps)
    return ops.rmsnorm_bwd(dy, r, w, eps=eps), grads


class SublayerRes(Residuals):
    """Residuals of sublayer."""

    x: Array | None = None  # [N, T, C], input of the norm
    n: Array | None = None  # [N, T, C], its output; None once dropped: rebuilt from x
    inside: Any = None  # residuals of f
    y: Array | None = None  # [N, T, C], output of f where a norm follows it


def sublayer(
    x: Array, layer: Layer, half: int, f: Forward, *, drop: frozenset[str] = NOTHING
) -> tuple[Array, SublayerRes]:
    """A half of a block, f, with its norm and its sum: y = x + f(norm(x)); Gemma has one after f, too.

    half      ATTENTION_NORM or MLP_NORM: which norms of the block are meant
    Shapes    x [N, T, C] -> y [N, T, C]
    Drop      "x", "n", "y", and what f can do without
    """
    before, after = layer.config.traits.norms[half]
    n = norm(before, x, layer)
    y, inside = f(n, layer, drop=drop)
    res = SublayerRes(inside=inside)
    res.keep(drop, x=x, n=n)
    if after:
        res.keep(drop, y=y)
        y = norm(after, y, layer)
    return x + y, res


def sublayer_bwd(
    dy: Array, res: SublayerRes, layer: Layer, half: int, f_bwd: Backward, *, params: bool = False
) -> tuple[Array, Gradients]:
    """VJP of sublayer: dx = dy + norm_bwd(f_bwd(dy)), and the gradients of its LoRA matrices.

    Shapes    dy [N, T, C] -> dx [N, T, C]; with `params` the gradients of every weight, too
    Empties   `res`
    """
    x, n, df, last = res.take("x"), res.take("n"), dy, Gradients()
    before, after = layer.config.traits.norms[half]
    if n is None:
        n, _ = ops.rmsnorm(x, layer.weight(before), eps=layer.config.rms_norm_eps)
    if after:
        df, last = norm_bwd(after, dy, res.take("y"), layer, params=params)
    dn, grads = f_bwd(df, n, res.take("inside"), layer, params=params)
    del n, df
    dx, first = norm_bwd(before, dn, x, layer, params=params)
    del dn
    return dy + dx, grads | first | last


def project(part: str, x: Array, layer: Layer, h: Gradients | None = None) -> Array:
    """One of the seven projections, with its LoRA branch where the adapter has one.

    Keeps     h = x·Aᵀ in the dictionary `h`, under the name of the projection
    """
    w, b, pair = layer.weight(part), layer.bias(part), layer.pair(part)
    if pair is None:
        y, _ = ops.linear(x, w, b)
    else:
        y, r = ops.lora_linear(x, w, b, *pair, s=layer.scale, drop=_H if h is None else NOTHING)
        if h is not None and r.h is not None:
            h[part] = r.h
            layer.show(f"{part}.h", r.h)
    layer.show(part, y)
    return y


def project_bwd(
    part: str, dy: Array, x: Array, layer: Layer, h: Gradients | None = None,
    *, params: bool = False,
) -> tuple[Array, Gradients]:  # fmt: skip
    """VJP of a projection: dx, and the gradients of A and B (and of W and b with `params`).

    h is taken from the dictionary, and rebuilt from x where it is not there.
    """
    layer.show(f"{part}.grad", dy)
    grads: Gradients = {}
    module, w, b, pair = layer.name(part), layer.weight(part), layer.bias(part), layer.pair(part)
    if pair is None:
        dx = ops.linear_bwd(dy, ops.LinearRes(x), w, b)
    else:
        r = ops.LoraLinearRes(x, h.pop(part, None) if h else None)
        dx, dA, dB = ops.lora_linear_bwd(dy, r, w, b, *pair, s=layer.scale)
        grads[tensor_name(module, "A")], grads[tensor_name(module, "B")] = dA, dB
    if params:  # the LoRA branch adds nothing to the base weight's gradient
        grads[f"{module}.weight"], db = ops.linear_bwd_params(dy, ops.LinearRes(x), w, b)
        if db is not None:
            grads[f"{module}.bias"] = db
    return dx, grads

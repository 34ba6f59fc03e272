"""Mistakes of fused ops: what is left out or exchanged between the ops that they join."""

from collections.abc import Callable, Sequence

import numpy as np

from mesp_ref.golden.mistakes import lora
from mesp_ref.golden.mistakes.rest import MLP, adapted, without
from mesp_ref.golden.mistakes.sites import only
from mesp_ref.golden.mistakes.variant import variant
from mesp_ref.golden.plain import Plain
from mesp_ref.ops import Array

QKV = tuple(f"self_attn.{c}_proj" for c in "qkv")


def at_each(parts: tuple[str, ...]) -> list[type[Plain]]:
    """Mistakes of a layer in one of several layers; and where it has no adapter."""
    rows: tuple[type[Plain], ...] = (
        lora.NoFrozenWeight,
        lora.NoLoraPath,
        lora.NoScaleInBackward,
        lora.NoBranchForward,
        *lora.SCALES,
        *lora.BACKWARDS,
        *lora.TRANSPOSED,
        *lora.BASE,
    )
    found = [adapted(f"LoRA is missing on {part.split('.')[1]}: no adapter there", (part,))
             for part in parts]  # fmt: skip
    return found + [only(mistake, (part,)) for mistake in rows for part in parts]


def ordered(order: Sequence[int]) -> type[Plain]:
    """q, k and v side by side in another order, forward and backward."""
    names = ", ".join("qkv"[i] for i in order)

    def side_by_side(self: Plain, parts: list[Array]) -> Array:
        return np.concatenate([parts[i] for i in order], axis=-1)

    def apart(self: Plain, dy: Array, sizes: list[int]) -> list[Array]:
        ends = np.cumsum([sizes[i] for i in order])[:-1]
        found = dict(zip(order, np.split(dy, ends, axis=-1), strict=True))
        return [found[i] for i in range(len(sizes))]

    return variant(
        f"y holds {names} in this order: exchanged", side_by_side=side_by_side, apart=apart
    )


def fan(sentence: str, term: str) -> type[Plain]:
    """The first of two gradients that meet is left out."""
    return variant(
        sentence, add=lambda self, what, a, b: b if what == term else Plain.add(self, what, a, b)
    )


OF_QKV: tuple[type[Plain], ...] = (
    *(without(f"dx lacks the part of {part.split('.')[1]}", part) for part in QKV[1:]),
    fan("dx lacks the part of q_proj", QKV[1]),
    *(ordered(order) for order in ((1, 0, 2), (0, 2, 1), (2, 1, 0), (1, 2, 0), (2, 0, 1))),
    *at_each(QKV),
)

OF_MLP: tuple[type[Plain], ...] = (
    without("dx lacks the part of up_proj", "up_proj"),
    fan("dx lacks the part of gate_proj", "up_proj"),
    *at_each(MLP),
)


def summed(
    sentence: str, a: Callable[[Array, Array], Array], n: Callable[[Array, Array], Array]
) -> type[Plain]:
    """a(x, f) in place of the sum, n(x, f) of what is normalised; gradients stay right."""

    def join(self: Plain, what: str, x: Array, f: Array) -> Array:
        return (n if "normalised" in what else a)(x, f)

    return variant(sentence, join=join)


def linear(sentence: str, a: tuple[float, float], n: tuple[float, float]) -> type[Plain]:
    """a₁·x + a₂·f in place of the sum, n₁·x + n₂·f of what is normalised, and their gradients."""

    def join(self: Plain, what: str, x: Array, f: Array) -> Array:
        c = n if "normalised" in what else a
        return c[0] * x + c[1] * f

    def add(self: Plain, what: str, dn: Array, da: Array) -> Array:
        i = int(what.endswith("to f"))
        return n[i] * dn + a[i] * da

    return variant(sentence, join=join, add=add)


OF_ADD_NORM: tuple[type[Plain], ...] = (
    variant(
        "the sum's own gradient is missing: dx and df are the norm's alone, the residual path is cut",
        add=lambda self, what, dn, da: dn,
    ),
    variant(
        "df lacks the sum's own gradient",
        add=lambda self, what, dn, da: dn if what.endswith("to f") else dn + da,
    ),
    variant(
        "dx lacks the sum's own gradient",
        add=lambda self, what, dn, da: dn + da if what.endswith("to f") else dn,
    ),
    variant("dx and df lack the norm's gradient", add=lambda self, what, dn, da: da),
    linear("x is added twice, forward and backward", (2, 1), (2, 1)),
    linear("f is added twice, forward and backward", (1, 2), (1, 2)),
    linear("f is subtracted: a wrong sign", (1, -1), (1, -1)),
    linear("the norm of x is taken, without f", (1, 1), (1, 0)),
    linear("the norm of f is taken, without x", (1, 1), (0, 1)),
    linear("x is missing in the sum: the residual path is left out", (0, 1), (1, 1)),
    linear("f is missing in the sum", (1, 0), (1, 1)),
    linear("x is missing in the sum and in the norm: no residual path", (0, 1), (0, 1)),
    summed("x is missing in the sum's forward: the residual is left out", lambda x, f: f, np.add),
    summed("f is missing in the sum's forward", lambda x, f: x, np.add),
    variant(
        "y holds the sum and then its norm: exchanged",
        side_by_side=lambda self, parts: np.concatenate(parts[::-1], axis=-1),
        apart=lambda self, dy, sizes: Plain.apart(self, dy, sizes)[::-1],
    ),
    variant(
        "y holds the sum and then its norm: exchanged, in the forward",
        side_by_side=lambda self, parts: np.concatenate(parts[::-1], axis=-1),
    ),
)

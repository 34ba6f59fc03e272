"""Mistakes of linear layers and their LoRA branch."""

from collections.abc import Callable
from typing import Any

import numpy as np

from mesp_ref.golden.mistakes.variant import variant
from mesp_ref.golden.plain import Plain, flat
from mesp_ref.ops import Array


class NoFrozenWeight(Plain):
    """dx of a LoRA layer without dy·W: the frozen weight's term is missing"""

    def add(self, what: str, a: Array, b: Array) -> Array:
        return a if what == "frozen weight" else super().add(what, a, b)


class NoLoraPath(Plain):
    """dx of a LoRA layer without dh·A: the adapter's term is missing"""

    def lora_bwd(self, dy: Array, x: Array, w: Array, A: Array, B: Array) -> tuple[Array, ...]:
        _, dA, dB = super().lora_bwd(dy, x, w, A, B)
        return self.linear_bwd(dy, w), dA, dB


class NoScaleInBackward(Plain):
    """the LoRA scale alpha/rank is missing in the backward"""

    def lora_bwd(self, dy: Array, x: Array, w: Array, A: Array, B: Array) -> tuple[Array, ...]:
        _, dA, dB = super().lora_bwd(dy, x, w, A, B)
        return dy @ (w + B @ A), dA / self.scale(), dB / self.scale()


class AlphaForScale(Plain):
    """the LoRA scale is alpha instead of alpha/rank, forward and backward"""

    def scale(self) -> float:
        return self.set.alpha


class UnitScale(Plain):
    """the LoRA scale is 1 instead of alpha/rank, forward and backward"""

    def scale(self) -> float:
        return 1.0


class RootScale(Plain):
    """the LoRA scale is alpha/√rank (rsLoRA) instead of alpha/rank, forward and backward"""

    def scale(self) -> float:
        return self.set.alpha / self.set.rank**0.5


class ScaledTwice(Plain):
    """the LoRA scale is applied twice to dB"""

    def lora_bwd(self, dy: Array, x: Array, w: Array, A: Array, B: Array) -> tuple[Array, ...]:
        dx, dA, dB = super().lora_bwd(dy, x, w, A, B)
        return dx, dA, dB * self.scale()


class UnscaledA(Plain):
    """the LoRA scale is missing in dA"""

    def lora_bwd(self, dy: Array, x: Array, w: Array, A: Array, B: Array) -> tuple[Array, ...]:
        dx, dA, dB = super().lora_bwd(dy, x, w, A, B)
        return dx, dA / self.scale(), dB


class NoBranch(Plain):
    """the LoRA branch is missing, forward and backward: the adapter does nothing"""

    def scale(self) -> float:
        return 0.0


class NoBranchForward(Plain):
    """the LoRA branch is missing in the forward"""

    def lora(self, x: Array, w: Array, b: Array | None, A: Array, B: Array) -> Array:
        return self.linear(x, w, b)


def scales(sentence: str, of: Callable[[float, float, float], float]) -> list[type[Plain]]:
    """The scale of (s, alpha, rank) everywhere, in the forward, in the backward."""

    def scale(self: Plain) -> float:
        return of(self.set.scale, self.set.alpha, self.set.rank)

    def forward(self: Plain, x: Array, w: Array, b: Array | None, A: Array, B: Array) -> Array:
        return self.linear(x, w, b) + scale(self) * (x @ A.T @ B.T)

    def backward(
        self: Plain, dy: Array, x: Array, w: Array, A: Array, B: Array
    ) -> tuple[Array, ...]:
        _, dA, dB = Plain.lora_bwd(self, dy, x, w, A, B)
        s, factor = scale(self), scale(self) / self.scale()
        return dy @ w + s * (dy @ B @ A), dA * factor, dB * factor

    return [
        variant(f"the LoRA scale is {sentence}, forward and backward", scale=scale),
        variant(f"the LoRA scale is {sentence}, in the forward", lora=forward),
        variant(f"the LoRA scale is {sentence}, in the backward", lora_bwd=backward),
    ]


SCALES: tuple[type[Plain], ...] = (
    UnitScale,
    AlphaForScale,
    RootScale,
    *scales("applied twice, s² instead of s", lambda s, a, r: s * s),
    *scales("1/s, divided instead of multiplied", lambda s, a, r: 1 / s),
    *scales("1/rank, without alpha", lambda s, a, r: 1 / r),
    *scales("alpha/rank², divided by the rank twice", lambda s, a, r: s / r),
    *scales("rank/alpha, upside down", lambda s, a, r: r / a),
    *scales("twice what it should be", lambda s, a, r: 2 * s),
    *scales("√s", lambda s, a, r: abs(s) ** 0.5),
    *scales("1 instead of alpha/rank", lambda s, a, r: 1.0)[1:],
    *scales("alpha instead of alpha/rank", lambda s, a, r: a)[1:],
    *scales("alpha/√rank (rsLoRA) instead of alpha/rank", lambda s, a, r: a / r**0.5)[1:],
)


def gradients(sentence: str, change: Callable[..., tuple[Array, ...]]) -> type[Plain]:
    """change(plain, dx, dA, dB, dy, x, w, A, B) in place of the right dx, dA and dB."""

    def lora_bwd(
        self: Plain, dy: Array, x: Array, w: Array, A: Array, B: Array
    ) -> tuple[Array, ...]:
        return change(self, *Plain.lora_bwd(self, dy, x, w, A, B), dy, x, w, A, B)

    return variant(sentence, lora_bwd=lora_bwd)


def _s(plain: Plain) -> float:
    return plain.set.scale


BACKWARDS = (
    gradients("the LoRA scale is missing in dB", lambda p, dx, dA, dB, *a: (dx, dA, dB / _s(p))),
    gradients(
        "the LoRA scale is missing in dA and dB",
        lambda p, dx, dA, dB, *a: (dx, dA / _s(p), dB / _s(p)),
    ),
    gradients(
        "the LoRA scale is applied twice to dA", lambda p, dx, dA, dB, *a: (dx, dA * _s(p), dB)
    ),
    gradients(
        "the LoRA scale is applied twice to dA and dB",
        lambda p, dx, dA, dB, *a: (dx, dA * _s(p), dB * _s(p)),
    ),
    gradients(
        "the LoRA scale is missing in dA and applied twice to dB (1/s and s)",
        lambda p, dx, dA, dB, *a: (dx, dA / _s(p), dB * _s(p)),
    ),
    gradients(
        "the LoRA scale is applied twice to dA and missing in dB (s and 1/s)",
        lambda p, dx, dA, dB, *a: (dx, dA * _s(p), dB / _s(p)),
    ),
    gradients(
        "the LoRA scale is missing in the adapter's term of dx",
        lambda p, dx, dA, dB, dy, x, w, A, B: (dy @ w + dy @ B @ A, dA, dB),
    ),
    gradients(
        "the LoRA scale is applied twice in the adapter's term of dx",
        lambda p, dx, dA, dB, dy, x, w, A, B: (dy @ w + _s(p) ** 2 * (dy @ B @ A), dA, dB),
    ),
    gradients(
        "A and B treated as constants: dA and dB are 0",
        lambda p, dx, dA, dB, *a: (dx, 0 * dA, 0 * dB),
    ),
    gradients("dA is 0: no gradient goes through B", lambda p, dx, dA, dB, *a: (dx, 0 * dA, dB)),
    gradients("dB is 0", lambda p, dx, dA, dB, *a: (dx, dA, 0 * dB)),
    gradients(
        "the frozen weight's term of dx is scaled like the adapter's",
        lambda p, dx, dA, dB, dy, x, w, A, B: (_s(p) * (dy @ w + dy @ B @ A), dA, dB),
    ),
    gradients(
        "dx without the frozen weight and unscaled: dy·B·A",
        lambda p, dx, dA, dB, dy, x, w, A, B: (dy @ B @ A, dA, dB),
    ),
    gradients(
        "dA and dB added to the weights instead of written alone",
        lambda p, dx, dA, dB, dy, x, w, A, B: (dx, dA + A, dB + B),
    ),
    *(
        gradients(
            f"{names} of LoRA averaged over {what} instead of summed: divided by {symbol}",
            lambda p, dx, dA, dB, dy, x, w, A, B, f=f: (dx, dA / f(x, A), dB / f(x, A)),
        )
        for names in ("dA and dB",)
        for what, symbol, f in (
            ("rows", "the number of rows", lambda x, A: x[..., 0].size),
            ("the batch", "N, the batch", lambda x, A: len(x)),
            ("tokens", "T, the tokens", lambda x, A: x.shape[-2]),
            ("the rank", "the rank", lambda x, A: len(A)),
        )
    ),
    gradients(
        "dA and dB of the LoRA twice as large: accumulated twice",
        lambda p, dx, dA, dB, *a: (dx, 2 * dA, 2 * dB),
    ),
    gradients("dA and dB with their sign turned", lambda p, dx, dA, dB, *a: (dx, -dA, -dB)),
)


def updated(rate: float) -> type[Plain]:
    """dx after a step of plain gradient descent on A and B."""

    def change(
        p: Plain, dx: Array, dA: Array, dB: Array, dy: Array, x: Array, w: Array, A: Array, B: Array
    ) -> tuple[Array, ...]:
        return dy @ w + _s(p) * (dy @ (B - rate * dB) @ (A - rate * dA)), dA, dB

    return gradients(f"dx formed with A and B after their update (rate {rate:g})", change)


def other_a(read: Callable[[Array], Array], sentence: str, names: str) -> list[type[Plain]]:
    """A or B (or both) read in another order, in the layer and in its gradient."""

    def turn(name: str, a: Array) -> Array:
        return read(a) if name in names else a

    def lora(self: Plain, x: Array, w: Array, b: Array | None, A: Array, B: Array) -> Array:
        return Plain.lora(self, x, w, b, turn("A", A), turn("B", B))

    def lora_bwd(
        self: Plain, dy: Array, x: Array, w: Array, A: Array, B: Array
    ) -> tuple[Array, ...]:
        return Plain.lora_bwd(self, dy, x, w, turn("A", A), turn("B", B))

    def written(
        self: Plain, dy: Array, x: Array, w: Array, A: Array, B: Array
    ) -> tuple[Array, ...]:
        dx, dA, dB = lora_bwd(self, dy, x, w, A, B)
        return dx, *(
            np.ascontiguousarray(d.T).reshape(d.shape) if n in names else d
            for n, d in (("A", dA), ("B", dB))
        )

    return [
        variant(sentence, lora=lora, lora_bwd=lora_bwd),
        variant(sentence, lora=lora, lora_bwd=written),
    ]


def columns(a: Array) -> Array:
    """The stored numbers read as the transpose."""
    return a.reshape(a.shape[::-1]).T


TRANSPOSED = (
    *other_a(columns, "A is read column by column: stored transposed, [in, R]", "A"),
    *other_a(columns, "B is read column by column: stored transposed, [R, out]", "B"),
    *other_a(columns, "A and B are read column by column: stored transposed", "AB"),
)

DROPOUT = tuple(
    variant(
        f"dropout left on in the LoRA branch: its factor 1/(1 − {p}) alone",
        scale=lambda self, p=p: self.set.scale / (1 - p),
    )
    for p in (0.05, 0.1, 0.2, 0.5)
)


# Rows that a gradient of weights may be summed over by mistake: the name, and the mask of [N, T].
def _last_whole(tile: int) -> Callable[[Array], Array]:
    return lambda i: i < i.size // tile * tile


ROWS: tuple[tuple[str, Callable[[Array], Array]], ...] = (
    (
        "of the last token only: not summed over positions",
        lambda i: i % i.shape[1] == i.shape[1] - 1,
    ),
    ("of the first token only: not summed over positions", lambda i: i % i.shape[1] == 0),
    ("of the first sequence of the batch only", lambda i: i < i.shape[1]),
    (
        "of the last sequence of the batch only: overwritten, not summed",
        lambda i: i >= i.size - i.shape[1],
    ),
    ("of the last row only: overwritten, not summed", lambda i: i == i.size - 1),
    ("of the first row only", lambda i: i == 0),
    ("without the last token of each sequence", lambda i: i % i.shape[1] != i.shape[1] - 1),
    ("without the first token of each sequence", lambda i: i % i.shape[1] != 0),
    ("without the last row", lambda i: i != i.size - 1),
    ("without the first row", lambda i: i != 0),
    *(
        (f"without the tail of rows behind the last whole tile of {tile}", _last_whole(tile))
        for tile in (2, 4, 8, 16, 32, 64, 128, 256)
    ),
)


def of_rows(words: str, mask: Callable[[Array], Array], which: str) -> type[Plain]:
    """dA and dB, or the gradients of the base weights, of some rows only."""

    def kept(dy: Array) -> Array:
        index = np.arange(dy[..., 0].size).reshape(-1, dy.shape[-2] if dy.ndim > 1 else 1)
        rows: Array = dy * mask(index).reshape(dy.shape[:-1])[..., None]
        return rows

    def lora_bwd(
        self: Plain, dy: Array, x: Array, w: Array, A: Array, B: Array
    ) -> tuple[Array, ...]:
        dx, dA, dB = Plain.lora_bwd(self, dy, x, w, A, B)
        _, rows_a, rows_b = Plain.lora_bwd(self, kept(dy), x, w, A, B)
        return dx, rows_a if which != "dB" else dA, rows_b if which != "dA" else dB

    def linear_params(self: Plain, dy: Array, x: Array) -> tuple[Array, Array]:
        (dw, db), (rows_w, rows_b) = (
            Plain.linear_params(self, dy, x),
            Plain.linear_params(self, kept(dy), x),
        )
        return rows_w if which != "db" else dw, rows_b if which != "dw" else db

    steps: dict[str, Any] = {"lora_bwd": lora_bwd}
    names = {"": "LoRA gradients", "dA": "dA of LoRA", "dB": "dB of LoRA"}
    if which in ("base", "dw", "db"):
        steps, names = (
            {"linear_params": linear_params},
            {"base": "dw and db", "dw": "dw", "db": "db"},
        )
    if which == "all":
        steps, names = (
            {"lora_bwd": lora_bwd, "linear_params": linear_params},
            {"all": "gradients of weights"},
        )
    return variant(f"{names[which]} {words}", **steps)


def params(sentence: str, change: Callable[..., tuple[Array, Array]]) -> type[Plain]:
    """change(dw, db, dy, x) in place of the right dw and db."""

    def linear_params(self: Plain, dy: Array, x: Array) -> tuple[Array, Array]:
        return change(*Plain.linear_params(self, dy, x), dy, x)

    return variant(sentence, linear_params=linear_params)


def no_bias(self: Plain, x: Array, w: Array, b: Array | None) -> Array:
    return Plain.linear(self, x, w, None)


BASE = (
    variant("the bias is missing in the forward", linear=no_bias),
    variant(
        "the bias is missing, forward and backward: db is 0",
        linear=no_bias,
        linear_params=lambda self, dy, x: (
            Plain.linear_params(self, dy, x)[0],
            0 * dy[(0,) * (dy.ndim - 1)],
        ),
    ),
    variant(
        "the bias is added twice in the forward",
        linear=lambda self, x, w, b: Plain.linear(self, x, w, None if b is None else 2 * b),
    ),
    variant(
        "the bias is subtracted in the forward",
        linear=lambda self, x, w, b: Plain.linear(self, x, w, None if b is None else -b),
    ),
    variant(
        "the bias is multiplied by the LoRA scale",
        linear=lambda self, x, w, b: Plain.linear(
            self, x, w, None if b is None else self.set.scale * b
        ),
    ),
    variant(
        "the frozen weight is read column by column: stored transposed",
        linear=lambda self, x, w, b: Plain.linear(self, x, columns(w), b),
        linear_bwd=lambda self, dy, w: Plain.linear_bwd(self, dy, columns(w)),
    ),
    variant(
        "the frozen weight is read column by column in the forward: stored transposed",
        linear=lambda self, x, w, b: Plain.linear(self, x, columns(w), b),
    ),
    variant(
        "the frozen weight is read column by column in the backward: stored transposed",
        linear_bwd=lambda self, dy, w: Plain.linear_bwd(self, dy, columns(w)),
    ),
    params(
        "db averaged over rows instead of summed: divided by their number",
        lambda dw, db, dy, x: (dw, db / len(flat(dy))),
    ),
    params(
        "dw averaged over rows instead of summed: divided by their number",
        lambda dw, db, dy, x: (dw / len(flat(dy)), db),
    ),
    params(
        "dw and db averaged over rows instead of summed: divided by their number",
        lambda dw, db, dy, x: (dw / len(flat(dy)), db / len(flat(dy))),
    ),
    params(
        "dw averaged over the batch instead of summed: divided by N",
        lambda dw, db, dy, x: (dw / len(dy), db),
    ),
    params(
        "db averaged over the batch instead of summed: divided by N",
        lambda dw, db, dy, x: (dw, db / len(dy)),
    ),
    params(
        "dw and db averaged over the batch instead of summed: divided by N",
        lambda dw, db, dy, x: (dw / len(dy), db / len(dy)),
    ),
)

ROW_MISTAKES: tuple[type[Plain], ...] = tuple(
    of_rows(words, mask, which)
    for words, mask in ROWS
    for which in ("", "dA", "dB", "base", "dw", "db", "all")
)
KNOWN: tuple[type[Plain], ...] = (
    NoFrozenWeight,
    NoLoraPath,
    NoScaleInBackward,
    ScaledTwice,
    UnscaledA,
    NoBranch,
    NoBranchForward,
    *SCALES,
    *BACKWARDS,
    *TRANSPOSED,
    *DROPOUT,
    *BASE,
    *ROW_MISTAKES,
    *(updated(rate) for rate in (1e-3, 1e-2, 0.05, 0.1, 1.0)),
)
LastTokenOnly = of_rows(*ROWS[0], "")
FirstSequenceOnly = of_rows(*ROWS[2], "")

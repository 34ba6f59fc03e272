"""Mistakes of embeddings, of weights in few bits, of optimisers and of a block's paths."""

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np

from mesp_ref.golden.mistakes.variant import variant
from mesp_ref.golden.plain import Arrays, Plain, Weights
from mesp_ref.ops import Array

# -- embedding ---------------------------------------------------------------------------------


def table(
    sentence: str,
    dw: Callable[[Array, Array, Array], Array],
    y: Callable[[Array, Array], Array] | None = None,
) -> type[Plain]:
    """dw(dy [rows, C], ids [rows], w) and y(w, ids) in place of the right ones."""
    steps: dict[str, Any] = {
        "embed_bwd": lambda self, dy, ids, w: dw(dy.reshape(-1, dy.shape[-1]), ids.reshape(-1), w)
    }
    if y:
        steps["embed"] = lambda self, w, ids: y(w, ids)
    return variant(sentence, **steps)


def added(dy: Array, ids: Array, w: Array) -> Array:
    dw = np.zeros_like(w)
    np.add.at(dw, ids, dy)
    return dw


def written(dy: Array, ids: Array, w: Array) -> Array:
    dw = np.zeros_like(w)
    for i, row in zip(ids, dy, strict=True):
        dw[i] = row
    return dw


def occurrences(ids: Array, w: Array) -> Array:
    return np.maximum(1, np.bincount(ids, minlength=len(w)))[:, None]


EMBEDDING: tuple[type[Plain], ...] = (
    table("rows of a token that repeats overwrite each other: the last one stays", written),
    table(
        "rows of a token that repeats: only the first one counts, the others are not added",
        lambda dy, ids, w: written(dy[::-1], ids[::-1], w),
    ),
    table(
        "rows of a token that repeats are averaged over its occurrences instead of summed",
        lambda dy, ids, w: added(dy, ids, w) / occurrences(ids, w),
    ),
    table(
        "rows of a token that repeats are divided by √occurrences",
        lambda dy, ids, w: added(dy, ids, w) / occurrences(ids, w) ** 0.5,
    ),
    table(
        "token id 0 is taken as padding: its row has no gradient",
        lambda dy, ids, w: added(dy * (ids > 0)[:, None], ids, w),
    ),
    table(
        "embeddings multiplied by √C (Gemma's convention)",
        lambda dy, ids, w: added(dy, ids, w) * w.shape[1] ** 0.5,
        lambda w, ids: w[ids] * w.shape[1] ** 0.5,
    ),
    table(
        "embeddings multiplied by √C (Gemma's convention), in the backward only",
        lambda dy, ids, w: added(dy, ids, w) * w.shape[1] ** 0.5,
    ),
    table(
        "embeddings multiplied by √C (Gemma's convention), in the forward only",
        added,
        lambda w, ids: w[ids] * w.shape[1] ** 0.5,
    ),
    table(
        "token ids one too small: the row before",
        lambda dy, ids, w: added(dy, (ids - 1) % len(w), w),
        lambda w, ids: w[(ids - 1) % len(w)],
    ),
    table(
        "token ids one too large: the next row",
        lambda dy, ids, w: added(dy, (ids + 1) % len(w), w),
        lambda w, ids: w[(ids + 1) % len(w)],
    ),
    table(
        "token ids one too small in the backward: the row before",
        lambda dy, ids, w: added(dy, (ids - 1) % len(w), w),
    ),
    table(
        "token ids one too large in the backward: the next row",
        lambda dy, ids, w: added(dy, (ids + 1) % len(w), w),
    ),
    table(
        "the table's gradient is averaged over rows instead of summed",
        lambda dy, ids, w: added(dy, ids, w) / len(ids),
    ),
    variant(
        "the table's gradient is of the first sequence only",
        embed_bwd=lambda self, dy, ids, w: (
            added(dy[0], ids[0], w) if ids.ndim > 1 else added(dy, ids, w)
        ),
    ),
    variant(
        "the table's gradient is of the last sequence only",
        embed_bwd=lambda self, dy, ids, w: (
            added(dy[-1], ids[-1], w) if ids.ndim > 1 else added(dy, ids, w)
        ),
    ),
    table(
        "the table's gradient lacks the last row", lambda dy, ids, w: added(dy[:-1], ids[:-1], w)
    ),
    table("the embedding's gradient is 0", lambda dy, ids, w: np.zeros_like(w)),
)

# -- weights in few bits -----------------------------------------------------------------------


def unpacked(sentence: str, order: Callable[[Array, int], Array]) -> type[Plain]:
    """order(codes [out, words, of a word], bits)"""
    return variant(
        sentence, unpack=lambda self, words, bits: order(Plain.unpack(self, words, bits), bits)
    )


def paired(codes: Array, bits: int) -> Array:
    return codes.reshape(*codes.shape[:-1], -1, 2)[..., ::-1].reshape(codes.shape)


def halves(codes: Array, bits: int) -> Array:
    """The low nibbles of a word's bytes first, then the high ones."""
    return codes.reshape(*codes.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(codes.shape)


def split(codes: Array, bits: int) -> Array:
    """Low nibbles of all of a row's bytes first, then the high ones (GGML's order, over the row)."""
    flat = codes.reshape(len(codes), -1, 2)
    return flat.swapaxes(1, 2).reshape(codes.shape)


def grouped(group: int) -> Callable[[Array, int], Array]:
    """Low nibbles of a group first, then its high ones (GGML's order)."""

    def order(codes: Array, bits: int) -> Array:
        if codes[0].size % group:
            return codes
        return codes.reshape(len(codes), -1, group // 2, 2).swapaxes(2, 3).reshape(codes.shape)

    return order


def bytes_swapped(codes: Array, bits: int) -> Array:
    return codes.reshape(*codes.shape[:-1], 4, -1)[..., ::-1, :].reshape(codes.shape)


def decoded(sentence: str, rule: Callable[..., Array]) -> type[Plain]:
    """rule(q, s, b, half = 2^(bits − 1)) on arrays of the same shape."""

    def decode(self: Plain, codes: Array, scales: Array, biases: Array, bits: int) -> Array:
        group = codes.shape[1] // scales.shape[1]
        s, b = np.repeat(scales, group, axis=1), np.repeat(biases, group, axis=1)
        return rule(codes, s, b, 2 ** (bits - 1))

    return variant(sentence, decode=decode)


def signed(q: Array, half: int) -> Array:
    return np.where(q >= half, q - 2 * half, q)


def group_axis(order: Callable[[Array, int], Array]) -> Callable[..., Array]:
    def decode(self: Plain, codes: Array, scales: Array, biases: Array, bits: int) -> Array:
        return codes * order(scales, codes.shape[1]) + order(biases, codes.shape[1])

    return decode


QUANTISED: tuple[type[Plain], ...] = (
    unpacked("4-bit codes in the other nibble order: the high nibble first", paired),
    unpacked(
        "the codes of a word in reverse order: the first in the highest bits",
        lambda c, bits: c[..., ::-1],
    ),
    unpacked("the bytes of a word in the other order (endianness)", bytes_swapped),
    unpacked("the low nibbles of a word first, then the high ones: another nibble order", halves),
    unpacked("the low nibbles of a row first, then the high ones: another nibble order", split),
    unpacked(
        "the low nibbles of a group of 32 first, then the high ones (GGML's nibble order)",
        grouped(32),
    ),
    unpacked(
        "the low nibbles of a group of 64 first, then the high ones: another nibble order",
        grouped(64),
    ),
    decoded(
        "codes read as signed numbers (two's complement)", lambda q, s, b, h: signed(q, h) * s + b
    ),
    decoded(
        "codes read as signed numbers (two's complement), without the bias",
        lambda q, s, b, h: signed(q, h) * s,
    ),
    decoded(
        "codes around a zero point of half the range, without the bias: scale·(q − 2^(bits−1))",
        lambda q, s, b, h: (q - h) * s,
    ),
    decoded(
        "codes around a zero point of half the range, and the bias too: scale·(q − 2^(bits−1)) + bias",
        lambda q, s, b, h: (q - h) * s + b,
    ),
    decoded("the bias (zero point) of the groups is missing: scale·q", lambda q, s, b, h: q * s),
    decoded(
        "the bias of the groups is subtracted: a wrong sign, scale·q − bias",
        lambda q, s, b, h: q * s - b,
    ),
    decoded("the bias is scaled too: scale·(q + bias)", lambda q, s, b, h: (q + b) * s),
    decoded("the bias is taken as a zero point: scale·(q − bias)", lambda q, s, b, h: (q - b) * s),
    decoded("scales and biases exchanged: bias·q + scale", lambda q, s, b, h: q * b + s),
    decoded("the scale is missing: q + bias", lambda q, s, b, h: q + b),
    decoded("codes divided by the scale: q/scale + bias", lambda q, s, b, h: q / s + b),
    decoded("the codes themselves, without scale and bias", lambda q, s, b, h: q * 1.0),
    decoded("codes one too large", lambda q, s, b, h: (q + 1) * s + b),
    decoded("codes one too small", lambda q, s, b, h: (q - 1) * s + b),
    decoded("codes around half a step: scale·(q + ½) + bias", lambda q, s, b, h: (q + 0.5) * s + b),
    decoded(
        "codes centred at half the range minus ½: scale·(q − (2^bits − 1)/2)",
        lambda q, s, b, h: (q - h + 0.5) * s,
    ),
    decoded("the scale divided by the largest code", lambda q, s, b, h: q * s / (2 * h - 1) + b),
    variant(
        "scales and biases of the wrong axis of groups: strided over the row",
        decode=group_axis(lambda a, n: np.tile(a, n // a.shape[1])),
    ),
    variant(
        "scales and biases of the first group for all groups of a row",
        decode=group_axis(lambda a, n: np.repeat(a[:, :1], n, axis=1)),
    ),
    variant(
        "scales and biases of the last group for all groups of a row",
        decode=group_axis(lambda a, n: np.repeat(a[:, -1:], n, axis=1)),
    ),
    variant(
        "scales and biases of the next group",
        decode=group_axis(lambda a, n: np.repeat(np.roll(a, -1, axis=1), n // a.shape[1], axis=1)),
    ),
    variant(
        "groups' scales read column by column: the wrong axis of groups",
        decode=group_axis(
            lambda a, n: np.repeat(a.reshape(a.shape[::-1]).T, n // a.shape[1], axis=1)
        ),
    ),
    variant(
        "the scale of the first row for all rows",
        decode=group_axis(
            lambda a, n: np.repeat(np.broadcast_to(a[:1], a.shape), n // a.shape[1], axis=1)
        ),
    ),
)

# -- optimisers --------------------------------------------------------------------------------


def adamw(
    sentence: str,
    *,
    betas: Callable[[float, float], tuple[float, float]] = lambda a, b: (a, b),
    correct: str = "mv",
    eps: str = "outside",
    decay: str = "decoupled",
    step: Callable[[int], int] = lambda t: t,
    change: Callable[[Any], Any] = dict,
) -> type[Plain]:
    """One step of AdamW with one thing different."""

    def rule(self: Plain, w: Array, g: Array, state: Arrays, t: int, at: Any) -> Array:
        at, t = change(at), step(t)
        (b1, b2), lr, wd = betas(at["beta1"], at["beta2"]), at["lr"], at["weight_decay"]
        if decay == "L2":
            g = g + wd * w
        m = state["m"] = b1 * state.get("m", 0.0) + (1 - b1) * g
        v = state["v"] = b2 * state.get("v", 0.0) + (1 - b2) * g * g
        m = m / (1 - b1**t) if "m" in correct and t else m
        root = np.sqrt(
            (v / (1 - b2**t) if "v" in correct and t else v) + (at["eps"] if eps == "inside" else 0)
        )
        root = (
            root
            + {
                "outside": at["eps"],
                "inside": 0.0,
                "before": at["eps"] / (1 - b2 ** max(t, 1)) ** 0.5,
            }[eps]
        )
        shrunk = {"decoupled": w * (1 - lr * wd), "without lr": w * (1 - wd)}.get(decay, w)
        moved = shrunk - lr * m / root
        return moved * (1 - lr * wd) if decay == "after" else moved

    return variant(sentence, adamw=rule)


def first(beta: float) -> Callable[[float, float], tuple[float, float]]:
    return lambda _, b2: (beta, b2)


def second(beta: float) -> Callable[[float, float], tuple[float, float]]:
    return lambda b1, _: (b1, beta)


def with_eps(eps: float) -> Callable[[Any], Any]:
    return lambda at: {**at, "eps": eps}


def fixed(value: float) -> Callable[[float], float]:
    return lambda _: value


ADAMW: tuple[type[Plain], ...] = (
    adamw("Adam without bias correction", correct=""),
    adamw("Adam without bias correction of the second moment, v̂ = v", correct="m"),
    adamw("Adam without bias correction of the first moment, m̂ = m", correct="v"),
    adamw("weight decay added to the gradient (L2, Adam) instead of decoupled (AdamW)", decay="L2"),
    adamw("AdamW without weight decay", decay=""),
    adamw("AdamW's weight decay without the learning rate: w·(1 − wd)", decay="without lr"),
    adamw("AdamW's weight decay after the step instead of before", decay="after"),
    adamw("AdamW's betas exchanged", betas=lambda a, b: (b, a)),
    *(
        adamw(f"AdamW with beta2 = {b2:g}", betas=second(b2))
        for b2 in (0.9, 0.95, 0.98, 0.99, 0.9999)
    ),
    *(adamw(f"AdamW with beta1 = {b1:g}", betas=first(b1)) for b1 in (0.5, 0.8, 0.95, 0.99)),
    adamw("AdamW with beta1 = 0: no momentum, no first moment", betas=lambda a, b: (0.0, b)),
    adamw("AdamW counts steps from 2: its bias correction is one step late", step=lambda t: t + 1),
    adamw("AdamW counts steps from 0: its bias correction is one step early", step=lambda t: t - 1),
    adamw("AdamW's step stays 1: the bias correction of the first step for all", step=lambda t: 1),
    adamw("AdamW's eps inside the root: √(v̂ + eps)", eps="inside"),
    adamw("AdamW's eps added before the bias correction: √v + eps", eps="before"),
    *(
        adamw(f"AdamW with eps = {e:g}", change=with_eps(e))
        for e in (1e-6, 1e-5, 1e-4, 1e-3, 0.1, 0.0)
    ),
    adamw(
        "AdamW with the learning rate applied twice as large",
        change=lambda at: {**at, "lr": 2 * at["lr"]},
    ),
    adamw("AdamW with half the learning rate", change=lambda at: {**at, "lr": at["lr"] / 2}),
    adamw(
        "AdamW with ten times the weight decay",
        change=lambda at: {**at, "weight_decay": 10 * at["weight_decay"]},
    ),
    variant(
        "AdamW steps up the gradient: a wrong sign",
        adamw=lambda self, w, g, state, t, at: Plain.adamw(self, w, -g, state, t, at),
    ),
    variant("plain SGD in place of AdamW", adamw=lambda self, w, g, state, t, at: w - at["lr"] * g),
    variant(
        "the sign of the gradient (signSGD) in place of AdamW",
        adamw=lambda self, w, g, state, t, at: w - at["lr"] * np.sign(g),
    ),
    variant(
        "gradients accumulate over AdamW's steps: not set to zero between them",
        adamw=lambda self, w, g, state, t, at: Plain.adamw(self, w, piled(state, g), state, t, at),
    ),
)


def piled(state: Arrays, g: Array) -> Array:
    state["pile"] = state.get("pile", 0.0) + g
    return state["pile"]


def sgd(
    sentence: str,
    *,
    momentum: Callable[[float], float] = lambda m: m,
    damping: Callable[[float], float] = lambda m: 0.0,
    nesterov: bool = False,
    decay: str = "L2",
    first: bool = True,
    change: Callable[[Any], Any] = dict,
    sign: float = 1.0,
) -> type[Plain]:
    """One step of SGD with one thing different."""

    def rule(self: Plain, w: Array, g: Array, state: Arrays, t: int, at: Any) -> Array:
        at = change(at)
        mu, lr, wd, g = momentum(at["momentum"]), at["lr"], at["weight_decay"], sign * g
        g = g + wd * w if decay == "L2" else g
        factor = 1 - damping(at["momentum"])
        u = state["u"] = (
            mu * state["u"] + factor * g if "u" in state else (factor if first else 1.0) * g
        )
        moved = (
            w * (1 - lr * wd)
            if decay == "decoupled"
            else w * (1 - wd)
            if decay == "without lr"
            else w
        )
        return moved - lr * (g + mu * u if nesterov else u)

    return variant(sentence, sgd=rule)


SGD: tuple[type[Plain], ...] = (
    sgd("SGD without momentum", momentum=lambda m: 0.0),
    sgd("SGD's momentum damped: u ← momentum·u + (1 − momentum)·g", damping=lambda m: m),
    sgd(
        "SGD's momentum damped from the second step on: u ← momentum·u + (1 − momentum)·g",
        damping=lambda m: m,
        first=False,
    ),
    sgd("Nesterov's momentum in place of SGD's", nesterov=True),
    *(sgd(f"SGD with momentum = {m:g}", momentum=fixed(m)) for m in (0.5, 0.8, 0.95, 0.99, 0.1)),
    sgd("SGD without weight decay", decay=""),
    sgd("SGD's weight decay decoupled: w·(1 − lr·wd), outside the momentum", decay="decoupled"),
    sgd("SGD's weight decay without the learning rate: w·(1 − wd)", decay="without lr"),
    sgd("SGD steps up the gradient: a wrong sign", sign=-1.0),
    sgd("SGD with twice the learning rate, × 2", change=lambda at: {**at, "lr": 2 * at["lr"]}),
    sgd("SGD with half the learning rate", change=lambda at: {**at, "lr": at["lr"] / 2}),
    sgd(
        "SGD with ten times the weight decay",
        change=lambda at: {**at, "weight_decay": 10 * at["weight_decay"]},
    ),
    variant(
        "gradients accumulate over SGD's steps: not set to zero between them",
        sgd=lambda self, w, g, state, t, at: Plain.sgd(self, w, piled(state, g), state, t, at),
    ),
)

MEZO: tuple[type[Plain], ...] = (
    variant(
        "MeZO's slope divided by eps instead of 2·eps",
        slope=lambda self, up, down, eps: (up - down) / eps,
    ),
    variant("MeZO's slope not divided by 2·eps", slope=lambda self, up, down, eps: up - down),
    variant(
        "MeZO steps up the gradient: a wrong sign",
        slope=lambda self, up, down, eps: -(up - down) / (2 * eps),
    ),
    variant(
        "MeZO's weights are not restored: they stay at one side, θ − eps·z",
        mezo=lambda self, w, g, z, at: w - (at["lr"] * g + at["eps"]) * z,
    ),
    variant(
        "MeZO's weights are not restored: they stay at one side, θ + eps·z",
        mezo=lambda self, w, g, z, at: w - (at["lr"] * g - at["eps"]) * z,
    ),
    variant(
        "MeZO steps along the sign of z",
        mezo=lambda self, w, g, z, at: w - at["lr"] * g * np.sign(z),
    ),
    variant(
        "MeZO steps without z: the same amount in every direction",
        mezo=lambda self, w, g, z, at: w - at["lr"] * g,
    ),
    variant(
        "MeZO with twice the learning rate", mezo=lambda self, w, g, z, at: w - 2 * at["lr"] * g * z
    ),
)

# -- the paths of a block ----------------------------------------------------------------------


def without(sentence: str, term: str) -> type[Plain]:
    """One of two gradients that meet is left out."""
    return variant(
        sentence, add=lambda self, what, a, b: a if what == term else Plain.add(self, what, a, b)
    )


NoMlpResidual = without(
    "the residual path around the MLP is missing in the backward", "residual around the MLP"
)
NoAttentionResidual = without(
    "the residual path around the attention is missing in the backward",
    "residual around the attention",
)
NoUpPath = without("the gradient through up_proj is missing before the second norm", "up_proj")
NoKeyPath = without(
    "the gradient through k_proj is missing before the first norm", "self_attn.k_proj"
)
NoValuePath = without(
    "the gradient through v_proj is missing before the first norm", "self_attn.v_proj"
)


def joined(sentence: str, where: str, f: Callable[[Array, Array], Array], g: float) -> type[Plain]:
    """f(x, half) in place of x + half, and the residual's gradient times g."""

    def join(self: Plain, what: str, x: Array, half: Array) -> Array:
        return f(x, half) if where in what else Plain.join(self, what, x, half)

    def add(self: Plain, what: str, a: Array, b: Array) -> Array:
        return (
            a + g * b
            if what.startswith("residual") and where in what
            else Plain.add(self, what, a, b)
        )

    return variant(sentence, join=join, add=add)


def skipped(sentence: str, parts: tuple[str, ...], has_dw: bool = False) -> type[Plain]:
    """No norm at some parts; its weight has no gradient, or the right one."""

    def norm(self: Plain, x: Array, w: Array) -> Array:
        return x if self.at in parts else Plain.norm(self, x, w)

    def norm_bwd(self: Plain, dy: Array, x: Array, w: Array) -> Array:
        return dy if self.at in parts else Plain.norm_bwd(self, dy, x, w)

    def norm_params(self: Plain, dy: Array, x: Array, w: Array) -> Array:
        dw = Plain.norm_params(self, dy, x, w)
        return 0 * dw if self.at in parts and not has_dw else dw

    return variant(sentence, norm=norm, norm_bwd=norm_bwd, norm_params=norm_params)


def skipped_norm(*parts: str, text: str = "") -> list[type[Plain]]:
    """A norm, or several, that a backend does not have."""
    sentence = text or f"the norm {parts[0]} is skipped"
    return [skipped(sentence, parts), skipped(sentence, parts, True)]


class PostNorm(Plain):
    """the residual path starts behind the first norm instead of before it"""

    def block(self, w: Weights, x: Array) -> tuple[Array, Arrays]:
        y, res = super().block(w, x)
        res["x"] = x
        return y, res

    def join(self, what: str, x: Array, f: Array) -> Array:
        return self.trace["input_layernorm"] + f if "attention" in what else x + f

    def add(self, what: str, a: Array, b: Array) -> Array:
        if what == "self_attn.v_proj":
            return a + b + self.trace["after_attention.grad"]
        return a if what == "residual around the attention" else a + b


class Parallel(Plain):
    """the MLP reads the block's input in parallel to the attention, not its output"""

    def norm_at(self, w: Weights, part: str, x: Array) -> Array:
        if part == self.set.norms[0][0]:
            self.entered = x
        return super().norm_at(w, part, self.entered if part == self.set.norms[1][0] else x)

    def block(self, w: Weights, x: Array) -> tuple[Array, Arrays]:
        y, res = super().block(w, x)
        return y, res | {"a": x}

    def add(self, what: str, a: Array, b: Array) -> Array:
        if what == "residual around the MLP":
            self.beside = a
            return b
        return a + b + self.beside if what == "residual around the attention" else a + b


def dead(sentence: str, names: tuple[str, ...], forward: bool = False) -> type[Plain]:
    """No gradient goes through the parts named."""

    def lora_bwd(
        self: Plain, dy: Array, x: Array, w: Array, A: Array, B: Array
    ) -> tuple[Array, ...]:
        dx, dA, dB = Plain.lora_bwd(self, dy, x, w, A, B)
        return (0 * dx, 0 * dA, 0 * dB) if self.at in names else (dx, dA, dB)

    return variant(sentence, lora_bwd=lora_bwd)


ATTENTION, MLP = (
    tuple(f"self_attn.{c}_proj" for c in "qkvo"),
    tuple(f"mlp.{c}_proj" for c in ("gate", "up", "down")),
)


def into(sentence: str, parts: tuple[str, ...]) -> type[Plain]:
    """The gradient stops below the parts named: their matrices have one, what is before has not."""

    def lora_bwd(
        self: Plain, dy: Array, x: Array, w: Array, A: Array, B: Array
    ) -> tuple[Array, ...]:
        dx, dA, dB = Plain.lora_bwd(self, dy, x, w, A, B)
        return (0 * dx if self.at in parts else dx), dA, dB

    return variant(sentence, lora_bwd=lora_bwd)


def adapted(sentence: str, parts: tuple[str, ...]) -> type[Plain]:
    """LoRA is missing on the parts named."""

    def lora(self: Plain, x: Array, w: Array, b: Array | None, A: Array, B: Array) -> Array:
        return self.linear(x, w, b) if self.at in parts else Plain.lora(self, x, w, b, A, B)

    def lora_bwd(
        self: Plain, dy: Array, x: Array, w: Array, A: Array, B: Array
    ) -> tuple[Array, ...]:
        dx, dA, dB = Plain.lora_bwd(self, dy, x, w, A, B)
        return (self.linear_bwd(dy, w), 0 * dA, 0 * dB) if self.at in parts else (dx, dA, dB)

    return variant(sentence, lora=lora, lora_bwd=lora_bwd)


BLOCK: tuple[type[Plain], ...] = (
    NoMlpResidual,
    NoAttentionResidual,
    NoUpPath,
    NoKeyPath,
    NoValuePath,
    PostNorm,
    Parallel,
    *(
        mistake
        for where in ("attention", "MLP")
        for mistake in (
            joined(
                f"the residual path around the {where} is missing, forward and backward",
                where,
                lambda x, f: f,
                0.0,
            ),
            joined(
                f"the residual path around the {where} is missing in the forward",
                where,
                lambda x, f: f,
                1.0,
            ),
            joined(
                f"the residual around the {where} is added twice, forward and backward",
                where,
                lambda x, f: 2 * x + f,
                2.0,
            ),
            joined(
                f"the residual around the {where} is subtracted", where, lambda x, f: x - f, 1.0
            ),
        )
    ),
    variant(
        "the residual around the attention is added twice in the backward",
        add=lambda self, what, a, b: (
            a + 2 * b if what == "residual around the attention" else a + b
        ),
    ),
    variant(
        "the residual around the MLP is added twice in the backward",
        add=lambda self, what, a, b: a + 2 * b if what == "residual around the MLP" else a + b,
    ),
    dead("the attention's backward returns zeros: no gradient goes through it", ATTENTION),
    dead("the MLP's backward returns zeros: no gradient goes through it", MLP),
    into(
        "the MLP's gradient stops at its norm: gate and up have one, the block's input does not get it",
        MLP[:2],
    ),
    into(
        "the gradient stops at q, k and v: the block's input does not get the attention's",
        ATTENTION[:3],
    ),
    into("the gradient stops at down_proj: nothing reaches gate and up, they get zeros", MLP[2:]),
    adapted("LoRA is missing on the attention's projections: adapters on the MLP only", ATTENTION),
    adapted("LoRA is missing on the MLP's projections: adapters on the attention only", MLP),
    adapted(
        "LoRA is missing on o, gate, up and down: adapters on q, k and v only",
        (*ATTENTION[3:], *MLP),
    ),
    adapted(
        "LoRA is missing on all but q and v: adapters on q and v only",
        ("self_attn.k_proj", *ATTENTION[3:], *MLP),
    ),
    *(
        adapted(f"LoRA is missing on {' and '.join(p.split('.')[1] for p in pair)}", pair)
        for parts in (ATTENTION, MLP)
        for pair in combinations(parts, 2)
    ),
    *(
        adapted(f"LoRA is missing on {part.split('.')[1]}: no adapter there", (part,))
        for part in (*ATTENTION, *MLP)
    ),
)


def cut_above(number: int) -> type[Plain]:
    """Layers below get nothing from the layer that is cut."""
    return variant(
        f"no gradient reaches layer {number} and those below: cut off",
        cut=lambda self, n, dx: 0 * dx if n == number else dx,
    )


def model(layers: int) -> list[type[Plain]]:
    """Mistakes that need a whole model of so many layers."""
    return [*(cut_above(number) for number in range(layers)), *TIED]


TIED: tuple[type[Plain], ...] = (
    without("the tied table's gradient lacks the head's part", "head"),
    variant(
        "the tied table's gradient lacks the embedding's part",
        add=lambda self, what, a, b: b if what == "head" else Plain.add(self, what, a, b),
    ),
    *skipped_norm("model.norm"),
)

"""Mistakes of what families have of their own: norms of heads, gains, norms behind halves, tables."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from mesp_ref.engine.config import SLIDING, Qwen2Config
from mesp_ref.files.config import rope_fields
from mesp_ref.golden.mistakes import masks, norm
from mesp_ref.golden.mistakes.rest import skipped_norm
from mesp_ref.golden.mistakes.rope import THETAS
from mesp_ref.golden.mistakes.sites import only
from mesp_ref.golden.mistakes.variant import variant
from mesp_ref.golden.plain import Arrays, Plain, Setting, Weights, flat
from mesp_ref.golden.positions import frequencies, model_tables
from mesp_ref.ops import Array, RopeScaling

HEADS = ("self_attn.q_norm", "self_attn.k_norm")
GAIN = "the gain of norms is w instead of 1 + w: the 1 is forgotten"


class NormOverHeads(Plain):
    """q and k normalised over all heads together instead of head by head"""

    def inverse_rms(self, x: Array) -> Array:
        if self.at not in HEADS:
            return super().inverse_rms(x)
        return 1 / np.sqrt((x * x).mean(axis=(-2, -1), keepdims=True) + self.set.eps)

    def norm_bwd(self, dy: Array, x: Array, w: Array) -> Array:
        if self.at not in HEADS:
            return super().norm_bwd(dy, x, w)
        r, u = self.inverse_rms(x), dy * w
        return u * r - x * (u * x).mean(axis=(-2, -1), keepdims=True) * r**3


class NormAfterRope(Plain):
    """q and k are normalised behind RoPE instead of before it"""

    def turned(self, w: Weights, letter: str, x: Array) -> Array:
        part, self.at = f"self_attn.{letter}_rope", f"self_attn.{letter}_rope"
        y = self.rotate(x)
        self.heads_turned = {**getattr(self, "heads_turned", {}), (self.number, letter): y}
        return self.keep(part, self.head_norm(w, letter, y))

    def turned_back(self, w: Weights, letter: str, dy: Array, x: Array) -> Array:
        part = f"self_attn.{letter}_rope"
        dy = self.keep(f"{part}.grad", dy)
        dy = self.head_norm_back(w, letter, dy, self.heads_turned[self.number, letter])
        self.at = part
        return self.rotate_bwd(dy)


class OtherHeadNorm(Plain):
    """the norms of q and k are exchanged: each has the other's weight"""

    def head_norm(self, w: Weights, letter: str, x: Array) -> Array:
        return super().head_norm(exchanged(w, *HEADS), letter, x)

    def head_norm_back(self, w: Weights, letter: str, dy: Array, x: Array) -> Array:
        return super().head_norm_back(exchanged(w, *HEADS), letter, dy, x)


def exchanged(w: Weights, first: str, second: str) -> Arrays:
    """Weights, those of two norms under each other's names."""
    a, b = f"{first}.weight", f"{second}.weight"
    return {**w, a: w[b], b: w[a]} if a in w and b in w else dict(w)


def head_params(sentence: str, dw: Callable[[Array], Array]) -> type[Plain]:
    """dw of the norms of heads from its terms [N, T, heads, D]."""

    def norm_params(self: Plain, dy: Array, x: Array, w: Array) -> Array:
        if self.at not in HEADS:
            return Plain.norm_params(self, dy, x, w)
        return dw(dy * x * self.inverse_rms(x))

    return variant(sentence, norm_params=norm_params)


OF_HEADS: tuple[type[Plain], ...] = (
    NormOverHeads,
    NormAfterRope,
    OtherHeadNorm,
    *skipped_norm(*HEADS, text="the norms of q and k, q_norm and k_norm, are skipped"),
    *(mistake for part in HEADS for mistake in skipped_norm(part)),
    *(only(mistake, HEADS) for mistake in norm.KNOWN),
    head_params(
        "dw of q_norm and k_norm of the first head only", lambda t: flat(t[:, :, 0]).sum(axis=0)
    ),
    head_params(
        "dw of q_norm and k_norm of the last head only", lambda t: flat(t[:, :, -1]).sum(axis=0)
    ),
    head_params(
        "dw of q_norm and k_norm averaged over heads", lambda t: flat(t).sum(axis=0) / t.shape[2]
    ),
)


# -- gains -------------------------------------------------------------------------------------


def gains(
    sentence: str, forward: float, backward: float, parts: tuple[str, ...] = ()
) -> type[Plain]:
    """forward + w and backward + w in place of 1 + w, at some parts or at all."""

    def at(value: float) -> Callable[[Plain, Array], Array]:
        return lambda self, w: value + w if not parts or self.at in parts else Plain.gain(self, w)

    def norm_at(self: Plain, w: Weights, part: str, x: Array) -> Array:
        self.at = part
        return self.keep(part, self.norm(x, at(forward)(self, w[f"{part}.weight"])))

    def norm_back(self: Plain, w: Weights, part: str, dy: Array, x: Array) -> Array:
        self.at = part
        dy, gain = self.keep(f"{part}.grad", dy), at(backward)(self, w[f"{part}.weight"])
        self.keep(f"{part}.weight.grad", self.norm_params(dy, x, gain))
        return self.norm_bwd(dy, x, gain)

    return variant(sentence, norm_at=norm_at, norm_back=norm_back)


def of_gain(parts: tuple[str, ...]) -> list[type[Plain]]:
    """Mistakes of norms whose gain is 1 + w, at all of them or at one."""
    found = [
        gains(f"{GAIN}, forward and backward", 0.0, 0.0),
        gains(f"{GAIN} in the backward", 1.0, 0.0),
        gains(f"{GAIN} in the forward", 0.0, 1.0),
        gains("the gain of norms is 2 + w: the 1 of 1 + w is added twice", 2.0, 2.0),
        gains(f"{GAIN}, at q_norm and k_norm only", 0.0, 0.0, HEADS),
        gains(f"{GAIN} in the backward, at q_norm and k_norm only", 1.0, 0.0, HEADS),
    ]
    for part in parts:
        found.append(gains(f"{GAIN}, at {part} only", 0.0, 0.0, (part,)))
        found.append(gains(f"{GAIN} in the backward, at {part} only", 1.0, 0.0, (part,)))
    return found


# -- norms behind the halves -------------------------------------------------------------------


class NormOfSum(Plain):
    """the norm behind a half is taken of the sum: norm(x + f) instead of x + norm(f)"""

    def __init__(self, setting: Setting):
        super().__init__(setting)
        self.sums, self.passed = dict[tuple[int, int], Array](), dict[int, Array]()

    def behind(self, w: Weights, half: int, y: Array) -> Array:
        self.pending = w, half
        return y

    def join(self, what: str, x: Array, f: Array) -> Array:
        w, half = self.pending
        self.sums[self.number, half] = x + f
        return super().behind(w, half, x + f)

    def behind_back(self, w: Weights, half: int, dy: Array, y: Array) -> Array:
        self.passed[half] = super().behind_back(w, half, dy, self.sums[self.number, half])
        return self.passed[half]

    def add(self, what: str, a: Array, b: Array) -> Array:
        if what.startswith("residual"):
            return a + self.passed[int("MLP" in what)]
        return super().add(what, a, b)


def crossed(self: Plain, w: Weights) -> Arrays:
    return exchanged(w, self.set.norms[0][1], self.set.norms[1][1])


def of_behind(parts: tuple[str, ...]) -> list[type[Plain]]:
    """Mistakes of the two norms behind the halves."""
    return [
        NormOfSum,
        *(mistake for part in parts for mistake in skipped_norm(part)),
        *skipped_norm(*parts, text="the norms behind the halves are skipped, both"),
        variant(
            "the norms behind the halves are exchanged: each has the other's weight",
            behind=lambda self, w, half, y: Plain.behind(self, crossed(self, w), half, y),
            behind_back=lambda self, w, half, dy, y: Plain.behind_back(
                self, crossed(self, w), half, dy, y
            ),
        ),
    ]


# -- the embedding's factor --------------------------------------------------------------------


def embedded(
    sentence: str, forward: Callable[[float], float], backward: Callable[[float], float]
) -> type[Plain]:
    """Another factor of the embedding; both are given √C."""
    return variant(
        sentence,
        embedding=lambda self: forward(self.set.embedding),
        embedding_bwd=lambda self: backward(self.set.embedding),
    )


EMBEDDINGS: tuple[type[Plain], ...] = (
    embedded(
        "the embedding's factor √C is lost, forward and backward", lambda r: 1.0, lambda r: 1.0
    ),
    embedded("the embedding's factor √C is lost in the backward", lambda r: r, lambda r: 1.0),
    embedded("the embedding's factor √C is lost in the forward", lambda r: 1.0, lambda r: r),
    embedded("the embedding times C instead of √C", lambda r: r * r, lambda r: r * r),
    embedded("the embedding divided by √C instead of multiplied", lambda r: 1 / r, lambda r: 1 / r),
    embedded(
        "the embedding's factor √C is applied twice in the backward", lambda r: r, lambda r: r * r
    ),
)


def times_root(width: int) -> type[Plain]:
    """The factor in a family that has none."""
    return variant("the embedding times √C, as Gemma does", embedding=lambda self, r=width**0.5: r)


# -- tables of angles --------------------------------------------------------------------------


def retabled(sentence: str, change: Callable[[Setting], tuple[Any, Any]]) -> type[Plain]:
    """Other tables of all layers: change(setting) -> those of most, those of layers with a window."""

    def init(self: Plain, setting: Setting) -> None:
        (cos, sin), local = change(setting)
        Plain.__init__(self, setting._replace(cos=cos, sin=sin, local=local))

    return variant(sentence, __init__=init)


def of_angles(config: Qwen2Config, tokens: int) -> list[type[Plain]]:
    """Mistakes of a backend that computes its angles from a config."""

    def other(sentence: str, start: int = 0, **fields: Any) -> type[Plain]:
        changed = dataclasses.replace(config, **fields)
        return retabled(sentence, lambda s: model_tables(changed, tokens))

    found = [
        other(
            f"RoPE with theta = {value:,.0f} instead of {config.rope_theta:,.0f}", rope_theta=value
        )
        for value in (*THETAS, 1000.0)
        if value != config.rope_theta
    ]
    if config.rope_scaling is not None:
        found += _of_scaling(config, tokens, config.rope_scaling, other)
    return found + (_of_two(config) if SLIDING in config.layer_types else [])


def _of_scaling(
    config: Qwen2Config, tokens: int, scaling: RopeScaling, other: Callable[..., type[Plain]]
) -> list[type[Plain]]:
    def turned(setting: Setting, f: Array) -> tuple[Any, Any]:
        angle = np.arange(tokens)[:, None] * f
        return (np.cos(angle), np.sin(angle)), setting.local

    rope = rope_fields(config)
    slow = frequencies(config.head_dim, config.rope_theta, rope)
    fast = frequencies(config.head_dim, config.rope_theta, None)
    found = [
        other("RoPE without its scaling", rope_scaling=None),
        retabled(
            "RoPE's scaling applied twice", lambda s: turned(s, _scaled(slow, scaling))
        ),
        other("RoPE's scaling upside down: × factor",
              rope_scaling=scaling._replace(factor=1 / scaling.factor)),
        other("RoPE's scaling with the root of its factor",
              rope_scaling=scaling._replace(factor=scaling.factor**0.5)),
    ]  # fmt: skip
    if scaling.original is None:
        return found
    half = scaling.original // 2
    return [
        *found,
        other("RoPE's scaling applied to all frequencies alike (linear)",
              rope_scaling=RopeScaling(scaling.factor)),
        other("RoPE's scaling with its low and high frequency factors exchanged",
              rope_scaling=scaling._replace(low=scaling.high, high=scaling.low)),
        other("RoPE's scaling with half its original length",
              rope_scaling=scaling._replace(original=half)),
        retabled("RoPE's scaling turned around: kept frequencies stretched, stretched ones kept",
                 lambda s: turned(s, fast + fast / scaling.factor - slow)),
        retabled("RoPE's scaling without its smooth middle: kept there",
                 lambda s: turned(s, np.where(slow > fast / scaling.factor * 1.0001, fast, slow))),
        retabled("RoPE's scaling without its smooth middle: stretched there",
                 lambda s: turned(s, np.where(slow < fast * 0.9999, fast / scaling.factor, slow))),
    ]  # fmt: skip


def _scaled(f: Array, scaling: RopeScaling) -> Array:
    """Frequencies, scaled once more."""
    factor, original, low, high = scaling
    if original is None:
        return f / factor
    smooth = np.clip((original * f / (2 * np.pi) - low) / (high - low), 0, 1)
    found: Array = (1 - smooth) * f / factor + smooth * f
    return found


def _of_two(config: Qwen2Config) -> list[type[Plain]]:
    """Of layers that have two tables."""
    scaling = config.rope_scaling

    def stretched(setting: Setting) -> tuple[Any, Any]:
        assert setting.local
        if scaling is None:
            return (setting.cos, setting.sin), setting.local
        size = config.head_dim
        f = _scaled(frequencies(size, config.rope_local_base_freq, None), scaling)
        angle = np.arange(len(setting.cos))[:, None] * f
        return (setting.cos, setting.sin), (np.cos(angle), np.sin(angle))

    return [
        retabled(
            "RoPE's tables exchanged: layers with a window turn by the others' theta, and back",
            lambda s: (s.local, (s.cos, s.sin)),
        ),
        retabled(
            "RoPE with one theta for all: layers with a window turn by that of the others",
            lambda s: ((s.cos, s.sin), (s.cos, s.sin)),
        ),
        retabled(
            "RoPE with one theta for all: layers that see all turn by that of those with a window",
            lambda s: (s.local, s.local),
        ),
        retabled("RoPE's scaling also on layers with a window", stretched),
    ]


# -- all that a family may show ----------------------------------------------------------------


def of_blocks(config: Qwen2Config, layers: bool) -> list[type[Plain]]:
    """What the traits of a config add to the mistakes of a block, or of all layers of a model."""
    traits = config.traits
    behind = tuple(after for _, after in traits.norms if after)
    parts = (
        *(n for pair in traits.norms for n in pair if n),
        *(HEADS if traits.head_norms else ()),
    )
    found = list(OF_HEADS if traits.head_norms else ())
    found += of_gain((*parts, "model.norm") if layers else parts) if traits.gain else []
    found += of_behind(behind) if behind else []
    found += [mistake for before, _ in traits.norms for mistake in skipped_norm(before)]
    slides = SLIDING in config.layer_types
    found += masks.of_masks(False, slides, config.attention_scale is not None)
    return found + (list(masks.BY_LAYER) if slides and layers else [])


def of_models(config: Qwen2Config, tokens: int) -> list[type[Plain]]:
    """And of a whole model, which computes its angles and embeds."""
    root = list(EMBEDDINGS) if config.traits.scaled_embedding else [times_root(config.hidden_size)]
    return of_blocks(config, True) + of_angles(config, tokens) + root

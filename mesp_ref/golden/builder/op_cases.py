"""The op cases: shapes and edge cases, one line each."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mesp_ref.ops import IGNORED, Array, rope_tables
from mesp_ref.ops.registry import Args, Sizes

ALL = ("float64", "float32", "float16", "bfloat16")
WIDE = ("float64", "float32")  # values that 16 bits cannot carry through the op
NO_HALF = ("float64", "float32", "bfloat16")  # outside the range of float16

Change = Callable[[Args], Args]

USUAL = Sizes(n=2, t=4, past=2, c=6, g=2, share=2, d=4, f=5, v=9, r=3)
ONE_TOKEN = USUAL._replace(n=1, t=1, past=0)
NINE = USUAL._replace(n=1, t=9, past=0, c=7, f=3, v=6)


def _same(args: Args) -> Args:
    return args


class OpCase(NamedTuple):
    """What to draw and what to make of it."""

    op: str
    name: str
    note: str
    sizes: Sizes = USUAL
    change: Change = _same
    dtypes: tuple[str, ...] = ALL


def times(**factors: float) -> Change:
    """Arguments multiplied."""
    return lambda args: args | {name: args[name] * by for name, by in factors.items()}


def put(**values: object) -> Change:
    """Arguments replaced; a number fills an array."""

    def change(args: Args) -> Args:
        return args | {
            name: np.full_like(args[name], value) if isinstance(args[name], np.ndarray) else value
            for name, value in values.items()
        }

    return change


def without_bias(args: Args) -> Args:
    return args | {"b": None}


def at(name: str, index: object, value: object) -> Change:
    """One entry or slice of an argument replaced."""

    def change(args: Args) -> Args:
        array = args[name].copy()
        array[index] = value
        return args | {name: array}

    return change


def positions(start: int, theta: float) -> Change:
    """Angles of other positions."""

    def change(args: Args) -> Args:
        t, half = args["cos"].shape
        cos, sin = rope_tables(start, start + t, 2 * half, theta, np.dtype(np.float64))
        return args | {"cos": cos, "sin": sin}

    return change


def _ordinary_scores(args: Args) -> Args:
    return args | {"q": args["q"] * 0.75}


def _ramp(args: Args) -> Args:
    return args | {"gate": np.linspace(-80, 80, args["gate"].size).reshape(args["gate"].shape)}


def _every(name: str) -> Change:
    """Labels or ids that count up, none ignored."""

    def change(args: Args) -> Args:
        shape: Array = args[name]
        return args | {name: np.arange(shape.size).reshape(shape.shape) % 5}

    return change


_LINEAR = (
    OpCase("linear", "usual", "batch, bias, all axis lengths different"),
    OpCase("linear", "no_bias", "without a bias, as o, gate, up and down", change=without_bias),
    OpCase("linear", "one_token", "one row", ONE_TOKEN),
    OpCase("linear", "nine_tokens", "one sequence of nine", NINE),
    OpCase("linear", "one_by_one", "one input, one output", USUAL._replace(c=1, f=1)),
    OpCase("linear", "large", "x of hundreds", change=times(x=256.0)),
    OpCase("linear", "tiny", "x of 1e-4", change=times(x=2.0**-13), dtypes=NO_HALF),
    OpCase("lora_linear", "usual", "B ≠ 0, s = 0.75"),
    OpCase("lora_linear", "no_bias", "without a bias", change=without_bias),
    OpCase("lora_linear", "rank_1", "rank 1", USUAL._replace(r=1)),
    OpCase("lora_linear", "rank_above_width", "rank larger than both sides", USUAL._replace(r=8)),
    OpCase("lora_linear", "fresh", "B = 0: the output is the base's, dA exactly 0",
           change=put(B=0.0)),
    OpCase("lora_linear", "no_frozen_part", "W = 0, b = 0: the branch alone",
           change=put(w=0.0, b=0.0)),
    OpCase("lora_linear", "scale_20", "a large scale", change=put(s=20.0)),
    OpCase("lora_linear", "scale_2", "alpha 16 at rank 8", change=put(s=2.0)),
    OpCase("lora_linear", "one_token", "one row", ONE_TOKEN),
    OpCase("lora_linear", "nine_tokens", "one sequence of nine", NINE),
    OpCase("lora_linear", "tiny", "x of 1e-4", change=times(x=2.0**-13), dtypes=NO_HALF),
)  # fmt: skip

_NORM_AND_ROPE = (
    OpCase("rmsnorm", "usual", "eps = 0.01, so that a misplaced eps shows"),
    OpCase("rmsnorm", "eps_1e-6", "the eps of Qwen2.5", change=put(eps=1e-6)),
    OpCase("rmsnorm", "one_channel", "C = 1: dx nearly cancels", USUAL._replace(c=1)),
    OpCase("rmsnorm", "zero_row", "one token is 0: n = √eps", change=at("x", (0, 1), 0.0)),
    OpCase("rmsnorm", "tiny", "eps dominates x", change=times(x=2.0**-12), dtypes=NO_HALF),
    OpCase("rmsnorm", "large", "x of thousands; its square leaves float16's range",
           change=times(x=2048.0)),
    OpCase("rmsnorm", "outlier", "one channel 500 times the others",
           change=at("x", (..., 2), 500.0)),
    OpCase("rmsnorm", "negative_weight", "w < 0", change=times(w=-1.0)),
    OpCase("rmsnorm", "one_token", "one row", ONE_TOKEN),
    OpCase("rmsnorm", "nine_tokens", "one sequence of nine", NINE),
    OpCase("rope", "usual", "positions 2 to 5, theta 100"),
    OpCase("rope", "position_0", "angle 0: the identity", ONE_TOKEN),
    OpCase("rope", "one_pair", "D = 2", USUAL._replace(d=2)),
    OpCase("rope", "wide_head", "D = 8: half-split differs from neighbours", NINE._replace(d=8)),
    OpCase("rope", "far", "positions from 30,000, theta 1e6: the tables are given, not computed",
           change=positions(30_000, 1e6)),
    OpCase("rope", "quarter_turns", "theta 1: every pair turns alike", change=positions(1, 1.0)),
    OpCase("rope", "one_head", "H = 1", USUAL._replace(g=1, share=1)),
)  # fmt: skip

_ATTENTION = (
    OpCase("causal_softmax", "usual", "two earlier keys", change=times(s=0.75)),
    OpCase("causal_softmax", "square", "no cache", USUAL._replace(past=0), times(s=0.75)),
    OpCase("causal_softmax", "one_token", "p = 1, ds = 0", ONE_TOKEN),
    OpCase("causal_softmax", "equal", "equal scores: uniform over visible keys", change=put(s=1.0)),
    OpCase("causal_softmax", "large", "scores of hundreds: one key takes all",
           change=times(s=128.0), dtypes=WIDE),
    OpCase("causal_softmax", "tiny", "scores of 1e-4", change=times(s=2.0**-13), dtypes=NO_HALF),
    OpCase("attention", "usual", "H = 4 on G = 2, two earlier keys", change=_ordinary_scores),
    OpCase("attention", "square", "Tq = Tk", USUAL._replace(past=0), _ordinary_scores),
    OpCase("attention", "every_head_its_own", "H = G = 3",
           USUAL._replace(g=3, share=1, past=0), _ordinary_scores),
    OpCase("attention", "one_kv_head", "G = 1", USUAL._replace(g=1, share=3), _ordinary_scores),
    OpCase("attention", "one_token", "p = 1: dq = dk = 0", ONE_TOKEN),
    OpCase("attention", "cached", "one query, six earlier keys",
           USUAL._replace(t=1, past=6), _ordinary_scores),
    OpCase("attention", "nine_tokens", "one sequence of nine",
           NINE._replace(g=1, share=2, d=2), _ordinary_scores),
    OpCase("attention", "zero_queries", "q = 0: uniform, dk = 0", change=put(q=0.0)),
    OpCase("attention", "one_pair", "D = 2", USUAL._replace(d=2, past=0), _ordinary_scores),
    OpCase("attention", "large_scores", "scores of hundreds",
           USUAL._replace(past=0), times(q=16.0, k=8.0), WIDE),
)  # fmt: skip

_MLP_AND_HEAD = (
    OpCase("swiglu", "usual", "ordinary gates"),
    OpCase("swiglu", "saturated", "gates from −80 to 80", change=_ramp, dtypes=WIDE),
    OpCase("swiglu", "zero_gate", "gate = 0: z = 0, dgate = up/2", change=put(gate=0.0)),
    OpCase("swiglu", "large", "gates of ±8", change=times(gate=4.0)),
    OpCase("swiglu", "tiny", "gates of 1e-4", change=times(gate=2.0**-13), dtypes=NO_HALF),
    OpCase("swiglu", "one_token", "one row", ONE_TOKEN),
    OpCase("embedding", "usual", "some tokens repeat"),
    OpCase("embedding", "one_word", "one token everywhere: its row collects all",
           change=put(ids=3)),
    OpCase("embedding", "distinct", "no token repeats", USUAL._replace(n=1, t=5),
           _every("ids")),
    OpCase("embedding", "one_token", "one row", ONE_TOKEN),
    OpCase("cross_entropy", "usual", "every third label ignored"),
    OpCase("cross_entropy", "none_ignored", "every row counts", change=_every("labels")),
    OpCase("cross_entropy", "all_ignored", "loss 0, gradient exactly 0",
           change=put(labels=IGNORED)),
    OpCase("cross_entropy", "one_row", "one token", ONE_TOKEN, _every("labels")),
    OpCase("cross_entropy", "label_0_counts", "token id 0 is no padding", change=put(labels=0)),
    OpCase("cross_entropy", "confident", "logits of hundreds: softmax − onehot cancels",
           change=times(logits=64.0), dtypes=WIDE),
    OpCase("cross_entropy", "offset", "logits around 1000: the maximum must be subtracted",
           change=lambda args: args | {"logits": np.round(args["logits"]) * 8 + 1000},
           dtypes=WIDE),
    OpCase("cross_entropy", "uniform", "equal logits: loss log V", change=put(logits=0.5)),
    OpCase("lm_loss", "usual", "every third label ignored", change=times(x=0.5)),
    OpCase("lm_loss", "none_ignored", "every row counts",
           change=lambda args: _every("labels")(times(x=0.5)(args))),
    OpCase("lm_loss", "all_ignored", "loss 0, gradients exactly 0", change=put(labels=IGNORED)),
    OpCase("lm_loss", "label_0_counts", "token id 0 is no padding", USUAL._replace(n=1),
           lambda args: put(labels=0)(times(x=0.5)(args))),
    OpCase("lm_loss", "one_token", "one row", ONE_TOKEN, _every("labels")),
    OpCase("lm_loss", "confident", "logits of tens", USUAL._replace(n=1),
           times(x=8.0), WIDE),
)  # fmt: skip

OP_CASES = _LINEAR + _NORM_AND_ROPE + _ATTENTION + _MLP_AND_HEAD

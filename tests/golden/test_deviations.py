"""The causes of the scoreboard's deviations, in NumPy: a case fails with the cause and not without."""

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

from mesp_ref.golden import Suite
from mesp_ref.golden.check import judge
from mesp_ref.ops import Array

Arrays = dict[str, Array]
STORED = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def stored(x: Array, dtype: str) -> Array:
    """Numbers as `dtype` holds them, in float64 to go on with."""
    with np.errstate(over="ignore"):
        return np.asarray(x).astype(STORED[dtype]).astype(np.float64)


def sigmoid_in_16_bits(v: Arrays, dtype: str, cause: bool) -> Arrays:
    """swiglu whose sigmoid is formed in the type of its gate (tinygrad, MLX)."""
    gate, up, dy = v["gate"], v["up"], v["dy"]
    if cause:
        e = stored(np.exp2(stored(-gate * np.log2(np.e), dtype)), dtype)
        sigmoid = stored(1 / stored(1 + e, dtype), dtype)
    else:
        sigmoid = 1 / (1 + np.exp(-gate))
    dgate = dy * up * (sigmoid + gate * sigmoid * (1 - sigmoid))
    return {"y": gate * sigmoid * up, "dgate": dgate, "dup": dy * gate * sigmoid}


def rounded_products(v: Arrays, dtype: str, cause: bool) -> Arrays:
    """A product of matrices whose terms are rounded before they are summed (tinygrad)."""

    def term(x: Array) -> Array:
        return stored(x, dtype) if cause else x

    x, w, dy = v["x"], v["w"], v["dy"]
    dx = term(dy[..., :, None] * w).sum(-2)
    dw = term(dy[..., :, None] * x[..., None, :]).reshape(-1, *w.shape).sum(0)
    return {"dx": dx, "dw": dw}


def square_of_the_denominator(v: Arrays, dtype: str, cause: bool) -> Arrays:
    """silu's quotient rule with q², which leaves float32 at a gate of −47 (HIPS autograd)."""
    gate, up, dy = v["gate"], v["up"], v["dy"]
    e = np.exp(-gate)
    q = 1 + e
    square = stored(q * q, dtype) if cause else q * q
    return {"dgate": dy * up * (1 / q + gate * e / square)}


def sum_in_16_bits(v: Arrays, dtype: str, cause: bool) -> Arrays:
    """The gradients of biases, Σ dy over tokens one after the other in 16 bits (JAX)."""
    biases = {n: a for n, a in v.items() if n.startswith("b")}
    total = np.zeros(v["dy"].shape[-1])
    for row in v["dy"].reshape(-1, len(total)):
        total = stored(total + row, dtype) if cause else total + row
    ends = np.cumsum([len(a) for a in biases.values()])[:-1]
    return {f"d{n}": a for n, a in zip(biases, np.split(total, ends), strict=True)}


def cut(x: Array) -> Array:
    """TF32 as hardware reads a float32: 10 bits after the point, the other 13 cut off."""
    bits = np.asarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFFE000)
    return bits.view(np.float32).astype(np.float64)


def operands_in_tf32(v: Arrays, dtype: str, cause: bool) -> Arrays:
    """Causal attention whose products of matrices read TF32 (Triton's tl.dot on NVIDIA)."""
    read = cut if cause else np.asarray
    share, scale = v["q"].shape[2] // v["k"].shape[2], v["q"].shape[3] ** -0.5
    q, dy = (read(v[n]).transpose(0, 2, 1, 3) for n in ("q", "dy"))
    k, u = (read(v[n]).transpose(0, 2, 1, 3).repeat(share, 1) for n in "kv")
    scores = q @ k.swapaxes(2, 3) * scale
    seen = np.tri(*scores.shape[2:]) > 0
    p = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0)
    total = p.sum(-1, keepdims=True)
    y, p = read(p) @ u / total, p / total
    ds = p * (dy @ u.swapaxes(2, 3) - (y * dy).sum(-1, keepdims=True))
    ds, p = read(ds), read(p)
    dq, dk, dv = ds @ k * scale, ds.swapaxes(2, 3) @ q * scale, p.swapaxes(2, 3) @ dy
    n, _, t, d = y.shape
    dk, dv = (a.reshape(n, -1, share, t, d).sum(2) for a in (dk, dv))
    return {m: a.swapaxes(1, 2) for m, a in {"y": y, "dq": dq, "dk": dk, "dv": dv}.items()}


CAUSES: list[tuple[Callable[[Arrays, str, bool], Arrays], str, str]] = [
    (sigmoid_in_16_bits, "ops/swiglu/large", "float16"),
    (sigmoid_in_16_bits, "tile/swiglu/one_gate_a_row", "float16"),
    (sigmoid_in_16_bits, "tile/swiglu/one_gate_a_row", "bfloat16"),
    (rounded_products, "ops/linear/no_bias", "bfloat16"),
    (rounded_products, "ops/linear/nine_tokens", "bfloat16"),
    (rounded_products, "ops/linear/large", "bfloat16"),
    (square_of_the_denominator, "ops/swiglu/saturated", "float32"),
    (sum_in_16_bits, "ops/lora_linear/usual", "float16"),
    (sum_in_16_bits, "ops/lora_linear/rank_above_width", "float16"),
    (sum_in_16_bits, "ops/qkv_lora/usual", "bfloat16"),
    (sum_in_16_bits, "ops/qkv_lora/fresh", "bfloat16"),
    (sum_in_16_bits, "ops/qkv_lora/scale_2", "bfloat16"),
    (operands_in_tf32, "ops/attention/square", "float32"),
    (operands_in_tf32, "ops/attention/every_head_its_own", "float32"),
    (operands_in_tf32, "ops/attention/one_pair", "float32"),
]


@pytest.mark.parametrize(("cause", "name", "dtype"), CAUSES)
def test_the_cause_and_nothing_else_fails_the_case(
    cause: Callable[[Arrays, str, bool], Arrays], name: str, dtype: str, suite: Suite
) -> None:
    case = suite.cases[name]
    vectors = suite.read(case)
    inputs = {n: a.astype(np.float64) for n, a in vectors.inputs.items()}
    tensors = {tensor.name: tensor for tensor in case.tensors}
    for present in (True, False):
        with np.errstate(all="ignore"):
            got = {n: stored(a, dtype) for n, a in cause(inputs, dtype, present).items()}
            verdicts = [judge(tensors[n], a, vectors, dtype) for n, a in got.items()]
        assert all(verdict.passed for verdict in verdicts) is not present, verdicts


@pytest.mark.parametrize(
    ("name", "place", "got"),
    [
        ("y", (1, 3, 3, 1), 0.840137839),
        ("dq", (1, 3, 0, 0), -0.218434751),
        ("dk", (0, 3, 1, 3), 0.00714945793),
        ("dv", (1, 3, 1, 1), 0.104804829),
    ],
)
def test_a_gpu_gave_these_numbers(
    name: str, place: tuple[int, ...], got: float, suite: Suite
) -> None:
    """Triton's attention in float32 on an H200: what cut operands give, to the last digits."""
    vectors = suite.read(suite.cases["ops/attention/square"])
    made = operands_in_tf32(dict(vectors.inputs), "float32", True)[name][place]
    assert made == pytest.approx(got, rel=1e-6)
    assert made != pytest.approx(vectors.want[name][place], rel=1e-4)

"""What gradcheck says where it is hard: wrong is never passed, right never failed, the rest is said."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

import mesp_ref as mr
from mesp_ref.verify import gradcheck, gradgradcheck
from mesp_ref.verify.conventions import gradient_reversal, scaled, symmetric, zero_rows

A = np.array
RNG = np.random.default_rng(1)
X = RNG.standard_normal((40, 40))


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def softmax(x: Any) -> Any:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def softmax_bwd(dy: Any, x: Any) -> Any:
    p = softmax(x)
    return p * (dy - (dy * p).sum(-1, keepdims=True))


# Oracles of the slopes are SciPy's special functions where it has them.
STEEP: dict[str, tuple[Callable[..., Any], Callable[..., Any], np.ndarray]] = {
    "r^-12": (lambda r: r**-12 - r**-6, lambda r: -12 * r**-13 + 6 * r**-7, np.linspace(1, 2, 7)),
    "exp(1/x)": (lambda x: np.exp(1 / x), lambda x: -np.exp(1 / x) / x**2, A([0.5, 1, 2])),
    "exp(-x)": (lambda x: np.exp(-x), lambda x: -np.exp(-x), A([45.0])),
    "normal density": (
        lambda x: np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi), lambda x: -x * stats.norm.pdf(x), A([9.0]),
    ),
    "sin(1e6 x)": (lambda x: np.sin(1e6 * x), lambda x: 1e6 * np.cos(1e6 * x), A([0.3, 1.1, -2])),
    "sin(1e6 |x|)": (
        lambda x: np.sin(1e6 * np.abs(x)), lambda x: np.sign(x) * 1e6 * np.cos(1e6 * np.abs(x)),
        A([0.3, 1.1, -2]),
    ),
    "sqrt": (np.sqrt, lambda x: 0.5 / np.sqrt(x), A([1e-6, 4])),
    "log1p": (np.log1p, lambda x: 1 / (1 + x), A([1e-12, 1e-3, 1])),
    "gammaln": (special.gammaln, special.digamma, A([0.5, 2, 30])),
    "multigammaln": (
        lambda x: A([special.multigammaln(float(v), 2) for v in x]),
        lambda x: special.digamma(x) + special.digamma(x - 0.5), A([0.6, 1.7, 5]),
    ),
    "a float32 forward": (
        lambda x: np.sin(x.astype(np.float32)).astype(np.float64), np.cos, A([0.1, 2, 4]),
    ),
    "an offset": (lambda x: 1e6 + np.abs(x) * x, lambda x: 2 * np.abs(x), A([0.5, 2])),
}  # fmt: skip


@pytest.mark.parametrize("name", STEEP)
@pytest.mark.parametrize("factor", [1.0, 0.0, -1.0, 1.01])
def test_steep_functions(name: str, factor: float) -> None:
    forward, slope, x = STEEP[name]
    result = gradcheck(forward, lambda dy, x: dy * slope(x) * factor, (x,))
    assert result.passed == (factor == 1), str(result)
    assert result.verdict == ("passed" if factor == 1 else "failed"), str(result)


def test_a_saturated_function_is_inconclusive_unless_it_is_right() -> None:
    """1 − σ(40) is 0 in float64: no backward from s·(1 − s) can be right, and none is passed."""
    x = A([40.0])
    exact = gradcheck(sigmoid, lambda dy, x: dy * np.exp(-x) / (1 + np.exp(-x)) ** 2, (x,))
    assert exact.passed, str(exact)
    result = gradcheck(sigmoid, lambda dy, x: dy * sigmoid(x) * (1 - sigmoid(x)), (x,))
    assert result.verdict == "inconclusive"
    assert "Inputs nearer to 1" in str(result)
    assert not result.passed
    assert not gradcheck(sigmoid, lambda dy, x: 0 * dy, (x,)).passed


def test_random_and_noisy_forwards_are_not_repeatable() -> None:
    rng = np.random.default_rng(0)
    for forward in (
        lambda x: x * (rng.random(x.shape) < 0.5) * 2,
        lambda x: x + 1e-9 * rng.standard_normal(x.shape),
    ):
        result = gradcheck(forward, lambda dy, x: 100 * dy, (X[:4, :5],))
        assert not result.passed
        assert "not repeatable" in str(result)


@pytest.mark.parametrize("seed", range(10))
def test_one_wrong_entry_of_1600_is_seen(seed: int) -> None:
    def backward(dy: Any, x: Any) -> Any:
        dx = dy * (1 - np.tanh(x) ** 2)
        dx[-1, -1] = 0
        return dx

    result = gradcheck(np.tanh, backward, (X,), seed=seed)
    assert not result.passed
    assert "at index [39, 39]" in str(result)
    assert "of 1600 entries one by one" in str(result)


def test_outputs_without_a_gradient() -> None:
    def forward(x: Any) -> Any:
        return x.max(-1), x.argmax(-1)

    def backward(dys: Any, x: Any) -> Any:
        dx = np.zeros_like(x)
        np.put_along_axis(dx, x.argmax(-1)[..., None], dys[0][..., None], -1)
        return dx

    assert gradcheck(forward, backward, (X[:3, :4],)).passed
    assert not gradcheck(forward, lambda d, x: 2 * backward(d, x), (X[:3, :4],)).passed


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_low_precision_is_judged_in_its_own_units(dtype: Any) -> None:
    for seed in range(5):
        x = np.random.default_rng(seed).standard_normal((4, 6)).astype(dtype)
        right = gradcheck(softmax, softmax_bwd, (x,), seed=seed)
        assert right.passed, str(right)
        assert not gradcheck(softmax, lambda dy, x: softmax(x) * dy, (x,), seed=seed).passed


RIGHT: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]] = {
    "interp": (
        lambda x: np.interp(x, [0, 1, 2, 4.0], [1, 3, 2, 5.0]),
        lambda dy, x: dy * A([2, -1, 1.5])[np.searchsorted([0, 1, 2, 4.0], x) - 1], (A([0.3, 1.2, 3]),),
    ),
    "x/sqrt(4)": (lambda x: x / np.sqrt(4), lambda dy, x: dy / np.sqrt(4), (X[:2],)),
    "erf": (special.erf, lambda dy, x: dy * 2 / np.sqrt(np.pi) * np.exp(-x * x), (X[:2, :3],)),
    "xlogy": (
        special.xlogy, lambda dy, x, y: (dy * np.log(y), dy * x / y), (A([0.5, 2]), A([1.3, 0.4])),
    ),
    "float32 logits near 30": (softmax, softmax_bwd, ((30 + X[:3, :5]).astype(np.float32),)),
    "relu": (lambda x: np.maximum(x, 0), lambda dy, x: dy * (x > 0), (A([0.0, 1, -4, 0]),)),
    "relu, 1 at 0": (lambda x: np.maximum(x, 0), lambda dy, x: dy * (x >= 0), (A([0.0, 1, -4]),)),
    "abs at 0": (np.abs, lambda dy, x: dy * np.sign(x), (np.zeros((3, 3)),)),
    "sort with ties": (
        lambda x: np.sort(x, -1),
        lambda dy, x: np.take_along_axis(dy, np.argsort(np.argsort(x, -1, "stable"), -1, "stable"), -1),
        (A([[1.0, 1, 0], [2, 2, 2]]),),
    ),
    "cbrt": (np.cbrt, lambda dy, x: dy / 3 / np.cbrt(x) ** 2, (A([0.0, 1, -4]),)),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_right_ones_pass(name: str) -> None:
    forward, backward, args = RIGHT[name]
    result = gradcheck(forward, backward, args)
    assert result.passed, str(result)


@pytest.mark.parametrize("at_zero", [2.0, -0.1, np.nan])
def test_beyond_a_kinks_slopes_is_wrong(at_zero: float) -> None:
    x = A([0.0, 1, -4, 0])
    result = gradcheck(
        lambda x: np.maximum(x, 0), lambda d, x: d * np.where(x == 0, at_zero, x > 0), (x,)
    )
    assert result.verdict == "failed"


def test_minus_infinity_among_the_inputs() -> None:
    x = X[:3, :5].copy()
    x[0, 2] = x[1, :3] = -np.inf
    right = gradcheck(
        special.logsumexp, lambda dy, x: dy * softmax(x.reshape(1, -1)).reshape(x.shape), (x,)
    )
    assert right.passed, str(right)
    wrong = gradcheck(special.logsumexp, lambda dy, x: dy * softmax(x), (x,))
    assert wrong.verdict == "failed"


def test_a_forward_that_raises_near_by_gets_smaller_steps() -> None:
    def log(x: Any) -> Any:
        if (np.asarray(x, float) <= 0).any():
            raise ValueError("domain")
        return np.log(np.asarray(x, float))

    assert gradcheck(log, lambda dy, x: dy / x, (A([1e-3, 1, 5]),)).passed
    assert not gradcheck(log, lambda dy, x: dy / x**2, (A([1e-3, 1, 5]),)).passed


def cholesky_bwd(dl: Any, a: Any) -> Any:
    """Murray 2016, the symmetric one."""
    low = np.linalg.cholesky(a)
    phi = np.tril(low.T @ dl)
    phi[np.diag_indices(len(a))] /= 2
    inverse = np.linalg.inv(low)
    s = inverse.T @ phi @ inverse
    return (s + s.T) / 2


def test_conventions_pass_when_stated_and_only_then() -> None:
    spd = X[:4, :6] @ X[:4, :6].T
    unstated = gradcheck(np.linalg.cholesky, cholesky_bwd, (spd,), names=("a",))
    assert unstated.verdict == "inconclusive"
    assert "conventions={'a': symmetric}" in str(unstated)
    for factor in (1.0, 1.01):
        stated = gradcheck(
            np.linalg.cholesky, lambda d, a, f=factor: f * cholesky_bwd(d, a), (spd,), names=("a",),
            conventions={"a": symmetric},
        )  # fmt: skip
        assert stated.passed == (factor == 1), str(stated)


def test_padding_reversal_and_straight_through() -> None:
    ids = A([0, 2, 2, 1])

    def padded(dy: Any, w: Any, ids: Any) -> Any:
        dw = np.zeros_like(w)
        np.add.at(dw, ids, dy)
        dw[0] = 0
        return dw

    def look_up(w: Any, ids: Any) -> Any:
        return w[ids]

    args = X[:4, :3], ids
    said = {"w": zero_rows(0)}
    assert gradcheck(look_up, padded, args, names=("w", "i"), conventions=said).passed
    assert not gradcheck(look_up, padded, args, names=("w", "i")).passed
    said = {"w": zero_rows(1)}
    assert not gradcheck(look_up, padded, args, names=("w", "i"), conventions=said).passed

    def back(dy: Any, x: Any) -> Any:
        return -2 * dy

    x = (X[:3, :4],)
    assert gradcheck(np.copy, back, x, names="x", conventions={"x": gradient_reversal(2)}).passed
    assert not gradcheck(np.copy, back, x, names="x", conventions={"x": scaled(2)}).passed
    assert gradcheck(np.round, lambda dy, x: dy, x, surrogate=lambda x: x).passed
    assert not gradcheck(np.round, lambda dy, x: dy, x).passed
    with pytest.raises(mr.MespRefError, match="conventions: found"):
        gradcheck(np.copy, back, x, names="x", conventions={"y": symmetric})


def test_lists_dictionaries_and_none() -> None:
    def forward(p: Any, xs: Any) -> Any:
        return {"y": p["w"] * xs[0] + 0 * p["b"], "z": [xs[1] ** 2], "n": len(xs)}

    def backward(d: Any, p: Any, xs: Any) -> Any:
        return {"w": d["y"] * xs[0], "b": None}, [d["y"] * p["w"], 2 * d["z"][0] * xs[1]]

    args = {"w": X[0], "b": X[1]}, [X[2], X[3, :5]]
    result = gradcheck(forward, backward, args, names=("p", "xs"))
    assert result.passed, str(result)

    def unused(d: Any, p: Any, xs: Any) -> Any:
        return {"w": None, "b": None}, backward(d, p, xs)[1]

    wrong = gradcheck(forward, unused, args, names=("p", "xs"))
    assert "gradient of p['w']" in str(wrong)
    assert not wrong.passed


def test_double_backward() -> None:
    def first(dy: Any, x: Any) -> Any:
        return 3 * dy * x * x

    def second(ddx: Any, dy: Any, x: Any) -> Any:
        return 3 * ddx * x * x, 6 * ddx * dy * x

    assert gradgradcheck(first, second, X[0], (X[1],), names=("x",)).passed
    wrong = gradgradcheck(first, lambda g, dy, x: (second(g, dy, x)[0], g * dy), X[0], (X[1],))
    assert wrong.verdict == "failed"


def test_promotion_is_a_verdict_of_its_own() -> None:
    def backward(dy: Any, x: Any) -> Any:
        return dy * (1 - np.tanh(x) ** 2) * np.float64(1)

    result = gradcheck(np.tanh, backward, (X[:2],))
    assert result.passed
    assert result.float32 == "promoted"
    assert not gradcheck(np.tanh, backward, (X[:2],), dtypes=("float32",)).passed


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_count_in_a_narrow_type(dtype: str) -> None:
    """Ties counted in the input's own type: right in float64, 0 where the count overflows."""

    def backward(dy: Any, x: Any) -> Any:
        best = x == x.max()
        count = np.asarray(70000 if x.itemsize > 2 else np.inf).astype(x.dtype)
        return (dy * best.astype(x.dtype) / count).astype(x.dtype)

    x = np.ones(70000)
    assert gradcheck(np.max, backward, (x,), dtypes=()).passed
    result = gradcheck(np.max, backward, (x,), dtypes=(dtype,))
    assert [f.oracle for f in result.failures] == [dtype]


def test_float16_is_asked_by_default_where_the_forward_takes_it() -> None:
    x = np.ones(70000)

    def counted(dy: Any, x: Any) -> Any:
        best = x == x.max()
        return (dy * best / best.astype(x.dtype).sum(dtype=x.dtype)).astype(x.dtype)

    def exact(dy: Any, x: Any) -> Any:
        best = x == x.max()
        return (dy * (best / best.sum())).astype(x.dtype)

    assert "Right in float64, grossly wrong in float16" in str(gradcheck(np.max, counted, (x,)))
    assert gradcheck(np.max, exact, (x,)).passed

    def only_double(x: Any) -> Any:
        if np.asarray(x).dtype == np.float16:
            raise TypeError("not for float16")
        return x.max()

    assert gradcheck(only_double, counted, (x,)).passed


def test_float16_may_break_ties_in_another_order() -> None:
    def backward(dy: Any, x: Any) -> Any:
        kept = x if x.itemsize > 2 else x[::-1]  # the last of equals first
        order = np.argsort(kept, kind="stable")
        order = order if x.itemsize > 2 else len(x) - 1 - order
        return dy[np.argsort(order)]

    x = A([0.5, 0.5 + 2.0**-20, 2.0, -1.0, 2.0])  # two of which float16 makes one number
    assert gradcheck(np.sort, backward, (x,)).passed


def test_large_arrays_take_a_moment(capsys: pytest.CaptureFixture[str]) -> None:
    """Counted in calls, which no busy machine changes."""
    calls = []

    def forward(x: Any, w: Any) -> Any:
        calls.append(1)
        return x @ w

    args = RNG.standard_normal((200, 200)), RNG.standard_normal((200, 200))
    assert gradcheck(forward, lambda dy, x, w: (dy @ w.T, x.T @ dy), args).passed
    assert len(calls) < 150


def test_inside_hypothesis_what_cannot_be_judged_is_discarded() -> None:
    seen = []

    @settings(max_examples=20, database=None, deadline=None)
    @given(st.sampled_from([40.0, 1.0]))
    def judged(x: float) -> None:
        result = gradcheck(sigmoid, lambda dy, x: dy * sigmoid(x) * (1 - sigmoid(x)), (A([x]),))
        seen.append(x)
        assert result.passed

    judged()
    assert set(seen) == {1.0}


def test_a_plain_import_is_light() -> None:
    code = (
        "import sys, threading, mesp_ref.verify; from mesp_ref.verify import gradcheck\n"
        "assert callable(gradcheck) and threading.active_count() == 1\n"
        "heavy = ('engine', 'files', 'lean', 'memory', 'train', 'ops', 'api', 'golden', 'cli')\n"
        "print([m for m in sys.modules if m.startswith(tuple(f'mesp_ref.{h}' for h in heavy))\n"
        " or m.split('.')[0] in ('torch', 'jax', 'mlx', 'safetensors', 'tokenizers', 'matplotlib')])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


MODULE = """
import numpy as np
from mesp_ref.verify import gradcheck_property
def scale_bwd(dy, x, w): return dy * w, (dy * x).sum(axis=0)
@gradcheck_property(scale_bwd, "n c", "c", max_examples=5)
def scale(x, w): return x * w
def divided(dy, x): return 2 * dy * x**2 / x
pairs = [(np.square, divided, "1 1")]
sample = [(np.square, lambda dy, x: 2 * dy * x, (np.arange(3.0),))]
arrays = [(np.square, divided, np.arange(3.0))]
"""


def test_one_option_of_pytest(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODULE, encoding="utf-8")

    def run(what: str) -> str:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                   "-p", "mesp_ref.verify.pytest_plugin", "--mesp-gradcheck", what]  # fmt: skip
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    assert "1 passed" in run("mine")
    report = run("mine:pairs")
    assert "0.0]], dtype=np.float64),)" in report, report  # −0.0 as well
    assert (tmp_path / ".mesp-gradcheck" / "square.json").is_file()
    assert "1 passed" in run("mine:sample")
    assert "behind a pair, expected (forward, backward," in run("mine:arrays")
    assert "found no pair" in run("json")


def test_a_step_that_leads_past_a_tiny_number() -> None:
    """x·log(x) at 1e-300: the step of complex step is 6e-61, and log is another number there."""
    x = np.array([1e-300, 1.0, 0.3])
    right = gradcheck(lambda x: x * np.log(x), lambda dy, x: dy * (np.log(x) + 1), (x,))
    assert right.passed, right
    assert not gradcheck(lambda x: x * np.log(x), lambda dy, x: dy * np.log(x), (x,)).passed


def test_other_sizes_are_asked_unless_it_is_said() -> None:
    """A mean over all rows for one over each: right for a single row."""
    x = np.random.default_rng(3).standard_normal((1, 4))

    def centred(x: np.ndarray) -> np.ndarray:
        return x - x.mean(axis=-1, keepdims=True)

    def draft(dy: np.ndarray, x: np.ndarray) -> np.ndarray:
        return dy - dy.mean()

    assert not gradcheck(centred, draft, (x,)).passed
    assert gradcheck(centred, draft, (x,), sizes=False).passed
    assert not gradcheck(centred, draft, (np.vstack([x, 2 * x]),), sizes=False).passed


def test_float16_that_computes_in_float32_inside() -> None:
    """The mean of float16 numbers summed in float32, as kernels do; and zeros for its gradient."""
    x = np.random.default_rng(1).standard_normal(1000).astype(np.float16)

    def mean(x: np.ndarray) -> Any:
        return x.mean(dtype=np.float32).astype(x.dtype)

    def back(dy: Any, x: np.ndarray) -> np.ndarray:
        return np.full_like(x, np.float32(dy) / x.size)

    assert gradcheck(mean, back, (x,)).verdict != "failed"
    assert gradcheck(mean, back, (np.ones(1000, np.float16),)).passed
    for many in (np.ones(70_000, np.float16), np.ones(1000, np.float16)):
        assert not gradcheck(lambda x: x.max(), lambda dy, x: np.zeros_like(x), (many,)).passed


def test_ties_counted_in_float16_are_inconclusive_or_said_not_to_be_meant() -> None:
    def counted(dy: Any, x: np.ndarray) -> np.ndarray:
        best = (x == x.max()).astype(x.dtype)
        return dy * best / best.sum(dtype=x.dtype)

    x = np.random.default_rng(2).standard_normal(5)
    assert gradcheck(lambda x: x.max(), counted, (x,)).inconclusive
    assert gradcheck(lambda x: x.max(), counted, (x,), dtypes=()).passed
    assert gradcheck(lambda x: x.max(), counted, (x,), dtypes=("float16",)).verdict == "failed"
    mean = gradcheck(lambda x: x.mean(), lambda dy, x: np.full_like(x, dy / x.size), (x,))
    assert mean.passed, mean  # length alone, which no NumPy function is made for in float16


def test_lengths_past_tiles_and_past_16_bits_are_seen_from_one_small_sample() -> None:
    """Rows after the last whole block of 16; offsets in 16 bits."""

    def blocks(dy: Any, x: np.ndarray, w: np.ndarray) -> Any:
        kept = len(x) // 16 * 16 if len(x) > 1000 else len(x)
        return dy * w, (dy * x)[:kept].sum(0)

    def narrow(dy: Any, w: np.ndarray, ids: np.ndarray) -> np.ndarray:
        dw = np.zeros(w.size)
        for offset, row in zip(ids.astype(np.int16) * np.int16(w.shape[1]), dy, strict=True):
            if offset >= 0:
                dw[offset : offset + w.shape[1]] += row
        return dw.reshape(w.shape)

    rng = np.random.default_rng(3)
    x, w, ids = rng.standard_normal((3, 4)), rng.standard_normal(4), np.array([0, 2, 2])
    found = gradcheck(lambda x, w: x * w, blocks, (x, w))
    assert "arg0 [1030, 4], arg1 [4]" in str(found), found
    found = gradcheck(lambda w, ids: w[ids], narrow, (x, ids))
    assert "arg0 [16393, 4], arg1 [3]" in str(found), found

"""Optimisers against values worked out by hand, in exact fractions, or at 50 digits."""

import math
import tracemalloc
from fractions import Fraction

import mpmath
import numpy as np
import pytest

from mesp_ref.errors import MespRefError
from mesp_ref.train.optim import (
    SGD,
    AdamW,
    clip_by_global_norm,
    global_norm,
    learning_rate,
    make_optimizer,
)


def array(*values, dtype=np.float64):
    return np.array(values, dtype=dtype)


def random_steps(shape, steps, seed=0, dtype=np.float64):
    """A start and some gradients."""
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal(shape).astype(dtype),
        [rng.standard_normal(shape).astype(dtype) for _ in range(steps)],
    )


def test_sgd_by_hand():
    w = array(1.0, -2.0, 4.0)
    SGD().step({"w": w}, {"w": array(0.5, 0.25, -1.0)}, 0.5)
    assert w.tolist() == [0.75, -2.125, 4.5]  # exact in binary


def test_sgd_weight_decay_by_hand():
    w = array(1.0, -2.0)
    SGD(weight_decay=0.25).step({"w": w}, {"w": array(0.5, 1.0)}, 0.5)
    # d = [0.5 + 0.25, 1 - 0.5]
    assert w.tolist() == [0.625, -2.25]


@pytest.mark.parametrize("decay", [0, Fraction(1, 8)])
def test_sgd_momentum_in_fractions(decay):
    lr, mu = Fraction(1, 4), Fraction(1, 2)
    gradients = [Fraction(1), Fraction(-3, 2), Fraction(5, 4), Fraction(1, 8)]
    w, u = Fraction(3), Fraction(0)
    optimizer, got = SGD(weight_decay=float(decay), momentum=0.5), array(3.0)
    for g in gradients:
        u = mu * u + g + decay * w
        w -= lr * u
        optimizer.step({"w": got}, {"w": array(float(g))}, 0.25)
    assert got[0] == float(w)  # every intermediate is a dyadic fraction of few bits


def test_adamw_first_step_by_hand():
    # t = 1: m/(1-b1) = g and v/(1-b2) = g², so the step is lr·g/(|g| + eps), here lr·0.5·sign
    w = array(1.0, 1.0)
    AdamW(eps=3.0).step({"w": w}, {"w": array(3.0, -3.0)}, 0.5)
    np.testing.assert_allclose(w, [0.75, 1.25], rtol=0, atol=2e-16)


def test_adamw_decay_is_decoupled():
    # a zero gradient moves nothing but the decay: w(1 - lr·wd) = 4(1 - 0.5·0.25)
    w = array(4.0)
    AdamW(weight_decay=0.25).step({"w": w}, {"w": array(0.0)}, 0.5)
    assert w[0] == 3.5


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [
        (np.float64, 1e-15),  # measured 2.2e-16
        (np.float32, 1e-6),  # measured 1.4e-7
    ],
)
def test_adamw_at_fifty_digits(dtype, bound):
    b1, b2, eps, decay, lr = 0.9, 0.95, 1e-3, 0.1, 0.01
    start, gradients = random_steps(5, 7, dtype=dtype)
    got, optimizer = start.copy(), AdamW((b1, b2), eps, decay)
    for g in gradients:
        optimizer.step({"w": got}, {"w": g}, lr)
    with mpmath.workdps(50):
        for i in range(5):
            w, m, v = mpmath.mpf(float(start[i])), mpmath.mpf(0), mpmath.mpf(0)
            for t, step in enumerate(gradients, 1):
                g = mpmath.mpf(float(step[i]))
                m = mpmath.mpf(b1) * m + (1 - mpmath.mpf(b1)) * g
                v = mpmath.mpf(b2) * v + (1 - mpmath.mpf(b2)) * g * g
                corrected = mpmath.sqrt(v / (1 - mpmath.mpf(b2) ** t)) + mpmath.mpf(eps)
                update = m / (1 - mpmath.mpf(b1) ** t) / corrected
                w -= mpmath.mpf(lr) * (mpmath.mpf(decay) * w + update)
            assert abs(float(w) - float(got[i])) <= bound * max(abs(float(start[i])), 1.0)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_pieces_are_elementwise(name):
    """A tensor of several pieces and a rest is updated as each of its elements alone would be."""
    start, gradients = random_steps(70_001, 3)
    whole, optimizer = start.copy(), make_optimizer(name, weight_decay=0.1)
    for g in gradients:
        optimizer.step({"w": whole}, {"w": g}, 0.01)
    for i in (0, 32_767, 32_768, 65_535, 65_536, 70_000):
        one, alone = start[i : i + 1].copy(), make_optimizer(name, weight_decay=0.1)
        for g in gradients:
            alone.step({"w": one}, {"w": g[i : i + 1].copy()}, 0.01)
        assert whole[i] == one[0]
    assert np.all(whole != start)


@pytest.mark.parametrize("make", [SGD, lambda: SGD(0.1, 0.9), AdamW], ids=["sgd", "heavy", "adamw"])
def test_block_by_block_is_all_at_once(make):
    rng = np.random.default_rng(3)
    names = ["a", "b", "c"]
    start = {n: rng.standard_normal((4, 6)).astype(np.float32) for n in names}
    steps = [{n: rng.standard_normal((4, 6)).astype(np.float32) for n in names} for _ in range(4)]
    at_once, by_block = ({n: w.copy() for n, w in start.items()} for _ in range(2))
    one, other = make(), make()
    for grads in steps:
        one.step(at_once, grads, 0.1)
        for name in reversed(names):
            other.step(by_block, {name: grads[name]}, 0.1)
    for name in names:
        np.testing.assert_array_equal(at_once[name], by_block[name])
        assert not np.array_equal(at_once[name], start[name])


def test_steps_are_counted_per_tensor():
    """A tensor that sat out two steps corrects its bias as one that is met for the first time."""
    params = {"a": array(1.0), "late": array(1.0)}
    optimizer = AdamW(eps=3.0)
    for _ in range(2):
        optimizer.step(params, {"a": array(3.0)}, 0.5)
    assert params["late"][0] == 1.0
    optimizer.step(params, {"late": array(3.0)}, 0.5)
    assert params["late"][0] == pytest.approx(0.75, abs=1e-15)


@pytest.mark.parametrize("make", [lambda: SGD(0.1, 0.9), AdamW], ids=["sgd", "adamw"])
def test_state_continues_bit_for_bit(make):
    start, gradients = random_steps((3, 5), 8, dtype=np.float32)
    through, optimizer = start.copy(), make()
    for g in gradients:
        optimizer.step({"w": through}, {"w": g}, 0.05)
    resumed, before = start.copy(), make()
    for g in gradients[:3]:
        before.step({"w": resumed}, {"w": g}, 0.05)
    after = make()
    after.load_state_dict(before.state_dict())
    before.step({"w": start.copy()}, {"w": gradients[0]}, 9.0)  # what was loaded is a copy
    for g in gradients[3:]:
        after.step({"w": resumed}, {"w": g}, 0.05)
    np.testing.assert_array_equal(through, resumed)


def test_gradients_are_left_as_they_are():
    g = array(1.0, 2.0)
    for optimizer in (SGD(0.1, 0.5), AdamW(weight_decay=0.1)):
        optimizer.step({"w": array(3.0, 4.0)}, {"w": g}, 0.1)
    assert g.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("make", [SGD, lambda: SGD(0.1, 0.9), lambda: AdamW(weight_decay=0.1)])
def test_a_step_allocates_little(make):
    w, g, optimizer = np.ones((2000, 1000), np.float32), np.ones((2000, 1000), np.float32), make()
    optimizer.step({"w": w}, {"w": g}, 0.1)  # momenta are made here
    tracemalloc.start()
    optimizer.step({"w": w}, {"w": g}, 0.1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 512 * 1024  # the tensor has 8 MB


def test_clipping_by_hand():
    grads = {"a": array(3.0, 0.0), "b": array(-4.0)}
    assert clip_by_global_norm(grads, 2.5) == 5.0
    assert grads["a"].tolist() == [1.5, 0.0]
    assert grads["b"].tolist() == [-2.0]


def test_clipping_leaves_small_gradients():
    grads = {"a": array(0.3), "b": array(0.4)}
    assert clip_by_global_norm(grads, 0.6) == pytest.approx(0.5, rel=1e-15)
    assert (grads["a"][0], grads["b"][0]) == (0.3, 0.4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_clipping_reports_what_is_not_finite(bad):
    grads = {"a": array(1.0, bad)}
    assert not math.isfinite(clip_by_global_norm(grads, 0.5))
    assert grads["a"][0] == 1.0


def test_norm_is_summed_in_double():
    value = np.float32(0.1)
    grads = {"a": np.full((1000, 1000), value), "b": np.full(5, value)}
    assert global_norm(grads) == pytest.approx(float(value) * math.sqrt(1_000_005), rel=1e-12)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0, 2.0, 2.0, 2.0, 2.0, 2.0]),
        ("linear", [1.0, 2.0, 2.0, 1.5, 1.0, 0.5]),
        ("cosine", [1.0, 2.0, 2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)]),
    ],
)
def test_schedules_by_hand(schedule, expected):
    """base 2, six steps, two of them warm-up: p = 0, 1/4, 1/2, 3/4 afterwards."""
    got = [learning_rate(i, base=2.0, total=6, warmup=2, schedule=schedule) for i in range(6)]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-15)


def test_all_steps_may_be_warm_up():
    got = [learning_rate(i, base=4.0, total=4, warmup=4, schedule="linear") for i in range(4)]
    assert got == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (lambda: AdamW(betas=(1.0, 0.9)), "beta1: found 1.0"),
        (lambda: AdamW(eps=-1.0), "eps: found -1.0"),
        (lambda: SGD(weight_decay=-0.1), "weight_decay: found -0.1"),
        (lambda: SGD(momentum=math.nan), "momentum: found nan"),
        (lambda: make_optimizer("adam"), "optimizer: found 'adam'"),
        (lambda: make_optimizer("adamw", momentum=0.9), "momentum: found 0.9 with adamw"),
        (lambda: clip_by_global_norm({}, 0.0), "clip: found 0.0"),
        (lambda: learning_rate(0, base=1, total=4, schedule="step"), "schedule: found 'step'"),
        (lambda: learning_rate(0, base=1, total=4, warmup=5), "warmup: found 5 steps"),
        (lambda: SGD().step({}, {"w": array(1.0)}, 1.0), "w: found a gradient"),
        (lambda: SGD().step({"w": array(1.0)}, {"w": array(1.0, 2.0)}, 1.0), "w: gradient: found"),
        (
            lambda: SGD().step({"w": array(1.0)}, {"w": array(1.0, dtype=np.float32)}, 1.0),
            "w: gradient: found float32",
        ),
        (lambda: SGD().step({"w": np.ones((4, 4)).T[1:]}, {"w": np.ones((3, 4))}, 1.0), "strided"),
        (lambda: AdamW().load_state_dict({"mean/w": array(1.0)}), "optimiser state"),
    ],
)
def test_mistakes_are_named(action, words):
    with pytest.raises(MespRefError, match=words.replace("(", r"\(")):
        action()


def test_read_only_parameters_are_refused():
    w = array(1.0)
    w.flags.writeable = False
    with pytest.raises(MespRefError, match="read-only"):
        AdamW().step({"w": w}, {"w": array(1.0)}, 0.1)

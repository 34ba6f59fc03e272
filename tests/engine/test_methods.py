"""The training methods: alike to the bit, lean as promised, and MeZO honest about its noise."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import mesp_ref as mr
from mesp_ref.engine.block import MESP, block
from mesp_ref.engine.half import Residuals
from mesp_ref.engine.mezo import expected_cosine, perturbation_seeds
from mesp_ref.engine.model import embed
from mesp_ref.engine.positions import layers
from mesp_ref.files.safetensors import Stored
from mesp_ref.ops import Array
from mesp_ref.verify.bugs import BUGS
from mesp_ref.verify.planted import original, planted
from mesp_ref.verify.samples import sample_adapter, sample_batch, sample_model, small_config

Case = tuple[mr.Model, mr.Adapter, Array, Array]


def case(
    dtype: str = "float64", tied: bool = True, shape: tuple[int, int] = (2, 5), **changed: Any
) -> Case:
    rng = np.random.default_rng(21)
    config = small_config(tied, **changed)
    model, adapter = sample_model(rng, config, dtype), sample_adapter(rng, config, dtype)
    return model, adapter, *sample_batch(rng, config, shape)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("method", "kind"), [("mebp", "ram"), ("mebp", "disk"),
                                              ("mesp", "ram"), ("mesp", "disk")])  # fmt: skip
@pytest.mark.parametrize("trainable", ["lora", "all"])
def test_bit_identical(method: str, kind: str, dtype: str, tied: bool, trainable: str) -> None:
    given = case(dtype, tied, (3, 70), vocab_size=1003)  # two uneven tiles of the vocabulary
    loss, grads = mr.loss_and_grads(*given, method="store_all", trainable=trainable)
    again, same = mr.loss_and_grads(*given, method=method, trainable=trainable, checkpoints=kind)
    assert again == loss
    assert list(same) == list(grads)
    for name, grad in grads.items():
        assert grad.dtype == dtype
        assert grad.any(), name
        np.testing.assert_array_equal(same[name], grad, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("workers", [1, 2])
def test_offloading_changes_no_bit(dtype: str, workers: int) -> None:
    """What is read from the file is what would have been computed again."""
    given = case(dtype, shape=(2, 71), vocab_size=1003, intermediate_size=901)  # several tiles
    options = {"method": "mesp_tiled", "workers": workers}
    loss, grads = mr.loss_and_grads(*given, trainable="all", checkpoints="disk", **options)
    again, same = mr.loss_and_grads(*given, trainable="all", checkpoints="offload", **options)
    assert again == loss
    assert list(same) == list(grads)
    for name, grad in grads.items():
        np.testing.assert_array_equal(same[name], grad, err_msg=name)


@pytest.mark.parametrize("method", sorted(set(mr.METHODS) - {"mesp_tiled"}))
def test_only_tiles_are_offloaded(method: str) -> None:
    with pytest.raises(mr.MespRefError, match=f"found 'offload' with {method}, expected 'ram' or"):
        mr.loss_and_grads(*case(), method=method, checkpoints="offload")


@pytest.mark.parametrize("kind", ["ram", "disk", "offload"])
def test_tiles_change_only_the_order_of_sums(kind: str) -> None:
    given = case(shape=(2, 71), vocab_size=1003, intermediate_size=650)  # two uneven tiles of each
    loss, grads = mr.loss_and_grads(*given, method="mesp", trainable="all")
    again, same = mr.loss_and_grads(*given, method="mesp_tiled", trainable="all", checkpoints=kind)
    assert again == pytest.approx(loss, rel=1e-14)
    assert same.keys() == grads.keys()
    for name, grad in grads.items():
        scale = np.abs(grad).max()
        np.testing.assert_allclose(same[name], grad, rtol=0, atol=1e-12 * scale, err_msg=name)


def base(array: Array) -> Array:
    """The buffer behind a view."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def kept_buffers(
    model: mr.Model, adapter: mr.Adapter, ids: Array, drop: frozenset[str]
) -> list[Array]:
    """The distinct buffers that one block's residuals hold, weights and angles apart."""
    layer = layers(model, adapter, 0, ids.shape[1])[0]
    _, res = block(embed(model, ids), layer, drop=drop)
    return list({id(base(a)): base(a) for a in arrays_of(res)}.values())


def test_mesp_keeps_the_eight_intermediates_of_the_paper() -> None:
    """Block input, two norms, probabilities, attention output, sum after attention, gate, up."""
    model, adapter, ids, _ = case()
    n, t = ids.shape
    wide, mlp = n * t * 7, n * t * 9  # N·T·C and N·T·F elements
    expected = [wide] * 4 + [mlp] * 2 + [n * 4 * t * t, n * t * 4 * 6]
    held = kept_buffers(model, adapter, ids, MESP)
    assert sorted(a.size for a in held) == sorted(expected)
    everything = kept_buffers(model, adapter, ids, frozenset())
    assert len(everything) == 8 + 7 + 1 + 3 + 1  # and h of seven layers, silu, q, k, v, z


def arrays_of(res: Any) -> list[Array]:
    """Every array in nested residuals."""
    if isinstance(res, np.ndarray):
        return [res]
    fields: Any = vars(res) if isinstance(res, Residuals) else res if isinstance(res, dict) else {}
    return [array for item in fields.values() for array in arrays_of(item)]


def residual_lifetimes(method: str) -> tuple[int, int]:
    """How many residual arrays of a block are alive when its backward starts, and when it ends."""
    alive: list[tuple[int, int]] = []
    real: Callable[..., Any] = original("engine.block:block_bwd")

    def watched(dx: Array, res: Any, layer: Any, **options: Any) -> Any:
        refs = [weakref.ref(a) for a in arrays_of(res)]
        before = sum(ref() is not None for ref in refs)
        result = real(dx, res, layer, **options)
        gc.collect()
        alive.append((before, sum(ref() is not None for ref in refs)))
        return result

    with planted({"engine.block:block_bwd": watched}):
        mr.loss_and_grads(*case(), method=method)
    return alive[0]


def test_mebp_keeps_everything_until_its_backward_ends() -> None:
    before, after = residual_lifetimes("mebp")
    assert after == before == 8 + 7 + 5  # h of seven layers, q, k, v, silu, z


def test_mesp_lets_each_residual_die_at_its_last_use() -> None:
    before, after = residual_lifetimes("mesp")
    assert before == 8
    assert after == 0


@pytest.mark.parametrize("method", ["store_all", "mebp", "mesp", "mesp_tiled", "mesp_streamed"])
@pytest.mark.parametrize("trainable", ["lora", "all"])
def test_updates_in_the_callback_do_not_touch_the_gradients(method: str, trainable: str) -> None:
    model, adapter, ids, labels = case(tied=False)
    _, expected = mr.loss_and_grads(model, adapter, ids, labels, method, trainable)
    parameters = adapter.weights | (model.weights if trainable == "all" else {})
    seen: dict[str, Array] = {}
    order: list[int] = []

    def update(number: int, grads: dict[str, Array]) -> None:
        order.append(number)
        for name, grad in grads.items():
            seen[name] = grad.copy()
            parameters[name] -= 0.1 * grad

    _, returned = mr.loss_and_grads(
        model, adapter, ids, labels, method, trainable, on_gradients=update
    )
    assert returned == {}
    assert order == ([2, 1, 0, -1] if trainable == "all" else [1, 0])
    for name, grad in expected.items():
        np.testing.assert_array_equal(seen[name], grad, err_msg=name)


def noise_of(given: Case, seed: int) -> dict[str, Array]:
    """z, taken from the estimate itself: g·z is a multiple of z, and z is standard normal."""
    model, adapter, ids, labels = given
    _, estimate = mr.loss_and_grads(model, adapter, ids, labels, "mezo", seed=seed, eps=1e-4)
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(g.shape, dtype=g.dtype) for name, g in estimate.items()}


def projected(given: Case, seed: int, eps: float) -> float:
    """The scalar g that MeZO multiplies z with."""
    model, adapter, ids, labels = given
    _, estimate = mr.loss_and_grads(model, adapter, ids, labels, "mezo", seed=seed, eps=eps)
    z = noise_of(given, seed)
    ratios = np.concatenate([(estimate[name] / z[name]).ravel() for name in z])
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-10)  # the estimate is g·z, with this z
    return float(ratios[0])


def test_mezo_projected_gradient_is_the_directional_derivative_to_second_order() -> None:
    """g(eps) = ⟨∇L, z⟩ + O(eps²): the error falls fourfold when eps halves."""
    given = case()
    _, grads = mr.loss_and_grads(*given)
    z = noise_of(given, seed=5)
    true = sum((grads[name] * z[name]).sum() for name in grads)
    errors = [projected(given, 5, eps) - true for eps in (4e-3, 2e-3, 1e-3)]
    assert abs(errors[0]) < 1e-2 * abs(true)
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.02)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.02)


def snapshot(adapter: mr.Adapter) -> dict[str, Array]:
    return {name: array.copy() for name, array in adapter.weights.items()}


def assert_restored(
    adapter: mr.Adapter, before: dict[str, Array], z: dict[str, Array], eps: float
) -> None:
    """|θ' − θ| ≤ 4u(|θ| + eps·|z|)"""
    for name, array in adapter.weights.items():
        u = np.finfo(array.dtype).eps / 2
        bound = 4 * u * (np.abs(before[name]) + eps * np.abs(z[name]))
        assert (np.abs(array - before[name]) <= bound).all(), name


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("eps", [1e-3, 1.0])
def test_mezo_restores_the_parameters(dtype: str, eps: float) -> None:
    model, adapter, ids, labels = given = case(dtype)
    z, before = noise_of(given, 9), snapshot(adapter)
    mr.loss_and_grads(model, adapter, ids, labels, "mezo", seed=9, eps=eps)
    assert_restored(adapter, before, z, eps)


@pytest.mark.parametrize("failing", [1, 2])
def test_mezo_restores_the_parameters_after_an_interrupt(failing: int) -> None:
    model, adapter, ids, labels = given = case()
    z, before, calls = noise_of(given, 9), snapshot(adapter), []
    real = original("engine.mezo:_forward")

    def interrupted(*args: Any) -> float:
        calls.append(1)
        if len(calls) == failing:
            raise KeyboardInterrupt
        return real(*args)

    with planted({"engine.mezo:_forward": interrupted}), pytest.raises(KeyboardInterrupt):
        mr.loss_and_grads(model, adapter, ids, labels, "mezo", seed=9, eps=0.1)
    assert_restored(adapter, before, z, 0.1)


def test_mezo_is_seeded() -> None:
    given = case()
    first, same, other = (
        mr.loss_and_grads(*given, method="mezo", seed=seed)[1] for seed in (1, 1, 2)
    )
    for name, grad in first.items():
        assert not np.array_equal(grad, other[name])
        np.testing.assert_allclose(same[name], grad, rtol=1e-8)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_perturbation_is_the_published_algorithm_to_the_bit(dtype: str) -> None:
    """θ + eps·z, θ − 2·eps·z, θ + eps·z with z from the seed itself; then g·z."""
    model, adapter, ids, labels = given = case(dtype)
    copy, eps = adapter.astype(dtype), 1e-2
    loss, grads = mr.loss_and_grads(*given, method="mezo", seed=11, eps=eps)
    losses = []
    for by in (eps, -2 * eps, eps):
        rng = np.random.default_rng(11)
        for array in copy.weights.values():
            array += by * rng.standard_normal(array.shape, dtype=array.dtype)
        losses.append(mr.loss(model, copy, ids, labels))
    g, rng = (losses[0] - losses[1]) / (2 * eps), np.random.default_rng(11)
    assert loss == (losses[0] + losses[1]) / 2
    for name, grad in grads.items():
        want = g * rng.standard_normal(grad.shape, dtype=grad.dtype)
        np.testing.assert_array_equal(grad, want, err_msg=name)
        np.testing.assert_array_equal(adapter.weights[name], copy.weights[name], err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("trainable", ["lora", "all"])
def test_perturbations_are_averaged(dtype: str, trainable: str) -> None:
    """The mean of n estimates from the derived seeds, one after another on the same parameters.

    Bound: g·z of each is rounded once or twice on either side and the mean n times: u·(n + 4) of
    the mean of |g·z|. Both sides find the parameters with the same rounding of earlier restoring.
    """
    n, options = 5, {"method": "mezo", "trainable": trainable, "eps": 1e-2}
    alone, given = [], case(dtype)
    for seed in perturbation_seeds(3, n):
        alone.append(mr.loss_and_grads(*given, seed=seed, **options))
    loss, grads = mr.loss_and_grads(*case(dtype), seed=3, perturbations=n, **options)
    assert loss == pytest.approx(np.mean([value for value, _ in alone]), rel=1e-15 * n)
    u = np.finfo(dtype).eps / 2
    for name, grad in grads.items():
        each = np.stack([found[name] for _, found in alone]).astype(np.float64)
        bound = (n + 4) * u * np.abs(each).mean(axis=0)
        assert (np.abs(grad - each.mean(axis=0)) <= bound).all(), name
        assert grad.dtype == dtype
        assert np.abs(grad - each[0]).max() > 1e3 * bound.max(), name


def test_seeds_of_perturbations() -> None:
    """The first is the seed itself; fewer are a part of more; neighbours share none."""
    assert perturbation_seeds(7, 1) == (7,)
    assert perturbation_seeds(7, 9)[:4] == perturbation_seeds(7, 4)
    drawn = [seed for start in range(200) for seed in perturbation_seeds(start, 8)]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize(("method", "count"), [("mezo", 0), ("mezo", -3), ("mesp", 2)])
def test_impossible_perturbations_are_refused(method: str, count: int) -> None:
    with pytest.raises(mr.MespRefError, match=f"^perturbations: found {count}"):
        mr.loss_and_grads(*case(), method=method, perturbations=count)


def cosine(a: dict[str, Array], b: dict[str, Array]) -> float:
    x, y = (np.concatenate([g[name].ravel() for name in a]) for g in (a, b))
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


@pytest.mark.parametrize(("n", "draws"), [(1, 120), (4, 30), (16, 10)])
def test_cosine_with_the_true_gradient_rises_as_the_theory_says(n: int, draws: int) -> None:
    """Mean over independent seeds within 4 standard errors of `expected_cosine`.

    cos² is Beta(n/2, (d−1)/2): Var cos = n/(n + d − 1) − (E cos)². eps is small, so that the third
    derivative plays no part; in float64 the difference of losses still has 8 digits.
    """
    rng = np.random.default_rng(3)
    config = small_config()
    model = sample_model(rng, config)
    adapter = sample_adapter(rng, config, targets="q_proj,down_proj")
    given = (model, adapter, *sample_batch(rng, config))
    _, true = mr.loss_and_grads(*given)
    d = sum(g.size for g in true.values())
    found = [
        cosine(mr.loss_and_grads(*given, method="mezo", seed=1000 * n + i, eps=1e-4,
                                 perturbations=n)[1], true)
        for i in range(draws)
    ]  # fmt: skip
    want = expected_cosine(d, n)
    error = np.sqrt((n / (n + d - 1) - want**2) / draws)
    assert np.mean(found) == pytest.approx(want, abs=4 * error)
    assert min(found) > 0
    assert 4 * error < 0.3 * want  # narrow enough to tell n from 2n, whose cosine is 1.4 times


def test_expected_cosine_in_the_limits() -> None:
    """d = 2, n = 1: the mean of |cos φ| over a circle, 2/π. Then n ≪ d, and n ≫ d."""
    assert expected_cosine(1) == pytest.approx(1)
    assert expected_cosine(2) == pytest.approx(2 / np.pi)
    assert expected_cosine(10**6) == pytest.approx(np.sqrt(2 / np.pi / 10**6), rel=1e-6)
    assert expected_cosine(10**6, 400) == pytest.approx(np.sqrt(400 / 10**6), rel=1e-3)
    assert expected_cosine(10, 10**6) == pytest.approx(1, abs=1e-5)


def test_mezo_on_every_weight_needs_arrays_in_memory() -> None:
    model, adapter, ids, labels = case()
    _, grads = mr.loss_and_grads(model, adapter, ids, labels, "mezo", trainable="all")
    assert grads.keys() >= model.weights.keys()
    tables = {name: Stored(w, w.dtype) for name, w in model.weights.items()}
    frozen = mr.Model(model.config, tables)
    with pytest.raises(mr.MespRefError, match="read_into_memory"):
        mr.loss_and_grads(frozen, adapter, ids, labels, "mezo", trainable="all")


def test_the_published_error_is_not_ours() -> None:
    """Recomputing q and k without RoPE and bias, as the released code does, gives other gradients."""
    given = case()
    _, grads = mr.loss_and_grads(*given)

    with planted(BUGS["rebuild: the published error, no RoPE and no bias"].functions()):
        _, wrong = mr.loss_and_grads(*given, method="mesp")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    a, b = grads[name].ravel(), wrong[name].ravel()
    assert a @ b / np.sqrt((a @ a) * (b @ b)) < 0.999

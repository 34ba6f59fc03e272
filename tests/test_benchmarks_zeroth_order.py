"""benchmarks/zeroth_order.py: theory against Monte Carlo and exact integrals, sums against loops."""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import beta

import mesp_ref as mr
from mesp_ref.ops import Array

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import estimates
import race
import zeroth_order
import zeroth_order_page as page_of

SEEDS = 40_000


@pytest.fixture(scope="module")
def drawn() -> tuple[Array, Array, slice]:
    """A gradient [30] of uneven entries, noise [SEEDS, 30], and a part of both."""
    rng = np.random.default_rng(5)
    gradient = rng.standard_normal(30) * rng.uniform(0.1, 2, 30)
    return gradient, rng.standard_normal((SEEDS, 30)), slice(4, 16)


def share_of(gradient: Array, part: slice) -> float:
    return float(np.linalg.norm(gradient[part]) / np.linalg.norm(gradient))


@pytest.mark.parametrize("d", [2, 17, 400])
def test_mean_of_abs_cosine_is_the_integral(d: int) -> None:
    """cos² of a random direction is Beta(1/2, (d−1)/2); quantiles come from the same law."""
    law = beta(0.5, (d - 1) / 2)
    assert estimates.expected_cosine(d) == pytest.approx(law.expect(np.sqrt), rel=1e-6)
    (median,) = estimates.cosine_quantiles(d, 1, (0.5,))
    assert law.cdf(median**2) == pytest.approx(0.5)


@pytest.mark.parametrize("n", [1, 3])
def test_quantiles_of_the_mean_of_n_estimates(drawn: tuple[Array, Array, slice], n: int) -> None:
    gradient, noise, _ = drawn
    groups = (noise * (noise @ gradient)[:, None])[: SEEDS // n * n].reshape(-1, n, 30).mean(1)
    cosines = groups @ gradient / np.linalg.norm(groups, axis=1) / np.linalg.norm(gradient)
    levels = (0.05, 0.5, 0.95)
    for level, at in zip(levels, estimates.cosine_quantiles(30, n, levels), strict=True):
        error = math.sqrt(level * (1 - level) / len(cosines))
        assert abs(np.mean(cosines < at) - level) <= 4 * error


def test_cosine_on_a_part() -> None:
    """The law holds up to O(1/d): with d = 2000, 3e-4 of it, far below the sampling error."""
    rng, d, part = np.random.default_rng(3), 2000, slice(0, 500)
    gradient = np.ones(d)
    gradient[part] *= 3
    noise = rng.standard_normal((4000, d))
    dot = noise[:, part] @ gradient[part]
    cosines = dot / np.linalg.norm(noise[:, part], axis=1) / np.linalg.norm(gradient[part])
    found = np.sign(noise @ gradient) * cosines
    want = estimates.cosine_of_part(500, share_of(gradient, part))
    assert abs(found.mean() - want) <= 4 * found.std() / math.sqrt(len(found))
    assert abs(want - estimates.expected_cosine(500)) > 8 * found.std() / math.sqrt(len(found))


def test_sign_agreement(drawn: tuple[Array, Array, slice]) -> None:
    gradient, noise, part = drawn
    right = np.sign((noise @ gradient)[:, None] * noise[:, part]) == np.sign(gradient[part])
    each = right.mean(1)
    want = estimates.sign_agreement(gradient[part], float(np.linalg.norm(gradient)))
    assert abs(each.mean() - want) <= 4 * each.std() / math.sqrt(SEEDS)


def test_sign_agreement_in_two_dimensions() -> None:
    """One entry: always right. Two equal ones: z₁ + z₂ has the sign of z₁ three times in four."""
    assert estimates.sign_agreement(np.array([-3.0, 0.0]), 3.0) == pytest.approx(1)
    assert estimates.sign_agreement(np.ones(2), math.sqrt(2)) == pytest.approx(0.75)


@pytest.mark.parametrize("n", [1, 4])
def test_norm_ratio(drawn: tuple[Array, Array, slice], n: int) -> None:
    gradient, noise, part = drawn
    means = (noise * (noise @ gradient)[:, None]).reshape(-1, n, 30).mean(1)
    for entries in (part, slice(None)):
        square = (means[:, entries] ** 2).sum(1) / (gradient[entries] @ gradient[entries])
        share = share_of(gradient, entries)
        want = estimates.norm_ratio(len(gradient[entries]), share, n) ** 2
        assert abs(square.mean() - want) <= 4 * square.std() / math.sqrt(len(square))


def test_perturbations_for_a_cosine() -> None:
    n = estimates.perturbations_for(0.25, 1001)
    assert math.sqrt(n / (n + 1000)) == pytest.approx(0.25)


def test_part_statistics_against_plain_sums() -> None:
    """Two tensors out of three, some entries 0, in loops over seeds."""
    rng = np.random.default_rng(0)
    gradient, noise = rng.standard_normal(12), rng.standard_normal((6, 12))
    gradient[[1, 9]] = 0
    starts, slices = np.array([0, 4, 7]), [slice(0, 4), slice(4, 7), slice(7, 12)]
    tallies = estimates.stack(estimates.tally(z, gradient, starts) for z in noise)
    found = estimates.part_statistics(tallies, gradient, slices, [0, 2])
    inside = np.r_[0:4, 7:12]
    alone, cosines, signs, ratios = [], [], [], []
    for z in noise:
        estimate, true = (z @ gradient * z)[inside], gradient[inside]
        length = np.linalg.norm(true)
        alone.append(abs(z[inside] @ true) / np.linalg.norm(z[inside]) / length)
        cosines.append(estimate @ true / np.linalg.norm(estimate) / length)
        signs.append(np.mean((estimate * true > 0)[true != 0]))
        ratios.append(np.linalg.norm(estimate) / length)
    assert found.parameters == 9
    assert found.share == pytest.approx(length / np.linalg.norm(gradient))
    for mean, samples in ((found.alone, alone), (found.cosine, cosines), (found.signs, signs)):
        assert mean.value == pytest.approx(np.mean(samples))
        assert mean.error == pytest.approx(np.std(samples, ddof=1) / math.sqrt(6))
    assert found.norm == pytest.approx(np.sqrt(np.mean(np.square(ratios))))


def test_averaged_cosines_against_plain_means() -> None:
    rng = np.random.default_rng(1)
    gradient, rows = rng.standard_normal(5), rng.standard_normal((7, 5))
    found = dict(estimates.averaged_cosines(gradient, rows))
    assert list(found) == [1, 2, 4]
    for n, mean in found.items():
        groups = rows[: 7 // n * n].reshape(-1, n, 5).mean(1)
        cosines = groups @ gradient / np.linalg.norm(groups, axis=1) / np.linalg.norm(gradient)
        assert mean.value == pytest.approx(cosines.mean())
        assert (mean.error is None) == (n == 4)


@pytest.fixture
def point(tiny_model_dir: Path) -> estimates.Point:
    """A tiny model in float64, B ≠ 0."""
    model = mr.load_model(tiny_model_dir, dtype="float64")
    adapter = mr.init_lora(model.config, rank=2, seed=1, b_std=0.1, dtype="float64")
    ids = np.random.default_rng(2).integers(0, model.config.vocab_size, (1, 9))
    return estimates.Point(model, adapter, ids, ids)


def test_two_forwards_are_the_directional_derivative(point: estimates.Point) -> None:
    """The difference falls as eps²; theta is left as it was, bit for bit."""
    before, seeds = point.theta.tobytes(), (3, 4, 5)
    part = point.span(point.members(".layers.1."))
    exact = np.array([point.noise(s)[part] @ point.gradient[part] for s in seeds])
    errors = [
        np.abs(np.array(list(point.two_forwards(part, seeds, eps))) - exact).max()
        for eps in (1e-2, 1e-3)
    ]
    assert 80 < errors[0] / errors[1] < 120
    assert errors[1] < 1e-3 * np.abs(exact).max()
    assert point.theta.tobytes() == before


def test_noise_is_that_of_the_library(point: estimates.Point) -> None:
    """One seed of loss_and_grads is g·z with this z and the g of two forwards."""
    (g,) = point.two_forwards(slice(None), [8], 1e-3)
    np.testing.assert_allclose(point.mezo(8, 1, 1e-3), g * point.noise(8), rtol=1e-9)


def test_parts_cover_the_adapter(point: estimates.Point) -> None:
    parts = zeroth_order.all_parts(point)
    for name, members in parts.items():
        assert members, name
    for names in (["layer 0", "layer 1"], list(zeroth_order.PROJECTIONS)):
        assert sorted(i for name in names for i in parts[name]) == parts["all"]
    assert point.names[parts["1 k_proj B"][0]].endswith("layers.1.self_attn.k_proj.lora_B.weight")


def test_digest_sees_one_bit(point: estimates.Point) -> None:
    before = race.digest([1.0, 2.0], point.adapter)
    assert race.digest([1.0, np.nextafter(2.0, 3)], point.adapter) != before
    point.theta[-1] = np.nextafter(point.theta[-1], 1)
    assert race.digest([1.0, 2.0], point.adapter) != before


def test_smooth_shortens_at_the_ends() -> None:
    assert race.smooth([1, 2, 6, 3], 3).tolist() == [1.5, 3, 11 / 3, 4.5]
    assert race.smooth([1, 2], 9).tolist() == [1.5, 1.5]


def test_the_whole_on_a_tiny_model(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured, saved, loaded, drawn, written; MeBP and MeSP end in one digest."""
    monkeypatch.setattr(zeroth_order, "machine", lambda: ["a machine"])  # needs threadpoolctl
    monkeypatch.setattr(zeroth_order, "SMALL_SEEDS", {"matrix": 8, "layer": 8})
    args = argparse.Namespace(
        model=tiny_model_dir, data=text_file, steps=3, batch_size=2, seq_len=12, rank=2, seed=0,
        seeds=8, forwards=4,
    )  # fmt: skip
    results = zeroth_order.measure(args)
    assert results.curve("mebp").digest == results.curve("mesp").digest
    assert results.facts["checked"] < 1e-4  # float32: θ is perturbed and restored in place
    page_of.save(results, tmp_path / "all.json")
    assert page_of.load(tmp_path / "all.json") == _as_json(results)
    page_of.draw(results, tmp_path)
    written = page_of.page(results)
    assert "agree bit for bit: all 3 training losses" in written
    linked = {part.split(")")[0] for part in written.split("](")[1:]} - {"zeroth_order.json"}
    assert linked == {path.name for path in tmp_path.glob("*.png")}
    broken = results.curve("mesp")._replace(
        digest="", losses=[*results.curve("mesp").losses[:2], 0.0]
    )
    other = results._replace(curves=[results.curves[0], broken])
    assert "differ: their training losses are equal for 2 steps only" in page_of.equality(other)


def _as_json(results: page_of.Results) -> page_of.Results:
    """Held-out losses are pairs in memory and lists in JSON."""
    curves = [c._replace(held=[list(pair) for pair in c.held]) for c in results.curves]
    return results._replace(curves=curves)


def test_nothing_to_redraw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["zeroth_order.py", "--redraw", "--out", str(tmp_path)])
    assert zeroth_order.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "zeroth_order.json: not found" in error

"""Weights that are multiplied a tile at a time: what they compute, and what is never decoded."""

import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mesp_ref as mr
from mesp_ref.engine.config import Qwen2Config
from mesp_ref.engine.layer import Layer
from mesp_ref.files.affine import Affine
from mesp_ref.files.random import write_random_checkpoint
from mesp_ref.job.limit import sampling_need
from mesp_ref.lean.shards import Cut, Window
from mesp_ref.lean.tiled_weight import LARGEST, TiledWeight, in_tiles, tile_elements, tiled_model
from mesp_ref.ops import Array

CONFIG = Qwen2Config(65, 1024, 96, 1, 16, 4, 80)  # q and o above LARGEST, k and v below


class Watched:
    """A table that remembers the largest part of it that was asked for."""

    def __init__(self, array: Array):
        self.array, self.shape, self.dtype, self.most = array, array.shape, array.dtype, 0

    def __getitem__(self, index: Any) -> Array:
        found = self.array[index]
        self.most = max(self.most, found.size)
        return found


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 3), (7, 100)])
@pytest.mark.parametrize("complex_", [False, True])
def test_products_are_those_of_the_whole(rows: int, columns: int, complex_: bool) -> None:
    """Sums by einsum, in float64; no more than a tile is asked for."""
    rng = np.random.default_rng(0)
    w, x, dy = rng.standard_normal((23, 19)), rng.standard_normal((4, 19)), rng.random((4, 23))
    if complex_:
        x, dy = x + 1e-30j, dy + 1e-30j
    watched = Watched(w)
    tiled = TiledWeight(watched, rows, columns)
    for found, expected in (
        (x @ tiled[...].T, np.einsum("mi,oi->mo", x, w)),
        (dy @ tiled[...], np.einsum("mo,oi->mi", dy, w)),
    ):
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)
    assert watched.most <= max(rows * 19, min(columns, 19) * 23)


def test_a_part_of_a_weight_is_tiled_as_well() -> None:
    """What a worker has: some rows, or some columns."""
    rng = np.random.default_rng(0)
    w, x, y = (
        rng.standard_normal((23, 19)),
        rng.standard_normal((4, 19)),
        rng.standard_normal((4, 8)),
    )
    rows = TiledWeight(Window(w, Cut(0, 5, 13)), 3, 4)
    np.testing.assert_allclose(x @ rows[...].T, x @ w[5:13].T, rtol=0, atol=1e-13)
    columns = TiledWeight(Window(w, Cut(1, 2, 10)), 3, 4)
    np.testing.assert_allclose(y @ columns[...].T, y @ w[:, 2:10].T, rtol=0, atol=1e-13)


def test_only_large_weights_are_tiled() -> None:
    shapes = {n: np.broadcast_to(np.float32(0), s) for n, s in CONFIG.weight_shapes().items()}
    nothing: Any = np.zeros(0)
    layer = in_tiles(Layer(0, CONFIG, shapes, None, nothing, nothing))
    tiled = {name for name, w in layer.weights.items() if isinstance(w, TiledWeight)}
    assert tiled == {f"model.layers.0.self_attn.{letter}_proj.weight" for letter in "qo"}
    assert all(np.prod(shapes[name].shape) > LARGEST for name in tiled)
    small = Layer(0, CONFIG, shapes, None, nothing, nothing)._replace(
        weights={n: w[:1] for n, w in shapes.items()}
    )
    assert in_tiles(small) is small


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "model"
    write_random_checkpoint(CONFIG, path, dtype="bfloat16", affine=Affine(4, 64))
    return path


def grads(model: mr.Model, method: str, place: str = "disk", workers: int = 1) -> dict[str, Array]:
    adapter = mr.init_lora(CONFIG, rank=3, b_std=0.1, dtype=model.dtype)
    ids = np.random.default_rng(0).integers(0, 65, (1, 5))
    return mr.loss_and_grads(
        model, adapter, ids, ids, method=method, checkpoints=place, workers=workers
    )[1]  # fmt: skip


def test_a_large_packed_model_has_the_gradients_of_its_decoded_weights(packed: Path) -> None:
    """mesp decodes whole weights; tiled and streamed agree in float64 to the rounding of sums, and
    with each other bit for bit, wherever their block inputs lie."""
    model = mr.load_model(packed, "float64")
    wanted = grads(model, "mesp", "ram")
    shared, found = grads(model, "mesp_tiled", workers=2), grads(model, "mesp_tiled")
    for name, expected in wanted.items():
        for got in (shared[name], found[name]):
            assert np.abs(got - expected).max() <= 1e-13 * np.abs(expected).max(), name
    for method, place in (
        ("mesp_tiled", "ram"),
        ("mesp_tiled", "offload"),
        ("mesp_streamed", "disk"),
    ):
        again = grads(model, method, place)
        assert all(np.array_equal(again[name], value) for name, value in found.items())


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> mr.Model:
    """A packed model whose largest matrix is its head, tied or not."""
    config = replace(CONFIG, vocab_size=4099, eos_token_id=None)
    path = tmp_path_factory.mktemp("wide") / "model"
    write_random_checkpoint(config, path, dtype="bfloat16", affine=Affine(4, 64), std=0.1)
    return mr.load_model(path)


def test_text_is_the_same_and_no_large_matrix_is_decoded_whole(wide: mr.Model) -> None:
    model, found, most = wide, {}, {}
    for name, given in (("whole", model), ("tiled", tiled_model(model))):
        mr.generate(given, [[1, 2]], max_new_tokens=1)  # caches fill
        tracemalloc.start()
        found[name] = mr.generate(given, [[1, 2, 3]], max_new_tokens=4)
        most[name] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert found["tiled"] == found["whole"]
    assert most["whole"] > 4099 * 1024 * 4
    adapter = mr.init_lora(model.config, rank=3)
    assert 4 * 1000 * 1024 < most["tiled"] <= sampling_need(7, model, adapter) < most["whole"] / 2


def test_what_is_a_view_stays_what_it_is(wide: mr.Model, tmp_path: Path) -> None:
    """In memory, or in a file of the numbers that are computed with; in 16 bits it is tiled."""
    dense = mr.read_into_memory(wide)
    assert tiled_model(dense) is dense
    for dtype, tiled in (("float32", 0), ("bfloat16", 3)):
        write_random_checkpoint(wide.config, tmp_path / dtype, dtype=dtype)
        weights = tiled_model(mr.load_model(tmp_path / dtype)).weights.values()
        assert sum(isinstance(w, TiledWeight) for w in weights) == tiled
    assert tile_elements(8192) == 256 * 8192


def test_bits_do_not_depend_on_how_weights_are_stored(packed: Path) -> None:
    """The packed file, and the same numbers in memory."""
    model = mr.load_model(packed)
    dense = mr.read_into_memory(model)
    found, again = grads(model, "mesp_tiled"), grads(dense, "mesp_tiled")
    assert all(np.array_equal(again[name], value) for name, value in found.items())

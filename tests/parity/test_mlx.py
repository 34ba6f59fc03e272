"""MLX and mlx-lm as oracles of packed weights and of adapters in mlx-lm's layout.

Needs the `mlx` extra beside `parity`; skipped only where mlx is not installed. Bit for bit with mlx
0.32.4 on x86-64 Linux; a compiler for another processor may fuse scale·q + bias into one rounding.
"""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import mesp_ref as mr
from mesp_ref.files.affine import Affine
from mesp_ref.files.checkpoint import save_checkpoint
from mesp_ref.files.mlx import load_mlx_adapter, save_mlx_adapter
from mesp_ref.files.quantize import quantize, quantize_checkpoint
from mesp_ref.files.quantized import Quantized

mx = pytest.importorskip("mlx.core")
mlx_utils = pytest.importorskip("mlx.utils")
models = pytest.importorskip("mlx_lm.utils")
tuner = pytest.importorskip("mlx_lm.tuner.utils")

TYPES = {
    "float32": (np.dtype(np.float32), mx.float32),
    "float16": (np.dtype(np.float16), mx.float16),
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), mx.bfloat16),
}
EVERY = [(t, bits, g) for t in TYPES for bits in (4, 8) for g in (32, 64, 128)]


@pytest.fixture(autouse=True, scope="module")
def _on_the_cpu() -> None:
    mx.set_default_device(mx.cpu)


def to_mlx(w: np.ndarray) -> Any:
    if w.dtype == ml_dtypes.bfloat16:
        return mx.array(w.view(np.uint16)).view(mx.bfloat16)
    return mx.array(w)


def to_numpy(a: Any) -> np.ndarray:
    if a.dtype == mx.bfloat16:
        return np.array(a.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.array(a)


def same_bits(got: np.ndarray, want: np.ndarray) -> bool:
    return got.dtype == want.dtype and got.shape == want.shape and got.tobytes() == want.tobytes()


def special_rows(rng: np.random.Generator, shape: tuple[int, int], size: float) -> np.ndarray:
    """Normal weights, and groups that are zero, constant, of one sign, symmetric or have outliers."""
    w = rng.standard_normal(shape) * size
    w[0], w[1], w[2] = 0, size, -size
    w[3], w[4] = np.abs(w[3]), -np.abs(w[4])
    w[5, ::2] = -w[5, 1::2]
    w[6, 7] = 50 * size
    w[7, ::2] = 0
    return w


@pytest.mark.parametrize("size", [1e-6, 0.02, 1.0, 100.0])
@pytest.mark.parametrize(("kind", "bits", "g"), EVERY)
def test_quantize_and_dequantize(kind: str, bits: int, g: int, size: float) -> None:
    """Every word, scale, bias and decoded weight is mx.quantize's and mx.dequantize's."""
    rng = np.random.default_rng(bits + g)
    for rows, groups in ((8, 1), (33, 7), (64, 16)):
        w = special_rows(rng, (rows, groups * g), size).astype(TYPES[kind][0])
        want = mx.quantize(to_mlx(w), group_size=g, bits=bits)
        got = quantize(w, Affine(bits, g))
        for ours, theirs in zip(got, want, strict=True):
            assert same_bits(ours, to_numpy(theirs))
        decoded = mx.dequantize(*want, group_size=g, bits=bits)
        assert decoded.dtype == TYPES[kind][1]
        table = Quantized(*got, bits, np.dtype(np.float32))
        assert same_bits(table[...], to_numpy(decoded).astype(np.float32))


@pytest.mark.parametrize(("kind", "bits", "g"), EVERY)
def test_dequantize_any_bits(kind: str, bits: int, g: int) -> None:
    """Random words, scales of both signs, subnormal, and in float16 up to overflow."""
    rng = np.random.default_rng(bits * g)
    words = rng.integers(0, 2**32, (9, 4 * g * bits // 32), dtype=np.uint32)
    for size in (1e-7, 1e-3, 7.0, 2e4):
        with np.errstate(over="ignore"):
            scales, biases = (
                (rng.standard_normal((9, 4)) * size * by).astype(TYPES[kind][0]) for by in (1, -8)
            )
        parts = [to_mlx(a) for a in (words, scales, biases)]
        want = to_numpy(mx.dequantize(*parts, group_size=g, bits=bits))
        with np.errstate(over="ignore", invalid="ignore"):
            got = Quantized(words, scales, biases, bits, np.dtype(np.float32))[...]
        assert np.array_equal(got, want.astype(np.float32), equal_nan=True)


# ------------------------------------------------------------------------------- models of mlx-lm


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = mr.Qwen2Config(
        vocab_size=99, hidden_size=64, intermediate_size=160, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, rope_theta=4321.0,
    )  # fmt: skip
    model = mr.random_model(config, seed=4, std=0.15)
    arrays = {n: model.weights[n][...] for n in model.weights}
    rng = np.random.default_rng(5)
    for w in arrays.values():
        if w.ndim == 1:
            w += (0.3 * rng.standard_normal(w.shape)).astype(w.dtype)
    path = tmp_path_factory.mktemp("dense")
    save_checkpoint(config, arrays, path)
    return path


def logits_of(model: Any, ids: np.ndarray) -> np.ndarray:
    return to_numpy(model(mx.array(ids)).astype(mx.float32))


IDS = np.random.default_rng(1).integers(0, 99, (2, 11))


@pytest.mark.parametrize(("bits", "g"), [(4, 32), (4, 64), (8, 32)])
def test_mlx_lm_loads_what_we_quantise(dense: Path, tmp_path: Path, bits: int, g: int) -> None:
    """Rows of 160 weights stay dense at g = 64. Two float32 forwards: 1e-4 of the largest logit."""
    quantize_checkpoint(dense, tmp_path / "out", bits, g)
    theirs, _ = models.load_model(tmp_path / "out")
    assert theirs.model.layers[0].mlp.up_proj.bits == bits
    want, got = logits_of(theirs, IDS), mr.logits(mr.load_model(tmp_path / "out"), IDS)
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


@pytest.mark.parametrize("dtype", TYPES)
def test_we_load_what_mlx_lm_quantises(dense: Path, tmp_path: Path, dtype: str) -> None:
    """Every tensor bit for bit what our quantize writes from the same directory."""
    model, config = models.load_model(dense)
    model.set_dtype(TYPES[dtype][1])
    model, config = models.quantize_model(model, config, group_size=32, bits=4)
    models.save_model(tmp_path / "theirs", model)
    models.save_config(config, tmp_path / "theirs" / "config.json")
    quantize_checkpoint(dense, tmp_path / "ours", 4, 32, dtype)
    ours, theirs = mr.load_model(tmp_path / "ours"), mr.load_model(tmp_path / "theirs")
    for name in ours.weights:
        assert same_bits(ours.weights[name][...], theirs.weights[name][...]), name
        assert type(ours.weights[name]) is type(theirs.weights[name])
    assert np.array_equal(mr.logits(ours, IDS), mr.logits(theirs, IDS))


# -------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize(
    "options",
    [{"rank": 3, "alpha": 5.0}, {"targets": "q_proj,down_proj", "rank": 4, "use_rslora": True}],
)
def test_mlx_lm_loads_our_adapter(dense: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    model = mr.load_model(dense)
    adapter = mr.init_lora(model.config, seed=2, b_std=0.3, **options)
    save_mlx_adapter(adapter, tmp_path)
    theirs, _ = models.load_model(dense)
    bare = logits_of(theirs, IDS)
    want = logits_of(tuner.load_adapters(theirs, str(tmp_path)), IDS)
    got = mr.logits(model, IDS, adapter)
    assert np.abs(want - bare).max() > 0.1 * np.abs(want).max()  # the adapter does something
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()
    again = load_mlx_adapter(tmp_path, config=model.config)
    assert (again.rank, again.targets) == (adapter.rank, adapter.targets)
    assert again.scale == pytest.approx(adapter.scale, rel=1e-15)
    assert all(same_bits(again.weights[n], w) for n, w in adapter.weights.items())


@pytest.mark.parametrize("blocks", [2, 3])
def test_we_load_an_adapter_of_mlx_lm(dense: Path, tmp_path: Path, blocks: int) -> None:
    """As its trainer saves it: the last `blocks` blocks, every linear layer, scale 20."""
    theirs, _ = models.load_model(dense)
    parameters = {"rank": 8, "scale": 20.0, "dropout": 0.0}
    theirs.freeze()
    tuner.linear_to_lora_layers(theirs, blocks, parameters)
    mx.random.seed(3)
    weights = {
        name: mx.random.normal(a.shape) * 0.05
        for name, a in mlx_utils.tree_flatten(theirs.trainable_parameters())
    }
    theirs.load_weights(list(weights.items()), strict=False)
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": blocks, "lora_parameters": parameters}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = mr.load_model(dense)
    adapter = load_mlx_adapter(tmp_path, config=model.config)
    assert adapter.scale == 20
    want, got = logits_of(theirs, IDS), mr.logits(model, IDS, adapter)
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


@pytest.mark.parametrize("blocks", [[0], [1, 2], [0, 2]])
def test_an_adapter_of_some_blocks(dense: Path, tmp_path: Path, blocks: list[int]) -> None:
    """mlx-lm refuses what save_mlx_adapter refuses when it knows the model, and reads the rest."""
    model = mr.load_model(dense)
    last = model.config.num_hidden_layers - 1
    blocks = [min(block, last) for block in blocks]
    whole = mr.init_lora(model.config, seed=2, b_std=0.3, rank=3)
    some = {n: w for n, w in whole.weights.items() if int(n.split(".")[4]) in blocks}
    adapter = mr.Adapter(3, 16.0, whole.targets, weights=some)
    theirs, _ = models.load_model(dense)
    if max(blocks) < last:
        with pytest.raises(mr.MespRefError, match="mlx-lm adapts the last blocks of a model only"):
            save_mlx_adapter(adapter, tmp_path, blocks=last + 1)
        save_mlx_adapter(adapter, tmp_path)
        with pytest.raises(ValueError, match="not an adapter parameter"):
            tuner.load_adapters(theirs, str(tmp_path))
        with pytest.raises(mr.MespRefError, match="mlx-lm adapts no other"):
            load_mlx_adapter(tmp_path, config=model.config)
        return
    save_mlx_adapter(adapter, tmp_path, blocks=last + 1)
    want = logits_of(tuner.load_adapters(theirs, str(tmp_path)), IDS)
    again = load_mlx_adapter(tmp_path, config=model.config)
    got = mr.logits(model, IDS, again)
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


def test_merged_models_load_in_mlx_lm(dense: Path, tmp_path: Path) -> None:
    """The merged checkpoint gives mlx-lm the logits of base and adapter."""
    model = mr.load_model(dense)
    adapter = mr.init_lora(model.config, seed=2, b_std=0.3)
    mr.merge(model, adapter, tmp_path / "merged")
    theirs, _ = models.load_model(tmp_path / "merged")
    want, got = mr.logits(model, IDS, adapter), logits_of(theirs, IDS)
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()

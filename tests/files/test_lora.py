"""Adapters: initialisation, scale, PEFT directories, merging, and every way a file can be wrong."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mesp_ref as mr
from mesp_ref.engine.config import PROJECTIONS
from mesp_ref.verify.samples import sample_adapter, sample_batch, sample_model, small_config

A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
CONFIG = small_config()


def test_initialisation_is_that_of_peft() -> None:
    """A uniform in ±1/√in, B zero: the adapted model is the base, to the bit."""
    adapter = mr.init_lora(small_config(hidden_size=64), rank=32, seed=3)
    assert adapter.targets == tuple(PROJECTIONS)
    assert len(adapter.weights) == 2 * 7 * 2
    A = adapter.weights[A0]
    assert A.shape == (32, 64)
    assert A.dtype == np.float32
    assert 0.99 / 8 < np.abs(A).max() <= 1 / 8
    assert np.var(A) == pytest.approx(1 / (3 * 64), rel=0.1)
    assert not any(w.any() for name, w in adapter.weights.items() if "lora_B" in name)


def test_fresh_adapter_changes_nothing_and_its_gradient_of_A_is_zero() -> None:
    rng = np.random.default_rng(0)
    model, batch = sample_model(rng, CONFIG), sample_batch(rng, CONFIG)
    adapter = mr.init_lora(CONFIG, rank=3, dtype="float64")
    np.testing.assert_array_equal(mr.logits(model, batch[0], adapter), mr.logits(model, batch[0]))
    _, grads = mr.loss_and_grads(model, adapter, *batch)
    for name, grad in grads.items():
        assert grad.any() == ("lora_B" in name), name


@pytest.mark.parametrize(("rslora", "scale"), [(False, 16.0 / 8), (True, 16.0 / math.sqrt(8))])
def test_scale(rslora: bool, scale: float) -> None:
    assert mr.init_lora(CONFIG, rank=8, alpha=16.0, use_rslora=rslora).scale == scale


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all", tuple(PROJECTIONS)),
        (["v_proj", "q_proj"], ("q_proj", "v_proj")),
        ("down_proj", ("down_proj",)),
        ("q_proj, up_proj", ("q_proj", "up_proj")),
    ],
)
def test_targets(targets: Any, expected: tuple[str, ...]) -> None:
    adapter = mr.init_lora(CONFIG, targets=targets)
    assert adapter.targets == expected
    assert len(adapter.weights) == 4 * len(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank: found 0"),
        ({"rank": 2.5}, "rank: found 2.5"),
        ({"rank": True}, "rank: found True"),
        ({"alpha": math.nan}, "alpha: found nan"),
        ({"targets": "k_proj,lm_head"}, "found 'lm_head'"),
        ({"targets": []}, "targets: found none"),
        ({"dtype": "float16"}, "dtype: found float16"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(mr.MespRefError, match=message):
        mr.init_lora(CONFIG, **options)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rslora", [False, True])
def test_round_trip_to_the_bit(tmp_path: Path, dtype: str, rslora: bool) -> None:
    adapter = sample_adapter(
        np.random.default_rng(1), CONFIG, dtype, use_rslora=rslora, targets=["q_proj", "down_proj"]
    )
    adapter.base_model_name_or_path = "somewhere/base"
    mr.save_adapter(adapter, tmp_path)
    loaded = mr.load_adapter(tmp_path, dtype, CONFIG)
    assert loaded.scale == adapter.scale
    assert loaded.targets == adapter.targets
    assert loaded.base_model_name_or_path == "somewhere/base"
    assert loaded.weights.keys() == adapter.weights.keys()
    for name, array in adapter.weights.items():
        np.testing.assert_array_equal(loaded.weights[name], array)
        loaded.weights[name] += 1  # an optimiser may


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    mr.save_adapter(sample_adapter(np.random.default_rng(2), CONFIG, "float32"), tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type: found 'IA3'"),
        ({"r": 0}, "r: found 0"),
        ({"r": "8"}, "r: found '8'"),
        ({"lora_alpha": None}, "alpha: found None"),
        ({"r": 2}, "r: found 2, expected 3, with which"),
        ({"use_dora": True}, "use_dora: found True"),
        ({"bias": "all"}, "bias: found 'all'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
)
def test_adapter_config_that_cannot_be_computed(
    directory: Path, change: dict[str, Any], message: str
) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(mr.MespRefError, match=message) as error:
        mr.load_adapter(directory)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", "1"])
def test_adapter_config_that_is_not_an_object(directory: Path, text: str) -> None:
    (directory / "adapter_config.json").write_text(text)
    with pytest.raises(mr.MespRefError, match=r"adapter_config\.json"):
        mr.load_adapter(directory)


def test_missing_partner_foreign_tensor_and_foreign_model(directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    other = small_config(hidden_size=8)
    with pytest.raises(mr.MespRefError, match="belongs to another model"):
        mr.load_adapter(directory, config=other)
    save_file({name: array for name, array in tensors.items() if name != A0}, file)
    with pytest.raises(mr.MespRefError, match=r"q_proj.lora_A.weight: missing, expected beside"):
        mr.load_adapter(directory)
    save_file(tensors | {"base_model.model.lm_head.lora_A.weight": tensors[A0]}, file)
    with pytest.raises(mr.MespRefError, match=r"lm_head.lora_A.weight: found, expected"):
        mr.load_adapter(directory)
    file.unlink()
    with pytest.raises(mr.MespRefError, match="not found"):
        mr.load_adapter(directory)


@pytest.mark.parametrize("tied", [True, False])
def test_merged_checkpoint_is_the_adapted_model(tmp_path: Path, tied: bool) -> None:
    """Logits agree to rounding; base weights outside the targets are copied to the bit."""
    rng = np.random.default_rng(5)
    config = small_config(tied)
    model, ids = sample_model(rng, config), sample_batch(rng, config)[0]
    adapter = sample_adapter(rng, config, targets=["v_proj", "gate_proj"])
    mr.merge(model, adapter, tmp_path / "merged", dtype="float64")
    merged = mr.load_model(tmp_path / "merged", "float64")
    expected = mr.logits(model, ids, adapter)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(mr.logits(merged, ids), expected, rtol=0, atol=1e-13 * scale)
    for name in model.weights:
        touched = name.endswith(("v_proj.weight", "gate_proj.weight"))
        assert np.array_equal(merged.weights[name][...], model.weights[name][...]) != touched, name


def test_merge_refuses_to_overwrite_and_foreign_adapters(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    model = sample_model(rng, CONFIG)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(mr.MespRefError, match="not empty"):
        mr.merge(model, sample_adapter(rng, CONFIG), tmp_path / "full")
    assert [f.name for f in (tmp_path / "full").iterdir()] == ["notes.txt"]
    with pytest.raises(mr.MespRefError, match="belongs to another model"):
        mr.merge(model, sample_adapter(rng, small_config(hidden_size=8)), tmp_path / "out")
    assert not (tmp_path / "out").exists()

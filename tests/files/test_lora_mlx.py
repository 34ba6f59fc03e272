"""Adapters in mlx-lm's layout; tests/parity/test_mlx.py loads them in mlx-lm itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mesp_ref as mr
from mesp_ref.cli import main
from mesp_ref.files.mlx import load_mlx_adapter, save_mlx_adapter


@pytest.fixture
def adapter(tiny_config: mr.Qwen2Config) -> mr.Adapter:
    return mr.init_lora(tiny_config, rank=3, alpha=5.0, targets="q_proj,down_proj", b_std=0.1)


def test_the_files(adapter: mr.Adapter, tmp_path: Path) -> None:
    """Matrices transposed, names without PEFT's prefix, the scale itself in the configuration."""
    save_mlx_adapter(adapter, tmp_path)
    found = load_file(tmp_path / "adapters.safetensors")
    assert len(found) == 8
    prefix = "base_model.model.model.layers.1.mlp.down_proj.lora_"
    assert np.array_equal(
        found["model.layers.1.mlp.down_proj.lora_a"], adapter.weights[f"{prefix}A.weight"].T
    )
    assert np.array_equal(
        found["model.layers.1.mlp.down_proj.lora_b"], adapter.weights[f"{prefix}B.weight"].T
    )
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora"
    assert config["num_layers"] == 2
    assert config["lora_parameters"] == {
        "rank": 3, "scale": 5 / 3, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.down_proj"],
    }  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rslora", [False, True])
def test_round_trip(tiny_config: mr.Qwen2Config, tmp_path: Path, dtype: str, rslora: bool) -> None:
    """Every matrix bit for bit, writable; the scale to rounding, since alpha is scale·rank."""
    adapter = mr.init_lora(
        tiny_config, rank=3, alpha=5.0, b_std=0.1, use_rslora=rslora, dtype=dtype
    )
    save_mlx_adapter(adapter, tmp_path)
    again = load_mlx_adapter(tmp_path, dtype, tiny_config)
    assert list(again.targets) == list(adapter.targets)
    assert again.scale == pytest.approx(adapter.scale, rel=4e-16)
    assert set(again.weights) == set(adapter.weights)
    for name, w in adapter.weights.items():
        assert again.weights[name].dtype == w.dtype
        assert again.weights[name].flags.writeable
        assert np.array_equal(again.weights[name], w)


def test_the_last_blocks_alone(adapter: mr.Adapter, tmp_path: Path, tiny_model_dir: Path) -> None:
    """mlx-lm's default adapts the last 16 blocks; the others then compute as the base does."""
    last = {n: w for n, w in adapter.weights.items() if ".layers.1." in n}
    save_mlx_adapter(mr.Adapter(3, 5.0, adapter.targets, weights=last), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["num_layers"] == 1
    model = mr.load_model(tiny_model_dir)
    found = load_mlx_adapter(tmp_path, config=model.config)
    silent = {n: w * (".layers.1." in n) for n, w in adapter.weights.items()}
    zeroed = mr.Adapter(3, 5.0, adapter.targets, weights=silent)
    ids = [[5, 6, 7, 8]]
    assert np.allclose(mr.logits(model, ids, found), mr.logits(model, ids, zeroed), atol=1e-6)
    assert not np.allclose(mr.logits(model, ids, found), mr.logits(model, ids), atol=1e-6)


def edit_config(field: str, value: Any) -> Callable[[dict, dict], object]:
    return lambda config, tensors: config.update({field: value})


def edit_scale(**values: Any) -> Callable[[dict, dict], object]:
    return lambda config, tensors: config["lora_parameters"].update(values)


Q = "model.layers.0.self_attn.q_proj"
BROKEN: dict[str, tuple[Callable[[dict, dict], object], str]] = {
    "dora": (edit_config("fine_tune_type", "dora"), "fine_tune_type: found 'dora'"),
    "full": (edit_config("fine_tune_type", "full"), "fine_tune_type: found 'full'"),
    "none": (edit_config("lora_parameters", None), "lora_parameters: found None, expected rank"),
    "rank": (edit_scale(rank=0), "lora_parameters.rank: found 0"),
    "scale": (edit_scale(scale="20"), "lora_parameters.scale: found '20', expected a finite"),
    "other rank": (edit_scale(rank=4), "expected rank 4"),
    "name": (
        lambda c, t: t.update({"lm_head.lora_a": t[f"{Q}.lora_a"]}),
        "lm_head.lora_a: found, expected matrices model.layers.N",
    ),
    "vector": (
        lambda c, t: t.update({f"{Q}.lora_a": t[f"{Q}.lora_a"][0]}),
        f"{Q}.lora_a: found float32 [3], expected a matrix",
    ),
    "alone": (lambda c, t: t.pop(f"{Q}.lora_b"), "q_proj.lora_B.weight: missing"),
    "shape": (
        lambda c, t: t.update({f"{Q}.lora_a": np.zeros((21, 3), np.float32)}),
        "the adapter belongs to another model",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_bad_adapters_are_named(
    adapter: mr.Adapter, tiny_config: mr.Qwen2Config, tmp_path: Path, case: str
) -> None:
    change, message = BROKEN[case]
    save_mlx_adapter(adapter, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapters.safetensors")
    change(config, tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapters.safetensors")
    with pytest.raises(mr.MespRefError) as caught:
        load_mlx_adapter(tmp_path, config=tiny_config)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_not_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(mr.MespRefError, match="not found, expected an mlx-lm adapter"):
        load_mlx_adapter(tmp_path)
    for text, message in (
        ("{", "not readable as JSON"),
        ("[1]", "found list, expected a JSON object"),
    ):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(mr.MespRefError, match=message):
            load_mlx_adapter(tmp_path)


def test_command(adapter: mr.Adapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PEFT to mlx-lm and back: the same matrices."""
    peft, mlx, again = (str(tmp_path / name) for name in ("peft", "mlx", "again"))
    mr.save_adapter(adapter, peft)
    assert main(["convert", "adapter", peft, mlx, "--to", "mlx"]) == 0
    assert "4 projections of rank 3 for mlx" in capsys.readouterr().out
    assert main(["convert", "adapter", mlx, again, "--to", "peft", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"] == 4
    found = mr.load_adapter(again)
    assert all(np.array_equal(found.weights[n], w) for n, w in adapter.weights.items())
    assert main(["convert", "adapter", str(tmp_path / "none"), again, "--to", "mlx"]) == 2

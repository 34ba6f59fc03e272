"""Which modules PEFT adapts: as peft 0.21 decides (tests/parity compares logits), and in time."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mesp_ref as mr
from mesp_ref.files import targets
from mesp_ref.files.targets import adapted
from mesp_ref.verify.samples import small_config

Q0, V0, Q1, V1, UP1 = (
    f"model.layers.{place}"
    for place in ("0.self_attn.q_proj", "0.self_attn.v_proj", "1.self_attn.q_proj",
                  "1.self_attn.v_proj", "1.mlp.up_proj")
)  # fmt: skip
ALL = {Q0, V0, Q1, V1, UP1}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {Q0, V0, Q1, V1}),  # PEFT's own choice for qwen2
        ({"target_modules": ["q_proj"]}, {Q0, Q1}),
        ({"target_modules": ["proj"]}, set()),
        ({"target_modules": ["self_attn.q_proj", "up_proj"]}, {Q0, Q1, UP1}),
        ({"target_modules": [Q1]}, {Q1}),
        ({"target_modules": []}, set()),
        ({"target_modules": "all-linear"}, ALL),
        ({"target_modules": "q_proj"}, set()),
        ({"target_modules": r".*q_proj"}, {Q0, Q1}),
        ({"target_modules": r"model\.layers\.1\..*"}, {Q1, V1, UP1}),
        ({"target_modules": "all-linear", "exclude_modules": ["up_proj"]}, ALL - {UP1}),
        ({"target_modules": "all-linear", "exclude_modules": r".*mlp.*"}, ALL - {UP1}),
        ({"target_modules": "all-linear", "exclude_modules": "all-linear"}, ALL),
        ({"target_modules": "all-linear", "exclude_modules": []}, ALL),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1}, {Q1}),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0}, {Q0}),
        ({"target_modules": ["q_proj"], "layers_to_transform": []}, {Q0, Q1}),
        ({"target_modules": ["v_proj", Q0], "layers_to_transform": [1]}, {Q0, V1}),
        ({"layers_to_transform": [5]}, set()),
    ],
)
def test_selection(fields: dict[str, Any], expected: set[str]) -> None:
    assert adapted(ALL, fields, "adapter_config.json") == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": "("}, "target_modules: found '(', expected a regular expression"),
        ({"target_modules": "a\0"}, None),
        ({"exclude_modules": "*"}, "exclude_modules: found '*', expected a regular expression"),
        (
            {"target_modules": ".*q_proj", "layers_to_transform": [0]},
            "layers_to_transform: found [0] beside target_modules '.*q_proj'",
        ),
    ],
)
def test_what_is_no_selection(fields: dict[str, Any], message: str | None) -> None:
    if message is None:
        assert adapted(ALL, fields, "x") == set()
        return
    with pytest.raises(mr.MespRefError) as error:
        adapted(ALL, fields, "adapter_config.json")
    assert message in str(error.value)


def test_a_regular_expression_cannot_hang_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's re needs 2^40 steps for this one, and nothing can stop it but the end of a process."""
    monkeypatch.setattr(targets, "_SECONDS", 1)
    begin = time.monotonic()
    with pytest.raises(mr.MespRefError, match="expected a regular expression that is evaluated"):
        adapted([f"model.layers.0.{'a' * 40}"], {"target_modules": r".*\.(a|a)*b"}, "x")
    assert time.monotonic() - begin < 5


# ------------------------------------------------------------------------------ whole adapters


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """An adapter of two blocks on q_proj and v_proj."""
    adapter = mr.init_lora(small_config(), rank=2, targets="q_proj,v_proj", b_std=1.0)
    mr.save_adapter(adapter, tmp_path)
    return tmp_path


def edit(directory: Path, **fields: Any) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def keep(directory: Path, *parts: str) -> None:
    """Only those tensors whose names hold one of these parts."""
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({n: w for n, w in tensors.items() if any(part in n for part in parts)}, file)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"]},
        {"exclude_modules": ["v_proj"]},
        {"layers_to_transform": [1]},
        {"target_modules": r".*0.*"},
        {"target_modules": "v_proj"},
    ],
)
def test_tensors_that_peft_would_drop(directory: Path, fields: dict[str, Any]) -> None:
    edit(directory, **fields)
    with pytest.raises(mr.MespRefError, match="PEFT would drop it") as error:
        mr.load_adapter(directory)
    assert str(directory / "adapter_config.json") in str(error.value)


@pytest.mark.parametrize("fields", [{"layers_to_transform": [1]}, {"layers_to_transform": 1},
                                    {"target_modules": r".*\.1\..*(q|v)_proj"}])  # fmt: skip
def test_an_adapter_of_one_block(directory: Path, fields: dict[str, Any]) -> None:
    """The other block computes as the base does: its logits are those of matrices that are zero."""
    edit(directory, **fields)
    whole = mr.Adapter(2, 16.0, ("q_proj", "v_proj"), weights=load_file(
        directory / "adapter_model.safetensors"))  # fmt: skip
    for name, w in whole.weights.items():
        w *= ".layers.1." in name
    keep(directory, ".layers.1.")
    model = mr.random_model(small_config())
    found = mr.load_adapter(directory, config=model.config)
    ids = [[1, 2, 3, 4]]
    want = mr.logits(model, ids, whole)
    assert np.allclose(mr.logits(model, ids, found), want, rtol=0, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize(("begun", "read"), [(True, True), ("gaussian", True), ("eva", True),
                                             (False, False), ("orthogonal", False)])  # fmt: skip
def test_a_module_that_is_adapted_but_not_stored(directory: Path, begun: Any, read: bool) -> None:
    """PEFT begins it anew: with B = 0 it changes nothing, drawn at random it does."""
    edit(directory, init_lora_weights=begun)
    keep(directory, "q_proj")
    if read:
        assert mr.load_adapter(directory, config=small_config()).targets == ("q_proj",)
        return
    with pytest.raises(
        mr.MespRefError, match=r"expected matrices of model\.layers\.0\.self_attn\.v"
    ):
        mr.load_adapter(directory, config=small_config())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication: found"),
        ({"a_future_field": True}, "a_future_field: found True, expected no such field"),
        ({"use_dora": "false"}, "use_dora: found 'false', expected False"),
        ({"use_rslora": "true"}, "use_rslora: found 'true', expected true or false"),
        ({"use_rslora": 1}, "use_rslora: found 1"),
        ({"fan_in_fan_out": 0}, "fan_in_fan_out: found 0"),
        ({"lora_bias": "no"}, "lora_bias: found 'no'"),
        ({"lora_alpha": "16"}, "lora_alpha: found '16'"),
        ({"lora_alpha": True}, "lora_alpha: found True"),
        ({"task_type": "SEQ_CLS"}, "task_type: found 'SEQ_CLS'"),
        ({"arrow_config": {"top_k": 1}}, "arrow_config: found"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: found 'pissa'"),
        ({"target_modules": {"q_proj": True}}, "target_modules: found {'q_proj': True}"),
        ({"layers_pattern": "h"}, "layers_pattern: found 'h'"),
        ({"peft_type": None}, "peft_type: missing, expected 'LORA'"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path: found 3"),
    ],
)
def test_fields_that_change_the_numbers(
    directory: Path, fields: dict[str, Any], message: str
) -> None:
    edit(directory, **fields)
    with pytest.raises(mr.MespRefError) as error:
        mr.load_adapter(directory)
    assert message in str(error.value)


# ------------------------------------------------------------------------------------ to mlx-lm


@pytest.mark.parametrize(
    ("blocks", "stated", "model", "message"),
    [
        ([0, 1], None, False, None),
        ([0, 1], [0, 1], True, None),
        ([0, 1], [0, 1], False, "name the model with --model"),
        ([1], [1], True, None),
        ([1], [1], False, "name the model with --model"),
        ([1], None, False, "name the model with --model"),
        ([0], [0], False, "name the model with --model"),
        (
            [0],
            [0],
            True,
            "found matrices up to block 0, expected some in the model's last, block 1",
        ),
        ([0], None, True, "found matrices up to block 0, expected some"),
    ],
)
def test_only_the_last_blocks_go_to_mlx_lm(
    tiny_model_dir: Path, tmp_path: Path, blocks: list[int], stated: Any, model: bool,
    message: str | None, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """mlx-lm 0.32 refuses matrices of blocks that it does not adapt: tests/parity/test_mlx.py."""
    from mesp_ref.cli import main

    config = mr.load_model(tiny_model_dir).config
    mr.save_adapter(mr.init_lora(config, rank=2, b_std=1.0), tmp_path / "a")
    keep(tmp_path / "a", *(f".layers.{i}." for i in blocks))
    edit(tmp_path / "a", layers_to_transform=stated)
    command = ["convert", "adapter", str(tmp_path / "a"), str(tmp_path / "out"), "--to", "mlx"]
    command += ["--model", str(tiny_model_dir)] if model else []
    assert main(command) == (0 if message is None else 2)
    shown = capsys.readouterr()
    if message is not None:
        assert message in shown.err
        assert not (tmp_path / "out").exists()
        return
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["num_layers"] == len(blocks)

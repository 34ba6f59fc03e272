"""Checkpoint directories: what transformers writes is read here, and the other way round."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_oracle
from huggingface_hub.errors import StrictDataclassError
from safetensors.numpy import load_file, save_file
from torch_oracle import LAYOUTS, TOLERANCE, Batch, assert_close, assert_names_its_file

import mesp_ref as mr
from mesp_ref.files.checkpoint import save_checkpoint

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def assert_same_logits(path: Path, batch: Batch) -> None:
    want = torch_oracle.logits(torch_oracle.load(path), batch.ids)
    got = mr.logits(mr.load_model(path, dtype="float64"), batch.ids)
    assert_close(got, want, TOLERANCE, "logits")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_files_of_transformers(
    tmp_path: Path, batch: Batch, dtype: str, tied: bool, shards: bool
) -> None:
    model = torch_oracle.build(replace(LAYOUTS["H/G=2"], tied=tied)).to(DTYPES[dtype])
    model.save_pretrained(tmp_path, max_shard_size="4KB" if shards else "1GB")
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == shards
    assert len(list(tmp_path.glob("*.safetensors"))) > 2 or not shards
    assert_same_logits(tmp_path, batch)


def rewrite_config(path: Path, drop: set[str], **fields: Any) -> None:
    file = path / "config.json"
    values = {k: v for k, v in json.loads(file.read_text()).items() if k not in drop}
    file.write_text(json.dumps(values | fields))


NEW_FIELDS = {"rope_parameters", "dtype", "layer_types"}


@pytest.mark.parametrize("layout", ["H/G=3", "wide heads"])
def test_old_config_fields(tmp_path: Path, batch: Batch, layout: str) -> None:
    """Top-level rope_theta and torch_dtype, as every published Qwen2.5 has them."""
    torch_oracle.build(LAYOUTS[layout]).save_pretrained(tmp_path)
    new = mr.load_model(tmp_path).config
    assert new.rope_theta == 4321.0
    old = {"rope_theta": 4321.0, "torch_dtype": "float32", "rope_scaling": None}
    old |= {"sliding_window": 131072, "max_window_layers": 21, "use_mrope": False}
    rewrite_config(tmp_path, NEW_FIELDS, **old)
    assert mr.load_model(tmp_path).config == new
    assert_same_logits(tmp_path, batch)


@pytest.mark.parametrize(
    ("drop", "fields"),
    [
        ({"rope_parameters"}, {}),
        ({"rms_norm_eps"}, {}),
        ({"max_position_embeddings"}, {}),
        ({"num_key_value_heads"}, {}),
        ({"tie_word_embeddings"}, {}),
        ({"rope_parameters"}, {"rope_parameters": {"rope_type": "default"}}),
        ({"rope_parameters"}, {"rope_parameters": {"rope_theta": 99.0}}),
        ({"rope_parameters"}, {"rope_theta": 77.0, "rope_parameters": {"rope_type": "default"}}),
        (set(), {"rope_theta": 77.0}),
        ({"rope_parameters"}, {"rope_theta": 77.0, "rope_scaling": {"type": "default"}}),
        ({"rope_parameters"}, {"rope_theta": 77.0, "rope_scaling": {"type": "yarn", "factor": 4}}),
        (set(), {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
        (set(), {"hidden_act": "gelu"}),
        (set(), {"hidden_act": None}),
        (set(), {"rope_theta": 0}),
        (set(), {"rope_theta": -1e4}),
        (set(), {"rope_theta": "4321"}),
        (set(), {"rope_theta": True}),
        (set(), {"rope_theta": None}),
        ({"rope_parameters"}, {"rope_theta": None}),
        ({"rope_parameters"}, {"rope_parameters": None, "rope_scaling": None}),
        (set(), {"rope_scaling": {"rope_type": "default", "rope_theta": 99.0}}),
        ({"rope_parameters"}, {"rope_scaling": {"rope_type": "default", "rope_theta": 99.0}}),
        ({"rope_parameters"}, {"rope_theta": 77.0, "rope_scaling": {"type": "dynamic"}}),
        (set(), {"partial_rotary_factor": 0.5}),
        (set(), {"attn_logit_softcapping": 30.0}),
        (set(), {"final_logit_softcapping": 30.0}),
        (set(), {"mlp_bias": True}),
        (set(), {"mlp_bias": False}),
        (set(), {"attention_bias": False}),
        (set(), {"attention_bias": True}),
        (set(), {"head_dim": None}),
        (set(), {"tie_word_embeddings": None}),
        (set(), {"tie_word_embeddings": 0}),
        (set(), {"num_key_value_heads": None}),
        (set(), {"rms_norm_eps": None}),
        (set(), {"max_position_embeddings": None}),
        (set(), {"layer_types": None}),
        (set(), {"sliding_window": 4, "use_sliding_window": False}),
        (set(), {"use_sliding_window": "false", "sliding_window": 4}),
        (set(), {"use_sliding_window": None, "sliding_window": 4}),
        (set(), {"attention_dropout": 0.5}),
        (set(), {"dual_chunk_attention_config": {"chunk_size": 2, "local_size": 1}}),
        (set(), {"is_decoder": False}),
        (set(), {"is_causal": False}),
        (set(), {"pretraining_tp": 2}),
        (set(), {"chunk_size_feed_forward": 1}),
        (set(), {"auto_map": {"AutoModelForCausalLM": "modeling.Other"}}),
        (set(), {"qk_norm": True}),
        (set(), {"a_future_field": None}),
    ],
    ids=str,
)
def test_absent_and_unusual_fields_are_read_right_or_refused(
    tmp_path: Path, batch: Batch, drop: set[str], fields: dict[str, Any]
) -> None:
    """Defaults are transformers' own: equal logits, or a MespRefError that names the file."""
    torch_oracle.build(LAYOUTS["H/G=3"]).save_pretrained(tmp_path)
    rewrite_config(tmp_path, drop, **fields)
    try:
        mr.load_model(tmp_path)
    except mr.MespRefError as error:
        assert_names_its_file(error, tmp_path)
        return
    if None not in fields.values() or transformers_opens(tmp_path):
        assert_same_logits(tmp_path, batch)


def transformers_opens(path: Path) -> bool:
    """It refuses null where it demands a value: then there is no number to differ from."""
    try:
        torch_oracle.load(path)
    except (StrictDataclassError, TypeError, ValueError):
        return False
    return True


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_head_stored_twice(tmp_path: Path, batch: Batch, same: bool) -> None:
    """Read where it equals the embedding; transformers takes one or the other where it does not."""
    torch_oracle.build(replace(LAYOUTS["H/G=3"], tied=True)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].copy()
    head[-1, -1] += 0 if same else 1
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors", {"format": "pt"})
    if same:
        assert_same_logits(tmp_path, batch)
        return
    with pytest.raises(mr.MespRefError, match="weight: found other numbers than"):
        mr.load_model(tmp_path)


def own_arrays(config: mr.Qwen2Config) -> dict[str, np.ndarray]:
    """Random weights in which biases and norms matter."""
    rng = np.random.default_rng(11)
    return {
        name: rng.standard_normal(shape) * 0.3 + name.endswith("norm.weight")
        for name, shape in config.weight_shapes().items()
    }


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("layout", ["H/G=3", "wide heads", "H=G=1"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_written_here_read_by_transformers(
    tmp_path: Path, batch: Batch, dtype: str, layout: str, tied: bool
) -> None:
    """The values survive exactly and no tensor is missing or left over."""
    torch_oracle.build(replace(LAYOUTS[layout], tied=tied)).save_pretrained(tmp_path / "theirs")
    config = mr.load_model(tmp_path / "theirs").config
    save_checkpoint(config, own_arrays(config), tmp_path / "ours", dtype=dtype)
    assert mr.load_model(tmp_path / "ours").config == replace(
        config, source=str(tmp_path / "ours" / "config.json")
    )
    model, info = torch_oracle.Qwen2ForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info.values()), info
    assert str(model.dtype) == f"torch.{dtype}"
    read = mr.load_model(tmp_path / "ours", dtype="float64").weights
    for name, p in model.named_parameters():
        assert np.array_equal(p.detach().double().numpy(), read[name][...]), name
    assert_same_logits(tmp_path / "ours", batch)

"""The table of fields itself, and the five kinds of files that are read by one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published import ADAPTERS, CONFIGS, GENERATION, MLX_ADAPTERS, TOKENIZERS, Fields
from safetensors.numpy import load_file, save_file

import mesp_ref as mr
from mesp_ref.files.affine import Quantization
from mesp_ref.files.config import config_of, read_generation_config
from mesp_ref.files.fields import (
    boolean,
    either,
    empty,
    exactly,
    harmless,
    integer,
    list_of,
    number,
    read_fields,
    record,
    text,
    tokens,
)
from mesp_ref.files.mlx import load_mlx_adapter, save_mlx_adapter
from mesp_ref.files.peft import read_adapter_config
from mesp_ref.files.tokenizer import read_tokenizer_config
from mesp_ref.verify.samples import small_config

TABLE = {
    "size": integer(),
    "share": number(0, 1),
    "any": number(),
    "on": boolean,
    "kind": exactly("a", "b"),
    "off": exactly(False),
    "name": text,
    "ends": tokens,
    "names": list_of(text),
    "inner": record({"deep": record({"x": number()})}),
    "unused": empty,
    "either": either("a text or a number", text, number()),
} | harmless("note _note")


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({}, {}),
        ({"size": 1, "share": 0, "on": True}, {"size": 1, "share": 0.0, "on": True}),
        ({"any": -2.5}, {"any": -2.5}),
        ({"kind": "b", "off": False, "name": ""}, {"kind": "b", "off": False, "name": ""}),
        ({"ends": [1, 2]}, {"ends": [1, 2]}),
        ({"ends": 0, "names": []}, {"ends": 0, "names": []}),
        ({"inner": {"deep": {"x": 1}}}, {"inner": {"deep": {"x": 1.0}}}),
        ({"unused": {}}, {"unused": {}}),
        ({"note": [None, {"a": 1}], "_note": 3}, {"note": [None, {"a": 1}], "_note": 3}),
        (dict.fromkeys([*TABLE, "unknown"]), {}),
    ],
)  # fmt: skip
def test_what_fits(given: Fields, read: Fields) -> None:
    found = read_fields(given, TABLE, "file.json")
    assert found == read
    for name, value in read.items():
        assert type(found[name]) is type(value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": 0}, "size: found 0, expected a positive integer up to 2147483647"),
        ({"size": True}, "size: found True"),
        ({"size": 1.0}, "size: found 1.0"),
        ({"size": 2**31}, "size: found 2147483648"),
        ({"share": 1.1}, "share: found 1.1, expected a number from 0 to 1"),
        ({"share": "0.5"}, "share: found '0.5'"),
        ({"share": False}, "share: found False"),
        ({"any": float("nan")}, "any: found nan, expected a finite number"),
        ({"any": float("inf")}, "any: found inf"),
        ({"any": 10**400}, "any: found 1"),
        ({"on": "false"}, "on: found 'false', expected true or false"),
        ({"on": 1}, "on: found 1"),
        ({"kind": "c"}, "kind: found 'c', expected 'a' or 'b'"),
        ({"off": 0}, "off: found 0, expected False"),
        ({"off": ""}, "off: found ''"),
        ({"name": 3}, "name: found 3, expected a text"),
        ({"ends": [1, -1]}, "ends: found [1, -1], expected a token id or a list of them"),
        ({"names": ["a", 1]}, "names: found 1, expected a text"),
        ({"names": "a"}, "names: found 'a', expected a list"),
        ({"inner": {"deep": {"x": None, "y": 1}}}, "inner.deep.y: found 1, expected no such field"),
        ({"inner": {"deep": 1}}, "inner.deep: found 1, expected an object"),
        ({"unused": [0]}, "unused: found [0], expected null or nothing in it"),
        ({"unused": 0}, "unused: found 0"),
        ({"unused": True}, "unused: found True"),
        ({"either": []}, "either: found [], expected a text or a number"),
        ({"unknown": False}, "unknown: found False, expected no such field"),
        ({"": 1}, "'': found 1, expected no such field"),
        ({"a\nb": 1}, "expected no such field"),
    ],
)
def test_what_does_not_fit_is_named(given: Fields, message: str) -> None:
    with pytest.raises(mr.MespRefError) as error:
        read_fields(given, TABLE, "file.json", "why")
    assert str(error.value).startswith("file.json: ")
    assert message in str(error.value)
    assert str(error.value).endswith("; why")
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------- published files


@pytest.mark.parametrize("writer", CONFIGS)
def test_published_configs_open(writer: str) -> None:
    values = CONFIGS[writer]
    config = config_of(values)
    rope = values.get("rope_theta", values.get("rope_parameters", {}).get("rope_theta"))
    assert config.rope_theta == rope
    assert (config.hidden_size, config.head_dim, config.num_key_value_heads) == (896, 64, 2)
    assert config.eos_token_ids == (values["eos_token_id"],)
    Quantization(values, "config.json")


@pytest.mark.parametrize("writer", ADAPTERS)
def test_published_adapters_open(writer: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTERS[writer]))
    values = read_adapter_config(tmp_path)
    assert (values["r"], values["lora_alpha"]) == (8, 16.0)


@pytest.mark.parametrize("writer", MLX_ADAPTERS)
def test_published_mlx_adapters_open(writer: str, tmp_path: Path) -> None:
    config = small_config()
    save_mlx_adapter(mr.init_lora(config, rank=8, targets="q_proj,v_proj"), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(MLX_ADAPTERS[writer]))
    assert load_mlx_adapter(tmp_path, config=config).scale == 20.0


@pytest.mark.parametrize("writer", TOKENIZERS)
def test_published_tokenizer_settings_open(writer: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(TOKENIZERS[writer]))
    assert read_tokenizer_config(tmp_path)["chat_template"] == TOKENIZERS[writer]["chat_template"]


@pytest.mark.parametrize("writer", GENERATION)
def test_published_generation_settings_open(writer: str, tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text(json.dumps(GENERATION[writer]))
    found = read_generation_config(tmp_path)
    assert found["eos_token_id"] == GENERATION[writer]["eos_token_id"]


# ------------------------------------------------------------------- fields that change the numbers

COMPUTES_ELSE: list[tuple[Fields, str]] = [
    ({"rope_theta": 0}, "rope_theta: found 0, expected a number from 1"),
    ({"rope_theta": -10000.0}, "rope_theta: found -10000.0"),
    ({"rope_theta": "1000000"}, "rope_theta: found '1000000'"),
    ({"rope_theta": True}, "rope_theta: found True"),
    ({"rope_parameters": {"rope_theta": 5.0}}, "rope_parameters.rope_theta = 5, rope_theta = 1e+06"),
    ({"rope_scaling": {"rope_theta": 5.0}}, "rope_scaling.rope_theta = 5, rope_theta = 1e+06"),
    ({"rope_scaling": {"type": "default", "factor": 2.0}}, "rope_scaling.factor: found 2.0"),
    ({"rope_scaling": {"mrope_section": [1, 2]}}, "rope_scaling.mrope_section: found [1, 2]"),
    ({"rope_scaling": "yarn"}, "rope_scaling: found 'yarn', expected an object"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: found 0.5, expected 1"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: found 50.0"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping: found 30.0"),
    ({"mlp_bias": True}, "mlp_bias: found True, expected False"),
    ({"attention_bias": False}, "attention_bias: found False, expected True"),
    ({"use_sliding_window": "false"}, "use_sliding_window: found 'false'"),
    ({"layer_types": "full_attention"}, "layer_types: found 'full_attention', expected a list"),
    ({"tie_word_embeddings": 0}, "tie_word_embeddings: found 0, expected true or false"),
    ({"tie_word_embeddings": "true"}, "tie_word_embeddings: found 'true'"),
    ({"architectures": ["Qwen2ForSequenceClassification"]}, "architectures: found 'Qwen2ForSeq"),
    ({"auto_map": {"AutoModel": "modeling.Model"}}, "auto_map: found"),
    ({"is_causal": False}, "is_causal: found False"),
    ({"use_mrope": True}, "use_mrope: found True"),
    ({"qk_norm": True}, "qk_norm: found True, expected no such field"),
    ({"logit_scale": 0.5}, "logit_scale: found 0.5, expected no such field"),
    ({"num_experts": 0}, "num_experts: found 0, expected no such field"),
    ({"model_type": "qwen3_moe"}, "model_type: found 'qwen3_moe', expected 'qwen2' or 'llama'"),
    ({"model_type": ["qwen2"]}, "model_type: found ['qwen2']"),
    ({"pruned_heads": {"0": [1]}}, "pruned_heads: found"),
    ({"eos_token_id": "2"}, "eos_token_id: found '2', expected a token id or a list"),
    ({"eos_token_id": [[2]]}, "eos_token_id: found [[2]]"),
    ({"bos_token_id": 1.0}, "bos_token_id: found 1.0"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), COMPUTES_ELSE)
def test_a_config_that_means_another_model(change: Fields, message: str) -> None:
    with pytest.raises(mr.MespRefError) as error:
        config_of(CONFIGS["Qwen2.5 Instruct"] | change, "m/config.json")
    assert str(error.value).startswith("m/config.json: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization": {"group_size": 64}}, "bits: found None"),
        ({"quantization": {"bits": 4, "group_size": 64, "rotate": True}}, "quantization.rotate"),
        ({"quantization": [64, 4]}, "quantization: found [64, 4], expected an object"),
        ({"quantization": {"bits": 4, "group_size": 64, "a.b": 8}}, "quantization.a.b: found 8"),
        ({"quantization_config": {"bits": 4}}, "expected what the field quantization says, None"),
        (
            {"quantization": {"bits": 4}, "quantization_config": {"bits": 8}},
            "quantization_config: found {'bits': 8}, expected what the field",
        ),
    ],
)
def test_a_quantization_that_is_not_known(change: Fields, message: str) -> None:
    with pytest.raises(mr.MespRefError) as error:
        Quantization(change, "config.json").of("model.embed_tokens.weight")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chat_template": 3}, "chat_template: found 3, expected a text, or a list of named ones"),
        ({"chat_template": [{"name": "default"}, 3]}, "chat_template: found"),
        ({"eos_token": 2}, "eos_token: found 2, expected a token's text"),
        ({"auto_map": {"AutoTokenizer": ["t.T", None]}}, "auto_map: found"),
        ({"a_future_field": 1}, "a_future_field: found 1, expected no such field"),
    ],
)
def test_tokenizer_settings_that_are_not_known(
    change: Fields, message: str, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(TOKENIZERS["Qwen2.5"] | change))
    with pytest.raises(mr.MespRefError) as error:
        read_tokenizer_config(tmp_path)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eos_token_id": "<|im_end|>"}, "eos_token_id: found '<|im_end|>', expected a token id"),
        ({"eos_token_id": [1, None]}, "eos_token_id: found [1, None]"),
        ({"a_future_field": 1}, "a_future_field: found 1, expected no such field"),
    ],
)
def test_generation_settings_that_are_not_known(
    change: Fields, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(GENERATION["Qwen2.5 base"] | change))
    with pytest.raises(mr.MespRefError) as error:
        read_generation_config(tmp_path)
    assert message in str(error.value)


def _edit(lora: Fields) -> Any:
    return {"lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0} | lora}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # versions of mlx-lm scale by alpha/rank as well, by scale alone, or refuse
        (_edit({"alpha": 16}), "lora_parameters.alpha: found 16, expected no such field"),
        (_edit({"rank": "8"}), "lora_parameters.rank: found '8'"),
        (_edit({"keys": ["self_attn.q_proj"]}), "v_proj.lora_a: found, expected self_attn.v_proj"),
        (_edit({"keys": "self_attn.q_proj"}), "lora_parameters.keys: found 'self_attn.q_proj'"),
        ({"num_layers": 1}, "found, expected matrices of the last 1 blocks of 2"),
        ({"lora_layers": 1}, "found, expected matrices of the last 1 blocks of 2"),
        ({"num_layers": "all"}, "num_layers: found 'all'"),
        ({"use_dora": True}, "use_dora: found True"),
        ({"use_dora": "false"}, "use_dora: found 'false'"),
        ({"rotate": True}, "rotate: found True, expected no such field"),
    ],
)
def test_an_mlx_adapter_that_computes_something_else(
    change: Fields, message: str, tmp_path: Path
) -> None:
    config = small_config()
    save_mlx_adapter(mr.init_lora(config, rank=8, targets="q_proj,v_proj"), tmp_path)
    values = {"fine_tune_type": "lora"} | _edit({}) | change
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(mr.MespRefError) as error:
        load_mlx_adapter(tmp_path, config=config)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("mlx", [False, True])
def test_an_adapter_with_nan_is_not_read(number: float, mlx: bool, tmp_path: Path) -> None:
    save, load = (save_mlx_adapter, load_mlx_adapter) if mlx else (mr.save_adapter, mr.load_adapter)
    adapter = mr.init_lora(small_config(), rank=2, targets="q_proj")
    save(adapter, tmp_path)
    [file] = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    name = min(tensors)
    tensors[name].flat[-1] = number
    save_file(tensors, file)
    with pytest.raises(mr.MespRefError, match="found NaN or infinity in float32") as error:
        load(tmp_path)
    assert name in str(error.value)
    tensors[name].flat[-1] = 1e30
    save_file({n: w.astype(np.float64) * 1e20 for n, w in tensors.items()}, file)
    load(tmp_path, "float64")
    with pytest.raises(mr.MespRefError, match="found NaN or infinity in float32"):
        load(tmp_path)
    adapter.weights[min(adapter.weights)][0] = number
    with pytest.raises(mr.MespRefError, match="found NaN or infinity in float32"):
        save(adapter, tmp_path / "again")
    assert not (tmp_path / "again").exists()

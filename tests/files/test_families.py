"""Llama, SmolLM3, Qwen3 and Gemma 3 in files: read field by field, written back as what they are."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import mesp_ref as mr
from mesp_ref.cli import main
from mesp_ref.engine.config import FAMILIES, Qwen2Config
from mesp_ref.engine.init import random_arrays
from mesp_ref.files.checkpoint import save_checkpoint
from mesp_ref.files.config import config_fields, config_of
from mesp_ref.files.mlx import load_mlx_adapter, save_mlx_adapter
from mesp_ref.files.models import SHAPES
from mesp_ref.files.peft import load_adapter, save_adapter
from mesp_ref.files.quantize import quantize_checkpoint
from mesp_ref.ops import RopeScaling
from mesp_ref.verify.samples import FAMILY_SIZES, small_config

# As the hub has them, but for what every decoder's file has and no number depends on. Sizes are those of
# torchtune's model builders (qwen2_5, qwen3, llama3_2) and of transformers' convert_gemma3_weights.py.
_QWEN2: dict[str, Any] = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu",
    "max_position_embeddings": 32768, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "tie_word_embeddings": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
_LARGE = _QWEN2 | {"tie_word_embeddings": False, "vocab_size": 152064, "num_key_value_heads": 8}
_LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001, "hidden_act": "silu",
    "max_position_embeddings": 131072, "mlp_bias": False, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "vocab_size": 128256,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
}  # fmt: skip
_QWEN3: dict[str, Any] = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "attention_bias": False,
    "head_dim": 128, "hidden_act": "silu", "max_position_embeddings": 40960, "rms_norm_eps": 1e-06,
    "num_key_value_heads": 8, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "max_window_layers": 28, "use_sliding_window": False, "vocab_size": 151936,
    "tie_word_embeddings": True,
}  # fmt: skip
_GEMMA: dict[str, Any] = {
    "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "attention_bias": False,
    "attn_logit_softcapping": None, "cache_implementation": "hybrid", "eos_token_id": [1, 106],
    "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 32768, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144,
    "num_key_value_heads": 1,
}  # fmt: skip


def sizes(hidden: int, inner: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }  # fmt: skip


PUBLISHED = {
    "qwen2.5-0.5b": _QWEN2 | sizes(896, 4864, 24, 14),
    "qwen2.5-1.5b": _QWEN2 | sizes(1536, 8960, 28, 12),
    "qwen2.5-3b": _QWEN2 | sizes(2048, 11008, 36, 16),
    "qwen2.5-7b": _LARGE | {"num_key_value_heads": 4} | sizes(3584, 18944, 28, 28),
    "qwen2.5-14b": _LARGE | {"rms_norm_eps": 1e-05} | sizes(5120, 13824, 48, 40),
    "qwen2.5-32b": _LARGE | {"rms_norm_eps": 1e-05} | sizes(5120, 27648, 64, 40),
    "qwen2.5-72b": _LARGE | {"rms_norm_eps": 1e-05} | sizes(8192, 29568, 80, 64),
    "llama-3.2-1b": _LLAMA | {"head_dim": 64} | sizes(2048, 8192, 16, 32),
    "llama-3.2-3b": _LLAMA | {"head_dim": 128} | sizes(3072, 8192, 28, 24),
    "qwen3-0.6b": _QWEN3 | sizes(1024, 3072, 28, 16),
    "qwen3-1.7b": _QWEN3 | sizes(2048, 6144, 28, 16),
    "qwen3-4b": _QWEN3 | sizes(2560, 9728, 36, 32),
    "qwen3-8b": _QWEN3 | {"tie_word_embeddings": False} | sizes(4096, 12288, 36, 32),
    "gemma-3-1b": _GEMMA | sizes(1152, 6912, 26, 4),
    "gemma-3-270m": _GEMMA
    | {
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
        "_sliding_window_pattern": 6, "use_bidirectional_attention": False,
    }
    | sizes(640, 2048, 18, 4),
    "gemma-3-4b": _GEMMA
    | {
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        "num_key_value_heads": 4, "vocab_size": 262144 + 64, "max_position_embeddings": 131072,
    }
    | sizes(2560, 2560 * 8 // 2, 34, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_published_configs_are_the_shapes_by_name(name: str) -> None:
    found = config_of(PUBLISHED[name])
    own = {"source": "config", "bos_token_id": None, "eos_token_id": None}
    assert dataclasses.replace(found, **own) == SHAPES[name]


@pytest.mark.parametrize("name", FAMILY_SIZES)
def test_what_is_written_reads_as_it_was(name: str) -> None:
    config = small_config(**FAMILY_SIZES[name], eos_token_id=(1, 2))
    values = json.loads(json.dumps(config_fields(config)))
    assert config_of(values, "config") == config


@pytest.mark.parametrize(
    ("given", "change", "message"),
    [
        (_LLAMA, {"mlp_bias": True}, "mlp_bias: found True"),
        (_LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "found 'yarn', expected"),
        (_LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
         "rope_scaling.low_freq_factor: found None"),
        (_LLAMA, {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: found None"),
        (_LLAMA, {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "found other numbers"),
        (_LLAMA, {"hidden_act": "gelu"}, "hidden_act: found 'gelu'"),
        (_LLAMA, {"sliding_window_pattern": 6}, "sliding_window_pattern: found 6, expected no such"),
        (_QWEN3, {"use_sliding_window": True}, "use_sliding_window: found True"),
        (_QWEN3, {"layer_types": ["sliding_attention"] * 16}, "layer_types: found 'sliding_att"),
        (_GEMMA, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: found 50.0"),
        (_GEMMA, {"final_logit_softcapping": 30.0}, "final_logit_softcapping: found 30.0"),
        (_GEMMA, {"use_bidirectional_attention": True}, "use_bidirectional_attention: found True"),
        (_GEMMA, {"hidden_activation": "gelu"}, "hidden_activation: found 'gelu'"),
        (_GEMMA, {"layer_types": ["full_attention"]}, "layer_types: found 1 of them"),
        (_GEMMA, {"layer_types": ["chunked_attention"]}, "layer_types: found 'chunked_attention'"),
        (_GEMMA, {"sliding_window": 0}, "sliding_window: found 0"),
        (_GEMMA, {"model_type": "gemma3"}, "model_type: found 'gemma3', expected"),
        (_GEMMA, {"rope_parameters": {"sliding_attention": {"rope_theta": 5.0}}},
         "rope_local_base_freq: found rope_local_base_freq = 10000, rope_parameters."),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_computed_is_refused_by_field(
    given: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(mr.MespRefError) as error:
        config_of(given | sizes(64, 96, 16, 4) | change)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ("sliding_attention",) * 2}, "sliding_window: found None"),
        ({"layer_types": ("sliding_attention",) * 2, "sliding_window": -3}, "found -3"),
        ({"layer_types": ("full_attention",)}, "layer_types: found"),
        ({"layer_types": ("global",) * 2}, "layer_types: found"),
    ],
    ids=str,
)
def test_layers_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(mr.MespRefError, match="expected") as error:
        small_config(**change)
    assert message in str(error.value)


@pytest.fixture(params=FAMILY_SIZES)
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A small model of a family in bfloat16, gains of norms anywhere."""
    config = small_config(
        **FAMILY_SIZES[request.param] | {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16}
    )
    rng = np.random.default_rng(2)
    arrays = {n: w + rng.standard_normal(w.shape) * 0.3 for n, w in random_arrays(config).items()}
    (tmp_path / "model").mkdir()
    save_checkpoint(config, arrays, tmp_path / "model", "bfloat16")
    return tmp_path / "model"


IDS = [[1, 5, 2, 9, 0, 7, 3, 3, 1]]


def test_merge_and_quantize(directory: Path, tmp_path: Path) -> None:
    """The merged model computes what base and adapter do; what is not adapted keeps its bytes."""
    model = mr.load_model(directory)
    adapter = mr.init_lora(model.config, rank=2, b_std=0.3, targets="q_proj,down_proj")
    mr.merge(model, adapter, tmp_path / "merged", dtype="float32")
    merged = mr.load_model(tmp_path / "merged")
    assert merged.config == dataclasses.replace(model.config, source=merged.config.source)
    want = mr.logits(model, IDS, adapter=adapter)
    assert np.allclose(mr.logits(merged, IDS), want, rtol=0, atol=1e-4 * np.abs(want).max())
    old, new = (load_file(p / "model.safetensors") for p in (directory, tmp_path / "merged"))
    kept = [n for n in old if ".q_proj.weight" not in n and ".down_proj.weight" not in n]
    assert all(np.array_equal(old[n].astype(np.float32), new[n]) for n in kept)
    quantize_checkpoint(directory, tmp_path / "packed", group_size=32)
    packed = mr.load_model(tmp_path / "packed")
    assert np.isfinite(mr.logits(packed, IDS)).all()
    for name in (n for n in old if n.endswith("norm.weight")):
        assert np.array_equal(packed.weights[name][...], model.weights[name][...])


def test_saved_again_it_is_the_same_file(directory: Path, tmp_path: Path) -> None:
    model = mr.load_model(directory)
    (tmp_path / "again").mkdir()
    save_checkpoint(model.config, model.weights, tmp_path / "again", "bfloat16")  # type: ignore[arg-type]
    files = [p / "model.safetensors" for p in (directory, tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_gains_are_whole_in_memory_and_less_one_in_a_file(tmp_path: Path) -> None:
    config = small_config(**FAMILY_SIZES["gemma3"])
    model = mr.random_model(config)
    assert np.all(model.weights["model.norm.weight"][...] == 1)
    save_checkpoint(config, model.weights, tmp_path)  # type: ignore[arg-type]
    stored = load_file(tmp_path / "model.safetensors")
    assert not any(stored[n].any() for n in stored if n.endswith("norm.weight"))
    opened = mr.read_into_memory(mr.load_model(tmp_path))
    for name in model.weights:
        assert np.array_equal(opened.weights[name][...], model.weights[name][...]), name


def test_adapters_of_peft_and_mlx(directory: Path, tmp_path: Path) -> None:
    model = mr.load_model(directory)
    adapter = mr.init_lora(model.config, rank=2, b_std=0.3)
    save_adapter(adapter, tmp_path / "peft")
    save_mlx_adapter(adapter, tmp_path / "mlx")
    for found in (
        load_adapter(tmp_path / "peft", config=model.config),
        load_mlx_adapter(tmp_path / "mlx", config=model.config),
    ):
        assert found.weights.keys() == adapter.weights.keys()
        assert all(np.array_equal(found.weights[n], w) for n, w in adapter.weights.items())


def test_info(directory: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["info", str(directory), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    config = mr.load_model(directory).config
    assert facts["config"]["model_type"] == config.traits.model_type
    assert facts["tensors"] == len(config.weight_shapes())
    assert main(["info", str(directory)]) == 0
    rows = capsys.readouterr().out
    assert config.traits.model_type in rows
    peculiar = {
        "llama": ["RoPE scaling   llama3, factor 3"], "smollm3": ["without RoPE   1 of 2 blocks"],
        "qwen3": [], "gemma3_text": [
            "windows        1 of 2 blocks see 3 tokens, RoPE theta 30 there",
            "RoPE scaling   linear, factor 2",
        ],
    }  # fmt: skip
    for family, lines in peculiar.items():
        assert all((line in rows) == (family == config.traits.model_type) for line in lines)


def test_every_family_has_its_shape_of_a_block() -> None:
    """Names of what a family has beside Qwen2, as its transformers class writes them."""
    own = {
        name: {n.split(".0.")[1] for n in Qwen2Config(**given).weight_shapes() if ".0." in n}
        for name, given in {
            kind: {
                "vocab_size": 9, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1,
                "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "traits": traits,
                "rope_scaling": RopeScaling(2.0),
            }
            for kind, traits in FAMILIES.items()
        }.items()
    }  # fmt: skip
    biases = {f"self_attn.{letter}_proj.bias" for letter in "qkv"}
    heads = {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}
    halves = {"pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"}
    assert own["qwen2"] - own["llama"] == biases
    assert own["llama"] == own["smollm3"]
    assert own["qwen3"] - own["llama"] == heads
    assert own["gemma3_text"] - own["llama"] == heads | halves

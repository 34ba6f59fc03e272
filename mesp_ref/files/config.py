"""config.json of Hugging Face: read field by field into a Qwen2Config, and written."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mesp_ref.engine.config import Qwen2Config
from mesp_ref.errors import MespRefError, shown
from mesp_ref.files.fields import read_fields
from mesp_ref.files.names import without_places
from mesp_ref.files.strict import inside, read_object
from mesp_ref.files.tables import FAMILIES, GENERATION

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
)  # fmt: skip


def read_config(path: str | Path) -> Qwen2Config:
    """Read config.json, or the one inside a checkpoint directory."""
    file = Path(path)
    file = inside(file, "config.json") if file.is_dir() else file
    values = read_object(file, "a Hugging Face checkpoint directory with config.json")
    return config_of(values, source=str(file))


def read_generation_config(path: str | Path) -> dict[str, Any]:
    """The fields of a checkpoint directory's generation_config.json; none where it has no such file.

    Raises MespRefError naming the field for one that is unknown, or token ids that are none.
    """
    file = inside(path, "generation_config.json")
    if not file.exists():
        return {}
    return read_fields(read_object(file, "generation settings"), GENERATION, file)


def config_of(values: Mapping[str, Any], source: str = "config.json") -> Qwen2Config:
    """Read today's fields (rope_parameters) and those of published Qwen2.5 files (rope_theta).

    Raises MespRefError naming the field for what the engine does not compute or does not know:
    another model_type, sliding windows, RoPE scaling, another activation, two angles that differ.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise MespRefError(
            f"{source}: model_type: found {shown(kind)}, expected {' or '.join(map(repr, FAMILIES))}"
            "; the engine computes no other model"
        )
    known = read_fields(values, FAMILIES[kind], source, f"the engine computes plain {kind} only")
    for field in _SIZES:
        if field not in known:
            raise MespRefError(f"{source}: {field}: missing, expected an integer")
    heads, eos = known["num_attention_heads"], known.get("eos_token_id")
    return Qwen2Config(
        **{field: known[field] for field in _SIZES},
        num_key_value_heads=known.get("num_key_value_heads", heads),
        head_dim=_head_dim(known, source),
        rms_norm_eps=known.get("rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(known, source),
        max_position_embeddings=known.get("max_position_embeddings", 32768),
        tie_word_embeddings=known.get("tie_word_embeddings", False),
        bos_token_id=known.get("bos_token_id"),
        eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
        source=source,
    )


def config_fields(config: Qwen2Config, kept: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What config.json should hold; fields of `kept`, the file it replaces, that are not ours stay.

    rope_theta is written twice: mlx-lm reads only the top-level field and silently falls back
    to 1e6 without it.
    """
    values = asdict(config)
    del values["source"]
    if isinstance(config.eos_token_id, tuple):
        values["eos_token_id"] = list(config.eos_token_id)
    usual = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "max_window_layers": config.num_hidden_layers,
        "layer_types": ["full_attention"] * config.num_hidden_layers,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    return usual | dict(kept or {}) | values | {"rope_parameters": rope}


def kept_fields(directory: Path | None) -> dict[str, Any]:
    """The fields of a checkpoint's config.json that a changed copy keeps: all but how it is packed."""
    if directory is None:
        return {}
    values = read_object(inside(directory, "config.json"), "a checkpoint directory")
    return without_places({k: v for k, v in values.items() if not k.startswith("quantization")})


def _head_dim(known: Mapping[str, Any], source: str) -> int:
    """head_dim as stated, or hidden_size / num_attention_heads as Qwen2 defines it."""
    hidden, heads = known["hidden_size"], known["num_attention_heads"]
    if "head_dim" not in known and hidden % heads:
        raise MespRefError(
            f"{source}: num_attention_heads: found {heads}, expected a divisor of "
            f"hidden_size = {hidden}"
        )
    stated: int = known.get("head_dim", hidden // heads)
    return stated


def _rope_theta(known: Mapping[str, Any], source: str) -> float:
    """The base of RoPE, from the top level, rope_parameters or rope_scaling; 10,000 without any."""
    stated: dict[str, float] = {}
    for field in ("rope_parameters", "rope_scaling"):
        if "rope_theta" in known.get(field, {}):
            stated[f"{field}.rope_theta"] = known[field]["rope_theta"]
    if "rope_theta" in known:
        stated["rope_theta"] = known["rope_theta"]
    if len(set(stated.values())) > 1:
        found = ", ".join(f"{name} = {theta:g}" for name, theta in stated.items())
        raise MespRefError(
            f"{source}: rope_theta: found {found}, expected one value; programs differ in which "
            "they take, remove the wrong one"
        )
    return next(iter(stated.values()), 10000.0)

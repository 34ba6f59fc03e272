"""config.json of Hugging Face: read field by field into a Qwen2Config, and written."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mesp_ref.engine.config import Qwen2Config
from mesp_ref.errors import MespRefError, shown
from mesp_ref.files.strict import inside, read_object

# What the engine computes; a config that says otherwise is refused by name.
_REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "model_type": ("qwen2",),
    "hidden_act": ("silu", None),
    "use_sliding_window": (False, None),
    "attention_dropout": (0, 0.0, None),
}


def read_config(path: str | Path) -> Qwen2Config:
    """Read config.json, or the one inside a checkpoint directory."""
    file = Path(path)
    file = inside(file, "config.json") if file.is_dir() else file
    values = read_object(file, "a Hugging Face checkpoint directory with config.json")
    return config_of(values, source=str(file))


def config_of(values: Mapping[str, Any], source: str = "config.json") -> Qwen2Config:
    """Read today's fields (rope_parameters) and those of published Qwen2.5 files (rope_theta).

    Raises MespRefError naming the field for what the engine does not compute: another
    model_type, sliding windows, RoPE scaling, another activation.
    """
    for field, allowed in _REQUIRED_VALUES.items():
        if values.get(field) not in allowed:
            raise MespRefError(
                f"{source}: {field}: found {shown(values.get(field))}, expected {allowed[0]!r}; "
                "the engine computes plain Qwen2 only"
            )
    kinds = values.get("layer_types") or ()
    for kind in kinds if isinstance(kinds, list | tuple) else (kinds,):
        if kind != "full_attention":
            raise MespRefError(
                f"{source}: layer_types: found {shown(kind)}, expected 'full_attention' everywhere"
            )
    try:
        heads = values["num_attention_heads"]
        sizes = {
            "vocab_size": values["vocab_size"],
            "hidden_size": values["hidden_size"],
            "intermediate_size": values["intermediate_size"],
            "num_hidden_layers": values["num_hidden_layers"],
            "num_attention_heads": heads,
            "num_key_value_heads": values.get("num_key_value_heads") or heads,
        }
    except KeyError as error:
        raise MespRefError(f"{source}: {error.args[0]}: missing, expected an integer") from None
    eos = values.get("eos_token_id")
    return Qwen2Config(
        **sizes,
        head_dim=_head_dim(values, source),
        rms_norm_eps=values.get("rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(values, source),
        max_position_embeddings=values.get("max_position_embeddings", 32768),
        tie_word_embeddings=values.get("tie_word_embeddings", False),
        bos_token_id=values.get("bos_token_id"),
        eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
        source=source,
    )


def config_fields(config: Qwen2Config) -> dict[str, Any]:
    """What config.json should hold.

    rope_theta is written twice: mlx-lm reads only the top-level field and silently falls back
    to 1e6 without it.
    """
    values = asdict(config)
    del values["source"]
    if isinstance(config.eos_token_id, tuple):
        values["eos_token_id"] = list(config.eos_token_id)
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **values,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "sliding_window": None,
        "use_sliding_window": False,
        "max_window_layers": config.num_hidden_layers,
        "layer_types": ["full_attention"] * config.num_hidden_layers,
        "initializer_range": 0.02,
        "use_cache": True,
    }


def _head_dim(values: Mapping[str, Any], source: str) -> Any:
    """head_dim as stated, or hidden_size / num_attention_heads as Qwen2 defines it."""
    stated = values.get("head_dim")
    if stated is not None:
        return stated
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    if not (isinstance(hidden, int) and isinstance(heads, int) and heads > 0) or hidden % heads:
        raise MespRefError(
            f"{source}: num_attention_heads: found {shown(heads)}, expected a divisor of "
            f"hidden_size = {shown(hidden)}"
        )
    return hidden // heads


def _rope_theta(values: Mapping[str, Any], source: str) -> Any:
    """The base of RoPE from rope_parameters or the top level; scaled variants are refused."""
    rope: dict[str, Any] = {}
    for field in ("rope_scaling", "rope_parameters"):
        given = values.get(field) or {}
        if not isinstance(given, Mapping):
            raise MespRefError(
                f"{source}: {field}: found {shown(given)}, expected an object or null"
            )
        kind = given.get("rope_type", given.get("type", "default"))
        if kind != "default":
            raise MespRefError(
                f"{source}: {field}.rope_type: found {shown(kind)}, expected 'default'; "
                "scaled RoPE is not computed"
            )
        rope |= given
    theta = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    return theta

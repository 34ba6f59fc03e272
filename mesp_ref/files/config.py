"""config.json of Hugging Face: read field by field into a Qwen2Config, and written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mesp_ref.engine.config import FAMILIES as TRAITS
from mesp_ref.engine.config import FULL, NO_ROPE, SLIDING, Qwen2Config
from mesp_ref.errors import MespRefError, shown
from mesp_ref.files.fields import read_fields
from mesp_ref.files.names import without_places
from mesp_ref.files.strict import inside, read_object
from mesp_ref.files.tables import ARCHITECTURES, DEFAULTS, FAMILIES, GENERATION
from mesp_ref.ops import RopeScaling

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
)  # fmt: skip
_WRITTEN = (
    *_SIZES, "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta",
    "max_position_embeddings", "tie_word_embeddings", "bos_token_id", "eos_token_id",
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
    """Read today's fields (rope_parameters) and those of published files (rope_theta, rope_scaling).

    Raises MespRefError naming the field for what the engine does not compute or does not know:
    another model_type, RoPE scaled otherwise, another activation, two angles that differ.
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
    known = DEFAULTS[kind] | known
    heads, eos = known["num_attention_heads"], known.get("eos_token_id")
    angles, local = angles_of(known, source)
    return Qwen2Config(
        **{field: known[field] for field in _SIZES},
        num_key_value_heads=known.get("num_key_value_heads", heads),
        head_dim=_head_dim(known, source),
        rms_norm_eps=known.get("rms_norm_eps", 1e-6),
        rope_theta=angles["rope_theta"],
        max_position_embeddings=known.get("max_position_embeddings", 32768),
        tie_word_embeddings=known.get("tie_word_embeddings", False),
        bos_token_id=known.get("bos_token_id"),
        eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
        traits=TRAITS[kind],
        attention_bias=kind != "qwen2" and known.get("attention_bias", False),
        rope_scaling=scaling_of(angles),
        layer_types=_layer_types(known, source),
        sliding_window=known.get("sliding_window") if kind == "gemma3_text" else None,
        rope_local_base_freq=local,
        attention_scale=known["query_pre_attn_scalar"] ** -0.5 if kind == "gemma3_text" else None,
        source=source,
    )


def config_fields(config: Qwen2Config, kept: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What config.json should hold; fields of `kept`, the file it replaces, that are not ours stay.

    rope_theta and rope_scaling are written twice: mlx-lm reads only the top-level fields and silently
    falls back to 1e6 without them.
    """
    values = {field: getattr(config, field) for field in _WRITTEN}
    if isinstance(config.eos_token_id, tuple):
        values["eos_token_id"] = list(config.eos_token_id)
    usual = {
        "architectures": [ARCHITECTURES[config.traits.model_type]],
        "model_type": config.traits.model_type,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    rope = rope_fields(config)
    if "factor" in rope:
        values["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    usual |= _own_fields(config)
    if config.traits.model_type == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": config.rope_local_base_freq}
        rope = {"full_attention": rope, "sliding_attention": local}
    return usual | dict(kept or {}) | values | {"rope_parameters": rope}


def _own_fields(config: Qwen2Config) -> dict[str, Any]:
    """What a family has beside the fields of all."""
    types = [config.layer_type(i) for i in range(config.num_hidden_layers)]
    if config.traits.model_type == "gemma3_text":
        patterns = [n for n in range(1, len(types) + 2) if types == pattern(n, len(types))]
        return {
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": config.attention_bias,
            "layer_types": types,
            "sliding_window": config.sliding_window,
            "query_pre_attn_scalar": _scalar(config),
            "rope_local_base_freq": config.rope_local_base_freq,
        } | ({"sliding_window_pattern": patterns[0]} if patterns else {})
    own: dict[str, Any] = {"hidden_act": "silu"}
    if config.traits.model_type != "qwen2":
        own |= {"attention_bias": config.attention_bias}
    if config.traits.model_type == "llama":
        return own | {"mlp_bias": False}
    own |= {
        "sliding_window": None,
        "use_sliding_window": False,
        "max_window_layers": config.num_hidden_layers,
        "layer_types": [FULL] * config.num_hidden_layers,
    }
    if config.traits.model_type == "smollm3":
        del own["max_window_layers"]
        own |= {"mlp_bias": False, "no_rope_layers": [int(kind != NO_ROPE) for kind in types]}
    return own


def _scalar(config: Qwen2Config) -> float:
    """D of 1/√D; the whole number that it always is."""
    found = config.head_dim if config.attention_scale is None else config.attention_scale**-2
    return round(found) if abs(found - round(found)) < 1e-9 * found else found


def pattern(period: int, layers: int) -> list[str]:
    """Types of Gemma's layers: every `period`-th sees all, the others a window."""
    return [SLIDING if (i + 1) % period else FULL for i in range(layers)]


def rope_fields(config: Qwen2Config) -> dict[str, Any]:
    """rope_parameters of a config's layers without a window."""
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is None:
        return found
    factor, original, low, high = config.rope_scaling
    if original is None:
        return found | {"rope_type": "linear", "factor": factor}
    return found | {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def scaling_of(angles: Mapping[str, Any]) -> RopeScaling | None:
    """What rope_parameters say of scaling."""
    kind = angles.get("rope_type", "default")
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(angles["factor"])
    return RopeScaling(
        angles["factor"], angles["original_max_position_embeddings"],
        angles["low_freq_factor"], angles["high_freq_factor"],
    )  # fmt: skip


def _layer_types(known: Mapping[str, Any], source: str) -> tuple[str, ...]:
    """The kind of each layer; none where all are alike."""
    count = known["num_hidden_layers"]
    if known["model_type"] == "smollm3":
        every = known.get("no_rope_layer_interval", 4)
        uses = known.get("no_rope_layers", [int((i + 1) % every != 0) for i in range(count)])
        types, field = [FULL if use else NO_ROPE for use in uses], "no_rope_layers"
    elif known["model_type"] == "gemma3_text":
        every = known.get("sliding_window_pattern", known.get("_sliding_window_pattern", 6))
        types, field = known.get("layer_types", pattern(every, count)), "layer_types"
    else:
        return ()  # the tables of fields let nothing through but FULL
    if len(types) != count:
        raise MespRefError(
            f"{source}: {field}: found {len(types)} of them, expected one for each of the "
            f"{count} layers (num_hidden_layers)"
        )
    return () if set(types) == {FULL} else tuple(types)


def kept_fields(directory: Path | None) -> dict[str, Any]:
    """The fields of a checkpoint's config.json that a changed copy keeps: all but how it is packed."""
    if directory is None:
        return {}
    values = read_object(inside(directory, "config.json"), "a checkpoint directory")
    return without_places({k: v for k, v in values.items() if not k.startswith("quantization")})


def _head_dim(known: Mapping[str, Any], source: str) -> int:
    """head_dim as stated, or hidden_size / num_attention_heads."""
    hidden, heads = known["hidden_size"], known["num_attention_heads"]
    if "head_dim" not in known and hidden % heads:
        raise MespRefError(
            f"{source}: num_attention_heads: found {heads}, expected a divisor of "
            f"hidden_size = {hidden}"
        )
    stated: int = known.get("head_dim", hidden // heads)
    return stated


def angles_of(known: Mapping[str, Any], source: str) -> tuple[dict[str, Any], float]:
    """rope_type, rope_theta and what belongs to them, of layers without a window; rope_theta of the
    others. They stand at the top level, in rope_parameters or in rope_scaling.

    Raises MespRefError where two places differ: programs differ in which they take.
    """
    stated: dict[str, Mapping[str, Any]] = {}
    local = {"rope_local_base_freq": {"rope_theta": known["rope_local_base_freq"]}} if (
        "rope_local_base_freq" in known) else dict[str, Any]()  # fmt: skip
    for field in ("rope_parameters", "rope_scaling"):
        given = known.get(field, {})
        for kind, into in ((SLIDING, local), (FULL, stated)):
            if kind in given:
                into[f"{field}.{kind}"] = given[kind]
        if FULL not in given and SLIDING not in given and given:
            stated[field] = given
    if "rope_theta" in known:
        stated["rope_theta"] = {"rope_theta": known["rope_theta"]}
    theta = _agreed("rope_theta", stated, "rope_theta", source)
    scaled = {place: scaling_of(given) for place, given in stated.items() if "rope_type" in given}
    if len(set(scaled.values())) > 1:
        raise MespRefError(
            f"{source}: rope_scaling: found other numbers than in {' and '.join(scaled)}, expected "
            "the same; programs differ in which they take, remove the wrong one"
        )
    place = next(iter(scaled), None)
    angles = dict(stated[place]) if place else {}
    angles["rope_theta"] = theta or known.get("usual_theta", 10000.0)
    return angles, _agreed("rope_theta", local, "rope_local_base_freq", source) or 10000.0


def _agreed(
    name: str, stated: Mapping[str, Mapping[str, Any]], field: str, source: str
) -> float | None:
    """The number that all places give that have it."""
    found = {
        place if place in ("rope_theta", "rope_local_base_freq") else f"{place}.{name}": given[name]
        for place, given in stated.items()
        if name in given
    }
    if len(set(found.values())) > 1:
        values = ", ".join(f"{place} = {value:g}" for place, value in found.items())
        raise MespRefError(
            f"{source}: {field}: found {values}, expected one value; programs differ in which "
            "they take, remove the wrong one"
        )
    return next(iter(found.values()), None)

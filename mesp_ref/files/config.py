"""config.json of Hugging Face: read field by field into a Qwen2Config, and written."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mesp_ref.engine.config import Qwen2Config
from mesp_ref.errors import MespRefError, shown
from mesp_ref.files.fields import (
    Reader,
    boolean,
    empty,
    exactly,
    harmless,
    integer,
    list_of,
    number,
    read_fields,
    record,
    text,
    token,
    tokens,
)
from mesp_ref.files.strict import inside, read_object

_THETA = number(1, 1e30)
_UNSCALED = record(
    {
        "rope_type": exactly("default"),
        "type": exactly("default"),
        "rope_theta": _THETA,
        "partial_rotary_factor": number(1, 1),
    }
)


def _rope(value: Any) -> Any:
    """rope_parameters or rope_scaling, of which older files call rope_type type."""
    if isinstance(value, Mapping) and "rope_type" not in value:
        value = {"rope_type" if name == "type" else name: item for name, item in value.items()}
    return _UNSCALED(value)


# How a program runs a model, keeps it or draws from it; none of it enters the forward.
_HARMLESS = harmless(
    """
    _name_or_path _commit_hash _attn_implementation _attn_implementation_autoset
    _attn_implementation_internal _experts_implementation _flash_attn_2_enabled _from_model_config
    attn_implementation transformers_version transformers.js_config unsloth_version unsloth_fixed
    dtype torch_dtype initializer_range use_cache gradient_checkpointing pretraining_tp
    chunk_size_feed_forward torchscript tf_legacy_loss use_bfloat16 tokenizer_class
    output_attentions output_hidden_states return_dict return_dict_in_generate output_scores
    finetuning_task task_specific_params problem_type num_labels id2label label2id
    keys_to_ignore_at_inference prefix pad_token_id sep_token_id decoder_start_token_id
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences suppress_tokens
    begin_suppress_tokens forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty
    sliding_window max_window_layers dual_chunk_attention_config
    quantization quantization_config
    """
)  # the windows' sizes are not used unless use_sliding_window is; quantization: files/affine.py

# Fields of every decoder that this engine could read, and the values that mean what it computes.
_DECODER: dict[str, Reader] = {
    "vocab_size": integer(),
    "hidden_size": integer(),
    "intermediate_size": integer(),
    "num_hidden_layers": integer(most=10_000),
    "num_attention_heads": integer(),
    "num_key_value_heads": integer(),
    "head_dim": integer(most=65_536),
    "rms_norm_eps": number(1e-30, 1e6),
    "rope_theta": _THETA,
    "rope_parameters": _rope,
    "rope_scaling": _rope,
    "max_position_embeddings": integer(),
    "tie_word_embeddings": boolean,
    "bos_token_id": token,
    "eos_token_id": tokens,
    "hidden_act": exactly("silu"),
    "attention_dropout": number(0, 0),
    "mlp_bias": exactly(False),
    "partial_rotary_factor": number(1, 1),
    "attn_logit_softcapping": empty,
    "final_logit_softcapping": empty,
    "use_mrope": exactly(False),
    "is_causal": exactly(True),
    "is_decoder": boolean,
    "is_encoder_decoder": exactly(False),
    "add_cross_attention": exactly(False),
    "tie_encoder_decoder": exactly(False),
    "cross_attention_hidden_size": empty,
    "pruned_heads": empty,
    "auto_map": empty,  # names Python code of the checkpoint's own, which is never run
} | _HARMLESS

# What a model_type adds to that. A further family is a further row.
FAMILIES: dict[str, dict[str, Reader]] = {
    "qwen2": {
        "model_type": exactly("qwen2"),
        "architectures": list_of(exactly("Qwen2ForCausalLM")),
        "attention_bias": exactly(True),  # q, k and v have biases, whatever the file says
        "use_sliding_window": exactly(False),
        "layer_types": list_of(exactly("full_attention")),
    }
    | _DECODER,
}
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
)  # fmt: skip

# generation_config.json: how to draw from the model. Its token ids are typed, for those who read
# the ends of a text there; the rest are defaults of another program's options.
_GENERATION: dict[str, Reader] = {
    "bos_token_id": tokens, "eos_token_id": tokens, "pad_token_id": tokens,
    "transformers_version": text,
} | harmless(
    """
    _from_model_config max_length max_new_tokens min_length min_new_tokens early_stopping max_time
    stop_strings do_sample num_beams num_beam_groups use_mtp use_cache cache_implementation
    cache_config max_cache_len temperature top_k top_p min_p top_h typical_p epsilon_cutoff
    eta_cutoff repetition_penalty encoder_repetition_penalty length_penalty no_repeat_ngram_size
    bad_words_ids renormalize_logits forced_bos_token_id forced_eos_token_id
    forced_decoder_ids remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens sequence_bias token_healing guidance_scale watermarking_config
    num_return_sequences output_attentions output_hidden_states output_scores output_logits
    return_dict_in_generate encoder_no_repeat_ngram_size decoder_start_token_id is_assistant
    num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold
    prompt_lookup_num_tokens max_matching_ngram_size assistant_early_exit assistant_lookbehind
    target_lookbehind assistant_ensemble_weight speculation_type compile_config disable_compile
    continuous_batching_config low_memory penalty_alpha dola_layers diversity_penalty constraints
    force_words_ids prefill_chunk_size trust_remote_code generation_kwargs
    chat_format max_window_size stop_words_ids system_prompt
    """
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
    return read_fields(read_object(file, "generation settings"), _GENERATION, file)


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
    return {k: v for k, v in values.items() if not k.startswith("quantization")}


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

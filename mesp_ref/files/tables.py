"""The five kinds of JSON files of others, field by field: what is not here is refused by name.

Each table maps a field to its reader (files/fields.py). `harmless` rows change no number, `empty`
ones belong to features that are not computed and must not be used. A field that becomes known, or a
further family of models, is a row here.
"""

from collections.abc import Mapping
from typing import Any

from mesp_ref.files.fields import (
    Reader,
    Unfit,
    boolean,
    either,
    empty,
    exactly,
    harmless,
    integer,
    list_of,
    number,
    record,
    rows,
    text,
    token,
    tokens,
)

# -------------------------------------------------------------------------------------- config.json

_THETA = number(1, 1e30)
_ANGLES: dict[str, Reader] = {"rope_theta": _THETA, "partial_rotary_factor": number(1, 1)}
# What each rope_type has beside them, all of it needed.
_SCALED: dict[str, dict[str, Reader]] = {
    "default": {},
    "linear": {"factor": number(1e-6, 1e6)},
    "llama3": {
        "factor": number(1e-6, 1e6),
        "low_freq_factor": number(0, 1e6),
        "high_freq_factor": number(0, 1e6),
        "original_max_position_embeddings": integer(),
    },
}


def _angles(*types: str) -> Reader:
    """rope_parameters or rope_scaling of some types; older files call rope_type type."""

    def read(value: Any) -> Any:
        if isinstance(value, Mapping) and "rope_type" not in value:
            value = {"rope_type" if name == "type" else name: item for name, item in value.items()}
        kind = value.get("rope_type") if isinstance(value, Mapping) else None
        own = _SCALED.get(kind if kind in types else "default", {})
        found = record({"rope_type": exactly(*types)} | _ANGLES | own)(value)
        for name in own:
            if name not in found:
                raise Unfit(None, f"a number, as rope_type {kind!r} needs it", (name,))
        return found

    return read


_rope = _angles("default")
_scaled_rope = _angles(*_SCALED)


def _ropes(value: Any) -> Any:
    """rope_parameters by the type of layer, or one for all."""
    if isinstance(value, Mapping) and ("full_attention" in value or "sliding_attention" in value):
        return record({"full_attention": _scaled_rope, "sliding_attention": _rope})(value)
    return _scaled_rope(value)


# How a program runs a model, keeps it or draws from it; none of it enters the forward.
_HARMLESS = harmless(
    """
    _name_or_path _commit_hash _attn_implementation _attn_implementation_autoset
    _attn_implementation_internal _experts_implementation _flash_attn_2_enabled _from_model_config
    attn_implementation transformers_version transformers.js_config unsloth_version unsloth_fixed
    dtype torch_dtype initializer_range use_cache cache_implementation
    gradient_checkpointing pretraining_tp
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
    "rope_parameters": _scaled_rope,
    "rope_scaling": _scaled_rope,
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

_FULL: dict[str, Reader] = {
    "use_sliding_window": exactly(False),
    "layer_types": list_of(exactly("full_attention")),
}

# The class of transformers that computes a model_type.
ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


# What transformers takes for fields that a file leaves out, where a family has its own.
DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "llama": {},
    "smollm3": {"num_key_value_heads": 4, "tie_word_embeddings": True, "usual_theta": 2e6},
    "qwen3": {"head_dim": 128},
    "gemma3_text": {
        "head_dim": 256,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256.0,
        "sliding_window": 4096,
        "usual_theta": 1e6,
    },
}


def _family(kind: str, own: dict[str, Reader]) -> dict[str, Reader]:
    """The fields of a model_type: its own, then those of every decoder."""
    named = {
        "model_type": exactly(kind),
        "architectures": list_of(exactly(ARCHITECTURES[kind])),
    }
    return named | own | {name: row for name, row in _DECODER.items() if name not in own}


# What a model_type adds to that, or has otherwise. A further family is a further row, here and in
# engine/config.py.
FAMILIES: dict[str, dict[str, Reader]] = {
    "qwen2": _family(
        "qwen2",
        _FULL
        | {
            "attention_bias": exactly(True),  # q, k and v have biases, whatever the file says
            "rope_parameters": _rope,
            "rope_scaling": _rope,
        },
    ),
    "llama": _family("llama", {"attention_bias": boolean}),
    "smollm3": _family(
        "smollm3",
        _FULL
        | {
            "attention_bias": boolean,
            "no_rope_layers": list_of(integer(0, 1)),
            "no_rope_layer_interval": integer(),
        },
    ),
    "qwen3": _family("qwen3", _FULL | {"attention_bias": boolean}),
    "gemma3_text": _family(
        "gemma3_text",
        {
            "attention_bias": boolean,
            "hidden_activation": exactly("gelu_pytorch_tanh"),
            "hidden_act": exactly("gelu_pytorch_tanh"),
            "layer_types": list_of(exactly("full_attention", "sliding_attention")),
            "sliding_window": integer(),
            "sliding_window_pattern": integer(),
            "_sliding_window_pattern": integer(),
            "query_pre_attn_scalar": number(1e-6, 1e6),
            "rope_parameters": _ropes,
            "rope_local_base_freq": _THETA,
            "use_bidirectional_attention": exactly(False),
        },
    ),
}


# Affine itself judges the numbers; the mode is judged where a tensor is packed.
_SCHEME = harmless("group_size bits mode")


def quantization(value: Any) -> Any:
    """MLX's field: group size, bits and mode, and by their names layers with their own or none."""
    modules = [name for name in value if "." in name] if isinstance(value, Mapping) else []
    own = either("group_size and bits, or false", boolean, record(_SCHEME))
    return record(_SCHEME | dict.fromkeys((*modules, "lm_head"), own))(value)


# --------------------------------------------------------------------------- generation_config.json

# How to draw from the model. Token ids are typed, for those who read the ends of a text there; the
# rest are defaults of another program's options.
GENERATION: dict[str, Reader] = {
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

# ---------------------------------------------------------------------- adapter_config.json of PEFT

_SELECTION = either("names or a regular expression", text, list_of(text))
_TARGETS: dict[str, Reader] = {
    "target_modules": _SELECTION,
    "exclude_modules": _SELECTION,
    "layers_to_transform": either(
        "a layer's number or a list of them", integer(0), list_of(integer(0))
    ),
    "layers_pattern": either("'layers'", empty, exactly("layers"), list_of(exactly("layers"))),
}
# The fields of a LoraConfig; what PEFT can do beyond plain LoRA has the value that means "not used".
ADAPTER: dict[str, Reader] = {
    "peft_type": exactly("LORA"),
    "task_type": exactly("CAUSAL_LM"),
    "base_model_name_or_path": text,
    "r": integer(),
    "lora_alpha": number(),
    "lora_dropout": number(0, 1),  # of training; a trained adapter computes without it
    "use_rslora": boolean,
    "bias": exactly("none"),
    "fan_in_fan_out": exactly(False),
    "use_dora": exactly(False),
    "use_qalora": exactly(False),
    "lora_bias": exactly(False),
    # Others (pissa, olora, corda, loftq, …) also changed the base weights they were made from.
    "init_lora_weights": exactly(True, False, "gaussian", "eva", "orthogonal", "mica"),
    "ensure_weight_tying": boolean,  # of embeddings, which are not adapted here
    "merge_weights": boolean,
} | _TARGETS
ADAPTER |= rows(
    empty,
    """
    modules_to_save rank_pattern alpha_pattern trainable_token_indices target_parameters
    layer_replication alora_invocation_tokens alora_invocation_string megatron_config enable_lora
    arrow_config kasa_config monteclora_config velora_config use_bdlora
    """,
)
ADAPTER |= harmless(  # how the adapter was begun, kept or run
    """
    auto_mapping revision inference_mode peft_version megatron_core loftq_config eva_config
    corda_config lora_ga_config qalora_group_size runtime_config unsloth_version unsloth_fixed
    """
)

# -------------------------------------------------------------------- adapter_config.json of mlx-lm

# What mlx-lm's trainer writes beside the adapter; most of it says how it was trained.
_PARAMETERS = record(
    {"rank": integer(), "scale": number(), "dropout": number(0, 1), "keys": list_of(text)}
)
MLX_ADAPTER: dict[str, Reader] = {
    "fine_tune_type": exactly("lora"),
    "use_dora": exactly(False),
    "lora_parameters": _PARAMETERS,
    "num_layers": integer(-1),
    "lora_layers": integer(-1),  # its older name
    "model": text,
    "base_model_name_or_path": text,
} | harmless(
    """
    adapter_path batch_size clear_cache_threshold config data grad_accumulation_steps
    grad_checkpoint hf_dataset iters learning_rate lr_schedule mask_prompt max_seq_length optimizer
    optimizer_config project_name report_to resume_adapter_file save_every seed steps_per_eval
    steps_per_report test test_batches train trust_remote_code val_batches wandb
    prompt_feature completion_feature chat_feature text_feature
    """
)

# ---------------------------------------------------------------------------- tokenizer_config.json

# The chat template and special tokens are read; what stands beside them is for another program's
# tokenizer class, and tokenizer.json is the tokenizer here.
_SPECIAL = either("a token's text, or an object with it as content", text, record({
    "content": text, "__type": text, "lstrip": boolean, "rstrip": boolean, "normalized": boolean,
    "single_word": boolean, "special": boolean,
}))  # fmt: skip
TOKENIZER: dict[str, Reader] = {
    "chat_template": either(
        "a text, or a list of named ones",
        text, list_of(record({"name": text, "template": text})),
    ),
    "auto_map": empty,  # names Python code of the checkpoint's own, which is never run
} | rows(
    _SPECIAL,
    """
    bos_token eos_token pad_token unk_token sep_token cls_token mask_token image_token audio_token
    video_token vision_bos_token vision_eos_token
    """,
) | harmless(
    """
    added_tokens_decoder additional_special_tokens extra_special_tokens add_bos_token add_eos_token
    add_prefix_space backend chat_template_kwargs clean_up_tokenization_spaces device errors
    fix_mistral_regex from_slow is_local legacy local_files_only max_length
    max_pixels min_pixels model_input_names model_max_length model_specific_special_tokens
    name_or_path pad_to_multiple_of pad_token_type_id padding padding_side processor_class
    response_schema return_token_type_ids revision sp_model_kwargs spaces_between_special_tokens
    special_tokens special_tokens_map_file split_special_tokens stride tokenizer_class
    tokenizer_file tokenizer_type tool_parser_type truncation truncation_side truncation_strategy
    trust_remote_code unsloth_version use_default_system_prompt use_fast vocab_file merges_file
    vocab_size
    """
)  # fmt: skip

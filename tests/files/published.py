"""Which fields published files hold, with the values that matter: what a user brings must open.

Written from what the programs of each time write; sizes stand for themselves.
"""

from typing import Any

Fields = dict[str, Any]

_QWEN2: Fields = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
    "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 21,
    "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
_WITHOUT_ROPE = {k: v for k, v in _QWEN2.items() if k not in ("rope_theta", "torch_dtype")}

# config.json, by who wrote it.
CONFIGS: dict[str, Fields] = {
    "Qwen2.5 Instruct": _QWEN2,
    "Qwen2.5 base": _QWEN2 | {"use_mrope": False, "eos_token_id": 151643},
    "Qwen2": _QWEN2 | {"max_position_embeddings": 131072, "transformers_version": "4.40.1"},
    "Qwen2.5 1M": _QWEN2
    | {
        "max_position_embeddings": 1010000,
        "rope_theta": 10000000.0,
        "dual_chunk_attention_config": {
            "chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144,
        },
    },
    "DeepSeek-R1-Distill-Qwen": _QWEN2
    | {"eos_token_id": 151643, "rope_theta": 10000, "use_mrope": False, "sliding_window": 4096},
    "fine-tuned with transformers 4.4x": _QWEN2
    | {
        "_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct", "_attn_implementation_autoset": True,
        "pad_token_id": 151643, "rope_scaling": None, "sliding_window": None, "use_cache": False,
    },
    "transformers 5": _WITHOUT_ROPE
    | {
        "dtype": "bfloat16", "layer_types": ["full_attention"] * 24, "pad_token_id": None,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "sliding_window": None, "transformers_version": "5.23.0",
    },
    "unsloth": _QWEN2
    | {"pad_token_id": 151654, "unsloth_fixed": True, "unsloth_version": "2025.1.1"},
    "mlx-community 4 bits": _QWEN2 | {"quantization": {"group_size": 64, "bits": 4}},
    "mlx-lm of today": _QWEN2
    | {
        "quantization": {"group_size": 64, "bits": 4, "mode": "affine"},
        "quantization_config": {"group_size": 64, "bits": 4, "mode": "affine"},
    },
    "transformers 4, every default written out": _QWEN2
    | {
        "add_cross_attention": False, "bad_words_ids": None, "begin_suppress_tokens": None,
        "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None,
        "decoder_start_token_id": None, "diversity_penalty": 0.0, "do_sample": False,
        "early_stopping": False, "encoder_no_repeat_ngram_size": 0,
        "exponential_decay_length_penalty": None, "finetuning_task": None,
        "forced_bos_token_id": None, "forced_eos_token_id": None,
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "is_decoder": False,
        "is_encoder_decoder": False, "label2id": {"LABEL_0": 0, "LABEL_1": 1},
        "length_penalty": 1.0, "max_length": 20, "min_length": 0, "no_repeat_ngram_size": 0,
        "num_beam_groups": 1, "num_beams": 1, "num_return_sequences": 1,
        "output_attentions": False, "output_hidden_states": False, "output_scores": False,
        "prefix": None, "problem_type": None, "pruned_heads": {}, "remove_invalid_values": False,
        "repetition_penalty": 1.0, "return_dict": True, "return_dict_in_generate": False,
        "sep_token_id": None, "suppress_tokens": None, "task_specific_params": None,
        "temperature": 1.0, "tf_legacy_loss": False, "tie_encoder_decoder": False,
        "tokenizer_class": None, "top_k": 50, "top_p": 1.0, "torchscript": False,
        "typical_p": 1.0, "use_bfloat16": False,
    },
}  # fmt: skip

_PEFT_0_5: Fields = {
    "auto_mapping": None, "base_model_name_or_path": "Qwen/Qwen2.5-0.5B", "bias": "none",
    "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
    "layers_pattern": None, "layers_to_transform": None, "lora_alpha": 16, "lora_dropout": 0.05,
    "modules_to_save": None, "peft_type": "LORA", "r": 8, "revision": None,
    "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM",
}  # fmt: skip
_PEFT_0_7 = _PEFT_0_5 | {
    "alpha_pattern": {}, "rank_pattern": {}, "loftq_config": {}, "megatron_config": None,
    "megatron_core": "megatron.core",
}  # fmt: skip
_PEFT_0_9 = _PEFT_0_7 | {"use_rslora": False, "use_dora": False, "layer_replication": None}
_PEFT_0_14 = _PEFT_0_9 | {
    "eva_config": None, "exclude_modules": None, "lora_bias": False,
    "runtime_config": {"ephemeral_gpu_offload": False},
}  # fmt: skip
_PEFT_0_17 = _PEFT_0_14 | {
    "corda_config": None, "trainable_token_indices": None, "target_parameters": None,
    "use_qalora": False, "qalora_group_size": 16,
}  # fmt: skip
_PEFT_0_19 = _PEFT_0_17 | {
    "alora_invocation_tokens": None, "arrow_config": None, "ensure_weight_tying": False,
    "lora_ga_config": None, "peft_version": "0.19.1", "use_bdlora": None,
}  # fmt: skip
ADAPTERS: dict[str, Fields] = {
    "peft 0.2": _PEFT_0_5 | {"enable_lora": None, "merge_weights": False},
    "peft 0.5": _PEFT_0_5,
    "peft 0.7": _PEFT_0_7,
    "peft 0.9": _PEFT_0_9,
    "peft 0.14": _PEFT_0_14,
    "peft 0.17": _PEFT_0_17,
    "peft 0.19": _PEFT_0_19,
    "peft 0.21": _PEFT_0_19
    | {"velora_config": None, "monteclora_config": None, "kasa_config": None},
    "unsloth": _PEFT_0_17
    | {"auto_mapping": {"base_model_class": "Qwen2ForCausalLM",
                        "parent_library": "transformers.models.qwen2.modeling_qwen2",
                        "unsloth_fixed": True}},
}  # fmt: skip

MLX_ADAPTERS: dict[str, Fields] = {
    "by hand": {
        "fine_tune_type": "lora", "num_layers": -1,
        "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0},
    },
    "mlx-lm of today": {
        "adapter_path": "adapters", "batch_size": 4, "clear_cache_threshold": 0, "config": None,
        "data": "data", "fine_tune_type": "lora", "grad_accumulation_steps": 1,
        "grad_checkpoint": False, "iters": 1000, "learning_rate": 1e-05,
        "lora_parameters": {"rank": 8, "dropout": 0.0, "scale": 20.0}, "lr_schedule": None,
        "mask_prompt": False, "max_seq_length": 2048, "model": "mlx-community/Qwen2.5-0.5B-4bit",
        "num_layers": 16, "optimizer": "adam", "optimizer_config": {"adam": {}, "sgd": {}},
        "project_name": None, "report_to": None, "resume_adapter_file": None, "save_every": 100,
        "seed": 0, "steps_per_eval": 200, "steps_per_report": 10, "test": False,
        "test_batches": 500, "train": True, "trust_remote_code": False, "val_batches": 25,
    },
    "mlx-lm of 2024": {
        "adapter_path": "adapters", "batch_size": 4, "config": None, "data": "data",
        "grad_checkpoint": None, "iters": 1000, "learning_rate": 1e-05, "lora_layers": 16,
        "lora_parameters": {
            "keys": ["self_attn.q_proj", "self_attn.v_proj"], "rank": 8, "scale": 20.0,
            "dropout": 0.0,
        },
        "lr_schedule": None, "max_seq_length": 2048, "model": "Qwen2.5-0.5B",
        "resume_adapter_file": None, "save_every": 100, "seed": 0, "steps_per_eval": 200,
        "steps_per_report": 10, "test": False, "test_batches": 500, "train": True,
        "use_dora": False, "val_batches": 25,
    },
}  # fmt: skip

_ADDED = {"content": "<|im_end|>", "lstrip": False, "normalized": False, "rstrip": False,
          "single_word": False, "special": True}  # fmt: skip
TOKENIZERS: dict[str, Fields] = {
    "Qwen2.5": {
        "add_bos_token": False, "add_prefix_space": False, "added_tokens_decoder": {"151645": _ADDED},
        "additional_special_tokens": ["<|im_start|>"], "bos_token": None,
        "chat_template": "{{ messages }}", "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>", "errors": "replace", "model_max_length": 131072,
        "pad_token": "<|endoftext|>", "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer", "unk_token": None,
    },
    "DeepSeek-R1-Distill-Qwen": {
        "add_bos_token": True, "add_eos_token": False, "bos_token": _ADDED | {"__type": "AddedToken"},
        "clean_up_tokenization_spaces": False, "eos_token": _ADDED, "legacy": True,
        "model_max_length": 16384, "pad_token": _ADDED, "sp_model_kwargs": {}, "unk_token": None,
        "tokenizer_class": "LlamaTokenizerFast", "chat_template": "{{ messages }}",
    },
    "transformers 5": {
        "add_prefix_space": False, "backend": "tokenizers", "bos_token": None,
        "chat_template": [{"name": "default", "template": "{{ messages }}"},
                          {"name": "tool_use", "template": "{{ tools }}"}],
        "clean_up_tokenization_spaces": False, "eos_token": "<|im_end|>", "errors": "replace",
        "extra_special_tokens": ["<|im_start|>"], "is_local": True, "model_max_length": 131072,
        "pad_token": "<|endoftext|>", "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer", "unk_token": None,
    },
}  # fmt: skip

GENERATION: dict[str, Fields] = {
    "Qwen2.5 Instruct": {
        "bos_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643],
        "pad_token_id": 151643, "repetition_penalty": 1.1, "temperature": 0.7, "top_k": 20,
        "top_p": 0.8, "transformers_version": "4.37.0",
    },
    "Qwen2.5 base": {
        "bos_token_id": 151643, "do_sample": False, "eos_token_id": 151643, "max_new_tokens": 2048,
        "transformers_version": "4.37.0",
    },
    "fine-tuned": {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2},
}  # fmt: skip

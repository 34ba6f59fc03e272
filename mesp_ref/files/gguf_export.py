"""A family as llama.cpp has it: what it cannot say, its sizes, its rows in their order."""

from collections.abc import Callable
from typing import Any

import numpy as np

from mesp_ref.engine.config import Qwen2Config
from mesp_ref.errors import MespRefError
from mesp_ref.files.checkpoint import is_gain
from mesp_ref.files.gguf_families import (
    ARCHITECTURES,
    FREQUENCIES,
    OF_FAMILY,
    layer_types,
    slowed,
)
from mesp_ref.files.gguf_writer import Outgoing
from mesp_ref.ops import Array

Rows = Callable[[int, int], Array]
_LOCAL_THETA = 10_000.0  # of Gemma's layers with windows, as llama.cpp has it


def check_export(config: Qwen2Config) -> None:
    """Raise MespRefError for what llama.cpp would compute otherwise: heads that do not share out the
    hidden size (qwen2), layers in another order, another scale or base, biases it does not read."""
    name = OF_FAMILY[config.traits.model_type]
    types = [config.layer_type(i) for i in range(config.num_hidden_layers)]
    usual = layer_types(name, len(types)) or ("full_attention",) * len(types)
    other = [i for i, (kind, wanted) in enumerate(zip(types, usual, strict=True)) if kind != wanted]
    at = other[0] if other else 0
    shared = config.head_dim * config.num_attention_heads == config.hidden_size
    own = config.attention_scale is None or np.isclose(config.attention_scale**-2, config.head_dim)
    for field, found, fits, expected in (
        ("head_dim", config.head_dim, shared or name != "qwen2",
         f"hidden_size / num_attention_heads = {config.hidden_size} / {config.num_attention_heads}"),
        ("layer_types", f"{types[at]} in layer {at}", not other, usual[at]),
        ("attention_bias", config.attention_bias, not config.attention_bias or name == "llama",
         "false"),
        ("rope_scaling", config.rope_scaling,
         not config.rope_scaling or "rope.scaling.factor" in ARCHITECTURES[name].keys, "none"),
        ("rope_scaling", config.rope_scaling,
         name == "llama" or not (config.rope_scaling and config.rope_scaling.original), "linear"),
        ("query_pre_attn_scalar", config.attention_scale, own, f"head_dim = {config.head_dim}"),
        ("rope_local_base_freq", config.rope_local_base_freq,
         config.rope_local_base_freq == _LOCAL_THETA or name != "gemma3", f"{_LOCAL_THETA:g}"),
    ):  # fmt: skip
        if not fits:
            raise MespRefError(
                f"{config.source}: {field}: found {found}, expected {expected}; llama.cpp loads no "
                f"other {name}"
            )


def add_sizes(writer: Any, config: Qwen2Config) -> None:
    """The model's sizes and constants, under its architecture's name."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.traits.model_type != "qwen2":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_dimension_count(config.head_dim)
    if config.rope_scaling is not None and config.rope_scaling.original is None:
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)
    if config.sliding_window is not None:
        writer.add_sliding_window(config.sliding_window)


def divisors(config: Qwen2Config) -> list[Outgoing]:
    """rope_freqs.weight where frequencies are scaled as in Llama 3."""
    if config.rope_scaling is None or config.rope_scaling.original is None:
        return []
    found = slowed(config.rope_scaling, config.rope_theta, config.head_dim).astype(np.float32)
    return [Outgoing(FREQUENCIES, "F32", found.shape, lambda a, b: found[a:b], FREQUENCIES)]


def rows_of(name: str, rows: Rows, config: Qwen2Config) -> Rows:
    """The rows of a tensor as llama.cpp has them: gains whole, q and k interleaved if its RoPE is."""
    if is_gain(name, config):
        return lambda a, b: rows(a, b).astype(np.float32) + np.float32(config.traits.gain)
    interleaved = ARCHITECTURES[OF_FAMILY[config.traits.model_type]].interleaved
    if not interleaved or name.split(".")[-2] not in ("q_proj", "k_proj"):
        return rows
    d = config.head_dim

    def ordered(a: int, b: int) -> Array:
        """Row 2j of a head is its component j, row 2j + 1 component j + D/2."""
        start, stop = a // d * d, -(-b // d) * d
        at = np.arange(a, b)
        return rows(start, stop)[at - at % d + at % d // 2 + at % 2 * (d // 2) - start]

    return ordered

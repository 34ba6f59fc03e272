"""The mistakes people make in this backward, each as one overridden step of Plain.

The first line of a docstring is the name by which reports and the tutor call the mistake. `known`
gives those that a case can show; `OF_BLOCKS` and `OF_LOSSES` are the ones whose answers are stored
in the suite, for checkers in other languages.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mesp_ref.engine.config import Qwen2Config
from mesp_ref.files.config import config_of
from mesp_ref.golden.mistakes import (
    attention,
    family,
    fused,
    lora,
    loss,
    masks,
    mlp,
    norm,
    online,
    rest,
    rope,
)
from mesp_ref.golden.mistakes.attention import OnDevice
from mesp_ref.golden.mistakes.loss import CountsIgnored, IgnoresTokenZero, SumOverTokens
from mesp_ref.golden.plain import Plain
from mesp_ref.ops import IGNORED, Array

Arrays = dict[str, Array]
LARGE = 10_000  # a vocabulary over which only some mistakes are computed, each takes a second

# By the name of their files under neg/.
OF_BLOCKS: dict[str, type[Plain]] = {
    "no_inverse_rope": rope.NoInverseRope,
    "rope_twice": rope.RopeTwice,
    "neighbour_rope": rope.NeighbourRope,
    "no_rope": rope.NoRope,
    "rebuilt_without_rope": attention.RebuiltWithoutRope,
    "rebuilt_without_bias": attention.RebuiltWithoutBias,
    "rebuilt_without_lora": attention.RebuiltWithoutLora,
    "on_device": OnDevice,
    "tiled_heads": attention.TiledHeads,
    "tiled_heads_backward": attention.TiledHeadsBackward,
    "mean_over_group": attention.MeanOverGroup,
    "first_of_group": attention.FirstOfGroup,
    "no_score_scale": attention.NoScoreScale,
    "detached_probabilities": attention.DetachedProbabilities,
    "swapped_qk": attention.SwappedQK,
    "softmax_without_row_sum": attention.SoftmaxWithoutRowSum,
    "softmax_as_sigmoid": attention.SoftmaxAsSigmoid,
    "no_mask": attention.NoMask,
    "norm_scale_only": norm.NormScaleOnly,
    "norm_without_weight": norm.NormWithoutWeight,
    "norm_sum_for_mean": norm.NormSumForMean,
    "norm_passed_through": norm.NormPassedThrough,
    "silu_sigmoid_only": mlp.SiluSigmoidOnly,
    "silu_as_sigmoid": mlp.SiluAsSigmoid,
    "swapped_gate_up": mlp.SwappedGateUp,
    "up_without_silu": mlp.UpWithoutSilu,
    "no_mlp_residual": rest.NoMlpResidual,
    "no_attention_residual": rest.NoAttentionResidual,
    "no_frozen_weight": lora.NoFrozenWeight,
    "no_up_path": rest.NoUpPath,
    "no_key_path": rest.NoKeyPath,
    "no_value_path": rest.NoValuePath,
    "no_lora_path": lora.NoLoraPath,
    "no_scale_in_backward": lora.NoScaleInBackward,
    "alpha_for_scale": lora.AlphaForScale,
    "unit_scale": lora.UnitScale,
    "root_scale": lora.RootScale,
    "scaled_twice": lora.ScaledTwice,
    "unscaled_a": lora.UnscaledA,
    "last_token_only": lora.LastTokenOnly,
    "first_sequence_only": lora.FirstSequenceOnly,
    "eps_outside": norm.EpsOutside,
}
OF_LOSSES: dict[str, type[Plain]] = {
    "sum_over_tokens": SumOverTokens,
    "mean_over_all": loss.MeanOverAll,
    "ignores_token_zero": IgnoresTokenZero,
    "unshifted_labels": loss.UnshiftedLabels,
    "counts_ignored": CountsIgnored,
}


def title(mistake: type[Plain]) -> str:
    """How a report calls a mistake."""
    return (mistake.__doc__ or "").strip()


# Of fused ops, masks and families: by case and file, the sentence that `known` has it under.
OF_CASES: dict[str, dict[str, str]] = {
    "ops/masked_attention/window": {
        "window_long": "the window is one key too long: its own is not counted",
        "window_short": "the window is one key too short: its own is counted twice",
        "no_window": "the window is ignored: a query sees all keys before it",
    },
    "ops/masked_attention/documents": {
        "documents_joined": "documents are not kept apart: a query sees the keys of those before its "
        "own",
        "boundary": "a document's boundary is off by one: a query sees the last key of the document "
        "before",
        "last_document": "dk and dv of the last document only: overwritten, not accumulated over "
        "documents",
    },
    "ops/qkv_lora/usual": {
        "no_value_path": "dx lacks the part of v_proj",
        "k_without_lora": "LoRA is missing on k_proj: no adapter there",
    },
    "ops/mlp_lora/usual": {
        "no_up_path": "dx lacks the part of up_proj",
        "down_without_lora": "LoRA is missing on down_proj: no adapter there",
    },
    "ops/add_norm/usual": {
        "no_own_gradient": "the sum's own gradient is missing: dx and df are the norm's alone, the "
        "residual path is cut",
        "f_without": "df lacks the sum's own gradient",
    },
    "ops/head_loss/usual": {
        "norm_passed_through": "RMSNorm skipped in the backward: dx = dy",
        "sum_over_tokens": title(SumOverTokens),
    },
    "block/qwen3": {
        "head_norms_passed_through": "RMSNorm skipped in the backward: dx = dy, at q_norm and k_norm "
        "only",
        "no_head_norms": "the norms of q and k, q_norm and k_norm, are skipped",
        "norm_over_heads": title(family.NormOverHeads),
        "rebuilt_without_norm": title(attention.RebuiltWithoutNorm),
    },
    "block/gemma3": {
        "gain_w": f"{family.GAIN}, forward and backward",
        "gain_w_backward": f"{family.GAIN} in the backward",
        "no_norm_behind_attention": "the norm post_attention_layernorm is skipped",
        "no_norm_behind_mlp": "the norm post_feedforward_layernorm is skipped",
        "silu": "SiLU in place of GELU (its tanh form), forward and backward",
        "head_scale": "scores scaled by 1/√D instead of the scale given (query_pre_attn_scalar)",
    },
    "block/gemma3_window": {
        "window_long": "the window is one key too long: its own is not counted",
        "window_short": "the window is one key too short: its own is counted twice",
    },
    "e2e/llama": {
        "scaling_twice": "RoPE's scaling applied twice",
        "no_scaling": "RoPE without its scaling",
    },
    "e2e/gemma3": {
        "embedding_unscaled": "the embedding's factor √C is lost, forward and backward",
        "one_theta": "RoPE with one theta for all: layers with a window turn by that of the others",
        "window_on_all_layers": "the window is on all layers, also on those that see all",
    },
}


def of_case(
    name: str, kind: str, attributes: dict[str, Any], inputs: Arrays
) -> dict[str, type[Plain]]:
    """OF_CASES of a case; ArithmeticError for a sentence that no mistake has."""
    wanted = OF_CASES.get(name, {})
    found = {title(m): m for m in (known(kind, attributes, inputs) if wanted else [])[::-1]}
    missing = [sentence for sentence in wanted.values() if sentence not in found]
    if missing:
        raise ArithmeticError(f"{name}: no mistake is called {missing[0]!r}")
    return {slug: found[sentence] for slug, sentence in wanted.items()}


def known(kind: str, attributes: dict[str, Any], inputs: Arrays) -> list[type[Plain]]:
    """Every mistake that a case of this kind may show, with the sizes of its inputs."""
    if kind in ("op", "tile"):
        return _of_op(attributes["op"], inputs, attributes)
    if kind == "positions":
        turn = (
            inputs["positions"],
            inputs["x"].shape[-1],
            attributes["theta"],
            attributes["scaling"],
        )
        return [*rope.of_positions(*turn), *rope.KNOWN]
    if kind == "quant":
        return list(rest.QUANTISED)
    if kind == "traj":
        return {"adamw": list(rest.ADAMW), "sgd": list(rest.SGD), "mezo": list(rest.MEZO)}[
            attributes["optimizer"]
        ]
    config = config_of(attributes["config"])
    parts = [*rope.KNOWN, *attention.KNOWN, *norm.KNOWN, *mlp.of(config.traits.gelu)]
    parts += [*lora.KNOWN, *rest.BLOCK, attention.of_hidden(config.hidden_size)]
    if kind == "block":
        tokens = inputs["x"].shape[1]
        parts += family.of_blocks(config, False)
        return [*parts, *norm.divisors(inputs["x"]), *online.of_keys(tokens, tokens)]
    return parts + _of_model(config, inputs)


def _of_model(config: Qwen2Config, inputs: Arrays) -> list[type[Plain]]:
    """What a whole model may show beside the mistakes of its blocks."""
    n, t = inputs["input_ids"].shape
    hidden, vocabulary = config.hidden_size, config.vocab_size
    labels = int((inputs["labels"][:, 1:] != IGNORED).sum())
    losses = [*loss.KNOWN, *loss.SHIFTED, *loss.counts(n, t, labels), *loss.paddings(vocabulary)]
    widths = norm.divisors(np.zeros((n, t, hidden)))
    tiles = [*online.of_keys(t, t), *online.of_vocabulary(vocabulary)]
    return [
        *losses,
        *rest.EMBEDDING,
        *rest.model(config.num_hidden_layers),
        *family.of_models(config, t),
        *widths,
        *tiles,
    ]


def _of_op(op: str, v: Arrays, attributes: Mapping[str, Any]) -> list[type[Plain]]:
    """Mistakes of one op."""
    losses = [*loss.KNOWN, *loss.NOT_SHIFTED]
    if op == "rmsnorm":
        return [*norm.KNOWN, *norm.divisors(v["x"])]
    if op == "causal_softmax":
        return [*attention.KNOWN, *online.of_keys(*v["s"].shape[-2:])]
    if op in ("attention", "masked_attention"):
        own = masks.of_masks("positions" in v, "window" in attributes, "scale" in attributes)
        return [*own, *attention.KNOWN, *online.of_keys(v["q"].shape[1], v["k"].shape[1])]
    if op == "qkv_lora":
        return [*lora.KNOWN, *fused.OF_QKV]
    if op in ("mlp_lora", "gelu_mlp_lora"):
        return [*lora.KNOWN, *mlp.of(op == "gelu_mlp_lora"), *fused.OF_MLP]
    if op == "add_norm":
        return [*norm.KNOWN, *norm.divisors(v["x"]), *fused.OF_ADD_NORM]
    if op == "head_loss":
        ends = [*rest.skipped_norm("model.norm"), *norm.KNOWN, *norm.divisors(v["x"])]
        return [*ends, *_of_op("lm_loss", v | {"w": v["head"]}, attributes)]
    if op in ("cross_entropy", "lm_loss"):
        n, t = (1, len(v["labels"])) if op == "cross_entropy" else v["labels"].shape
        size = v["logits"].shape[-1] if op == "cross_entropy" else len(v["w"])
        if size > LARGE:
            return [*loss.KNOWN, *online.of_vocabulary(size)]
        counts = loss.counts(n, t, int((v["labels"] != IGNORED).sum()))
        rows = lora.KNOWN if op == "lm_loss" else ()
        return [*losses, *counts, *loss.paddings(size), *online.of_vocabulary(size), *rows]
    return list(
        {
            "rope": rope.KNOWN,
            "swiglu": mlp.KNOWN,
            "geglu": mlp.GELU,
            "linear": lora.KNOWN,
            "lora_linear": lora.KNOWN,
            "embedding": rest.EMBEDDING,
        }.get(op, ())
    )

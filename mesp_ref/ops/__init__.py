"""Every operation of a transformer with LoRA as plain functions: op, op_bwd and op_bwd_params.

`op(activations…, parameters…, *, attributes) -> (y, Res)`. `op_bwd(dy, res, parameters…)` gives the
gradients of the activations (and of LoRA's A and B) in argument order, `op_bwd_params` those of
base weights and biases. `Res` is a NamedTuple of what the backward needs besides the parameters.

Letters: N batch, T tokens, C hidden, H query heads, G key/value heads, D head size, F MLP width,
V vocabulary, R rank; the gradient of `x` is `dx`. Compute types are float32, float64 and
complex128, the same out as in. Ops are pure: no input is ever changed.
"""

from mesp_ref.ops._array import NOTHING, Array, Table, rows
from mesp_ref.ops.attention import AttentionRes, attention, attention_bwd
from mesp_ref.ops.cross_entropy import IGNORED, CrossEntropyRes, cross_entropy, cross_entropy_bwd
from mesp_ref.ops.embedding import EmbeddingRes, embedding, embedding_bwd_params
from mesp_ref.ops.geglu import GegluRes, geglu, geglu_bwd
from mesp_ref.ops.linear import LinearRes, linear, linear_bwd, linear_bwd_params
from mesp_ref.ops.lm_loss import LmLossRes, lm_loss, lm_loss_bwd, lm_loss_bwd_params
from mesp_ref.ops.lora_linear import (
    LoraLinearRes,
    lora_linear,
    lora_linear_bwd,
    lora_linear_bwd_params,
)  # fmt: skip
from mesp_ref.ops.rmsnorm import RmsNormRes, rmsnorm, rmsnorm_bwd, rmsnorm_bwd_params
from mesp_ref.ops.rope import RopeRes, RopeScaling, rope, rope_bwd, rope_tables
from mesp_ref.ops.softmax import CausalSoftmaxRes, causal_softmax, causal_softmax_bwd
from mesp_ref.ops.swiglu import SwigluRes, swiglu, swiglu_bwd

"""Three ways to the exact gradient of one step, and what each keeps in memory.

    store_all   every residual of every block
    mebp        one checkpoint per block; re-runs a block, keeps it all
    mesp        the same checkpoints; re-runs a block, keeps eight

They call the same op pairs in the same order: the same bits. mezo.py estimates, `lean` cuts blocks up.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from mesp_ref import ops
from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.block import EVERYTHING, MESP, PLAIN, Halves, block, block_bwd
from mesp_ref.engine.half import Gradients, copied
from mesp_ref.engine.layer import Layer, Tap, untapped
from mesp_ref.engine.model import EMBEDDING, NORM, Model, embed, shift
from mesp_ref.ops import Array

OnGradients = Callable[[int, Gradients], object]


class Step(NamedTuple):
    """One batch on one model: all that a method needs to know."""

    model: Model
    adapter: Adapter | None
    ids: Array  # [N, T]
    labels: Array  # [N, T]
    layers: list[Layer]
    params: bool  # also the gradients of the base weights
    emit: OnGradients  # called once a block, when its gradients are complete
    checkpoints: Any = None  # a stack of block inputs: push(x), pop()
    halves: Halves = PLAIN
    lm_loss: Callable[..., tuple[Array, ops.LmLossRes]] = ops.lm_loss
    parameters: Mapping[int, Gradients] = MappingProxyType({})  # mezo: what it perturbs, by block
    seeds: tuple[int, ...] = (0,)  # mezo: one for each perturbation
    eps: float = 1e-3  # mezo
    probe: Any = None  # mezo: in place of its forwards, (step) -> the two losses of each seed
    tap: Tap = untapped


def store_all(step: Step) -> Array:
    """Plain backpropagation: every residual of every block waits for the backward.

    Keeps     all residuals; no block is run twice
    """
    x, kept = embed(step.model, step.ids), []
    step.tap("model.embed_tokens", x)
    for layer in step.layers:
        x, res = block(x, layer, halves=step.halves)
        kept.append(res)
        del res
    loss, dx, head = head_and_loss(step, x)
    del x
    for layer in reversed(step.layers):
        dx, grads = block_bwd(dx, kept.pop(), layer, halves=step.halves, params=step.params)
        step.emit(layer.number, grads)
        del grads  # handed over
    embed_bwd(step, dx, head)
    return loss


def mebp(step: Step) -> Array:
    """Memory-efficient backpropagation: a checkpoint per block, all intermediates of one block.

    Keeps     the input of each block; in the backward, everything of the block at hand until its
              backward ends, as autodiff does
    Source    Song & Tang 2025, arXiv 2510.03425
    """
    loss, dx, head = checkpointed_forward(step)
    for layer in reversed(step.layers):
        res = block(step.checkpoints.pop(), layer, halves=step.halves)[1]
        dx, grads = block_bwd(dx, copied(res), layer, halves=step.halves, params=step.params)
        step.emit(layer.number, grads)
        del grads, res  # handed over, and done with
    embed_bwd(step, dx, head)
    return loss


def mesp(step: Step) -> Array:
    """Memory-efficient structured backpropagation: eight intermediates, each until its last use.

    Keeps     the input of each block; in the backward, the block at hand without MESP, whose
              members are rebuilt; each residual dies as it is used
    Source    Park et al. 2026, arXiv 2602.13069
    """
    loss, dx, head = checkpointed_forward(step)
    for layer in reversed(step.layers):
        res = block(step.checkpoints.pop(), layer, halves=step.halves, drop=MESP)[1]
        dx, grads = block_bwd(dx, res, layer, halves=step.halves, params=step.params)
        step.emit(layer.number, grads)
        del grads, res  # handed over, and done with
    embed_bwd(step, dx, head)
    return loss


def checkpointed_forward(step: Step) -> tuple[Array, Array, Array | None]:
    """The forward of mebp and mesp: push every block's input, keep nothing else."""
    x = embed(step.model, step.ids)
    for layer in step.layers:
        step.checkpoints.push(x)
        x = block(x, layer, halves=step.halves, drop=EVERYTHING)[0]
    return head_and_loss(step, x)


def head_and_loss(step: Step, x: Array) -> tuple[Array, Array, Array | None]:
    """Final norm, head and loss, forward and backward: the loss, dx, and the tied table's gradient.

    An untied head's gradient and the norm's go to `emit` as block number num_hidden_layers.
    """
    model, labels = step.model, shift(step.labels)
    w, w_norm, eps = model.weights[model.head], model.weights[NORM], model.config.rms_norm_eps
    n, r_norm = ops.rmsnorm(x, w_norm, eps=eps)
    step.tap("model.norm", n)
    loss, r_loss = step.lm_loss(n, w, labels)
    dn = ops.lm_loss_bwd(1.0, r_loss, w)
    step.tap("model.norm.grad", dn)
    dx, tied = ops.rmsnorm_bwd(dn, r_norm, w_norm, eps=eps), None  # before `emit` may update w
    if step.params:
        dw = ops.lm_loss_bwd_params(1.0, r_loss, w)
        grads = {NORM: ops.rmsnorm_bwd_params(dn, r_norm, w_norm, eps=eps)}
        if model.config.tie_word_embeddings:
            tied = dw
        else:
            grads[model.head] = dw
        step.emit(model.config.num_hidden_layers, grads)
    return loss, dx, tied


def embed_bwd(step: Step, dx: Array, tied: Array | None) -> None:
    """Gradient of the embedding table: the lookup's, plus the head's when the two are tied."""
    step.tap("model.embed_tokens.grad", dx)
    if step.params:
        w, r = step.model.weights[EMBEDDING], ops.EmbeddingRes(step.ids)
        if step.model.config.traits.scaled_embedding:
            dx = dx * step.model.config.hidden_size**0.5
        dw = ops.embedding_bwd_params(dx, r, w)
        step.emit(-1, {EMBEDDING: dw if tied is None else dw + tied})

"""Five ways to the gradient of one step, and what each keeps in memory.

    store_all   every residual of every block                            exact
    mebp        one checkpoint per block; re-runs a block, keeps it all  exact
    mesp        the same checkpoints; re-runs a block, keeps eight       exact
    mesp_tiled  block inputs; half a block at a time, its ops in tiles   exact
    mezo        nothing; two forwards for each seed of noise             an estimate

The first three call the same op pairs in the same order, so with as many workers their gradients agree
bit for bit; those of mesp_tiled agree up to the order of summation.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from mesp_ref import ops
from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.block import MESP, Tap, block, block_bwd, untapped
from mesp_ref.engine.inputs import finite
from mesp_ref.engine.layer import Layer
from mesp_ref.engine.model import EMBEDDING, NORM, Model, embed, head_matrix, hidden_states, shift
from mesp_ref.lean.activations import Checkpoints
from mesp_ref.lean.halves_tiled import (
    attention_half,
    attention_half_bwd,
    mlp_half,
    mlp_half_bwd,
    shared_loss,
)
from mesp_ref.lean.workers import ALONE, Workers
from mesp_ref.ops import Array

Gradients = dict[str, Array]
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
    checkpoints: Checkpoints
    workers: Workers = ALONE
    parameters: Mapping[int, Gradients] = MappingProxyType({})  # mezo: what it perturbs, by block
    seeds: tuple[int, ...] = (0,)  # mezo: one for each perturbation
    eps: float = 1e-3  # mezo
    tap: Tap = untapped


def store_all(step: Step) -> Array:
    """Plain backpropagation: every residual of every block waits for the backward.

    Keeps     all residuals; no block is run twice
    """
    x, kept = embed(step.model, step.ids, step.tap), []
    for layer in step.layers:
        res: dict[str, Any] = {}
        x = block(x, layer, res=res, tap=step.tap)
        kept.append(res)
    loss, dx, head = _head(step, x)
    del x
    for layer in reversed(step.layers):
        dx, grads = block_bwd(dx, kept.pop(), layer, params=step.params, tap=step.tap)
        step.emit(layer.number, grads)
        del grads  # handed over
    _embed_bwd(step, dx, head)
    return loss


def mebp(step: Step) -> Array:
    """Memory-efficient backpropagation: a checkpoint per block, all intermediates of one block.

    Keeps     the input of each block; in the backward, everything of the block at hand until its
              backward ends, as autodiff does
    Source    Song & Tang 2025, arXiv 2510.03425
    """
    loss, dx, head = _checkpointed_forward(step)
    for layer in reversed(step.layers):
        res: dict[str, Any] = {}
        block(step.checkpoints.pop(), layer, res=res)
        dx, grads = block_bwd(dx, dict(res), layer, params=step.params)  # `res` holds on to all
        step.emit(layer.number, grads)
        del grads  # handed over
    _embed_bwd(step, dx, head)
    return loss


def mesp(step: Step) -> Array:
    """Memory-efficient structured backpropagation: eight intermediates, each until its last use.

    Keeps     the input of each block; in the backward, the block at hand without MESP, whose
              members are rebuilt, and block_bwd pops each residual as it is used
    Source    Park et al. 2026, arXiv 2602.13069
    """
    loss, dx, head = _checkpointed_forward(step)
    for layer in reversed(step.layers):
        res: dict[str, Any] = {}
        block(step.checkpoints.pop(), layer, res=res, drop=MESP)
        dx, grads = block_bwd(dx, res, layer, params=step.params)
        step.emit(layer.number, grads)
        del grads  # handed over
    _embed_bwd(step, dx, head)
    return loss


def mesp_tiled(step: Step) -> Array:
    """MeSP in tiles: no array of T·T, T·F or T·V elements; half a block is alive at a time.

    Keeps     the input of each block, and on disk, where it costs no memory, of each half; in RAM
              the input of the second half is computed again. With "offload" the file also takes
              q, k, v, the attention output, gate and up, and no projection is computed again
    """
    x, stack, kept = embed(step.model, step.ids), step.checkpoints, []
    keep = stack.keep if stack.offload else None
    for layer in step.layers:
        stack.push(x)
        x, attention = attention_half(x, layer, keep)
        if stack.halves:
            stack.push(x)
        x, mlp = mlp_half(x, layer, keep)
        kept.append((attention, mlp))
    loss, dx, head = _head(step, x)
    for layer in reversed(step.layers):
        x, (attention, mlp) = stack.pop(), kept.pop()
        a = x if stack.halves else attention_half(x, layer)[0]
        dx, grads = mlp_half_bwd(dx, a, layer, mlp, params=step.params)
        del a, mlp
        x = stack.pop() if stack.halves else x
        dx, found = attention_half_bwd(dx, x, layer, attention, params=step.params)
        step.emit(layer.number, found | grads)
        del grads, found  # handed over
    _embed_bwd(step, dx, head)
    return loss


def mezo(step: Step) -> Array:
    """Zeroth-order estimate: two forwards for each of n seeds, whose z ~ N(0, 1) is never stored.

    Estimate  g = (L(θ + eps·z) − L(θ − eps·z)) / (2·eps);  gradient ≈ the mean of g·z
    Returns   the mean of the 2n losses; the estimate goes to `emit`, block by block
    Restores  θ, perturbed in place, within 4u·(|θ| + eps·|z|) a seed, u the unit roundoff
    Source    Malladi et al. 2023, arXiv 2305.17333, algorithms 1 and 2
    """
    losses = [_two_sides(step, seed) for seed in step.seeds]
    noise = [np.random.default_rng(seed) for seed in step.seeds]
    for number, parameters in step.parameters.items():
        grads = {name: np.zeros_like(array) for name, array in parameters.items()}
        for (up, down), rng in zip(losses, noise, strict=True):
            _add_noise(grads, rng, (up - down) / (2 * step.eps) / len(losses))
        step.emit(number, grads)
        del grads  # handed over
    return np.asarray(np.mean(losses))


METHODS: dict[str, Callable[[Step], Array]] = {
    method.__name__: method for method in (store_all, mebp, mesp, mesp_tiled, mezo)
}


def _checkpointed_forward(step: Step) -> tuple[Array, Array, Array | None]:
    """The forward of mebp and mesp: push every block's input, keep nothing else."""
    x = embed(step.model, step.ids)
    for layer in step.layers:
        step.checkpoints.push(x)
        x = block(x, layer)
    return _head(step, x)


def _head(step: Step, x: Array) -> tuple[Array, Array, Array | None]:
    """Final norm, head and loss, forward and backward: the loss, dx, and the tied table's gradient.

    An untied head's gradient and the norm's go to `emit` as block number num_hidden_layers.
    """
    model, labels = step.model, shift(step.labels)
    w, w_norm = head_matrix(model), model.weights(NORM)
    eps = model.config.rms_norm_eps
    n, r_norm = ops.rmsnorm(x, w_norm, eps=eps)
    step.tap("model.norm", n)
    loss, r_loss = shared_loss(n, w, labels, step.workers)
    if step.tap is not untapped:
        _tap_logits(step, n, labels)
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


def _tap_logits(step: Step, n: Array, labels: Array) -> None:
    """Show the logits, the loss and their gradient, which lm_loss never holds whole."""
    z, _ = ops.linear(n, step.model.weights(step.model.head))
    loss, res = ops.cross_entropy(ops.rows(z), labels.reshape(-1))
    step.tap("lm_head", z)
    step.tap("loss", loss)
    step.tap("lm_head.grad", ops.cross_entropy_bwd(1.0, res).reshape(z.shape))


def _embed_bwd(step: Step, dx: Array, tied: Array | None) -> None:
    """Gradient of the embedding table: the lookup's, plus the head's when the two are tied."""
    step.tap("model.embed_tokens.grad", dx)
    if step.params:
        dw = ops.embedding_bwd_params(
            dx, ops.EmbeddingRes(step.ids), step.model.weights.lazy(EMBEDDING)
        )
        step.emit(-1, {EMBEDDING: dw if tied is None else dw + tied})


def _two_sides(step: Step, seed: int) -> list[float]:
    """L(θ + eps·z) and L(θ − eps·z)."""
    at, losses = 0.0, []
    try:
        for side in (step.eps, -step.eps):
            _perturb(step, seed, side - at)
            at = side
            losses.append(_forward(step))
    finally:  # an interrupted step leaves the parameters as they were, too
        _perturb(step, seed, -at)
    return losses


def _forward(step: Step) -> float:
    """The loss alone.  Raises MespRefError for one that is not finite."""
    n = hidden_states(step.model, step.ids, blocks=step.layers)
    w, labels, drop = head_matrix(step.model), shift(step.labels), frozenset({"dx"})
    return finite("loss", shared_loss(n, w, labels, step.workers, drop)[0].item())


def _perturb(step: Step, seed: int, by: float) -> None:
    """θ += by·z, in place: the same z for the same seed."""
    rng = np.random.default_rng(seed)
    for parameters in step.parameters.values():
        _add_noise(parameters, rng, by)


def _add_noise(arrays: Gradients, rng: np.random.Generator, by: float) -> None:
    """w += by·z for every w, in place, z ~ N(0, 1) drawn tensor by tensor."""
    for w in arrays.values():
        w += by * rng.standard_normal(w.shape, dtype=w.dtype)

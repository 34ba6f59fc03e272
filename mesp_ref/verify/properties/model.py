"""Symmetries of the whole model, each of which makes two sums of gradients equal.

Where a change of weights leaves the loss alone, the gradient along that change is 0. The gradients
of different layers must then balance, so a path that the backward forgot shows.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from mesp_ref.api import logits, loss, loss_and_grads
from mesp_ref.engine.adapter import tensor_name
from mesp_ref.engine.model import Model
from mesp_ref.ops import IGNORED, Array
from mesp_ref.verify.properties.claim import agree, exactly, holds
from mesp_ref.verify.result import Finding
from mesp_ref.verify.samples import sample_adapter, sample_batch, sample_model, small_config

Tensors = dict[str, Array]
TABLE = "model.embed_tokens.weight"
GATE = 1e-11  # of the sum of absolute terms, through two layers


def _case(
    rng: np.random.Generator, tied: bool = False, eps: float = 1e-2
) -> tuple[Tensors, Tensors]:
    """All tensors of a small adapted model, and their gradients by mesp."""
    config = small_config(tied, rms_norm_eps=eps)
    model, adapter = sample_model(rng, config), sample_adapter(rng, config)
    _, grads = loss_and_grads(model, adapter, *sample_batch(rng, config), trainable="all")
    tensors = {name: model.weights[name][...] for name in model.weights}
    return tensors | adapter.weights, grads


def _parts(layer: int, module: str, *kinds: str) -> list[str]:
    path = f"model.layers.{layer}.{module}"
    names = {"weight": f"{path}.weight", "bias": f"{path}.bias"}
    names |= {matrix: tensor_name(path, matrix) for matrix in "AB"}
    return [names[kind] for kind in kinds]


def _along(tensors: Tensors, grads: Tensors, names: Iterable[str]) -> tuple[float, float]:
    """⟨θ, ∂L/∂θ⟩ over some tensors, and the sum of its absolute terms."""
    terms = [tensors[name] * grads[name] for name in names]
    return sum(t.sum() for t in terms), sum(np.abs(t).sum() for t in terms)


@holds("model")
def balanced_layers(rng: np.random.Generator) -> Iterator[Finding]:
    """q·a with k/a, v·a with o/a, up·a with down/a: the loss stays, so the gradients balance."""
    tensors, grads = _case(rng)
    out, into = ("weight", "bias", "B"), ("weight", "A")
    pairs = (
        ("q_proj and k_proj", "self_attn.q_proj", out, "self_attn.k_proj", out),
        ("v_proj and o_proj", "self_attn.v_proj", out, "self_attn.o_proj", into),
        ("up_proj and down_proj", "mlp.up_proj", ("weight", "B"), "mlp.down_proj", into),
    )
    for layer in range(2):
        for claim, one, kinds, other, kinds_other in pairs:
            left, a = _along(tensors, grads, _parts(layer, one, *kinds))
            right, b = _along(tensors, grads, _parts(layer, other, *kinds_other))
            yield agree("model", f"layer {layer}, {claim}", left, right, a + b, GATE)


@holds("model")
def balanced_norms(rng: np.random.Generator) -> Iterator[Finding]:
    """A norm's channel times a, the next layers' columns over a: w·dw = Σ W·dW + Σ A·dA."""
    tensors, grads = _case(rng)
    readers = {
        "input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
    }
    for layer in range(2):
        for norm, modules in readers.items():
            name = f"model.layers.{layer}.{norm}.weight"
            columns = [n for m in modules for n in _parts(layer, m, "weight", "A")]
            terms = [tensors[n] * grads[n] for n in columns]
            right = sum(t.sum(axis=0) for t in terms)
            size = sum(np.abs(t).sum() for t in terms)
            yield agree("model", name, tensors[name] * grads[name], right, size, GATE)
    left = tensors["model.norm.weight"] * grads["model.norm.weight"]
    head = tensors["lm_head.weight"] * grads["lm_head.weight"]
    yield agree("model", "model.norm.weight", left, head.sum(axis=0), np.abs(head).sum(), GATE)


@holds("model")
def scaled_residual_stream(rng: np.random.Generator) -> Iterator[Finding]:
    """With eps → 0 the norms forget the scale of the residual stream: Σ θ·dθ of its writers is 0."""
    tensors, grads = _case(rng, eps=1e-30)
    writers = [TABLE]
    for layer in range(2):
        for module in ("self_attn.o_proj", "mlp.down_proj"):
            writers += _parts(layer, module, "weight", "B")
    total, size = _along(tensors, grads, writers)
    yield agree("model", "Σ θ·dθ over what writes to the stream", total, 0.0, size, GATE)


@holds("model")
def low_rank_of_the_base(rng: np.random.Generator) -> Iterator[Finding]:
    """dA = s·Bᵀ·dW and dB = s·dW·Aᵀ in every projection of every block."""
    tensors, grads = _case(rng)
    for name in [n for n in grads if n.endswith("lora_A.weight")]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        partner, dw = name.replace("lora_A", "lora_B"), grads[f"{module}.weight"]
        A, B, s = tensors[name], tensors[partner], 4 / 3
        size_a, size_b = s * np.abs(B).T @ np.abs(dw), s * np.abs(dw) @ np.abs(A).T
        yield agree("model", name, grads[name], s * B.T @ dw, size_a.max(), 1e-12)
        yield agree("model", partner, grads[partner], s * dw @ A.T, size_b.max(), 1e-12)


@holds("model")
def tied_table(rng: np.random.Generator) -> Iterator[Finding]:
    """A tied table's gradient is that of the lookup plus that of the head, in the untied model."""
    config = small_config(tied=True)
    tied, adapter = sample_model(rng, config), sample_adapter(rng, config)
    batch = sample_batch(rng, config)
    arrays = {name: tied.weights[name][...] for name in tied.weights}
    apart = Model(small_config(tied=False), arrays | {"lm_head.weight": arrays[TABLE].copy()})
    value, grads = loss_and_grads(tied, adapter, *batch, trainable="all")
    other, split = loss_and_grads(apart, adapter, *batch, trainable="all")
    total = split[TABLE] + split["lm_head.weight"]
    size = np.abs(split[TABLE]) + np.abs(split["lm_head.weight"])
    yield agree("model", "loss", value, other, abs(other))
    yield agree("model", TABLE, grads[TABLE], total, size.max(), 1e-13)
    absent = np.setdiff1d(np.arange(config.vocab_size), batch[0])
    yield agree("model", "lookup of absent tokens", split[TABLE][absent], 0.0, np.zeros(()))


@holds("model")
def loss_is_the_mean_of_shifted_labels(rng: np.random.Generator) -> Iterator[Finding]:
    """The loss is −mean log p(label at t+1 | tokens up to t) of the logits."""
    config = small_config()
    model, adapter = sample_model(rng, config), sample_adapter(rng, config)
    ids, labels = sample_batch(rng, config)
    z = logits(model, ids, adapter)[:, :-1]
    log_p = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    target = labels[:, 1:]
    n, t = np.nonzero(target != IGNORED)
    expected = -log_p[n, t, target[n, t]].mean()
    by_gradients, _ = loss_and_grads(model, adapter, ids, labels)
    yield agree("model", "loss", loss(model, adapter, ids, labels), expected, 32 * expected)
    yield agree("model", "loss with gradients", by_gradients, expected, 32 * expected)


@holds("model")
def the_future_is_not_seen(rng: np.random.Generator) -> Iterator[Finding]:
    """Changing a token changes no logits before it, to the bit, and does change those at it."""
    config = small_config()
    model, ids = sample_model(rng, config), sample_batch(rng, config, (1, 6))[0]
    other = ids.copy()
    other[0, 3] = (ids[0, 3] + 1) % config.vocab_size
    before, after = logits(model, ids), logits(model, other)
    yield exactly("model", "earlier logits", after[:, :3], before[:, :3])
    moved = np.abs(after[:, 3:] - before[:, 3:]).max(axis=-1) > 0
    yield exactly("model", "later logits move", moved, True)

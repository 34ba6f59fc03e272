"""Prove the gradients of a real checkpoint: its LoRA tensors on one batch, by complex step."""

from collections.abc import Iterator

import numpy as np

from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.model import Model
from mesp_ref.ops import Array
from mesp_ref.verify.oracles import STEP, indices
from mesp_ref.verify.result import Finding, scalar
from mesp_ref.verify.subject import Subject
from mesp_ref.verify.whole_model import model_subject

RELATIVE = 1e-12  # of Σ|g·v|; measured on SmolLM2-135M (30 blocks): 6e-18, and 2.4e-16 of max|g|


def checkpoint_gradcheck(
    model: Model,
    adapter: Adapter,
    ids: Array,
    labels: Array,
    *,
    position_ids: Array | None = None,
    method: str = "mesp",
    directions: int = 2,
    tensors: int | None = None,
    entries: int = 1,
    seed: int = 0,
) -> Iterator[Finding]:
    """Gradients of a batch by `method` in float64 against complex step through the whole model.

    Yields    for each of `directions` random directions in all LoRA tensors together, then for each
              tensor (or `tensors` drawn ones), one direction and `entries` single entries
    Gate      1e-12·Σ|g·v|; of an entry 1e-12·max|g|. Magnitudes as for small models would grow with
              every layer of absolute values and say nothing.
    Packed    rows with position_ids are held to the loss of their documents apart
    Costs     one forward in complex128 per finding; stored weights are decoded as they are used
    Needs     B ≠ 0, or dA is 0 everywhere (init_lora's b_std)
    """
    subject = model_subject(
        model, adapter, ids, labels, method=method, trainable="lora", position_ids=position_ids
    )
    rng, dy = np.random.default_rng(seed), (np.ones(()),)
    grads = subject.backward(dy, subject.args)
    names = list(subject.differentiable)

    def draw(names: list[str]) -> dict[str, Array]:
        return {name: rng.standard_normal(grads[name].shape) for name in names}

    for number in range(directions):
        yield _along(subject, grads, draw(names), f"all tensors, direction {number + 1}")
    chosen = names if tensors is None else [names[i] for i in _drawn(rng, len(names), tensors)]
    for name in chosen:
        yield _along(subject, grads, draw([name]), f"{name}, direction")
        for at in indices(grads[name], rng, entries):
            unit = np.zeros_like(grads[name])
            unit[at] = 1
            floor = RELATIVE * float(np.abs(grads[name]).max())
            yield _along(subject, grads, {name: unit}, f"{name} {list(at)}", floor)


def _drawn(rng: np.random.Generator, count: int, limit: int) -> list[int]:
    return sorted(rng.choice(count, min(limit, count), replace=False).tolist())


def _along(
    subject: Subject, grads: dict[str, Array], v: dict[str, Array], what: str, floor: float = 0.0
) -> Finding:
    """⟨g, v⟩ against Im L(θ + i·h·v)/h."""
    (expected,) = subject.tangent(v, STEP)
    terms = [grads[name] * direction for name, direction in v.items()]
    size = sum(float(np.abs(term).sum()) for term in terms)
    got = sum(float(term.sum()) for term in terms)
    meaning = "The derivative of the loss along a direction, against complex step."
    return scalar(
        "complex step", subject.name, what, got, expected, RELATIVE * size + floor, meaning
    )

"""neg/: what a block, a model and single ops give with one mistake in them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mesp_ref.golden.builder.models import Made
from mesp_ref.golden.mistakes import OF_BLOCKS, OF_CASES, OF_LOSSES, of_case, title
from mesp_ref.golden.plain import Arrays, Plain
from mesp_ref.golden.simulate import simulator
from mesp_ref.golden.suite import Case, Tensor, Vectors, Wrong
from mesp_ref.ops import Array

WRONG = ("block/usual", "e2e/tied")  # the models that have the mistakes of all families


def refused(wrong: Arrays, case: Case, vectors: Vectors) -> tuple[str, ...]:
    """The dtypes in which a wrong answer exceeds some tolerance."""

    def outside(tensor: Tensor, dtype: str) -> bool:
        error = np.abs(wrong[tensor.name].astype(np.float64) - vectors.want[tensor.name])
        return bool((error > tensor.tolerance(vectors, dtype)).any())

    given = [tensor for tensor in case.tensors if tensor.name in wrong]
    return tuple(d for d in case.dtypes if any(outside(tensor, d) for tensor in given))


def _answer(
    name: str, case: Case, vectors: Vectors, bug: str, arrays: dict[str, Array]
) -> tuple[Wrong, Arrays]:
    narrow = {key: np.asarray(value, np.float32) for key, value in arrays.items()}
    where = refused(narrow, case, vectors)
    if not where:
        raise ArithmeticError(f"{name}: the mistake is within every tolerance")
    return Wrong(name, case.name, bug, f"{name}.safetensors", where), narrow


def wrong_models(made: Made) -> Iterator[tuple[Wrong, Arrays]]:
    """Loss or outputs and LoRA gradients of a block or model for every mistake that shows there."""
    results, case = [t.name for t in made.case.tensors if t.role == "result"], made.case
    mistakes = of_case(case.name, case.kind, case.attributes, made.vectors.inputs)
    if case.name in WRONG:
        mistakes |= OF_BLOCKS | (OF_LOSSES if case.kind == "e2e" else {})
    for slug, mistake in mistakes.items():
        trace = made.run(mistake(made.setting))
        arrays = {name: trace[name] for name in results}
        name = f"neg/{made.case.name}/{slug}"
        yield _answer(name, made.case, made.vectors, title(mistake), arrays)


# Ops of which wrong answers are stored: one case of each.
OF_OPS = (
    "ops/rmsnorm/usual",
    "ops/rope/wide_head",
    "ops/lora_linear/usual",
    "ops/attention/square",
    "ops/swiglu/usual",
    "ops/cross_entropy/usual",
)


def wrong_op(case: Case, vectors: Vectors) -> Iterator[tuple[Wrong, Arrays]]:
    """Output and gradients of an op for every mistake that changes them."""
    chosen = case.name in OF_OPS or case.name in OF_CASES
    run = simulator(case, vectors.inputs, Path()) if chosen else None
    if run is None:
        return
    if refused(run(Plain), case, vectors):
        raise ArithmeticError(f"{case.name}: two writings differ")
    results = [tensor.name for tensor in case.tensors if tensor.role == "result"]
    mistakes = of_case(case.name, case.kind, case.attributes, vectors.inputs)
    if case.name in OF_OPS:
        mistakes |= OF_BLOCKS | OF_LOSSES
    for slug, mistake in mistakes.items():
        found = run(mistake)
        arrays = {name: found[name] for name in results}
        if refused(arrays, case, vectors):
            yield _answer(f"neg/{case.name}/{slug}", case, vectors, title(mistake), arrays)

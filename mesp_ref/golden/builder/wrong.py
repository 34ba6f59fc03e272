"""neg/: what a block, a model and single ops give with one mistake in them."""

import re
from collections.abc import Callable, Iterator

import numpy as np

from mesp_ref.golden.builder.models import Made
from mesp_ref.golden.mistakes import (
    OF_BLOCKS,
    OF_LOSSES,
    CountsIgnored,
    IgnoresTokenZero,
    SumOverTokens,
    title,
)
from mesp_ref.golden.plain import Arrays, Plain, Setting
from mesp_ref.golden.suite import Case, Tensor, Vectors, Wrong
from mesp_ref.ops import Array


def refused(wrong: Arrays, case: Case, vectors: Vectors) -> tuple[str, ...]:
    """The dtypes in which a wrong answer exceeds some tolerance."""

    def outside(tensor: Tensor, dtype: str) -> bool:
        error = np.abs(wrong[tensor.name].astype(np.float64) - vectors.want[tensor.name])
        return bool((error > tensor.tolerance(vectors, dtype)).any())

    given = [tensor for tensor in case.tensors if tensor.name in wrong]
    return tuple(d for d in case.dtypes if any(outside(tensor, d) for tensor in given))


def slug(mistake: type[Plain]) -> str:
    """NoInverseRope -> no_inverse_rope"""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", mistake.__name__).lower()


def _answer(name: str, made: Made, bug: str, arrays: dict[str, Array]) -> tuple[Wrong, Arrays]:
    narrow = {key: np.asarray(value, np.float32) for key, value in arrays.items()}
    where = refused(narrow, made.case, made.vectors)
    if not where:
        raise ArithmeticError(f"{name}: the mistake is within every tolerance")
    return Wrong(name, made.case.name, bug, f"{name}.safetensors", where), narrow


def wrong_models(made: Made) -> Iterator[tuple[Wrong, Arrays]]:
    """Loss or outputs and LoRA gradients of a block or model for every mistake that shows there."""
    results = [tensor.name for tensor in made.case.tensors if tensor.role == "result"]
    losses = OF_LOSSES if made.case.kind == "e2e" else ()
    for mistake in OF_BLOCKS + losses:
        trace = made.run(mistake(made.setting))
        arrays = {name: trace[name] for name in results}
        yield _answer(f"neg/{made.case.name}/{slug(mistake)}", made, title(mistake), arrays)


# Ops whose mistakes Plain can make: the case, and what runs it.
def _rmsnorm(plain: Plain, v: Arrays) -> Arrays:
    return {"y": plain.norm(v["x"], v["w"]), "dx": plain.norm_bwd(v["dy"], v["x"], v["w"])}


def _rope(plain: Plain, v: Arrays) -> Arrays:
    return {"y": plain.rotate(v["x"]), "dx": plain.rotate_bwd(v["dy"])}


def _lora_linear(plain: Plain, v: Arrays) -> Arrays:
    grads = plain.lora_bwd(v["dy"], v["x"], v["w"], v["A"], v["B"])
    y = v["x"] @ v["w"].T + v["b"] + plain.scale() * (v["x"] @ v["A"].T @ v["B"].T)
    return {"y": y} | dict(zip(("dx", "dA", "dB"), grads, strict=True))


def _attention(plain: Plain, v: Arrays) -> Arrays:
    p = plain.softmax(v["q"], plain.share(v["k"]))
    grads = plain.attention_bwd(v["dy"], v["q"], v["k"], v["v"], p)
    y = np.einsum("nhqk,nkhd->nqhd", p, plain.share(v["v"]))
    return {"y": y} | dict(zip(("dq", "dk", "dv"), grads, strict=True))


def _swiglu(plain: Plain, v: Arrays) -> Arrays:
    grads = plain.swiglu_bwd(v["dy"], v["gate"], v["up"])
    y = plain.silu(v["gate"]) * v["up"]
    return {"y": y} | dict(zip(("dgate", "dup"), grads, strict=True))


def _cross_entropy(plain: Plain, v: Arrays) -> Arrays:
    """Plain shifts labels, so a row is put before them."""
    logits = np.concatenate([v["logits"], v["logits"][:1]])[None]
    labels = np.concatenate([v["labels"][:1], v["labels"]])[None]
    loss, dlogits = plain.cross_entropy(logits, labels)
    return {"y": loss, "dlogits": v["dy"] * dlogits[0, :-1]}


OF_OPS: dict[str, Callable[[Plain, Arrays], Arrays]] = {
    "ops/rmsnorm/usual": _rmsnorm,
    "ops/rope/wide_head": _rope,
    "ops/lora_linear/usual": _lora_linear,
    "ops/attention/square": _attention,
    "ops/swiglu/usual": _swiglu,
    "ops/cross_entropy/usual": _cross_entropy,
}


def op_setting(case: Case, inputs: Arrays) -> Setting:
    """What Plain needs to know of an op case."""
    q, k = inputs.get("q", np.empty((1, 1, 1, 1))), inputs.get("k", np.empty((1, 1, 1, 1)))
    rank = len(inputs["A"]) if "A" in inputs else 1
    none = np.empty((1, 1))
    return Setting(
        q.shape[2], k.shape[2], q.shape[3], case.attributes.get("eps", 0.0), rank,
        rank * case.attributes.get("s", 1.0), inputs.get("cos", none), inputs.get("sin", none),
    )  # fmt: skip


def wrong_op(case: Case, vectors: Vectors) -> Iterator[tuple[Wrong, Arrays]]:
    """Output and gradients of an op for every mistake that changes them."""
    if case.name not in OF_OPS:
        return
    inputs = {
        n: a.astype(np.float64) if a.dtype.kind == "f" else a for n, a in vectors.inputs.items()
    }
    setting = op_setting(case, inputs)

    def run(plain: Plain) -> Arrays:
        return OF_OPS[case.name](plain, inputs)

    made = Made(case, vectors, setting, run)
    if refused(run(Plain(setting)), case, vectors):
        raise ArithmeticError(f"{case.name}: two writings differ")
    for mistake in (*OF_BLOCKS, SumOverTokens, IgnoresTokenZero, CountsIgnored):
        arrays = run(mistake(setting))
        if refused(arrays, case, vectors):
            yield _answer(f"neg/{case.name}/{slug(mistake)}", made, title(mistake), arrays)

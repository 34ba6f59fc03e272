"""qkv_lora: three projections of one input with their adapters, side by side: y = [q, k, v]."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from mesp_ref import ops
from mesp_ref.ops import Array
from mesp_ref.registry import cases, lora_linear
from mesp_ref.registry.cases import OpCase
from mesp_ref.registry.draw import normal
from mesp_ref.registry.row import Golden, OpSpec
from mesp_ref.registry.sizes import Args, Sizes
from mesp_ref.registry.twins import Namespace

LETTERS = "qkv"
SMALL = Sizes(n=2, t=3, past=0, c=5, g=2, share=2, d=2, r=3)


def layers(given: dict[str, Any]) -> Iterator[tuple[Any, Any, Any, Any]]:
    """W, b, A and B of q, k and v; b is None where there is none."""
    for c in LETTERS:
        yield given[f"w{c}"], given.get(f"b{c}"), given[f"A{c}"], given[f"B{c}"]


def pieces(dy: Array, given: dict[str, Any]) -> list[Array]:
    """dy of q, k and v."""
    ends = np.cumsum([len(w) for w, *_ in layers(given)])
    return np.split(dy, ends[:-1], axis=-1)


def total(parts: list[Array]) -> Array:
    """What q, k and v give to one input."""
    first, second, third = parts
    return first + second + third


def forward(
    x: Array, *, s: float, **given: Any
) -> tuple[Array, tuple[ops.LoraLinearRes, ...]]:  # fmt: skip
    """The engine's lora_linear three times."""
    done = [ops.lora_linear(x, w, b, A, B, s=s) for w, b, A, B in layers(given)]
    return np.concatenate([y for y, _ in done], axis=-1), tuple(res for _, res in done)


def backward(dy: Array, res: Any, *, s: float, **given: Any) -> tuple[Array, ...]:
    """dx = dx_q + dx_k + dx_v, then dA and dB of each."""
    found = [
        ops.lora_linear_bwd(d, r, w, b, A, B, s=s)
        for d, r, (w, b, A, B) in zip(pieces(dy, given), res, layers(given), strict=True)
    ]
    return total([dx for dx, _, _ in found]), *(g for _, dA, dB in found for g in (dA, dB))


def backward_params(dy: Array, res: Any, **given: Any) -> tuple[Array | None, ...]:
    """dW and db of each; the branch adds nothing to them."""
    return tuple(
        grad
        for d, r, (w, b, A, B) in zip(pieces(dy, given), res, layers(given), strict=True)
        for grad in ops.lora_linear_bwd_params(d, r, w, b, A, B, s=0.0)
    )


def magnitude(dy: Array, res: Any, *, s: float, **given: Any) -> tuple[Array, ...]:
    found = [
        lora_linear.magnitude(d, r, w, b, A, B, s=s)
        for d, r, (w, b, A, B) in zip(pieces(dy, given), res, layers(given), strict=True)
    ]
    return total([dx for dx, _, _ in found]), *(g for _, dA, dB in found for g in (dA, dB))


def magnitude_params(dy: Array, res: Any, **given: Any) -> tuple[Array | None, ...]:
    return tuple(
        grad
        for d, r, (w, b, A, B) in zip(pieces(dy, given), res, layers(given), strict=True)
        for grad in lora_linear.magnitude_params(d, r, w, b, A, B, s=0.0)
    )


def equation(x: Array, *, s: Any, **given: Any) -> Array:
    """lora_linear with each of the three, side by side"""
    return np.concatenate(
        [lora_linear.equation(x, w, b, A, B, s) for w, b, A, B in layers(given)], axis=-1
    )


def output_magnitude(x: Array, *, s: float, **given: Any) -> Array:
    return np.concatenate(
        [lora_linear.output_magnitude(x, w, b, A, B, s) for w, b, A, B in layers(given)], axis=-1
    )


def torch_twin(torch: Any, x: Any, *, s: float, **given: Any) -> Any:
    twin = lora_linear.torch_twin
    return torch.cat([twin(torch, x, w, A, B, s, b) for w, b, A, B in layers(given)], dim=-1)


def functional_twin(fw: Namespace, x: Any, *, s: float, **given: Any) -> Any:
    twin = lora_linear.functional_twin
    return fw.xp.concatenate([twin(fw, x, w, A, B, s, b) for w, b, A, B in layers(given)], axis=-1)


def sample(rng: np.random.Generator, z: Sizes, dtype: Any) -> Args:
    args: Args = {"x": normal(rng, dtype, z.n, z.t, z.c), "s": 0.75}
    for c, heads in zip(LETTERS, (z.h, z.g, z.g), strict=True):
        args[f"w{c}"], args[f"b{c}"] = (
            normal(rng, dtype, heads * z.d, z.c),
            normal(rng, dtype, heads * z.d),
        )
        args[f"A{c}"], args[f"B{c}"] = (
            normal(rng, dtype, z.r, z.c),
            normal(rng, dtype, heads * z.d, z.r),
        )
    return args


def without_biases(args: Args) -> Args:
    return args | {f"b{c}": None for c in LETTERS}


CASES = (
    OpCase("usual", "H = 4 on G = 2, D = 2, rank 3, biases: y is q, k and v side by side", SMALL),
    OpCase("no_biases", "without biases, as in Llama, Qwen3 and Gemma", SMALL, without_biases),
    OpCase("one_kv_head", "G = 1, rank 1", SMALL._replace(g=1, share=3, r=1)),
    OpCase("fresh", "B = 0: the output is the base's, dA exactly 0", SMALL._replace(n=1),
           cases.put(Bq=0.0, Bk=0.0, Bv=0.0)),
    OpCase("scale_2", "alpha 16 at rank 8", SMALL._replace(n=1), cases.put(s=2.0)),
    OpCase("one_token", "one row", SMALL._replace(n=1, t=1)),
)  # fmt: skip

_GRADIENTS = tuple(f"{matrix}{c}" for c in LETTERS for matrix in "AB")
_PARAMETERS = tuple(f"{kind}{c}" for c in LETTERS for kind in "wb")
ROW = OpSpec(
    name="qkv_lora",
    forward=forward,
    backward=backward,
    backward_params=backward_params,
    activations=("x",),
    lora=_GRADIENTS,
    parameters=_PARAMETERS,
    attributes=("s",),
    optional=tuple(f"b{c}" for c in LETTERS),
    sample=sample,
    reduction_length=lambda z: max((z.h + 2 * z.g) * z.d + 3 * z.r, z.n * z.t),
    equation=equation,
    magnitude=magnitude,
    magnitude_params=magnitude_params,
    golden=Golden(
        cases=CASES,
        roundings={"y": 5, "dx": 7} | dict.fromkeys((f"d{n}" for n in _GRADIENTS), 3)
        | dict.fromkeys((f"d{n}" for n in _PARAMETERS), 1),
        forward_length=lambda z: z.c + z.r + 1,
        output_magnitude=output_magnitude,
        torch=torch_twin,
        functional=functional_twin,
    ),
)  # fmt: skip

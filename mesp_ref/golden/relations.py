"""Relations between a wrong tensor and right ones: factor, transpose, swap, permutation, shift."""

from collections.abc import Iterator, Sequence

import numpy as np

from mesp_ref.golden.suite import Case
from mesp_ref.ops import Array

NEAR = 0.05  # relative distance at which two tensors count as the same, above 16-bit rounding


def distance(a: Array, b: Array) -> float:
    """‖a − b‖/‖b‖; infinite when b is 0."""
    size = float(np.linalg.norm(b))
    return float(np.linalg.norm(a - b)) / size if size else np.inf


def relation(name: str, got: Array, want: dict[str, Array], case: Case) -> str:
    """What a wrong tensor is, in words; "" when nothing known fits."""
    right = want[name]
    if not np.isfinite(got).all():
        return ""
    if got.shape == right.shape and right.any():
        factor = float((got * right).sum() / np.square(right).sum())
        if not got.any() or distance(got, factor * right) < NEAR:
            return f"is the right one × {constants(case, factor)}"
    for text, candidate in _rearranged(right, got.shape, case):
        if distance(got, candidate) < NEAR:
            return text
    for other, value in want.items():
        if other != name and value.shape == got.shape and distance(got, value) < NEAR:
            return f"holds {other}"
    return ""


def _rearranged(right: Array, shape: tuple[int, ...], case: Case) -> Iterator[tuple[str, Array]]:
    """The right tensor in other orders, of the shape that was found."""
    if right.ndim == 2 and shape == right.shape[::-1]:
        yield "is transposed", right.T
    if right.size == np.prod(shape) and shape != right.shape:
        yield f"has shape {list(shape)} instead of {list(right.shape)}", right.reshape(shape)
    if shape != right.shape:
        return
    if right.ndim > 1 and shape[0] != shape[1]:
        yield "was stored column by column", right.T.reshape(shape)
    if right.ndim > 2:
        yield "is one token late", np.roll(right, 1, axis=1)
        yield "is one token early", np.roll(right, -1, axis=1)
        yield "has its tokens reversed", right[:, ::-1]
    yield from _heads(right, case)


def _heads(right: Array, case: Case) -> Iterator[tuple[str, Array]]:
    """Other orders of the axis that holds heads and their elements."""
    config = case.attributes.get("config")
    if not config or right.ndim < 2:
        return
    d, heads = config["head_dim"], config["num_attention_heads"]
    share = heads // config["num_key_value_heads"]
    for axis in range(right.ndim):
        moved = np.moveaxis(right, axis, 0)
        if len(moved) == heads * d and share not in (1, heads):
            tiled = moved.reshape(-1, share, d, *moved.shape[1:]).swapaxes(0, 1)
            yield "has its heads in tiled order", np.moveaxis(tiled.reshape(moved.shape), 0, axis)
        if len(moved) % d == 0 and d > 2:
            pairs = moved.reshape(-1, 2, d // 2, *moved.shape[1:]).swapaxes(1, 2)
            halves = moved.reshape(-1, d // 2, 2, *moved.shape[1:]).swapaxes(1, 2)
            for order in (pairs, halves):
                text = "has the elements of a head interleaved"
                yield text, np.moveaxis(order.reshape(moved.shape), 0, axis)


def constants(case: Case, factor: float) -> str:
    """A factor, and what it is where it equals a number of the case: 0.25 (= 1/rank)."""
    if factor == 0:
        return "0: the gradient does not arrive"
    known = {"−1": -1.0, "2": 2.0, "1/2": 0.5}
    attributes, config = case.attributes, case.attributes.get("config")
    values = {name: attributes[key] for name, key in (("rank", "rank"), ("alpha", "alpha"))
              if key in attributes}  # fmt: skip
    if "s" in attributes:
        values |= {"s": attributes["s"], "s²": attributes["s"] ** 2}
    if config:
        heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
        values |= {"√D": config["head_dim"] ** 0.5, "H/G": heads / groups}
    if config and "rank" in attributes:
        values |= {"√rank": attributes["rank"] ** 0.5}
    for name, value in values.items():
        known |= {name: value, f"1/{name}": 1 / value}
    names = [name for name, value in known.items() if abs(factor / value - 1) < 0.02]
    return f"{factor:.4g}" + (f" (= {' = '.join(names)})" if names else "")


def scope(names: Sequence[str], case: Case) -> str:
    """A set of tensors in words."""
    every = [t.name for t in case.tensors if ".lora_" in t.name]
    for matrix in ("A", "B"):
        if set(names) == {name for name in every if f".lora_{matrix}." in name}:
            return f"d{matrix} of every projection"
    if len(names) == 1:
        return names[0]
    if every and set(every) <= set(names):
        return "all LoRA gradients"
    letters = {name.rsplit(".lora_", 1)[0] for name in names}
    if len(letters) == 1:
        return f"the gradients of {letters.pop()}"
    return f"{names[0]} and {len(names) - 1} more"

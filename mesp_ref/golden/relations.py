"""What a wrong tensor is beside right ones: a factor, transposed, swapped, permuted, shifted, zeros."""

from collections.abc import Iterator, Sequence

import numpy as np

from mesp_ref.golden.answer import Answer, left
from mesp_ref.golden.places import AXES, some
from mesp_ref.golden.terms import constant
from mesp_ref.ops import Array

NOT_ONE = 1e-3  # a factor must differ from 1 by more, and by ten roundings


def relation(answer: Answer, name: str) -> str:
    """What a wrong tensor is, as the end of a sentence about it; "" when nothing known fits."""
    got, right = answer.got[name], answer.want[name]
    if not got.any():
        return "× 0: the gradient does not arrive"
    if got.size > 1 and right.any():
        factor = float((got * right).sum() / np.square(right).sum())
        if (
            abs(factor - 1) > max(NOT_ONE, 10 * answer.unit)
            and left(answer, name, factor * right) < np.inf
        ):
            equal = constant(answer, factor)
            return f"× {factor:.4g}{equal}" if equal else ""
    if got.size == 1:
        return ""
    if name in answer.views:  # samples have no order
        return ""
    for text, candidate in _rearranged(right, answer):
        if left(answer, name, candidate) < np.inf:
            return text
    for other in answer.got:
        value = answer.want[other]
        if other != name and value.shape == got.shape and left(answer, name, value) < np.inf:
            return f"holds {other}"
    return _zeros(answer, name)


def _zeros(answer: Answer, name: str) -> str:
    """Exact zeros along a part of an axis, and the right values elsewhere."""
    got, right = answer.got[name], answer.want[name]
    for axis, word in enumerate(AXES.get(got.ndim, ())):
        others = tuple(i for i in range(got.ndim) if i != axis)
        gone = np.asarray(~got.any(axis=others) & right.any(axis=others))
        index = np.flatnonzero(gone)
        if not 0 < len(index) < len(gone):
            continue
        shape = [1] * got.ndim
        shape[axis] = -1
        if left(answer, name, np.where(gone.reshape(shape), 0, right)) < np.inf:
            return f"is 0 {_at(index, len(gone), word)}, right elsewhere"
    return ""


def _at(index: Array, length: int, word: str) -> str:
    if len(index) == length - index[0]:
        return f"from {word} {index[0]} on" if len(index) > 1 else f"at the last {word}, {index[0]}"
    if len(index) == index[-1] + 1:
        return f"up to {word} {index[-1]}"
    return f"at {word}s {', '.join(map(str, index[:6]))}{', …' if len(index) > 6 else ''}"


def _rearranged(right: Array, answer: Answer) -> Iterator[tuple[str, Array]]:
    """The right tensor in other orders."""
    if right.ndim == 2 and right.shape[0] == right.shape[1]:
        yield "is transposed", right.T
    if right.ndim > 1 and right.shape[0] != right.shape[1]:
        yield "was stored column by column, transposed", right.T.reshape(right.shape)
    if right.ndim > 2:
        yield "is one token late", np.roll(right, 1, axis=1)
        yield "is one token early", np.roll(right, -1, axis=1)
        yield "has its tokens reversed", right[:, ::-1]
        yield "has its sequences in reverse order", right[::-1]
    if right.ndim == 4:
        yield "has its heads in reverse order", right[:, :, ::-1]
        yield "has its halves of a head exchanged", np.roll(right, right.shape[3] // 2, axis=3)
        yield "has heads and tokens exchanged in memory", right.swapaxes(1, 2).reshape(right.shape)
    yield from _heads(right, answer)


def _heads(right: Array, answer: Answer) -> Iterator[tuple[str, Array]]:
    """Other orders of the axis that holds heads and their elements."""
    config = answer.attributes.get("config")
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


def listed(names: Sequence[str], answer: Answer) -> str:
    """A set of tensors in words: all LoRA gradients, dB of every projection."""
    every = [name for name in answer.got if ".lora_" in name]
    for matrix in ("A", "B"):
        if set(names) == {name for name in every if f".lora_{matrix}." in name}:
            return f"d{matrix} of every projection"
    if every and set(every) == set(names):
        return "all LoRA gradients"
    letters = {name.rsplit(".lora_", 1)[0] for name in names}
    if len(letters) == 1 and len(names) > 1 and ".lora_" in names[0]:
        return f"the gradients of {letters.pop()}"
    return some(names)

"""Where an error is: which tensors, which rows, from which index on, its rank, the digits that agree."""

from collections.abc import Sequence

import numpy as np

from mesp_ref.golden.answer import Answer
from mesp_ref.ops import Array

AXES = {
    1: ("channel",),
    2: ("row", "column"),
    3: ("sequence", "token", "channel"),
    4: ("sequence", "token", "head", "element"),
}


def some(names: Sequence[str], most: int = 3) -> str:
    """A list of tensors in words."""
    if len(names) > most:
        return f"{names[0]} and {len(names) - 1} more"
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def all_zero(answer: Answer) -> str:
    """Failed tensors that are exactly 0, where all are."""
    zero = [n for n in answer.failed if not answer.got[n].any()]
    if not zero or len(zero) < len(answer.failed):
        return ""
    one = len(zero) == 1
    what = "value does not arrive" if zero == ["y"] else "gradient does not arrive"
    return f"{some(zero)} {'is' if one else 'are'} 0 everywhere: zeros, the {what}"


def relative(answer: Answer, name: str) -> Array:
    """Errors by the size of the right entries, those next to nothing by the tensor's."""
    want = answer.want[name]
    size = float(np.sqrt(np.mean(want**2))) or 1.0
    error: Array = np.abs(answer.got[name] - want) / np.maximum(np.abs(want), 0.1 * size)
    return error[error > 0] if (error > 0).any() else np.zeros(1)


def is_noise(answer: Answer, name: str) -> bool:
    """Whether an error has as many signs of either kind as roundings have, and no direction."""
    want = answer.want[name]
    error = answer.got[name] - want
    moved = (error * np.sign(want))[error != 0]
    if error.size == 1 or len(moved) < 4:
        return True
    balance = abs(float(np.sign(moved).mean())) * np.sqrt(len(moved))
    size = float(np.linalg.norm(error) * np.linalg.norm(want)) or 1.0
    return balance < 4 and abs(float((error * want).sum())) / size < 4 / np.sqrt(len(moved))


def digits(answer: Answer) -> float:
    """Decimal digits that the worst failed tensor agrees to, by its norm."""
    worst = 0.0
    for name in answer.failed:
        size = float(np.linalg.norm(answer.want[name]))
        worst = max(
            worst, float(np.linalg.norm(answer.got[name] - answer.want[name])) / (size or 1.0)
        )
    return float(-np.log10(worst)) if worst else 17.0


def described(answer: Answer) -> list[str]:
    """What can be said of an error that no known mistake explains."""
    right = [n for n in answer.got if n not in answer.failed]
    said = [f"{some(answer.failed)} differ" + ("s" if len(answer.failed) == 1 else "")]
    said[0] += f", {some(right)} agree{'s' if len(right) == 1 else ''}" if right else ""
    zero = [n for n in answer.failed if not answer.got[n].any()]
    if zero:
        said.append(f"{some(zero)} {'is' if len(zero) == 1 else 'are'} 0")
    agree = digits(answer)
    said.append(
        f"the worst agrees to {agree:.1f} digits"
        if agree > 0.3
        else "the error is as large as the values"
    )
    first = next((n for n in answer.failed if answer.got[n].size > 1 and n not in zero), None)
    if first and first not in answer.views:
        said += filter(None, (where(answer, first), rank(answer, first), share(answer, first)))
    return said


def beyond(answer: Answer, name: str) -> Array:
    """Which entries are beyond their tolerance."""
    off: Array = np.abs(answer.got[name] - answer.want[name]) > answer.allowed[name]
    return off


def where(answer: Answer, name: str) -> str:
    """The part of an axis that an error is confined to."""
    off = beyond(answer, name)
    names = AXES.get(off.ndim, ())
    for axis, word in enumerate(names):
        hit = np.asarray(off.any(axis=tuple(i for i in range(off.ndim) if i != axis)))
        found = _part(hit, word)
        if found:
            return f"{name} is wrong {found}, right elsewhere"
    return ""


def _part(hit: Array, word: str) -> str:
    index = np.flatnonzero(hit)
    if not 0 < len(index) < len(hit):
        return ""
    if len(index) == 1:
        return f"at {word} {index[0]} only"
    if index[-1] == len(hit) - 1 and len(index) == len(hit) - index[0]:
        return f"from {word} {index[0]} on"
    if index[0] == 0 and len(index) == index[-1] + 1:
        return f"up to {word} {index[-1]}"
    steps = np.unique(np.diff(index))
    if len(steps) == 1:
        return f"at every {steps[0]}th {word} from {index[0]} on"
    return f"at {word}s {', '.join(map(str, index[:6]))}{', …' if len(index) > 6 else ''} only"


def rank(answer: Answer, name: str) -> str:
    """A low rank of the error, over rows and the last axis."""
    error = answer.got[name] - answer.want[name]
    if error.ndim < 2:
        return ""
    rows = error.reshape(-1, error.shape[-1])
    if min(rows.shape) < 4:
        return ""
    sizes = np.linalg.svd(rows, compute_uv=False)
    found = int((sizes > 1e-3 * sizes[0]).sum())
    return f"the error of {name} has rank {found}" if found <= min(rows.shape) // 3 else ""


def share(answer: Answer, name: str) -> str:
    """The factor and the cosine to the right tensor, where the two are near parallel or opposed."""
    got, want = answer.got[name].reshape(-1), answer.want[name].reshape(-1)
    norms = float(np.linalg.norm(got)), float(np.linalg.norm(want))
    if not all(norms):
        return ""
    cosine = float(got @ want) / norms[0] / norms[1]
    return f"{name} has {norms[0] / norms[1]:.3g} times the right norm, cosine {cosine:.3f}"

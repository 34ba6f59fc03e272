"""What a backend gave for a case, and when a guess at it is good enough to be called an explanation."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mesp_ref.golden.tolerance import UNITS
from mesp_ref.ops import Array

Arrays = dict[str, Array]
TIGHT = {True: 0.2, False: 1e-3}  # of the error that an explanation may leave: in 16 bits, in more
FAR = 3.0  # tolerances, by rms, from which on an error is more than rounding beside a mistake
BETTER = 0.35  # of the error that it may leave at most, however small the error is


class Answer(NamedTuple):
    """Everything that naming a mistake needs of one case.

    kind, attributes, inputs   the case, as the suite has it
    got, want, allowed         float64; only tensors that were given, finite and in their shape
    failed                     of these, the ones beyond their tolerance
    views                      of tensors that are known by samples: what is seen of a whole one
    unusable                   failed ones that are missing, misshapen or not finite, and why
    """

    kind: str
    attributes: dict[str, Any]
    inputs: Arrays
    got: Arrays
    want: Arrays
    allowed: Arrays
    failed: tuple[str, ...]
    unusable: dict[str, str]
    dtype: str = "float32"
    views: Mapping[str, Callable[[Array], Array]] = {}
    barely: bool = False  # no failed tensor is far beyond its tolerance

    @property
    def narrow(self) -> bool:
        return self.dtype in ("float16", "bfloat16")

    @property
    def unit(self) -> float:
        return UNITS[self.dtype].store


def weights(answer: Answer, name: str) -> Array:
    """What errors of a tensor are measured in: its tolerance, nowhere next to nothing."""
    allowed = answer.allowed[name]
    largest = float(np.abs(answer.want[name]).max(initial=0))
    if (
        answer.kind == "quant"
    ):  # a wrong decoding rounds otherwise: in the type of the scales, or not
        return allowed + UNITS[answer.attributes["scale_dtype"]].store * (largest or 1.0)
    size = float(np.sqrt(np.mean(allowed**2))) or answer.unit * largest
    return np.maximum(allowed, 1e-3 * (size or 1.0))


def rms(x: Array) -> float:
    return float(np.sqrt(np.mean(np.square(x)))) if x.size else 0.0


def left(answer: Answer, name: str, guess: Array) -> float:
    """The part of a tensor's error that a guess leaves; infinite where it is no explanation.

    A guess at a failed tensor must leave little of its error, or rounding alone; one at a tensor
    that passed must pass, too.
    """
    got, want = answer.got[name], answer.want[name]
    if name in answer.views and guess.shape != got.shape:
        guess = answer.views[name](guess)
    if guess.shape != got.shape or not np.isfinite(guess).all():
        return np.inf
    unit = weights(answer, name)
    tight = TIGHT[answer.narrow or answer.kind == "quant"]
    off, error = rms((got - guess) / unit), rms((got - want) / unit)
    size = min(1e3, max(1.0, rms(guess) / (rms(want) or 1.0)))
    if name not in answer.failed:
        return 0.0 if off <= 2 * size else np.inf
    limit = max(2 * size, tight * error)
    if answer.barely or error > FAR:
        limit = min(limit, BETTER * error)
    return off / error if off <= limit else np.inf


def judged(answer: Answer) -> Answer:
    """The answer, with whether it fails by more than a little."""
    errors = [rms((answer.got[n] - answer.want[n]) / weights(answer, n)) for n in answer.failed]
    return answer._replace(barely=max(errors, default=0.0) <= FAR)


def floor(answer: Answer) -> float:
    """What rounding alone leaves of the error: below it, two explanations are equally good."""
    errors = [rms((answer.got[n] - answer.want[n]) / weights(answer, n)) for n in answer.failed]
    return 2.0 / max(max(errors, default=1.0), 2.0)

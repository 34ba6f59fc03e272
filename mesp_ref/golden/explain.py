"""What a wrong answer looks like: the nearest stored mistake, or a relation between got and want.

Every candidate predicts what a backend with that mistake would have written. Errors are measured in
units of the tolerance, so that tensors of all sizes weigh alike; a candidate counts when it leaves
little of the error. A right answer is never explained: only cases that failed come here.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mesp_ref.golden.relations import constants, distance, relation, scope
from mesp_ref.golden.suite import DTYPES, Case, Suite, Tensor, Vectors
from mesp_ref.golden.tolerance import UNITS
from mesp_ref.ops import Array

Arrays = dict[str, Array]
NEARLY = 0.02  # relative distance of a right answer in 16 bits
MOST = 3  # sentences about single tensors
LEFT = 0.15  # of the squared error that an explanation may leave; rounding leaves some in 16 bits
SIMPLER = 4.0  # a fitted relation must leave this many times less than a stored mistake


class Candidate(NamedTuple):
    """A sentence and the fraction of the squared error that it leaves."""

    left: float
    text: str


class Answer(NamedTuple):
    """What a backend gave for a case, as float64, with the tolerance of each tensor."""

    case: Case
    got: Arrays
    want: Arrays
    allowed: Arrays

    def error(self, predicted: Arrays) -> float:
        """Σ ((got − predicted)/tolerance)² over the tensors that are predicted."""
        total = 0.0
        for name, value in predicted.items():
            ratio = np.divide(
                self.got[name] - value, self.allowed[name],
                out=np.zeros(value.shape), where=self.allowed[name] > 0,
            )  # fmt: skip
            total += float((ratio * ratio).sum())
        return total

    def left(self, predicted: Arrays) -> float:
        """How much a prediction leaves of the error, or of the answer where that is smaller.

        Otherwise any small answer to a large tensor would look like the right one × 0.01.
        """
        before = self.error({name: self.want[name] for name in predicted})
        size = self.error({name: np.zeros_like(value) for name, value in predicted.items()})
        whole = min(before, size or before)
        return self.error(predicted) / whole if whole else 1.0


def explain(
    suite: Suite, case: Case, vectors: Vectors, got: Arrays, dtype: str, failed: Sequence[Tensor]
) -> list[str]:
    """Sentences, the likeliest first; empty when nothing known fits."""
    answer = _answer(case, vectors, got, dtype)
    if 0 < (error := _worst(answer, failed)) < NEARLY:
        return [f"agrees to {-np.log10(error):.1f} digits{_rounded(error, dtype)}"]
    stored = sorted(_stored(suite, answer))
    scaled = [c for c in _scaled(answer, failed) if c.left < LEFT]
    best = stored[0] if stored and stored[0].left < LEFT else None
    if scaled and (best is None or scaled[0].left * SIMPLER < best.left):
        return [scaled[0].text]
    if best is not None:
        return ["like: " + best.text]
    return _partly(suite, answer, failed) or _single(answer, got, failed)


def _worst(answer: Answer, failed: Sequence[Tensor]) -> float:
    """The largest relative distance of a failed tensor from the right one; infinite if one lacks."""
    names = [tensor.name for tensor in failed]
    if not all(name in answer.got for name in names):
        return np.inf
    return float(np.max([distance(answer.got[name], answer.want[name]) for name in names]))


def _rounded(error: float, dtype: str) -> str:
    """The lower precision whose roundings are as large as an error, as a question."""
    lower = DTYPES[DTYPES.index(dtype) + 1 :]
    near = [name for name in lower if 1 / 8 < error / UNITS[name].store < 8]
    return f": computed or stored in a lower precision, such as {near[0]}?" if near else ""


def _answer(case: Case, vectors: Vectors, got: Arrays, dtype: str) -> Answer:
    usable, allowed = Arrays(), Arrays()
    for tensor in case.tensors:
        array = got.get(tensor.name)
        if array is not None and array.shape == tensor.shape:
            value = array.astype(np.float64)
            if np.isfinite(value).all():
                usable[tensor.name] = value
                allowed[tensor.name] = tensor.tolerance(vectors, dtype)
    return Answer(case, usable, vectors.want, allowed)


def _stored(suite: Suite, answer: Answer) -> Iterator[Candidate]:
    """The wrong answers of the suite to this case."""
    for wrong in suite.wrong:
        if wrong.of == answer.case.name:
            arrays = suite.read_wrong(wrong)
            predicted = {
                n: a.astype(np.float64) for n, a in arrays.items() if n in answer.got
            }  # fmt: skip
            yield Candidate(answer.left(predicted), wrong.bug)


def _scaled(answer: Answer, failed: Sequence[Tensor]) -> Iterator[Candidate]:
    """All failed results are the right ones times one number."""
    names = [t.name for t in failed if t.role != "inner" and t.name in answer.got]
    names = [name for name in names if answer.want[name].any()]
    if not names:
        return
    above = below = 0.0
    for name in names:
        weight = 1 / np.square(answer.allowed[name]).mean()
        above += weight * float((answer.got[name] * answer.want[name]).sum())
        below += weight * float(np.square(answer.want[name]).sum())
    if not below:  # so small that its square is 0
        return
    factor = above / below
    predicted = {name: factor * answer.want[name] for name in names}
    yield Candidate(
        answer.left(predicted),
        f"{scope(names, answer.case)} × {constants(answer.case, factor)}",
    )


def _partly(suite: Suite, answer: Answer, failed: Sequence[Tensor]) -> list[str]:
    """The stored mistake that the most failed tensors show one by one: a mistake in one place."""
    names = [t.name for t in failed if t.role == "result" and t.name in answer.got]
    best: tuple[list[str], str] = [], ""
    for wrong in suite.wrong:
        if wrong.of == answer.case.name:
            arrays = suite.read_wrong(wrong)
            here = [
                n for n in names if n in arrays and answer.left({n: _wide(arrays[n])}) < LEFT
            ]  # fmt: skip
            best = max(best, (here, wrong.bug), key=lambda pair: len(pair[0]))
    here, bug = best
    return [f"{scope(here, answer.case)}: like: {bug}"] if here else []


def _wide(array: Array) -> Array:
    return array.astype(np.float64)


def _single(answer: Answer, got: Arrays, failed: Sequence[Tensor]) -> list[str]:
    """Relations of single tensors, those that share one put together."""
    groups: dict[str, list[str]] = {}
    for tensor in failed:
        array = got.get(tensor.name)
        if array is None or array.dtype.kind not in "fV" or not array.size:
            continue
        found = relation(tensor.name, array.astype(np.float64), answer.want, answer.case)
        if found:
            groups.setdefault(found, []).append(tensor.name)
    return [f"{scope(names, answer.case)}: {text}" for text, names in groups.items()][:MOST]

"""Every expected value of the op cases, proven to be the correctly rounded one (see verify.balls)."""

from typing import Any, NamedTuple

import numpy as np

from mesp_ref.golden.rows import ROWS
from mesp_ref.golden.suite import Case, Suite
from mesp_ref.verify.balls import WIDTHS, enclose, is_rounded


class Certificate(NamedTuple):
    """How many values of a case are proven; those not decided, and those refuted, by place."""

    case: str
    proven: int
    undecided: list[str]
    refuted: list[str]


def certify(suite: Suite, case: Case) -> Certificate:
    """Enclose output and gradients of an op case, and hold every stored number against its ball.

    Raises MespRefError without python-flint
    """
    spec, vectors = ROWS[case.attributes["op"]], suite.read(case)
    args: dict[str, Any] = dict.fromkeys(spec.optional) | {
        n: a.astype(np.float64) if a.dtype.kind == "f" else a for n, a in vectors.inputs.items()
    }
    dy = args.pop("dy")
    args |= {n: case.attributes[n] for n in spec.attributes if n in case.attributes}
    names = tuple(n for n in spec.differentiable if args[n] is not None)
    for bits in WIDTHS:
        found = enclose(spec.equation, args, names, dy, bits)
        balls = {"y": found.y} | {f"d{name}": array for name, array in found.gradients.items()}
        places: dict[bool | None, list[str]] = {True: [], False: [], None: []}
        for tensor in case.tensors:
            want = vectors.want[tensor.name]
            for at in np.ndindex(*want.shape):
                verdict = is_rounded(balls[tensor.name][at], float(want[at]))
                places[verdict].append(f"{tensor.name}{list(at)}")
        if not places[None]:
            break
    return Certificate(case.name, len(places[True]), places[None], places[False])

"""All oracles by name over all subjects: what every bug and every mutant is held against."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import numpy as np

from mesp_ref.ops import Array
from mesp_ref.registry import OPS, Args, Sizes
from mesp_ref.verify import oracles
from mesp_ref.verify.precision import precision, precision_directions
from mesp_ref.verify.properties import check_properties
from mesp_ref.verify.result import Finding
from mesp_ref.verify.samples import sample_adapter, sample_batch, sample_model, small_config
from mesp_ref.verify.subject import Arrays, Subject, op_subject
from mesp_ref.verify.whole_model import model_subject

TINY = Sizes(n=1, t=3, past=1, c=4, g=2, share=2, d=2, f=5, v=6, r=2)  # for 50 digits
LONG = Sizes(n=2, t=55, past=1, c=1, g=1, share=2, d=2, f=3, v=4, r=1)  # beyond one chunk of 64
ONE = Sizes(n=1, t=2, past=1, c=3, g=1, share=1, d=2, f=2, v=4, r=2)  # one counted label
MODEL_GATE = 1e-13

Oracle = Callable[[str], list[Finding]]


def op_cases(name: str) -> list[Subject]:
    """A row of the registry, as it is registered now: ordinary, long and short, and with everything
    dropped that can be dropped and everything absent that can be absent."""
    rng, spec = np.random.default_rng(1), OPS[name]
    cases = [
        op_subject(spec, spec.sample(rng, sizes, np.float64)) for sizes in (Sizes(), LONG, ONE)
    ]
    if spec.droppable or spec.optional:
        lean = replace(spec, forward=partial(spec.forward, drop=frozenset(spec.droppable)))
        absent = dict.fromkeys(spec.optional)
        args = spec.sample(rng, Sizes(), np.float64) | absent
        cases.append(op_subject(lean if spec.droppable else spec, args))
    return cases


def _measured(subject: Subject) -> Subject:
    """The subject with the magnitudes of the right code, whatever is planted later."""
    mags = subject.magnitude((np.ones(()),), subject.args)

    def magnitude(dys: Arrays, args: Args) -> dict[str, Array]:
        return {name: np.abs(dys[0]) * mag for name, mag in mags.items()}

    return replace(subject, magnitude=magnitude)


@cache
def model_cases(tiny: bool) -> tuple[Subject, ...]:
    """Tied by mesp, untied by mesp, tied by mesp_tiled; made once, before anything is planted."""
    rng, subjects = np.random.default_rng(2), []
    sizes = {"num_hidden_layers": 1, "hidden_size": 4, "intermediate_size": 3, "head_dim": 4}
    for tied, method in ((True, "mesp"), (False, "mesp"), (True, "mesp_tiled")):
        config = small_config(tied, **sizes if tiny else {})
        model, adapter = sample_model(rng, config), sample_adapter(rng, config)
        batch = sample_batch(rng, config, (1, 5) if tiny else (2, 6))
        subjects.append(_measured(model_subject(model, adapter, *batch, method=method)))
    return tuple(subjects)


def _precision(name: str) -> list[Finding]:
    rng = np.random.default_rng(3)
    if name == "model":
        return [f for s in model_cases(True)[:1] for f in precision_directions(s, rng, joint=True)]
    if name not in OPS:
        return []
    spec = OPS[name]
    return precision(op_subject(spec, spec.sample(rng, TINY, np.float64)), rng)


def _complex_step(name: str) -> list[Finding]:
    rng = np.random.default_rng(4)
    if name == "model":
        return [
            f for s in model_cases(False)
            for f in oracles.complex_step(s, rng, relative=MODEL_GATE, entries=3)
        ]  # fmt: skip
    cases = op_cases(name) if name in OPS else []
    return [f for s in cases for f in oracles.complex_step(s, rng, entries=60)]


def _over(check: Callable[..., list[Finding]], **options: float) -> Oracle:
    """An oracle over the cases of a subject."""

    def run(name: str) -> list[Finding]:
        rng = np.random.default_rng(5)
        if name == "model":
            return [f for s in model_cases(False) for f in check(s, rng, **options)]
        return [f for s in (op_cases(name) if name in OPS else []) for f in check(s, rng)]

    return run


def _properties(name: str) -> list[Finding]:
    return [f for _, found in check_properties([name]) for f in found]


ORACLES: dict[str, Oracle] = {
    "precision": _precision,
    "complex step": _complex_step,
    "adjoint": _over(oracles.adjoint, relative=MODEL_GATE),
    "hessian": _over(oracles.hessian_symmetry),
    "richardson": _over(oracles.richardson),
    "properties": _properties,
}


def killed(oracle: str, subject: str) -> bool:
    """Does the oracle reject what is planted now? A crash is a rejection, too."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            return any(not finding.passed for finding in ORACLES[oracle](subject))
        except Exception:  # whatever a wrong implementation raises
            return True

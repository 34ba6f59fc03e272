"""All oracles by name over all subjects: what every bug and every mutant is held against."""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import numpy as np

from mesp_ref.registry import OPS, Sizes
from mesp_ref.verify import oracles, steps
from mesp_ref.verify.precision import precision, precision_directions
from mesp_ref.verify.properties import check_properties
from mesp_ref.verify.result import Finding
from mesp_ref.verify.samples import (
    FAMILY_SIZES,
    sample_adapter,
    sample_batch,
    sample_model,
    small_config,
)
from mesp_ref.verify.steps import GATE as MODEL_GATE
from mesp_ref.verify.steps import joint, measured, step
from mesp_ref.verify.subject import Subject, op_subject
from mesp_ref.verify.whole_model import model_subject

TINY = Sizes(n=1, t=3, past=1, c=4, g=2, share=2, d=2, f=5, v=6, r=2)  # for 50 digits
# 110 rows, and a vocabulary beyond one tile of 1000, which does not divide it
LONG = Sizes(n=2, t=55, past=1, c=1, g=1, share=2, d=2, f=3, v=1003, r=1)
ONE = Sizes(n=1, t=2, past=1, c=3, g=1, share=1, d=2, f=2, v=4, r=2)  # one counted label

Oracle = Callable[[str], list[Finding]]


def op_cases(name: str) -> list[Subject]:
    """A row of the registry, as it is registered now: ordinary, long in tiles of its own choice and
    short, and with everything dropped that can be dropped and absent that can be absent."""
    rng, spec = np.random.default_rng(1), OPS[name]
    ordinary, long, one = (spec.sample(rng, sizes, np.float64) for sizes in (Sizes(), LONG, ONE))
    given = inspect.signature(spec.forward).parameters
    own = [name for name in spec.attributes if name in given and given[name].default is None]
    long = {name: value for name, value in long.items() if name not in own}
    cases = [op_subject(spec, args) for args in (ordinary, long, one)]
    if spec.droppable or spec.optional:
        lean = replace(spec, forward=partial(spec.forward, drop=frozenset(spec.droppable)))
        absent = dict.fromkeys(spec.optional)
        args = spec.sample(rng, Sizes(), np.float64) | absent
        cases.append(op_subject(lean if spec.droppable else spec, args))
    return cases


@cache
def model_cases(tiny: bool) -> tuple[Subject, ...]:
    """Tied by mesp, with s = alpha/√R where it is tiny; untied by mesp; tied by mesp_tiled. Made once,
    before anything is planted."""
    rng, subjects = np.random.default_rng(2), []
    sizes = {"num_hidden_layers": 1, "hidden_size": 4, "intermediate_size": 3, "head_dim": 4}
    for tied, method in ((True, "mesp"), (False, "mesp"), (True, "mesp_tiled")):
        config = small_config(tied, **sizes if tiny else {})
        model = sample_model(rng, config)
        adapter = sample_adapter(rng, config, use_rslora=tiny and tied)
        batch = sample_batch(rng, config, (1, 5) if tiny else (2, 6))
        subjects.append(measured(model_subject(model, adapter, *batch, method=method)))
    return tuple(subjects)


@cache
def family_case(name: str) -> Subject:
    """A tiny model of a family, for 50 digits; made once, before anything is planted."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 4, "intermediate_size": 3, "head_dim": 4}
    rng, config = np.random.default_rng(6), small_config(**sizes | FAMILY_SIZES[name])
    model, adapter = sample_model(rng, config), sample_adapter(rng, config)
    return measured(
        model_subject(model, adapter, *sample_batch(rng, config, (1, 6)), method="mesp")
    )


def _precision(name: str) -> list[Finding]:
    rng = np.random.default_rng(3)
    if name in FAMILY_SIZES:
        return precision_directions(family_case(name), rng, joint=True)
    if name == "model":
        return [f for s in model_cases(True)[:2] for f in precision_directions(s, rng, joint=True)]
    if name not in OPS:
        return []
    spec = OPS[name]
    return precision(op_subject(spec, spec.sample(rng, TINY, np.float64)), rng)


def _complex_step(name: str) -> list[Finding]:
    rng = np.random.default_rng(4)
    if name in OPS:
        return [f for s in op_cases(name) for f in oracles.complex_step(s, rng, entries=60)]
    return [
        f for s in along(name)
        for f in oracles.complex_step(s, rng, relative=MODEL_GATE, entries=3)
    ]  # fmt: skip


def whole_steps(name: str) -> tuple[Subject, ...]:
    """What "model" stands for; or the step of that name, nothing for what is neither."""
    if name == "model":
        return model_cases(False)
    return (step(name).subject,) if name in steps.CASES else ()


def along(name: str) -> tuple[Subject, ...]:
    """The same, but a step in all arguments at once: there are many steps."""
    found, rng = whole_steps(name), np.random.default_rng(8)
    return found if name == "model" else tuple(joint(subject, rng) for subject in found)


def _over(
    check: Callable[..., list[Finding]],
    cases: Callable[[str], tuple[Subject, ...]] = along,
    **options: float,
) -> Oracle:
    """An oracle over the cases of a subject."""

    def run(name: str) -> list[Finding]:
        rng = np.random.default_rng(5)
        if name in OPS:
            return [f for s in op_cases(name) for f in check(s, rng)]
        return [f for s in cases(name) for f in check(s, rng, **options)]

    return run


_adjoint = _over(oracles.adjoint, relative=MODEL_GATE)


def _adjoint_of(name: str) -> list[Finding]:
    """Of a step with its value."""
    return _adjoint(name) + ([steps.value(name)] if name in steps.CASES else [])


def _properties(name: str) -> list[Finding]:
    return [f for _, found in check_properties([name]) for f in found]


ORACLES: dict[str, Oracle] = {
    "precision": _precision,
    "complex step": _complex_step,
    "adjoint": _adjoint_of,
    "hessian": _over(oracles.hessian_symmetry, whole_steps),
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

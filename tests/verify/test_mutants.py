"""The checks can fail: seeded bugs and automatic mutants are rejected."""

import pytest

from mesp_ref.registry import OPS
from mesp_ref.verify.automatic import backwards, equivalent, mutants, survives
from mesp_ref.verify.bugs import BUGS, Bug
from mesp_ref.verify.mutants import Fate, fate, loss_goes_down, summary, table
from mesp_ref.verify.planted import planted
from mesp_ref.verify.suite import ORACLES, killed, model_cases


@pytest.mark.parametrize("oracle", ORACLES)
def test_right_code_survives_every_oracle(oracle: str) -> None:
    assert not [s for s in (*OPS, "model", "mezo") if killed(oracle, s)]


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_seeded_bug_is_killed(bug: Bug) -> None:
    """One in a backward by complex step, in the op itself where it is an op's; others by some
    oracle."""
    model_cases(True), model_cases(False)  # measured on the right code
    with planted(bug.functions()):
        if bug.kind == "backward":
            assert killed("complex step", bug.subjects[0])
        else:
            order = ("properties", "precision", "complex step")
            assert any(killed(oracle, s) for oracle in order for s in bug.subjects)


def test_there_are_enough_bugs_and_each_is_another() -> None:
    assert len(BUGS) >= 60
    assert len({bug.edits for bug in BUGS.values()}) == len(BUGS)


@pytest.mark.parametrize("path", backwards())
def test_automatic_mutants_are_killed_or_excused(path: str) -> None:
    alive = [m.change for m in mutants(path) if survives(m) and equivalent(m) is None]
    assert not alive


def test_excuses_are_for_survivors_only() -> None:
    """A mutant with a reason to live does live: the reasons are not a way out."""
    excused = [m for path in backwards() for m in mutants(path) if equivalent(m)]
    assert excused
    assert all(survives(m) for m in excused)


def test_a_training_curve_hardly_notices() -> None:
    """Steps along a scaled or half-missing gradient still go downhill."""
    assert loss_goes_down()
    with planted(BUGS["block: dk not rotated back"].functions()):
        assert loss_goes_down()
    with planted(BUGS["head: one-hot missing"].functions()):
        assert not loss_goes_down()


def test_the_table_says_who_killed_whom() -> None:
    found = fate(BUGS["rmsnorm: n² for n³"])
    assert {"precision", "complex step", "adjoint", "properties"} <= set(found.killers)
    survivor = Fate(BUGS["rope: keys skipped"], (), True)
    text = table([found, survivor])
    assert "| rmsnorm: n² for n³ | backward | killed |" in text
    assert "some oracle: 1/2 (50%)" in summary([found, survivor])

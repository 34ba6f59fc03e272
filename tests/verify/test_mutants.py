"""The checks can fail: seeded bugs and automatic mutants are rejected."""

import numpy as np
import pytest

from mesp_ref.registry import OPS
from mesp_ref.verify.automatic import Mutant, equivalent, mutants, prepare, reachable, survives
from mesp_ref.verify.bugs import BUGS, Bug
from mesp_ref.verify.equivalents import EQUIVALENTS, reasons
from mesp_ref.verify.mutants import Fate, fate, loss_goes_down, summary, table
from mesp_ref.verify.planted import planted
from mesp_ref.verify.samples import FAMILY_SIZES
from mesp_ref.verify.steps import CASES
from mesp_ref.verify.suite import ORACLES, killed


@pytest.mark.parametrize("oracle", ORACLES)
def test_right_code_survives_every_oracle(oracle: str) -> None:
    subjects = (*OPS, *CASES, *FAMILY_SIZES, "model", "mezo")
    assert not [s for s in subjects if killed(oracle, s)]


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_seeded_bug_is_killed(bug: Bug) -> None:
    """One in a backward by complex step, in the op itself where it is an op's; others by some
    oracle."""
    prepare()
    with planted(bug.functions()):
        if bug.kind == "backward":
            assert killed("complex step", bug.subjects[0])
        else:
            order = ("properties", "precision", "adjoint")
            assert any(killed(oracle, s) for oracle in order for s in bug.subjects)


def test_there_are_enough_bugs_and_each_is_another() -> None:
    assert len(BUGS) >= 60
    assert len({bug.edits for bug in BUGS.values()}) == len(BUGS)


@pytest.fixture(scope="module")
def everything() -> list[tuple[Mutant, tuple[str, ...]]]:
    """Every mutant with the subjects that call its function."""
    return [(m, subjects) for path, subjects in reachable().items() for m in mutants(path)]


FORMS_GRADIENTS = {
    "ops.lm_loss": ["loss_of"],
    "ops._vocabulary_tiles": ["one_pass"],
    "lean._mlp_tiles": ["backward_tiles"],
    "lean.shards": [
        "joined",
        "total",
        "join",
        "shared_lm_loss",
        "_by_cuts",
        "_by_cuts_bwd",
        "_by_rows",
        "_by_rows_bwd",
        "_loss_by_rows",
        "Window.__getitem__",
        "part_adapter",
    ],
    "lean.halves_tiled": ["mlp_half_bwd", "attention_half_bwd"],
    "lean.mesp_tiled": ["mesp_tiled"],
    "lean.workers": ["hire"],
    "lean.activations": ["DiskCheckpoints.keep", "_write"],
    "engine.methods": [
        "head_and_loss",
        "embed_bwd",
        "checkpointed_forward",
        "store_all",
        "mebp",
        "mesp",
    ],
    "engine.mezo": ["mezo"],
    "engine.half": ["sublayer_bwd", "project_bwd", "Residuals.take", "copied"],
    "engine.attention_half": ["qkv_bwd"],
    "engine.mlp_half": ["mlp_half_bwd"],
    "engine.model": ["shift"],
}


def test_mutants_are_of_every_function_that_a_gradient_passes_through() -> None:
    found = reachable()
    assert {f"{m}:{name}" for m, names in FORMS_GRADIENTS.items() for name in names} <= found.keys()
    assert {"tiles/two_workers", "rows/mesp_tiled"} <= set(found["lean.shards:_by_rows_bwd"])
    assert not [path for path in found if path.startswith(("engine.inputs", "engine.generate"))]


SAMPLE, LIVE = 60, 6  # of some 1500 mutants, and of 70 with a reason; all: `mesp-ref mutants`


def test_a_sample_of_automatic_mutants_is_killed(
    everything: list[tuple[Mutant, tuple[str, ...]]],
) -> None:
    doomed = [(m, subjects) for m, subjects in everything if equivalent(m) is None]
    assert len(doomed) >= 1300
    drawn = np.random.default_rng(19).choice(len(doomed), SAMPLE, replace=False)
    assert not [doomed[at][0].change for at in drawn if survives(*doomed[at])]


def test_reasons_are_for_survivors_only(
    everything: list[tuple[Mutant, tuple[str, ...]]],
) -> None:
    """Every reason is one mutant's at least, and a mutant with a reason to live does live."""
    used = [list(reasons(m.path, m.change)) for m, _ in everything]
    assert max(map(len, used)) == 1
    assert {row for rows in used for row in rows} == set(EQUIVALENTS)
    excused = [item for item, rows in zip(everything, used, strict=True) if rows]
    drawn = np.random.default_rng(19).choice(len(excused), LIVE, replace=False)
    assert all(survives(*excused[at]) for at in drawn)


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

"""Each kind of mistake in known_bugs*.py is found from its sample or from draws; right ones pass."""

from typing import Any

import known_bugs
import known_bugs_losses
import known_bugs_matrices
import known_bugs_shapes
import known_bugs_trackers
import known_bugs_values
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from known_bugs import Known
from profiles import TIMES

from mesp_ref.verify import gradcheck

pytestmark = pytest.mark.filterwarnings("ignore")

MODULES = (
    known_bugs, known_bugs_values, known_bugs_shapes, known_bugs_losses, known_bugs_matrices,
    known_bugs_trackers,
)  # fmt: skip
KNOWN = [known for module in MODULES for known in module.KNOWN]
RIGHT_DRAWS = 2 * TIMES  # python benchmarks/checkers.py --only mesp_ref draws forty


def survives(forward: Any, backward: Any, known: Known, count: int) -> str:
    """What the first example that does not pass says; nothing where all do."""

    def judged(args: tuple[Any, ...]) -> None:
        result = gradcheck(forward, backward, args)
        assert result.passed, str(result)

    test = settings(
        max_examples=count, deadline=None, database=None, derandomize=True,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )(given(known.examples)(judged))  # fmt: skip
    try:
        test()
    except AssertionError as error:
        return str(error)
    return ""


def test_kinds_are_many_and_each_has_its_name() -> None:
    assert len(KNOWN) == len({known.kind for known in KNOWN}) > 100


@pytest.mark.parametrize("known", KNOWN, ids=lambda k: k.kind)
def test_the_wrong_one_is_found(known: Known) -> None:
    forward = known.wrong_forward or known.forward
    if gradcheck(forward, known.wrong, known.sample).passed:
        assert survives(forward, known.wrong, known, 100)


@pytest.mark.parametrize("known", KNOWN, ids=lambda k: k.kind)
def test_the_right_one_passes(known: Known) -> None:
    result = gradcheck(known.forward, known.right, known.sample)
    assert result.passed, str(result)
    assert not survives(known.forward, known.right, known, RIGHT_DRAWS)

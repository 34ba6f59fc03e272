"""For a kernel author's CI: coverage, waivers, what is present, JUnit, annotations, tests."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers import Answer

from mesp_ref.cli import main
from mesp_ref.errors import MespRefError
from mesp_ref.golden import Suite
from mesp_ref.golden.testing import GoldenCase, cases
from mesp_ref.golden.waivers import read_coverage

NORM = "ops/rmsnorm/usual"
WAIVER = """
backend = "kernels 1"
covers = ["ops/rmsnorm/usual"]
[[waive]]
case = "ops/rmsnorm/*"
tensor = "dx"
most = {most}
why = "a choice"
"""


@pytest.fixture
def off(answer: Answer, suite: Suite) -> Path:
    """dx at ten times its tolerance."""
    case = suite.cases[NORM]
    vectors = suite.read(case)
    tensor = next(t for t in case.tensors if t.name == "dx")
    return answer(NORM, dx=vectors.want["dx"] + 10 * tensor.tolerance(vectors, "float64"))


def test_a_waiver_accepts_what_it_names(
    off: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "golden.toml"
    file.write_text(WAIVER.format(most=20))
    assert main(["golden", "check", str(off), "--only", NORM]) == 1
    assert main(["golden", "check", str(off), "--waivers", str(file)]) == 0
    assert "waived: ops/rmsnorm/*: 1 tensors: a choice" in capsys.readouterr().out
    file.write_text(WAIVER.format(most=5))  # not that much
    assert main(["golden", "check", str(off), "--waivers", str(file)]) == 1
    assert "no longer needed: the waiver of ops/rmsnorm/*" in capsys.readouterr().out


def test_a_waiver_accepts_no_missing_tensor(answer: Answer, tmp_path: Path) -> None:
    file = tmp_path / "golden.toml"
    file.write_text(WAIVER.format(most=1e9))
    assert main(["golden", "check", str(answer(NORM, dx=None)), "--waivers", str(file)]) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("backend = ", "not TOML"),
        ("other = 1", "found 'other', expected backend, covers or waive"),
        ("covers = 1", "covers as a list of texts"),
        ("[[waive]]\ncase = 'a'", "waive 1: why: found nothing"),
        ("[[waive]]\ncase = 'a'\nwhy = 'b'\nmost = 0", "waive 1: 'most': found 0"),
        ("[[waive]]\ncase = 'a'\nwhy = 'b'\ndtype = 'int8'", "waive 1: dtype: found 'int8'"),
        ("[[waive]]\ncases = 'a'", "waive 1: 'cases'"),
    ],
)
def test_a_wrong_coverage_file_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "golden.toml"
    file.write_text(text)
    with pytest.raises(MespRefError, match=message) as error:
        read_coverage(file)
    assert "\n" not in str(error.value)


def test_only_what_is_present_is_asked(answer: Answer) -> None:
    root = str(answer(NORM))
    assert main(["golden", "check", root]) == 1
    assert main(["golden", "check", root, "--present"]) == 0


def test_junit_and_annotations(
    off: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "golden.xml"
    arguments = [
        "golden",
        "check",
        str(off),
        "--only",
        "ops/rmsnorm",
        "--junit",
        str(page),
        "--github",
    ]
    assert main(arguments) == 1
    root = ElementTree.parse(page).getroot()
    suite = root[0]
    assert (suite.get("tests"), suite.get("failures")) == ("10", "10")  # nine have no file
    case = next(c for c in suite if c.get("name") == "usual (float64)")
    assert case.get("classname") == "ops.rmsnorm"
    assert "dx: differs" in case[0].text
    out = capsys.readouterr().out
    assert f"::error title={NORM} (float64)::1 of 3 tensors" in out
    assert main(arguments) == 2  # nothing is overwritten unasked
    assert "--junit" in capsys.readouterr().err


def rmsnorm(x: Any, w: Any, dy: Any, eps: float) -> dict[str, Any]:
    r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(eps))
    u = dy * w
    dx = u * r - x * (u * x).mean(-1, keepdims=True) * r**3
    return {"y": w * x * r, "dx": dx, "dw": (dy * x * r).reshape(-1, len(w)).sum(0)}


@pytest.mark.parametrize("case", cases("ops/rmsnorm", "tile/rmsnorm"), ids=str)
def test_the_suite_as_tests_of_a_function(case: GoldenCase) -> None:
    """The five lines of the documentation."""
    case.check(rmsnorm(**case.inputs))


def test_a_wrong_function_is_told_what_is_wrong() -> None:
    (case,) = cases(NORM)
    found = rmsnorm(**case.inputs)
    with pytest.raises(AssertionError, match=r"gain 1 \+ w instead of w"):
        case.check(rmsnorm(**case.inputs | {"w": 1 + case.inputs["w"]}))
    with pytest.raises(AssertionError, match="no such tensor"):
        case.check({"dz": found["y"]})
    with pytest.raises(AssertionError, match="no result was given"):
        case.check({})
    case.check({"y": found["y"]})  # a forward alone

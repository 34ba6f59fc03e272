"""The checker: what passes, what fails, which tensor is first, exit codes and reports."""

import copy
import dataclasses
import json
import math
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers import Answer

from mesp_ref.cli import main
from mesp_ref.errors import MespRefError
from mesp_ref.golden import Suite, check
from mesp_ref.golden.builder.write import write_tensors
from mesp_ref.golden.page import as_html
from mesp_ref.golden.report import as_text, percent

NORM = "ops/rmsnorm/usual"


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_values_rounded_once_agree(dtype: object, answer: Answer) -> None:
    report = check(answer(NORM, "block/usual", dtype=dtype), only=[NORM, "block/usual"])
    assert report.passed
    assert [case.dtype for case in report.cases] == [np.dtype(dtype).name] * 2
    assert not any(case.like for case in report.cases)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"dx": None}, "missing"),
        ({"dz": np.zeros(3)}, "unexpected"),
        ({"dx": np.zeros((2, 4, 7))}, "shape"),
        ({"dx": np.full((2, 4, 6), np.nan)}, "not finite"),
        ({"dx": np.full((2, 4, 6), np.inf)}, "not finite"),
        ({"dx": np.zeros((2, 4, 6))}, "differs"),
    ],
)
def test_what_fails(changed: dict, problem: str, answer: Answer) -> None:
    report = check(answer(NORM, **changed), only=[NORM])
    wrong = [v for v in report.cases[0].verdicts if not v.passed]
    assert [v.problem for v in wrong] == [problem]


def test_integers_are_no_answer(answer: Answer) -> None:
    report = check(answer(NORM, dtype=np.int32), only=[NORM], dtype="float32")
    assert {v.problem for v in report.cases[0].verdicts} == {"dtype"}


def test_one_ulp_beyond_the_tolerance_fails(answer: Answer, suite: Suite) -> None:
    case = suite.cases[NORM]
    vectors = suite.read(case)
    tensor = next(t for t in case.tensors if t.name == "dx")
    edge = vectors.want["dx"] + tensor.tolerance(vectors, "float32")
    assert check(answer(NORM, dx=np.nextafter(edge, vectors.want["dx"])), only=[NORM],
                 dtype="float32").passed  # fmt: skip
    report = check(answer(NORM, dx=edge * (1 + 1e-9)), only=[NORM], dtype="float32")
    assert not report.passed
    assert report.cases[0].first("backward").margin == pytest.approx(1, rel=0.2)


def test_the_first_diverging_tensor_is_in_execution_order(answer: Answer, suite: Suite) -> None:
    names = ["self_attn.o_proj", "self_attn.k_rope", "mlp.gate_proj.grad", "self_attn.q_proj.grad"]
    want = suite.read(suite.cases["block/usual"]).want
    root = answer("block/usual", **{name: want[name] + 1 for name in names})
    case = check(root, only=["block/usual"]).cases[0]
    assert case.first("forward").tensor == "self_attn.k_rope"
    assert case.first("backward").tensor == "mlp.gate_proj.grad"


def test_a_part_and_its_coverage(answer: Answer) -> None:
    root = answer(NORM, "block/usual")
    report = check(root, only=["ops/rmsnorm/us*", "block/usual:*lora_A*"])
    assert report.passed
    assert [len(c.verdicts) for c in report.cases] == [3, 7]
    assert (report.asked, report.total) == (2, len(Suite().cases))
    assert not check(root, only=["ops/rmsnorm"]).passed  # the other cases are missing
    results = check(root, only=["block/usual"], roles=["result"]).cases[0].verdicts
    assert len(results) == 16  # y, dx and fourteen LoRA matrices


def test_a_precision_that_a_case_does_not_cover(answer: Answer) -> None:
    names = ["ops/swiglu/saturated", NORM]
    report = check(answer(*names, dtype=np.float16), only=names)
    assert report.uncovered == names[:1]
    with pytest.raises(MespRefError, match="no case that covers it"):
        check(answer(names[0]), only=names[:1], dtype="bfloat16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "ops/nothing"], "only: 'ops/nothing' matches nothing"),
        (["--only", "block/usual"], "found none of the 1 files asked for"),
        (["--roles", "outer"], "found 'outer', expected one of result, inner, base"),
        (["--dtype", "float8"], "invalid choice: 'float8'"),
        (["--suite", "nowhere"], "nowhere/SHA256SUMS: not readable"),
    ],
)
def test_misuse_is_one_line_and_exit_code_2(
    options: list[str], message: str, answer: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["golden", "check", str(answer(NORM)), *options]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.count("\n") == 1
    assert out == ""


def test_the_command_line(answer: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["golden", "check", str(answer(NORM)), "--only", NORM]) == 0
    assert "1 of 1 cases and 3 of 3 tensors agree; 1 of the suite's" in capsys.readouterr().out
    root = str(answer(NORM, dx=np.zeros((2, 4, 6))))
    assert main(["golden", "check", root, "--only", NORM]) == 1
    assert "first in the backward: dx: differs" in capsys.readouterr().out
    assert main(["golden", "check", root, "--only", NORM, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is False
    assert found["cases"][0]["first"] == {"forward": None, "backward": "dx"}


def test_broken_files_are_misuse(answer: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    root = answer(NORM)
    (root / f"{NORM}.safetensors").write_bytes(b"no safetensors")
    assert main(["golden", "check", str(root), "--only", NORM]) == 2
    assert "header length" in capsys.readouterr().err


def test_the_page_is_one_file_with_a_heat_map(answer: Answer, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.q_proj"
    root = answer("e2e/tied", **{name: np.zeros((2, 7, 24)), "<script>": np.zeros(1)})
    page = tmp_path / "report.html"
    assert main(["golden", "check", str(root), "--only", "e2e/tied", "--html", str(page)]) == 1
    text = page.read_text(encoding="utf-8")
    assert "http" not in text
    assert "<script>" not in text
    assert "<th>layer 0</th>" in text
    assert "First in the forward: <code>" + name in text
    assert as_html(check(answer(NORM), only=[NORM])).count("agrees") == 2
    assert f"Golden check of {root.name}:" in text  # the folder's name, and no path of this machine
    assert str(root.parent) not in text
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d, mesp_ref", text)


def test_the_page_finds_what_fails(answer: Answer) -> None:
    """A cell for each case that leads to it, and a switch that leaves the failures."""
    root = answer(NORM)
    (root / f"{NORM}.safetensors").unlink()
    answer("ops/swiglu/usual")
    text = as_html(check(root, only=[NORM, "ops/swiglu/usual"]), "<b>", "today")
    sections = re.findall(r'<section id="(case-\d)" class="(\w+)">\n<h2[^>]*>(\S+)', text)
    assert {name: state for _, state, name in sections} == {
        NORM: "failed", "ops/swiglu/usual": "passed",
    }  # fmt: skip
    for place, state, name in sections:
        [cell] = re.findall(rf'<a class="([^"]+)" href="#{place}"[^>]*>([^<]+)</a>', text)
        assert cell == ("cell wrong" if state == "failed" else "cell", name.rpartition("/")[2])
    assert "#failures:checked ~ .passed" in text
    assert "<b>" not in text
    assert "prefers-color-scheme: dark" in text


def test_the_suite_is_exported_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["golden", "export", str(out)]) == 0
    assert Suite(out).verify_all() == Suite().verify_all()
    assert main(["golden", "export", str(out)]) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["nothing"],
            "backend: found 'nothing', expected one of engine, torch, jax, mlx, autograd",
        ),
        (["engine", "--dtype", "bfloat16"], "covered by none of the cases asked for"),
        (["engine", "--only", "ops/nothing"], "matches nothing"),
    ],
)
def test_running_a_backend_wrongly(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["golden", "run", *options, "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_running_and_checking_the_engine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main(["golden", "run", "engine", "--out", out, "--only", "block"]) == 0
    assert "9 cases in float32" in capsys.readouterr().out
    assert main(["golden", "check", out, "--only", "block"]) == 0
    assert main(["golden", "check", out, "--only", "e2e"]) == 2


def test_one_narrow_tensor_does_not_loosen_the_others(answer: Answer, suite: Suite) -> None:
    """A file in float32 with dw in bfloat16: dw may be rounded so, y and dx may not."""
    want = suite.read(suite.cases[NORM]).want
    narrow = {n: want[n].astype(ml_dtypes.bfloat16) for n in ("dw", "dx")}

    def write(**changed: np.ndarray) -> Path:
        root = answer(NORM, dtype=np.float32)
        arrays = {n: a.astype(np.float32) for n, a in want.items()} | changed
        write_tensors(root / f"{NORM}.safetensors", arrays)
        return root

    report = check(write(dw=narrow["dw"]), only=[NORM])
    assert (report.passed, report.cases[0].dtype, report.cases[0].narrower) == (True, "float32", 1)
    assert "(float32, 1 narrower)" in as_text(report)
    rounded = narrow["dx"].astype(np.float32)  # says float32 and has eight bits
    report = check(write(dw=narrow["dw"], dx=rounded), only=[NORM])
    assert [v.tensor for v in report.cases[0].verdicts if not v.passed] == ["dx"]
    assert check(write(dw=narrow["dw"], dx=rounded), only=[NORM], dtype="bfloat16").passed
    strict = check(write(dw=narrow["dw"]), only=[NORM], dtype="float64").cases[0]
    assert not strict.passed


def test_a_few_wider_tensors_do_not_make_a_file_exact(answer: Answer, suite: Suite) -> None:
    """A backend in bfloat16 that sums gradients of parameters in float32, as most do."""
    want = suite.read(suite.cases[NORM]).want
    root = answer(NORM)
    arrays = {n: a.astype(ml_dtypes.bfloat16) for n, a in want.items()}
    arrays["dw"] = arrays["dw"].astype(np.float32)
    write_tensors(root / f"{NORM}.safetensors", arrays)
    report = check(root, only=[NORM])
    assert report.passed
    assert report.cases[0].dtype == "bfloat16"


def test_what_a_precision_does_not_cover_is_not_missing(answer: Answer, suite: Suite) -> None:
    """All that float16 covers, written in float16: the other cases are told, not failed."""
    covered = [
        n for n, case in suite.cases.items() if "float16" in case.dtypes and "op" in case.kind
    ]
    rest = [n for n, case in suite.cases.items() if "float16" not in case.dtypes]
    assert rest
    report = check(answer(*covered, dtype=np.float16), only=[*covered, *rest])
    assert report.passed
    assert report.uncovered == [name for name in suite.cases if name in rest]


@pytest.mark.parametrize("digits", [2, 4, 5, 7])
def test_agreement_is_measured(digits: int, answer: Answer, suite: Suite) -> None:
    """A uniform relative error of 10^-n agrees to n digits."""
    want = suite.read(suite.cases[NORM]).want
    signs = np.where(np.random.default_rng(0).random(want["dx"].shape) < 0.5, -1, 1)
    root = answer(NORM, dx=want["dx"] * (1 + signs * 10.0**-digits))
    [text] = check(root, only=[NORM], dtype="float64").cases[0].like
    assert f"agrees to {digits}.0 digits" in text
    assert text.startswith("not a mistake we know") == (digits == 5)
    assert text.endswith("?") == (digits != 5)  # five digits are no precision's: nothing is asked


@pytest.mark.parametrize("value", [1e300, -1e308, 5e-324])
def test_extreme_numbers_are_judged_without_warnings(value: float, answer: Answer) -> None:
    """pytest turns warnings into errors; numbers in the report stay readable."""
    case = "block/usual"
    root = answer(case, **{"self_attn.q_proj.lora_A.weight.grad": np.full((4, 20), value)})
    report = check(root, only=[case])
    assert not report.passed
    assert max(map(len, as_text(report).split())) < 80


def test_shares_of_the_tolerance_are_readable() -> None:
    shares = {
        0.0: "0%",
        3e-9: "<0.01%",
        0.5: "50%",
        120.4: "120×",
        1e5: "100,000×",
        3e12: "3.0e+12×",
    }
    assert {margin: percent(margin) for margin in shares} == shares
    assert percent(math.inf) == "—"


def test_a_suite_that_names_an_impossible_file_is_refused(answer: Answer, suite: Suite) -> None:
    """Found by fuzzing: no file system takes a name of 5,000 characters."""
    other = copy.copy(suite)
    other.cases = {NORM: dataclasses.replace(suite.cases[NORM], file="a" * 5000)}
    with pytest.raises(MespRefError, match="cannot be read"):
        check(answer(NORM), other)

"""mesp-ref learn: a student's file, progress, grades."""

import csv
import io
import json
from pathlib import Path

import pytest

from mesp_ref.cli import main
from mesp_ref.learn.exercises import EXERCISES
from mesp_ref.learn.grade import grade

FORGOTTEN = """\
import numpy as np


def rmsnorm_bwd(dy, res, w, *, eps):
    n = np.sqrt((res.x ** 2).mean(-1, keepdims=True) + eps)
    return dy * w / n


def linear_bwd(dy, res, w, b=None):
    return dy @ w
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(FORGOTTEN, encoding="utf-8")
    return "mine.py"


def test_a_file_is_judged_and_progress_kept(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["learn", "rmsnorm_bwd", file]) == 1
    out = capsys.readouterr().out
    assert "the cross term is missing: every dx is too large along x" in out
    assert "Hint 1" not in out
    assert main(["learn", "rmsnorm_bwd", file, "--hint"]) == 1
    assert "Hint 1" in capsys.readouterr().out
    assert main(["learn", "linear_bwd", file]) == 0
    kept = json.loads(Path("learn-progress.json").read_text(encoding="utf-8"))["exercises"]
    assert kept == {
        "rmsnorm_bwd": {"tries": 2, "passed_at": 0}, "linear_bwd": {"tries": 1, "passed_at": 1},
    }  # fmt: skip
    capsys.readouterr()
    assert main(["learn"]) == 0
    assert f"1 of {len(EXERCISES)} exercises are right" in capsys.readouterr().out
    assert not list(Path().glob("__pycache__"))


def test_an_exercise_is_stated(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["learn", "swiglu", "--hint", "2"]) == 0
    out = capsys.readouterr().out
    assert "def swiglu_bwd(dz, res)" in out
    assert "Then: mesp-ref learn swiglu_bwd my_file.py" in out
    assert out.count("Hint ") == 2


def test_nothing_of_the_users_is_written_over(
    file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("learn-progress.json").write_text('{"mine": 1}', encoding="utf-8")
    assert main(["learn", "linear_bwd", file]) == 2
    assert "--progress" in capsys.readouterr().err
    assert Path("learn-progress.json").read_text(encoding="utf-8") == '{"mine": 1}'
    assert main(["learn", "linear_bwd", file, "--progress", "other.json"]) == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def linear_bwd(:\n", "line 1: invalid syntax"),
        ("x = 1\ny = x / 0\n", "line 2: ZeroDivisionError"),
        ("x = 1\n", "found no function linear_bwd"),
        ("import sys\nsys.exit(4)\n", "SystemExit"),
    ],
)
def test_files_that_cannot_be_judged(
    text: str, says: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(file).write_text(text, encoding="utf-8")
    assert main(["learn", "linear_bwd", file]) == 2
    assert says in capsys.readouterr().err
    assert main(["learn", "linear_bwd", "nothing.py"]) == 2


def test_misuse(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["rmsnorm_bwd", "--grade", "."], ["--csv"], ["foo"], ["--grade", "nowhere"]):
        assert main(["learn", *words]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_class_is_graded(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One that is right in part, one without end, one that does not parse, one in a folder."""
    folder = Path("class")
    (folder / "dee").mkdir(parents=True)
    (folder / "ada.py").write_text(FORGOTTEN, encoding="utf-8")
    (folder / "bob.py").write_text(FORGOTTEN + "while True: pass\n", encoding="utf-8")
    (folder / "=cyd.py").write_text("def linear_bwd(:\n", encoding="utf-8")
    (folder / "dee" / "a.py").write_text(FORGOTTEN + "print('noise')\n", encoding="utf-8")
    before = sorted(folder.rglob("*"))
    assert main(["learn", "--grade", "class", "--csv", "--time-limit", "5"]) == 0
    table = {row["student"]: row for row in csv.DictReader(io.StringIO(capsys.readouterr().out))}
    assert set(table) == {"ada", "bob", "'=cyd", "dee"}
    for student in ("ada", "dee"):
        row = table[student]
        assert (row["right"], row["linear_bwd"], row["rmsnorm_bwd"]) == ("1", "right", "wrong")
        assert row["rope_bwd"] == "missing"
    assert table["bob"]["linear_bwd"] == "late"
    assert table["bob"]["note"] == "stopped after 5 s"
    assert "line 1" in table["'=cyd"]["note"]
    assert sorted(folder.rglob("*")) == before
    Path("grades.csv").write_text("mine", encoding="utf-8")
    assert main(["learn", "--grade", "class", "--csv", "grades.csv"]) == 2
    assert Path("grades.csv").read_text(encoding="utf-8") == "mine"


def test_a_process_that_ends_is_told(tmp_path: Path) -> None:
    text = "import os\ndef linear_bwd(dy, res, w, b=None):\n    os._exit(3)\n"
    (tmp_path / "eve.py").write_text(text, encoding="utf-8")
    (found,) = grade(tmp_path, 20)
    assert found.note == "the process ended with code 3"
    assert found.right == 0
    assert len(found.verdicts) == len(EXERCISES)

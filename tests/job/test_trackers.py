"""--report-to: what a tracker is told, and what it can do to a run, with packages that are stand-ins;
tests/parity/test_trackers.py reads back what the real ones stored."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mesp_ref.cli import main

Rows = list[tuple[str, float, int]]
SHORT = ["--steps", "4", "--seq-len", "16", "--eval-every", "2", "--quiet", "--no-sample"]


class Writer:
    """tensorboard.summary.Writer, as far as it is used."""

    rows: dict[str, Rows] = {}  # noqa: RUF012

    def __init__(self, logdir: str):
        self.mine = self.rows.setdefault(logdir, [])

    def add_scalar(self, tag: str, data: float, step: int) -> None:
        self.mine.append((tag, data, step))

    def flush(self) -> None:
        pass

    close = flush


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Rows]:
    monkeypatch.chdir(tmp_path)
    Writer.rows = {}
    monkeypatch.setitem(sys.modules, "tensorboard", SimpleNamespace())  # type: ignore[misc]
    monkeypatch.setitem(sys.modules, "tensorboard.summary", SimpleNamespace(Writer=Writer))  # type: ignore[misc]
    return Writer.rows


@pytest.fixture
def start(tiny_model_dir: Path, text_file: Path) -> list[str]:
    return ["finetune", "--model", str(tiny_model_dir), "--data", str(text_file), *SHORT]


def test_the_numbers_of_a_run(
    rows: dict[str, Rows], start: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    log = ["--report-to", "tensorboard"]
    assert main([*start, *log]) == 0
    assert "logged   tensorboard --logdir runs/tensorboard" in capsys.readouterr().out
    [(place, found)] = rows.items()
    assert place == "runs/tensorboard/001"
    assert [step for tag, _, step in found if tag == "train/loss"] == [1, 2, 3, 4]
    assert [step for tag, _, step in found if tag == "eval/loss"] == [0, 2, 4]
    tags = {tag for tag, _, _ in found}
    assert {"train/lr", "train/grad_norm", "eval/perplexity", "eval/accuracy"} <= tags
    before = len(found)
    assert main(["finetune", "--resume", "runs/001", "--steps", "6", "--quiet", *log]) == 0
    assert [step for tag, _, step in found[before:] if tag == "train/loss"] == [5, 6]
    Path("runs/tensorboard/001").mkdir(parents=True, exist_ok=True)
    assert main([*start, *log, "--out", "runs/001", "--overwrite"]) == 0
    assert sorted(rows) == ["runs/tensorboard/001", "runs/tensorboard/001-2"]


def test_a_tracker_that_fails_ends_nothing(
    rows: dict[str, Rows], start: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def full(self: Writer, *what: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(Writer, "add_scalar", full)
    assert main([*start, "--report-to", "tensorboard"]) == 0
    assert "warning  progress is not complete: OSError: the disk is full" in capsys.readouterr().out
    assert Path("runs/001/summary.json").is_file()


@pytest.mark.parametrize("name", ["tensorboard", "trackio"])
def test_without_the_package(
    name: str, start: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, name, None)  # type: ignore[misc]
    monkeypatch.delitem(sys.modules, "tensorboard.summary", raising=False)
    assert main([*start, "--report-to", name]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"pip install 'mesp-ref[{name}]'" in line
    assert not Path("runs").exists()

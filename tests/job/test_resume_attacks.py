"""A run directory that somebody damaged: one line, nothing written, or the same bytes as before."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mesp_ref.cli import main
from mesp_ref.files.safetensors import MappedFile
from mesp_ref.job.state import save_state

NOT_A_COUNT = (None, -1, 1.5, "3", True, [], 10**18)
FACTS = ("step", "tokens", "cursor", "started", "identity", "environment", "best")
IDENTITY = ("method", "checkpoints", "steps", "seed", "rank", "lr", "data", "model")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A run of 6 steps, with evaluations at 2 and 4."""
    from helpers import words

    folder = tmp_path_factory.mktemp("attacked")
    (folder / "notes.txt").write_text(words(400), encoding="utf-8")
    line = ["finetune", "--model", str(tiny_model_dir), "--data", str(folder / "notes.txt"),
            "--out", str(folder / "run"), "--steps", "6", "--seq-len", "16", "--accumulate", "1",
            "--eval-rows", "2", "--eval-every", "2", "--rank", "1", "--targets", "q_proj",
            "--sample-tokens", "2", "--quiet"]  # fmt: skip
    assert main(line) == 0
    return folder / "run"


def state_with(change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Callable[[Path], None]:
    """Rewrite the saved state with its arrays and facts changed."""

    def act(run: Path) -> None:
        file = MappedFile(run / "state.safetensors")
        arrays = {name: np.array(file.raw(name)) for name in file}
        facts = json.loads(file.metadata["facts"])
        change(arrays, facts)
        save_state(run / "state.safetensors", arrays, facts)

    return act


def fact(value: Any, *path: str) -> Callable[[Path], None]:
    """One field of the state's facts; Ellipsis takes it out."""

    def change(arrays: Mapping[str, Any], facts: dict[str, Any]) -> None:
        *folders, last = path
        for name in folders:
            facts = facts[name]
        if value is ...:
            del facts[last]
        else:
            facts[last] = value

    return state_with(change)


def array(prefix: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """The first array with this prefix, changed or (None) taken out."""

    def act(arrays: dict[str, Any], facts: Any) -> None:
        name = next(n for n in arrays if n.startswith(prefix))
        value = change(arrays.pop(name))
        if value is not None:
            arrays[name] = value

    return state_with(act)


def nan(a: Any) -> Any:
    a = a.astype(float) if a.dtype.kind == "i" else a.copy()
    a.flat[0] = np.nan
    return a


def metric(value: Any, kind: str, name: str) -> Callable[[Path], None]:
    """A field of the first event of a kind."""

    def act(run: Path) -> None:
        file = run / "metrics.jsonl"
        events = [json.loads(line) for line in file.read_text().splitlines()]
        event = next(e for e in events if e["event"] == kind)
        if value is ...:
            del event[name]
        else:
            event[name] = value
        file.write_text("".join(json.dumps(e) + "\n" for e in events))

    return act


def option(value: Any, *path: str) -> Callable[[Path], None]:
    """A field of run.json's options."""

    def act(run: Path) -> None:
        file = run / "run.json"
        facts = json.loads(file.read_text())
        inner = facts
        for name in path[:-1]:
            inner = inner[name]
        if value is ...:
            del inner[path[-1]]
        else:
            inner[path[-1]] = value
        file.write_text(json.dumps(facts))

    return act


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda run: (run / name).write_text(content) and None


def gone(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).unlink()


def fifo(name: str) -> Callable[[Path], None]:
    def act(run: Path) -> None:
        (run / name).unlink()
        os.mkfifo(run / name)

    return act


def link(name: str, target: str) -> Callable[[Path], None]:
    def act(run: Path) -> None:
        shutil.move(run / name, run.parent / f"moved-{name}")
        (run / name).symlink_to(target or run.parent / f"moved-{name}")

    return act


ATTACKS: dict[str, Callable[[Path], None]] = {
    **{f"{n} missing": fact(..., n) for n in FACTS if n != "best"},
    **{f"{n} a text": fact("x", n) for n in FACTS},
    **{f"step {v!r}": fact(v, "step") for v in NOT_A_COUNT},
    **{f"tokens {v!r}": fact(v, "tokens") for v in NOT_A_COUNT},
    **{f"cursor {v!r}": fact([0, v, 0], "cursor") for v in NOT_A_COUNT},
    "cursor epoch": fact([10**9, 0, 0], "cursor"),
    "cursor row": fact([0, 0, 10**9], "cursor"),
    "cursor short": fact([0, 0], "cursor"),
    "started": fact("yesterday", "started"),
    **{f"identity {n} missing": fact(..., "identity", n) for n in IDENTITY},
    **{f"identity {n} a text": fact("x", "identity", n) for n in IDENTITY},
    **{f"identity {n} a list": fact([[]], "identity", n) for n in IDENTITY},
    **{f"best {n}": fact([], "best", n) for n in ("step", "loss", "waited", "latest")},
    "best loss NaN": fact(float("nan"), "best", "loss"),
    **{f"environment {n}": fact("x", "environment", n) for n in ("numpy", "blas", "threads")},
    **{f"no {p}": array(p, lambda a: None)
       for p in ("param/", "optimizer/mean", "optimizer/square", "optimizer/count")},
    **{f"NaN in {p}": array(p, nan)
       for p in ("param/", "optimizer/mean", "optimizer/square", "optimizer/count")},
    "a negative square": array("optimizer/square", lambda a: -1 - a),
    "a count of two": array("optimizer/count", lambda a: np.array([3, 3])),
    "a count of 0": array("optimizer/count", lambda a: a * 0),
    "a mean of another shape": array("optimizer/mean", lambda a: a[:, :1].copy()),
    "a mean in float64": array("optimizer/mean", lambda a: a.astype(np.float64)),
    "no arrays": state_with(lambda arrays, facts: arrays.clear()),
    "a stranger's array": state_with(lambda a, f: a.update({"optimizer/mean/x": np.zeros(3)})),
    "state gone": gone("state.safetensors"), "state empty": text("state.safetensors", ""),
    "state a text": text("state.safetensors", "hello world, this is text"),
    "state a pipe": fifo("state.safetensors"), "state linked": link("state.safetensors", ""),
    "metrics empty events": text("metrics.jsonl", "{}\n"),
    "metrics no JSON": text("metrics.jsonl", "hello\n"),
    "metrics a list": text("metrics.jsonl", "[1]\n"),
    "metrics a pipe": fifo("metrics.jsonl"), "metrics linked": link("metrics.jsonl", ""),
    "metrics loop": link("metrics.jsonl", "metrics.jsonl"),
    **{f"metrics step {n} {v!r}": metric(v, "step", n)
       for n in ("step", "loss", "seconds", "memory_mb") for v in (..., None, "x", float("nan"))},
    **{f"metrics eval {n}": metric("x", "eval", n) for n in ("step", "loss", "accuracy", "perplexity")},
    **{f"metrics sample {n}": metric([], "sample", n) for n in ("prompt", "text", "step")},
    "metrics kind": metric(["step"], "step", "event"),
    "run gone": gone("run.json"), "run empty": text("run.json", ""),
    "run a list": text("run.json", "[]"), "run {}": text("run.json", "{}"),
    "run a pipe": fifo("run.json"), "run linked": link("run.json", ""),
    **{f"option {n} {v!r}": option(v, "options", n)
       for n in ("model", "rank", "eval_every", "train", "dtype", "patience") for v in (..., [], -1.5)},
    **{f"train {n} {v!r}": option(v, "options", "train", n)
       for n in ("lr", "steps", "seed", "method", "workers") for v in (..., [], "x", -1)},
    "an unknown option": option(1, "options", "future"),
    "another method": option("mebp", "options", "train", "method"),
}  # fmt: skip
# What resuming rightly mends or says, and then goes on.
MENDED = {"metrics gone": gone("metrics.jsonl"), "metrics empty": text("metrics.jsonl", "")}


@pytest.mark.parametrize("name", ATTACKS)
def test_damage_is_one_line_and_nothing_is_written(
    name: str, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    ATTACKS[name](run)
    before = snapshot(run)
    assert main(["finetune", "--resume", str(run), "--quiet"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("mesp-ref: error: ")
    assert shown.err.count("\n") == 1
    assert str(run) in shown.err or "saved state" in shown.err or "state: " in shown.err, shown.err
    assert snapshot(run) == before


def snapshot(run: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in run.rglob("*") if f.is_file()}


@pytest.mark.parametrize("name", MENDED)
def test_a_table_that_is_lost_is_said(
    name: str, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    MENDED[name](run)
    assert main(["finetune", "--resume", str(run), "--steps", "7", "--quiet"]) == 0
    assert "holds 0 of 6 steps" in capsys.readouterr().out


def test_there_is_no_run_to_go_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for line in ("--resume", "--resume nothing", "--resume empty", "--out empty --resume"):
        assert main(["finetune", *line.split()]) == 2
        assert "--resume: found no run" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["empty"]


def test_a_run_goes_on_from_its_directory_alone(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished run is prolonged; clock, tokens and peak are those of the whole run."""
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    first = json.loads((run / "summary.json").read_text())
    assert main(["finetune", "--resume", str(run), "--quiet", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    for name in ("steps", "tokens", "computed_tokens", "seconds", "before", "after"):
        assert again[name] == first[name], name
    assert main(["finetune", "--resume", str(run), "--steps", "9", "--quiet", "--json"]) == 0
    longer = json.loads(capsys.readouterr().out)
    assert longer["steps"] == 9
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [e for e in lines if e["event"] == "step"]
    assert [e["step"] for e in steps] == [*range(1, 10)]
    assert longer["seconds"] == pytest.approx(sum(e["seconds"] for e in steps))
    assert longer["computed_tokens"] == sum(e["computed_tokens"] for e in steps) == 9 * 16
    assert [e["step"] for e in lines if e["event"] == "eval"] == [0, 2, 4, 6, 8, 9]
    assert main(["finetune", "--resume", str(run), "--quiet"]) == 0  # run.json knows of 9


def test_an_evaluation_that_was_cut_short_is_made_up_for(stopped: Path, tmp_path: Path) -> None:
    """The state of step 4 without the evaluation of step 4, as Ctrl-C in the middle of it leaves."""
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    kept = [line for line in (run / "metrics.jsonl").read_text().splitlines(keepends=True)
            if json.loads(line)["step"] <= 6 and '"eval", "step": 6' not in line]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(kept))
    assert main(["finetune", "--resume", str(run), "--steps", "8", "--quiet"]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in lines if e["event"] == "eval"] == [0, 2, 4, 6, 8]

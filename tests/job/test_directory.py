"""A run that replaces another: the old one stays whole until the new one is."""

import dataclasses
import errno
import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mesp_ref as mr
from mesp_ref.cli import main
from mesp_ref.errors import MespRefError
from mesp_ref.job.directory import RunDirectory
from mesp_ref.job.finetune import FinetuneOptions, Interrupted, finetune
from mesp_ref.job.metrics import Metrics
from mesp_ref.job.state import load_state
from mesp_ref.train.trainer import TrainConfig


@pytest.fixture
def options(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> FinetuneOptions:
    train = TrainConfig(steps=4, seq_len=16, accumulate=1)
    return FinetuneOptions(
        model=str(tiny_model_dir), data=str(text_file), out=str(tmp_path / "run"), train=train,
        save_every=2, sample_tokens=0, rank=2,
    )  # fmt: skip


def everything(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def at(kind: str, step: int, act: Callable[[], object]) -> Callable[[dict[str, Any]], None]:
    """A report function that acts when an event comes."""

    def report(event: dict[str, Any]) -> None:
        if (event["event"], event.get("step")) == (kind, step):
            act()

    return report


@pytest.fixture
def other(options: FinetuneOptions) -> FinetuneOptions:
    """The same with another rank, after a complete run."""
    finetune(options)
    return dataclasses.replace(options, rank=3, overwrite=True)


def interrupt() -> None:
    raise KeyboardInterrupt


def test_the_old_run_stays_until_the_new_one_is_complete(
    other: FinetuneOptions, tmp_path: Path
) -> None:
    run, new = tmp_path / "run", tmp_path / "run.new"
    before = everything(run)
    with pytest.raises(Interrupted, match=r"in .*run\.new: .*--resume in place of --overwrite"):
        finetune(other, at("step", 3, interrupt))
    assert everything(run) == before
    assert mr.load_adapter(new / "adapter").rank == 3
    with pytest.raises(mr.MespRefError, match=r"run\.new holds a run that was to replace it"):
        finetune(dataclasses.replace(other, overwrite=False))
    summary = finetune(dataclasses.replace(other, overwrite=False, resume=True))
    assert summary["out"] == str(run)
    assert mr.load_adapter(run / "adapter").rank == 3
    assert json.loads((run / "summary.json").read_text())["adapter"] == str(run / "adapter")
    assert not new.exists()
    assert not (run / ".lock").exists()
    assert load_state(run / "state.safetensors")[1]["step"] == 4
    finetune(dataclasses.replace(other, rank=2))
    assert mr.load_adapter(run / "adapter").rank == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "text.txt"]


def test_the_directory_alone_goes_on_with_the_run_that_waits(
    other: FinetuneOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--resume DIR takes the options of DIR.new, and what it tells names the final place."""
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        finetune(other, at("step", 3, interrupt))
    assert main(["finetune", "--resume", str(run), "--quiet"]) == 0
    assert mr.load_adapter(run / "adapter").rank == 3
    assert not (tmp_path / "run.new").exists()
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("try it:  mesp-ref generate ")
    options = shlex.split(last.removeprefix("try it:  mesp-ref "))
    assert options[options.index("--adapter") + 1] == str(run)
    assert main([*options, "--max-new-tokens", "2"]) == 0  # which finds the base by itself


def test_a_full_disk_leaves_the_old_run(
    other: FinetuneOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything(tmp_path / "run")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for kind, step in (("ready", 0), ("step", 1), ("step", 3)):
        with monkeypatch.context() as patch:
            fill = at(kind, step, lambda patch=patch: patch.setattr(os, "fsync", full))  # type: ignore[misc]
            with pytest.raises(mr.MespRefError, match="No space left on device"):
                finetune(other, fill)
        assert everything(tmp_path / "run") == before
    finetune(other)  # the run that waits gives way to this one
    assert mr.load_adapter(tmp_path / "run" / "adapter").rank == 3
    assert not (tmp_path / "run.new").exists()


def test_what_is_not_of_a_run_is_named_and_stays(other: FinetuneOptions, tmp_path: Path) -> None:
    note = tmp_path / "run.new"
    note.write_text("mine")
    with pytest.raises(mr.MespRefError, match=r"run\.new: exists, expected nothing"):
        finetune(other)
    note.unlink()
    finetune(dataclasses.replace(other, out=str(note), overwrite=False))  # a run of its own
    with pytest.raises(mr.MespRefError, match=r"run\.new: exists, expected nothing"):
        finetune(other)
    note.rename(tmp_path / "mine")
    for change in ("adapter/note.txt", "metrics.csv", "metrics.jsonl"):
        file = tmp_path / "run" / change
        was = file.read_text() if file.exists() else None
        file.write_text((was or "") + "mine\n")
        with pytest.raises(mr.MespRefError, match=f"found {change}.* which mesp-ref did not write"):
            RunDirectory(tmp_path / "run", overwrite=True)
        file.unlink() if was is None else file.write_text(was)


@pytest.mark.parametrize("name", ["model", "data", "val_data", "adapter"])
def test_a_run_never_replaces_what_it_reads(
    other: FinetuneOptions, tmp_path: Path, name: str
) -> None:
    inner = tmp_path / "run" / ("adapter" if name in ("model", "adapter") else "metrics.jsonl")
    change: dict[str, Any] = {name: str(inner)}
    with pytest.raises(mr.MespRefError, match="which is read; name another directory"):
        finetune(dataclasses.replace(other, **change))


def test_a_run_without_its_state_is_not_started_afresh(
    options: FinetuneOptions, tmp_path: Path
) -> None:
    run, resumed = tmp_path / "run", dataclasses.replace(options, resume=True)
    finetune(options)
    (run / "state.safetensors").unlink()
    before = everything(run)
    with pytest.raises(mr.MespRefError, match=r"--resume: found run\.json and no state"):
        finetune(resumed)
    assert everything(run) == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "run.json").write_text("{}")
    with pytest.raises(mr.MespRefError, match=r"--resume: found run\.json and no state"):
        finetune(dataclasses.replace(resumed, out=str(foreign)))
    assert everything(foreign) == {"run.json": b"{}"}


def test_a_run_killed_before_its_first_save_starts_again(
    options: FinetuneOptions, tmp_path: Path
) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.create({})
    directory.release()
    finetune(dataclasses.replace(options, resume=True))
    assert load_state(tmp_path / "run" / "state.safetensors")[1]["step"] == 4
    directory = RunDirectory(tmp_path / "run", overwrite=True)
    directory.create({})
    directory.release()
    finetune(dataclasses.replace(options, rank=3, resume=True))
    assert mr.load_adapter(tmp_path / "run" / "adapter").rank == 3
    assert not (tmp_path / "run.new").exists()


def test_steps_that_were_written_in_mib_are_read_in_mb(tmp_path: Path) -> None:
    """Earlier versions said memory_mib; a run that goes on from them holds one unit."""
    step = dict.fromkeys(
        ("loss", "lr", "grad_norm", "tokens", "computed_tokens", "seconds", "tokens_per_second"), 1
    )
    old = {"event": "step", "step": 1, **step, "memory_mib": 100.0}
    new = {"event": "step", "step": 2, **step, "memory_mb": 90.0}
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps(old) + "\n" + json.dumps(new) + "\n", encoding="utf-8")
    metrics = Metrics(file)
    totals = metrics.cut(2)
    assert totals.peak_mb == pytest.approx(104.8576)
    assert [event["memory_mb"] for event in metrics] == pytest.approx([104.8576, 90.0])
    assert "mib" not in file.read_text(encoding="utf-8")
    file.write_text(json.dumps(old | {"memory_mib": "x"}) + "\n", encoding="utf-8")
    with pytest.raises(MespRefError, match="line 1: memory_mb: found None"):
        list(metrics)

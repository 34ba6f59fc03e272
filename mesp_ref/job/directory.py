"""The directory of a run: what lies in it, when it may be written, how a run goes on from it.

adapter/            the PEFT adapter as of the last save; with --patience the best so far
run.json            the configuration used
metrics.jsonl       one event per line: step, eval, sample
state.safetensors   all that --resume needs
and once the run is complete
metrics.csv         the metrics as a table, a row per step
loss.png            the loss curve
summary.json        losses and samples before and after
"""

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mesp_ref.errors import MespRefError
from mesp_ref.files.output import write_aside
from mesp_ref.files.strict import inside
from mesp_ref.job.lock import DirectoryLock
from mesp_ref.job.metrics import Metrics, Totals
from mesp_ref.job.state import check_facts, load_state

OWN = (
    "run.json", "metrics.jsonl", "metrics.csv", "loss.png", "state.safetensors", "summary.json",
)  # fmt: skip
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
RUNS = Path("runs")


def write_json(path: Path, value: Any) -> None:
    """A JSON file, whole or not at all."""
    with write_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def finite(value: float) -> float | None:
    """The number itself, or None, for JSON has neither NaN nor infinity."""
    return value if math.isfinite(value) else None


def numbered_runs() -> list[int]:
    """Numbers NNN of runs/NNN, ascending."""
    if not RUNS.is_dir():
        return []
    return sorted(int(p.name) for p in RUNS.iterdir() if p.is_dir() and p.name.isdecimal())


class RunDirectory:
    """One run's files. Nothing is created before `create`.

    `path` None stands for runs/NNN: the next number, or with `resume` the last one.

    From here on no other run can have the directory, until `release`.

    Raises MespRefError for a path that is a file, that is not empty (unless `overwrite` or
    `resume`), that another run is using, or that cannot be written.
    """

    def __init__(self, path: str | Path | None, *, overwrite: bool = False, resume: bool = False):
        self.numbered = path is None and not resume
        self.path = self.place(path, resume)
        if overwrite and resume:
            raise MespRefError("--overwrite: found beside --resume, expected one of the two")
        self.overwrite, self.created, self._new = overwrite, False, False
        self.metrics = Metrics(self.file("metrics.jsonl"))
        self._lock: DirectoryLock | None = None
        self._check(resume)
        if self.path.is_dir():
            self._lock = DirectoryLock(self.path)

    @staticmethod
    def place(path: str | Path | None, resume: bool) -> Path:
        """The directory that `path` stands for; MespRefError where there is no run to go on with."""
        if path is not None:
            return Path(path)
        runs = numbered_runs()
        if resume and not runs:
            raise MespRefError(
                f"--resume: found no run in {RUNS}, expected one; name its directory, or leave "
                "--resume out to start one"
            )
        return RUNS / f"{runs[-1] if resume else [0, *runs][-1] + 1:03d}"

    def release(self) -> None:
        """Let other runs have the directory."""
        if self._lock is not None:
            self._lock.release()

    def file(self, name: str) -> Path:
        return self.path / name

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    def _check(self, resume: bool) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise MespRefError(f"{self.path}: --out: found a file, expected a directory")
        # A killed process may have left a hidden file that was being written aside.
        occupied = self.path.is_dir() and any(
            not file.name.startswith(".") for file in self.path.iterdir()
        )
        if occupied and resume and not self.file("run.json").is_file():
            raise MespRefError(
                f"{self.path}: --resume: found no run.json, expected the directory of a run"
            )
        if occupied and not (resume or self.overwrite):
            raise MespRefError(
                f"{self.path}: --out: exists and is not empty; name another directory, or add "
                "--overwrite to replace the run in it or --resume to go on with it"
            )
        parent = self.path.absolute()
        while not parent.exists():
            parent = parent.parent
        if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
            raise MespRefError(
                f"{self.path}: --out: {parent} cannot be written; name another place"
            )

    def saved(self) -> tuple[Any, Any] | None:
        """Arrays and facts of the last save; None where there is none."""
        file = inside(self.path, "state.safetensors")
        if not file.is_file():
            return None
        arrays, facts = load_state(file)
        return arrays, check_facts(file, facts)

    def resumable(self) -> tuple[Any, Any]:
        """Arrays and facts of the last save; MespRefError where there is nothing to go on from."""
        saved = self.saved() if self.file("run.json").is_file() else None
        if saved is None:
            missing = "state.safetensors" if self.file("run.json").is_file() else "run.json"
            raise MespRefError(
                f"{self.path}: --resume: found no {missing}, expected the directory of a run; "
                "leave --resume out to start one"
            )
        return saved

    def create(self, configuration: Mapping[str, Any]) -> None:
        """Make the directory without an earlier run's files; write run.json and what was logged."""
        self._new = not self.path.exists()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while self.numbered:
                try:
                    self.path.mkdir()
                    break
                except FileExistsError:  # another run took this number meanwhile
                    self.path = RUNS / f"{int(self.path.name) + 1:03d}"
            self.path.mkdir(exist_ok=True)
            if self._lock is None:  # it is new, or another run made it since we looked
                self._lock = DirectoryLock(self.path)
                self._check(resume=False)
            inside(self.path, "adapter")
            self._clear_asides()
            for file in self._own_files():
                file.unlink(missing_ok=True)
        except OSError as error:
            raise MespRefError(f"{self.path}: cannot be written: {error.strerror}") from None
        try:
            write_json(self.file("run.json"), configuration)
        except MespRefError:
            self.discard()
            raise
        self.created = True
        self.metrics.file = self.file("metrics.jsonl")  # its number may be another by now
        self.metrics.open()

    def _own_files(self) -> list[Path]:
        return [self.file(name) for name in OWN] + [self.adapter / name for name in _ADAPTER]

    def _clear_asides(self) -> None:
        """Remove what a killed process was writing aside."""
        for file in self._own_files():
            for aside in file.parent.glob(f".{file.name}.*"):
                aside.unlink(missing_ok=True)

    def discard(self) -> None:
        """Take back a run that could not save its first state: its files, its directory if new."""
        self._clear_asides()
        for file in self._own_files():
            file.unlink(missing_ok=True)
        self.release()
        for folder in (self.adapter, self.path)[: 2 if self._new else 1]:
            with contextlib.suppress(OSError):  # not there, or somebody else's files are in it
                folder.rmdir()

    def reopen(self, step: int) -> Totals:
        """Go on after `step`: later lines of metrics.jsonl are dropped. What the others come to."""
        inside(self.path, "adapter")
        self._clear_asides()
        totals = self.metrics.cut(step)
        self.created = True
        return totals

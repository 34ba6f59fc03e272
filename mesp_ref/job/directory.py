"""The directory of a run: what lies in it, when it may be written, how a run goes on from it.

adapter/            the PEFT adapter as of the last save; with --patience the best so far
run.json            the configuration used
metrics.jsonl       one event per line: step, eval, sample, quiz
state.safetensors   all that --resume needs
and once the run is complete
metrics.csv         the metrics as a table, a row per step
loss.png            the loss curve
summary.json        losses and samples before and after

A run that replaces another (--overwrite) lies beside it, in NAME.new, until it is complete.
"""

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mesp_ref.errors import MespRefError
from mesp_ref.files.aside import is_aside
from mesp_ref.files.manifest import Manifest
from mesp_ref.files.output import (
    await_folder,
    check_directory,
    recover,
    replace_directory,
    require_ours,
    write_aside,
    writing,
)
from mesp_ref.files.strict import inside, open_regular
from mesp_ref.job.lock import DirectoryLock, is_lock
from mesp_ref.job.metrics import Metrics, Totals, is_event
from mesp_ref.job.state import check_facts, load_state

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


def run_place(path: str | Path | None, resume: bool) -> Path:
    """The directory that `path` stands for; MespRefError where there is no run to go on with."""
    if path is None:
        runs = numbered_runs()
        if resume and not runs:
            raise MespRefError(
                f"--resume: found no run in {RUNS}, expected one; name its directory, or leave "
                "--resume out to start one"
            )
        return RUNS / f"{runs[-1] if resume else [0, *runs][-1] + 1:03d}"
    place = Path(path)
    return Path(os.path.realpath(place)) if place.name in ("", "..") else place


def resumed_folder(place: Path) -> Path:
    """Where the files of the run lie with which --resume goes on: `place`, or beside it."""
    await_folder(place)
    here, waiting = Manifest.read(place), _waiting(place)
    swapped = here is not None and here.state == "pending"
    waits = waiting is not None and waiting.state == "pending" and not swapped
    return _beside(place) if waits else place


def _beside(place: Path) -> Path:
    """Where a run lies that is to replace the one at `place`."""
    return place.with_name(f"{place.name}.new")


def _waiting(place: Path) -> Manifest | None:
    """The manifest of a run that was to replace the one at `place`, if no link leads to it."""
    if _beside(place).is_symlink():
        return None
    return Manifest.begun(_beside(place), lambda name, file: is_lock(file))


class RunDirectory:
    """One run's files. Nothing is created before `create`.

    `path` None stands for runs/NNN: the next number, or with `resume` the last one. `inputs` are
    the files and folders that the run reads: none of them may be replaced.
    place   the directory that was named
    path    where the files are: the same, but NAME.new until a run that replaces one is complete

    From here on no other run can have the directory, until `release`.

    Raises MespRefError for a path that is a file, that is not empty (unless `resume`, or
    `overwrite` and all in it is of a run of ours), that another run is using, or that cannot be
    written.
    """

    def __init__(
        self,
        path: str | Path | None,
        *,
        overwrite: bool = False,
        resume: bool = False,
        inputs: Sequence[str | Path | None] = (),
    ):
        self.numbered = path is None and not resume
        self.place = run_place(path, resume)
        if overwrite and resume:
            raise MespRefError("--overwrite: found beside --resume, expected one of the two")
        self.path, self.overwrite, self.created, self._made = self.place, overwrite, False, False
        self._locks: list[DirectoryLock] = []
        self._inputs = inputs
        self._old: Manifest | None = None
        recover(self.place, self._is_ours)
        self._check(resume)
        self._lock(self.place)
        if resume or self.overwrite:
            self._settle(resume)
        self.metrics = Metrics(self.file("metrics.jsonl"))

    def _lock(self, folder: Path) -> None:
        if folder.is_dir():
            self._locks.append(DirectoryLock(folder))

    def release(self) -> None:
        """Let other runs have the directory."""
        for lock in self._locks:
            lock.release()

    def file(self, name: str) -> Path:
        return self.path / name

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def _new(self) -> Path:
        """Where a run lies that is to replace the one at `place`."""
        return _beside(self.place)

    def _occupied(self) -> bool:
        """Whether anything lies there; hidden files, such as killed processes leave, do not count."""
        return self.path.is_dir() and any(
            not file.name.startswith(".") for file in self.path.iterdir()
        )

    def _check(self, resume: bool) -> None:
        if self.place.exists() and not self.place.is_dir():
            raise MespRefError(f"{self.place}: --out: found a file, expected a directory")
        occupied = self._occupied()
        if occupied and resume and not self.file("run.json").is_file():
            raise MespRefError(
                f"{self.place}: --resume: found no run.json, expected the directory of a run"
            )
        if occupied and not (resume or self.overwrite):
            raise MespRefError(
                f"{self.place}: --out: exists and is not empty; name another directory, or add "
                f"--overwrite to replace the run in it or --resume to go on with it{self._waits()}"
            )
        if occupied and self.overwrite:
            self._old = self._replaceable()
        parent = self.place.absolute()
        while not parent.exists():
            parent = parent.parent
        if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
            raise MespRefError(
                f"{self.place}: --out: {parent} cannot be written; name another place"
            )

    def _waits(self) -> str:
        """The end of a line about `place`, where a run waits to replace the one there."""
        waiting = _waiting(self.place)
        if waiting is None or waiting.state != "pending":
            return ""
        return f"; {self._new} holds a run that was to replace it: --resume goes on with that one"

    def _replaceable(self) -> Manifest | None:
        """The manifest of the run at `place`, if nothing else lies there or in the way."""
        here, waiting = Manifest.read(self.place), _waiting(self.place)
        swapped = here is not None and here.state == "pending"  # then it is the old run
        if os.path.lexists(self._new) and (
            waiting is None or (waiting.state == "complete" and not swapped)
        ):
            raise MespRefError(
                f"{self._new}: exists, expected nothing where the new run is to be kept until it "
                "is complete; move it or name another --out"
            )
        return check_directory(self.place, True, self._inputs, self._is_ours)

    def _is_ours(self, name: str, file: Path) -> bool:
        """Files whose content no manifest can list: the lock, and events that come one by one."""
        if name == "metrics.jsonl":
            with open_regular(file) as lines:
                return all(is_event(line) for line in lines)
        return name == ".lock" and is_lock(file)

    def _settle(self, resume: bool) -> None:
        """Finish a replacement that was cut short, or go on with one that waits."""
        here, waiting = Manifest.read(self.place), _waiting(self.place)
        if here is not None and here.state == "pending":  # in its place, but not yet alone
            if waiting is not None:
                waiting.remove(self._is_ours)
            here.state = "complete"
            here.save()
        elif resume and waiting is not None and waiting.state == "pending":
            self._old = self._replaceable()
            self.path = self._new
            self._lock(self.path)

    def saved(self) -> tuple[Any, Any] | None:
        """Arrays and facts of the last save; None where there is none.

        Raises MespRefError where the trained adapter of a run lies, and not its state.
        """
        file = inside(self.path, "state.safetensors")
        if not file.is_file():
            self._require_untrained()
            return None
        arrays, facts = load_state(file)
        return arrays, check_facts(file, facts)

    def resumable(self) -> tuple[Any, Any] | None:
        """Arrays and facts of the last save; None for a run that was killed before its first.

        Raises MespRefError where there is nothing to go on from.
        """
        if not self.file("run.json").is_file():
            raise MespRefError(
                f"{self.path}: --resume: found no run.json, expected the directory of a run; "
                "leave --resume out to start one"
            )
        return self.saved()

    def _require_untrained(self) -> None:
        """What lies in the directory must be ours, and nothing that was trained."""
        if self.created or not self._occupied():
            return
        manifest = Manifest.read(self.path)
        if manifest is None or os.path.lexists(self.adapter):
            raise MespRefError(
                f"{self.path}: --resume: found run.json and no state.safetensors, expected the "
                "state of the run; restore it, or start a new run in another directory"
            )
        require_ours(manifest, self._is_ours)

    def create(self, configuration: Mapping[str, Any]) -> None:
        """Make the directory; write its manifest, run.json and what was logged."""
        with writing(self.path):
            self._make()
            inside(self.path, "adapter")
            self._clear_asides()
        try:
            with writing(self.path):
                Manifest(self.path, "complete" if self._old is None else "pending").save()
            write_json(self.file("run.json"), configuration)
        except MespRefError:
            self.discard()
            raise
        self.created = True
        self.metrics.file = self.file("metrics.jsonl")  # it may have another place by now
        self.metrics.open()

    def _make(self) -> None:
        """The folder, locked, with nothing in it that is not ours to replace."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._old is not None:
            self._make_new()
            return
        self._made = not self.path.exists()
        while self.numbered:
            try:
                self.path.mkdir()
                break
            except FileExistsError:  # another run took this number meanwhile
                self.place = self.path = RUNS / f"{int(self.path.name) + 1:03d}"
        self.path.mkdir(exist_ok=True)
        if not self._locks:  # it is new, or another run made it since we looked
            self._lock(self.path)
            self._check(resume=False)
            if self._old is not None:
                raise MespRefError(f"{self.place}: --out: another run began there; start again")
        elif self._occupied():  # --resume of a run that was killed before its first save
            self._require_untrained()
            self.file("metrics.jsonl").unlink(missing_ok=True)

    def _make_new(self) -> None:
        """The folder beside the old run; one that was never completed gives way to it."""
        if self.path == self._new:  # --resume of one that was killed before its first save
            self._require_untrained()
            self._locks.pop().release()
        self.path, self._made = self._new, True
        waiting = _waiting(self.place)
        if waiting is not None:
            self._lock(self.path)
            self._locks.pop().release()
            require_ours(waiting, self._is_ours)
            waiting.remove(self._is_ours)
        self.path.mkdir()
        self._lock(self.path)

    def complete(self) -> None:
        """The run is whole: the one that it replaces makes way, in one step."""
        if self.path == self.place:
            return
        with writing(self.place):
            try:
                replace_directory(self.path, self.place, self._old, self._is_ours)
            finally:
                here = Manifest.read(self.place)
                if here is not None and here.state == "pending":
                    self.path = self.place
            if here is not None:
                here.state = "complete"
                here.save()

    def _clear_asides(self) -> None:
        """Remove what a killed process was writing aside."""
        recover(self.adapter)
        for folder in (self.path, self.adapter):
            for file in folder.iterdir() if folder.is_dir() else ():
                if is_aside(file.name) and file.is_file() and not file.is_symlink():
                    file.unlink(missing_ok=True)

    def discard(self) -> None:
        """Take back a run that could not save its first state: its files, its directory if new."""
        self.release()
        manifest = Manifest.read(self.path)
        if manifest is not None:
            manifest.remove(self._is_ours, keep_folder=not self._made)
        elif self._made:
            with contextlib.suppress(OSError):  # not there, or somebody else's files are in it
                self.path.rmdir()

    @property
    def how_to_go_on(self) -> str:
        """What to do after a run was stopped."""
        if self.path == self.place:
            return "repeat the command with --resume to go on"
        return (
            f"repeat the command with --resume in place of --overwrite to go on; {self.place} stays "
            "as it was until the new run is complete"
        )

    def reopen(self, step: int) -> Totals:
        """Go on after `step`: later lines of metrics.jsonl are dropped. What the others come to."""
        inside(self.path, "adapter")
        self._clear_asides()
        totals = self.metrics.cut(step)
        self.created = True
        return totals

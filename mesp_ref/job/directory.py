"""The directory of a run: what lies in it, when it may be written, how a run goes on from it.

adapter/            the PEFT adapter as of the last save; with --patience the best so far
run.json            the configuration used
metrics.jsonl       one event per line: step, eval, sample
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
    check_directory,
    recover,
    replace_directory,
    require_ours,
    write_aside,
    writing,
)
from mesp_ref.files.strict import inside, open_regular, parse_json
from mesp_ref.job.lock import DirectoryLock, is_lock
from mesp_ref.job.state import check_facts, load_state

Event = dict[str, Any]
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
        self.numbered = path is None and not (resume and numbered_runs())
        if path is not None:
            self.place = Path(path)
        else:
            runs = numbered_runs() or [0]
            self.place = RUNS / f"{runs[-1] + (1 if self.numbered else 0):03d}"
        if overwrite and resume:
            raise MespRefError("--overwrite: found beside --resume, expected one of the two")
        if self.place.name in ("", ".."):
            self.place = Path(os.path.realpath(self.place))
        self.path, self.overwrite, self.created, self._made = self.place, overwrite, False, False
        self._pending: list[Event] = []
        self._locks: list[DirectoryLock] = []
        self._inputs = inputs
        self._old: Manifest | None = None
        recover(self.place, self._is_ours)
        self._check(resume)
        self._lock(self.place)
        if resume or self.overwrite:
            self._settle(resume)

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
        return self.place.with_name(f"{self.place.name}.new")

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
        waiting = self._waiting()
        if waiting is None or waiting.state != "pending":
            return ""
        return f"; {self._new} holds a run that was to replace it: --resume goes on with that one"

    def _replaceable(self) -> Manifest | None:
        """The manifest of the run at `place`, if nothing else lies there or in the way."""
        here, waiting = Manifest.read(self.place), self._waiting()
        swapped = here is not None and here.state == "pending"  # then it is the old run
        if os.path.lexists(self._new) and (
            waiting is None or (waiting.state == "complete" and not swapped)
        ):
            raise MespRefError(
                f"{self._new}: exists, expected nothing where the new run is to be kept until it "
                "is complete; move it or name another --out"
            )
        return check_directory(self.place, True, self._inputs, self._is_ours)

    def _waiting(self) -> Manifest | None:
        """The manifest of a run that was to replace the one at `place`, if no link leads to it."""
        if self._new.is_symlink():
            return None
        return Manifest.begun(self._new, lambda name, file: is_lock(file))

    def _is_ours(self, name: str, file: Path) -> bool:
        """Files whose content no manifest can list: the lock, and events that come one by one."""
        if name == "metrics.jsonl":
            with open_regular(file) as lines:
                return all(_is_event(line) for line in lines)
        return name == ".lock" and is_lock(file)

    def _settle(self, resume: bool) -> None:
        """Finish a replacement that was cut short, or go on with one that waits."""
        here, waiting = Manifest.read(self.place), self._waiting()
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
        pending, self._pending = self._pending, []
        for event in pending:
            self.log(event)

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
        waiting = self._waiting()
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

    def reopen(self, step: int) -> None:
        """Go on after `step`: later lines of metrics.jsonl are dropped."""
        inside(self.path, "adapter")
        self._clear_asides()
        kept = [event for event in self._stored() if event["step"] <= step]
        with write_aside(self.file("metrics.jsonl")) as aside:
            aside.write_text("".join(json.dumps(event) + "\n" for event in kept), encoding="utf-8")
        self.created = True

    def log(self, event: Event) -> None:
        """Append one line to metrics.jsonl, or keep it until there is one."""
        if not self.created:
            self._pending.append(event)
            return
        try:
            with self.file("metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")
        except OSError as error:
            raise MespRefError(
                f"{self.file('metrics.jsonl')}: cannot be written: {error.strerror}"
            ) from None

    def events(self) -> list[Event]:
        """The events of this run so far."""
        return self._stored() if self.created else self._pending

    def _stored(self) -> list[Event]:
        """The lines of metrics.jsonl; a last one that was torn by a crash is left out."""
        file, found = self.file("metrics.jsonl"), []
        if file.is_file():
            with open_regular(file) as lines:
                for line in lines:
                    with contextlib.suppress(ValueError):
                        found.append(parse_json(line))
        return [event for event in found if _sound(event)]


def _is_event(line: bytes) -> bool:
    """Whether a line of metrics.jsonl was written by a run, even if a crash tore it."""
    try:
        return _sound(parse_json(line))
    except ValueError:
        return line.startswith(b'{"event": ') and not line.endswith(b"\n")


def _sound(event: Any) -> bool:
    """Whether a line of metrics.jsonl has what tables, curves and summaries take from it."""
    if not isinstance(event, dict) or type(event.get("step")) is not int:
        return False
    numbers: dict[str, tuple[str, ...]] = {"step": ("loss",), "eval": ("loss", "accuracy")}
    texts: dict[str, tuple[str, ...]] = {"sample": ("prompt", "text")}
    kind = event.get("event")
    return (
        isinstance(kind, str)
        and all(isinstance(event.get(name), (int, float)) for name in numbers.get(kind, ()))
        and all(isinstance(event.get(name), str) for name in texts.get(kind, ()))
        and (kind != "eval" or isinstance(event.get("perplexity", ""), (int, float, type(None))))
    )

"""metrics.jsonl: an event per line, appended as it happens and read as a stream, never held whole."""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mesp_ref.errors import MespRefError, shown
from mesp_ref.files.output import write_aside
from mesp_ref.files.strict import JSON_LIMIT, open_regular, parse_json

Event = dict[str, Any]
_KINDS = ("step", "eval", "sample", "quiz")
# What tables, curves and summaries take from each kind of event.
_NUMBERS = {
    "step": ("loss", "lr", "grad_norm", "seconds", "tokens_per_second", "memory_mb"),
    "eval": ("loss", "accuracy"),
    "sample": (),
    "quiz": (),
}


@dataclass
class Totals:
    """What the steps of a run come to, those before it was resumed included."""

    steps: int = 0
    computed_tokens: int = 0
    seconds: float = 0.0
    peak_mb: float = 0.0

    def add(self, event: Event) -> None:
        """One more step."""
        self.steps += 1
        self.computed_tokens += event["computed_tokens"]
        self.seconds += event["seconds"]
        self.peak_mb = max(self.peak_mb, event["memory_mb"])


class Metrics:
    """The events of a run. Until `open` they wait in memory, for the run has no directory yet.

    An event that cannot be written, on a full disk, waits too: it is written with the next one.
    """

    def __init__(self, file: Path):
        self.file, self._opened = file, False
        self._waiting: list[str] = []

    def open(self) -> None:
        """From here on there is a file; MespRefError when what waits cannot be written to it."""
        self._opened = True
        self.write()

    def log(self, event: Event) -> None:
        """Append one line. Raises MespRefError when it has to wait."""
        self._waiting.append(json.dumps(event) + "\n")
        if self._opened:
            self.write()

    def write(self) -> None:
        """Write what waits, all of it or nothing."""
        if not self._waiting:
            return
        try:
            with self.file.open("ab", buffering=0) as file:
                size, text = file.tell(), "".join(self._waiting).encode()
                try:
                    if file.write(text) < len(text):
                        raise OSError(None, "the disk is full")
                except OSError:
                    os.ftruncate(file.fileno(), size)
                    raise
        except OSError as error:
            raise MespRefError(f"{self.file}: cannot be written: {error.strerror}") from None
        self._waiting.clear()

    def __iter__(self) -> Iterator[Event]:
        """All events, those that wait last. Raises MespRefError for a line that is none."""
        if self._opened:
            yield from self._stored()
        yield from map(parse_json, tuple(self._waiting))

    def _stored(self) -> Iterator[Event]:
        """The file's lines; a last one that a crash cut short is left out."""
        last = 0
        with contextlib.ExitStack() as stack:
            try:
                if self.file.is_symlink():
                    raise OSError(None, "found a link, expected the file that finetune wrote")
                lines = stack.enter_context(open_regular(self.file))
            except FileNotFoundError:
                return
            except OSError as error:
                raise MespRefError(f"{self.file}: {error.strerror}") from None
            number = 0
            while line := lines.readline(JSON_LIMIT):
                number += 1
                if not line.endswith(b"\n") and len(line) < JSON_LIMIT:
                    return
                event = _checked(line, f"{self.file}: line {number}", last)
                last = event["step"] if event["event"] == "step" else last
                yield event

    def cut(self, step: int) -> Totals:
        """Go on after `step`: later lines are dropped. What the steps before came to."""
        totals = Totals()
        with write_aside(self.file) as aside, aside.open("w", encoding="utf-8") as file:
            for event in self._stored():
                if event["step"] <= step:
                    file.write(json.dumps(event) + "\n")
                    if event["event"] == "step":
                        totals.add(event)
        self._opened = True
        return totals


def is_event(line: bytes) -> bool:
    """Whether a line of metrics.jsonl was written by a run, even if a crash tore it."""
    try:
        return bool(_checked(line, "", -1))
    except MespRefError:
        return line.startswith(b'{"event": ') and not line.endswith(b"\n")


def _checked(line: bytes, where: str, last: int) -> Event:
    """The event on a line; MespRefError for the first field that finetune would not have written."""
    advice = "expected what finetune writes; the file is damaged: restore it, or move it away"
    try:
        event = parse_json(line)
    except ValueError as error:
        raise MespRefError(f"{where}: not JSON: {error}; {advice}") from None
    event = _in_mb(event) if isinstance(event, dict) else {}
    kind = event.get("event")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise MespRefError(f"{where}: event: found {shown(kind)}, {advice}")
    fields: list[tuple[str, bool]] = [("step", _count(event.get("step")))]
    fields += [(name, _number(event.get(name))) for name in _NUMBERS[kind]]
    if kind == "step":
        fields += [(name, _count(event.get(name))) for name in ("tokens", "computed_tokens")]
        fields.append(("step", _count(event.get("step")) and event["step"] > last))
    if kind == "eval":
        perplexity = event.get("perplexity", "")
        fields.append(("perplexity", perplexity is None or _number(perplexity)))
    if kind == "sample":
        fields += [(name, isinstance(event.get(name), str)) for name in ("prompt", "text")]
    if kind == "quiz":
        fields += [(name, _count(event.get(name))) for name in ("right", "of")]
        said = event.get("said")
        fields.append(("said", isinstance(said, list) and all(isinstance(s, str) for s in said)))
    for name, holds in fields:
        if not holds:
            raise MespRefError(f"{where}: {name}: found {shown(event.get(name))}, {advice}")
    return dict(event)


def _in_mb(event: Event) -> Event:
    """A step as earlier versions wrote it, in MiB, in MB."""
    old = event.get("memory_mib")
    if "memory_mb" in event or old is None or not _number(old):
        return event
    rest = {name: value for name, value in event.items() if name != "memory_mib"}
    return rest | {"memory_mb": old * 2**20 / 1e6}


def _count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _number(value: object) -> bool:
    return type(value) in (int, float)  # parse_json lets neither NaN nor infinity through

"""Who listens to a run cannot end it: a log on a full disk, a closed pipe, a report that raises."""

import contextlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any


class Reporter:
    """Hands the events of a run on, and collects what the run warns of.

    An exception of `report` is warned of once, and the run goes on; the next event is tried again.
    KeyboardInterrupt is no mistake of a report: it stops the run, saved, as Ctrl-C does.
    """

    def __init__(self, report: Callable[[Any], object]):
        self._report, self._broken = report, False
        self.warnings: list[str] = []

    def __call__(self, event: Mapping[str, Any]) -> None:
        try:
            self._report(event)
        except Exception as error:
            if self._broken:
                return
            self._broken = True
            self.warn(f"progress is not complete: {type(error).__name__}: {error}")

    def warn(self, text: str) -> None:
        """Say it once: as an event, or where nobody takes that as Python's own warning."""
        text = " ".join(text.split())
        if text in self.warnings:
            return
        self.warnings.append(text)
        if not self._broken:
            self({"event": "warning", "text": text})
        else:
            with contextlib.suppress(Exception):  # warnings can be made errors
                warnings.warn(text, RuntimeWarning, stacklevel=2)

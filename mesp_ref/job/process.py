"""Signals turned into a request: Ctrl-C, SIGTERM and SIGHUP end a run between two steps."""

import contextlib
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

_STOPPING = b"\nfinishing this step, then saving; press Ctrl-C again to stop at once\n"
# What ends a run: Ctrl-C, a machine that shuts down or a job's time that is up, a closed terminal.
STOPPING = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


class StopRequest:
    """While active, the first signal only sets `requested`; a second Ctrl-C interrupts at once.

    So a step is never torn: the loop looks at `requested` between steps, saves and ends. A closed
    terminal may send SIGHUP twice, so only Ctrl-C is taken for impatience. A SIGHUP that is ignored,
    as under nohup, stays ignored.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._before: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.requested = number
        # print could be entered twice here; the terminal may be gone, or standard error never was
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.write(sys.stderr.fileno(), _STOPPING)

    def check(self, *_: object) -> None:
        """Raise KeyboardInterrupt when a stop was requested."""
        if self.requested is not None:
            raise KeyboardInterrupt

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None: a handler that Python did not set, and cannot set again
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

"""The process around a run: its memory, and Ctrl-C turned into a request."""

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

_STATUS = Path("/proc/self/status")
_STOPPING = b"\nfinishing this step, then saving; press Ctrl-C again to stop at once\n"
_INTERVAL = 0.02  # seconds between two looks: a look takes some 50 µs


def memory_mib() -> float:
    """Memory that is this process's own, in MiB.

    Linux: resident anonymous memory (RssAnon), without the mapped weights, which the system may
    drop at any time. Elsewhere the peak of all resident memory so far; 0 where that is unknown too.
    """
    try:
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)


class PeakMemory:
    """Looks at memory_mib 50 times a second while active: the kernel keeps no peak of RssAnon."""

    def __init__(self) -> None:
        self._peak = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(_INTERVAL):
            self._peak = max(self._peak, memory_mib())

    def take(self) -> float:
        """The peak in MiB since the last call."""
        peak, self._peak = max(self._peak, memory_mib()), 0.0
        return peak

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


class StopRequest:
    """While active, the first Ctrl-C only sets `requested`; a second one interrupts at once.

    So a step is never torn: the loop looks at `requested` between steps, saves and ends.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: Any = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        os.write(2, _STOPPING)  # print could be entered twice here

    def check(self, *_: object) -> None:
        """Raise KeyboardInterrupt when a stop was requested."""
        if self.requested:
            raise KeyboardInterrupt

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

"""What the system says of this process: memory of its own, and pages of mapped files."""

import threading
from typing import NamedTuple


class Resident(NamedTuple):
    """Bytes of this process; 0 where the system does not tell (mapped, data: all but Linux)."""

    anonymous: int = 0  # NumPy, Python, BLAS: nobody but the process can free it
    mapped: int = 0  # weights and checkpoints on disk: the system may drop these pages at any time
    data: int = 0  # what RLIMIT_DATA limits: private writable memory, touched or not


def resident() -> Resident:
    """Memory of this process now.

    Linux: resident pages without and of files, private memory. Elsewhere all that is resident, or
    on Windows private; mapped weights are part of it where the system counts them so.
    """
    try:
        import psutil
    except ImportError:  # as in a browser
        return Resident()
    try:
        found = psutil.Process().memory_info()
    except (psutil.Error, OSError):  # no /proc, no file handle left: a number is no reason to stop
        return Resident()
    if not hasattr(found, "shared"):
        return Resident(anonymous=getattr(found, "private", found.rss))
    return Resident(found.rss - found.shared, found.shared, found.data)


class PeakResident:
    """The most of each while active, looked at 50 times a second: the kernel keeps no such peak.

    with PeakResident() as seen: ...
    seen.before, seen.peak; `take` in between
    """

    def __init__(self, interval: float = 0.02):
        self._interval = interval  # seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakResident":
        self.before = self.peak = resident()
        self._thread.start()
        return self

    def _look(self) -> None:
        self.peak = Resident(*map(max, self.peak, resident()))

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self._look()

    def take(self) -> float:
        """The peak of the process's own memory since the last call, in MB (10⁶ bytes)."""
        self._look()
        peak, self.peak = self.peak, Resident()
        return peak.anonymous / 1e6

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

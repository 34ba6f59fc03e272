"""What the kernel says of this process: memory of its own, and pages of mapped files."""

import threading
from pathlib import Path
from typing import NamedTuple

_STATUS = Path("/proc/self/status")
_FIELDS = ("RssAnon", "RssFile", "VmData")


class Resident(NamedTuple):
    """Bytes in RAM, or 0 where the system does not tell (all but Linux)."""

    anonymous: int = 0  # NumPy, Python, BLAS: nobody but the process can free it
    mapped: int = 0  # weights and checkpoints on disk: the system may drop these pages at any time
    data: int = 0  # what RLIMIT_DATA limits: private writable memory, touched or not


def resident() -> Resident:
    """Memory of this process now."""
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
        found = dict(line.split(":", 1) for line in lines if ":" in line)
        return Resident(*(int(found[name].split()[0]) * 1024 for name in _FIELDS))
    except (OSError, KeyError):  # not Linux, or one whose kernel does not tell them apart
        return Resident()


class PeakResident:
    """The most of each while active, looked at 200 times a second: the kernel keeps no such peak.

    with PeakResident() as seen: ...
    seen.before, seen.peak
    """

    _INTERVAL = 0.005  # seconds; a look takes some 50 µs

    def __enter__(self) -> "PeakResident":
        self.before = self.peak = resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        self.peak = Resident(*map(max, self.peak, resident()))

    def _watch(self) -> None:
        while not self._stop.wait(self._INTERVAL):
            self._look()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

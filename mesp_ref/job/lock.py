"""One run at a time in a directory: the second is told who has it and since when."""

import contextlib
import importlib
import os
import re
import weakref
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from mesp_ref.errors import MespRefError

fcntl: Any = None
with contextlib.suppress(ImportError):  # Windows has none
    fcntl = importlib.import_module("fcntl")

_NAME = ".lock"
_HOLDER = re.compile(r"process [0-9]+ since [0-9-]+ [0-9:]+|")  # empty: it died before it signed


class DirectoryLock:
    """Holds `directory` for this process until `release`, or until the process ends in any way.

    The kernel drops the lock (flock) with its process, so a killed run blocks nobody. The file
    `.lock` only says whose it is. Where a file system has no locks, none is taken.

    Raises MespRefError when another process, or another run of this one, holds the directory.
    """

    def __init__(self, directory: Path):
        self.release: Callable[[], object] = lambda: None
        handle = _locked(directory)
        if handle is not None:
            os.ftruncate(handle, 0)
            text = f"process {os.getpid()} since {datetime.now().isoformat(' ', 'seconds')}"
            os.pwrite(handle, text.encode(), 0)
            # Absolute: the process may move before the lock goes.
            self.release = weakref.finalize(self, _unlock, handle, (directory / _NAME).absolute())


def is_lock(file: Path) -> bool:
    """Whether a regular file is one of ours: named .lock, and nothing in it but a holder."""
    if file.name != _NAME or file.stat().st_size > 100:
        return False
    return _HOLDER.fullmatch(file.read_text("latin-1")) is not None


def _locked(directory: Path) -> int | None:
    """An open, locked `.lock`; None where there are no locks."""
    if fcntl is None:
        return None
    while True:
        if (directory / _NAME).is_file() and not is_lock(directory / _NAME):
            raise MespRefError(
                f"{directory / _NAME}: found a file that mesp-ref did not write, expected the lock "
                "of a run; move it or name another directory"
            )
        try:
            handle = os.open(directory / _NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise MespRefError(f"{directory}: cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 100, 0).decode("ascii", "replace") or "another process"
            os.close(handle)
            raise MespRefError(
                f"{directory}: --out: in use by {' '.join(holder.split())}, expected one run at a "
                "time; wait for it, stop it, or name another directory"
            ) from None
        except OSError:  # a network file system without locks
            os.close(handle)
            return None
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(handle), (directory / _NAME).stat()):
                return handle
        os.close(handle)  # its holder removed it between our two calls: take the new one


def _unlock(handle: int, file: Path) -> None:
    """Remove the file while it is still ours; closing it drops the lock."""
    with contextlib.suppress(OSError):
        file.unlink()
    os.close(handle)

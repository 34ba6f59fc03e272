"""One run at a time in a directory: the second is told who has it and since when."""

import contextlib
import os
import re
import weakref
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from filelock import lock_descriptor

from mesp_ref.errors import MespRefError

_NAME = ".lock"
# Empty: it died before it signed.
_HOLDER = re.compile(r" ?process [0-9]+ since [0-9-]+ [0-9:]+|")
_OPEN = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
_TEXT = 1  # where it says whose it is: Windows lets nobody read byte 0, which it locks


class DirectoryLock:
    """Holds `directory` for this process until `release`, or until the process ends in any way.

    The kernel drops the lock with its process, so a killed run blocks nobody. The file `.lock` only
    says whose it is. Where a file system has no locks, none is taken. A fork does not inherit it: a
    child that lived on would hold the directory of a run that is over.

    Raises MespRefError when another process, or another run of this one, holds the directory.
    """

    def __init__(self, directory: Path):
        self.release: Callable[[], object] = lambda: None
        handle = _locked(directory)
        if handle is not None:
            os.ftruncate(handle, 0)
            text = f"process {os.getpid()} since {datetime.now().isoformat(' ', 'seconds')}"
            with contextlib.suppress(OSError):  # a full disk: held all the same, by nobody's name
                os.write(handle, b" " * _TEXT + text.encode())
            # Absolute: the process may move before the lock goes.
            file = (directory / _NAME).absolute()
            self._end = weakref.finalize(self, _unlock, handle, file)
            self.release, self._handle = self._end, handle
            _HELD.add(self)

    def forked(self) -> None:
        """In the child of a fork: the lock stays the parent's."""
        if self._end.detach() is not None:
            os.close(self._handle)
            self.release = lambda: None


_HELD: "weakref.WeakSet[DirectoryLock]" = weakref.WeakSet()  # a fork asks for all of the process


def _after_fork() -> None:
    for lock in list(_HELD):
        lock.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def is_lock(file: Path) -> bool:
    """Whether a regular file is one of ours: named .lock, and nothing in it but a holder."""
    if file.name != _NAME or file.stat().st_size > 100:
        return False
    return _HOLDER.fullmatch(file.read_text("latin-1")) is not None


def _locked(directory: Path) -> int | None:
    """An open, locked `.lock`; None where there are no locks."""
    while True:
        if (directory / _NAME).is_file() and not is_lock(directory / _NAME):
            raise MespRefError(
                f"{directory / _NAME}: found a file that mesp-ref did not write, expected the lock "
                "of a run; move it or name another directory"
            )
        try:
            handle = os.open(directory / _NAME, _OPEN, 0o666)
        except OSError as error:
            raise MespRefError(f"{directory}: cannot be written: {error.strerror}") from None
        try:
            held = lock_descriptor(handle, blocking=False)
        except OSError:  # a network file system without locks
            os.close(handle)
            return None
        if not held:
            raise MespRefError(
                f"{directory}: --out: in use by {_holder(handle)}, expected one run at a "
                "time; wait for it, stop it, or name another directory"
            )
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(handle), (directory / _NAME).stat()):
                return handle
        os.close(handle)  # its holder removed it between our two calls: take the new one


def _holder(handle: int) -> str:
    """Who has the lock, by the file's own words; closes it."""
    try:
        os.lseek(handle, _TEXT, os.SEEK_SET)
        words = os.read(handle, 100).decode("ascii", "replace").split()
    finally:
        os.close(handle)
    return " ".join(words) or "another process"


def _unlock(handle: int, file: Path) -> None:
    """Remove the file while it is still ours; closing it drops the lock."""
    with contextlib.suppress(OSError):
        file.unlink()
    os.close(handle)

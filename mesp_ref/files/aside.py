"""What is written beside its place first: names, locks, and the one step that puts it there."""

import contextlib
import ctypes
import errno
import importlib
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mesp_ref.files.strict import NO_LINK, READ

fcntl: Any = None
with contextlib.suppress(ImportError):  # Windows has none
    fcntl = importlib.import_module("fcntl")

_UNABLE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
_AT_FDCWD, _EXCHANGE, _SWAP = -100, 2, 2  # linux/fs.h and fcntl.h; sys/stdio.h of macOS


def aside_name(path: Path, kind: str = "") -> Path:
    """A hidden name beside `path` that nobody has; `kind` "old-" for a version taken away."""
    return path.with_name(f".{path.name}.mesp-ref-{kind}{secrets.token_hex(4)}")


def is_aside(name: str, of: str | None = None) -> bool:
    """Whether a file name is one of `aside_name`'s, for a path called `of` or any."""
    pattern = r".+" if of is None else re.escape(of)
    return re.fullmatch(rf"\.{pattern}\.mesp-ref-(old-)?[0-9a-f]{{8}}", name) is not None


def leftovers(path: Path) -> list[Path]:
    """What lies aside of `path`: of runs that go on, or that were killed. New versions first."""
    with contextlib.suppress(OSError):
        found = [name for name in os.listdir(path.parent) if is_aside(name, path.name)]  # noqa: PTH208
        return [path.parent / name for name in sorted(found, key=lambda n: ("-old-" in n, n))]
    return []


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Hold a file or folder for this process while active; False where that is not possible.

    The kernel drops the lock (flock) with its process: what nobody holds, nobody is writing. Windows
    has no such locks, and renames nothing that is open: nothing is held there.
    """
    if fcntl is None:
        yield False
        return
    try:
        handle = os.open(path, READ | NO_LINK)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except OSError:  # in use, or no locks here
            free = False
        yield free
    finally:
        os.close(handle)


def exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step that no reader and no kill can cut; False where there is none.

    Source    renameat2(2) with RENAME_EXCHANGE on Linux, renamex_np(2) with RENAME_SWAP on macOS
    Raises    OSError, for names that are not there or may not be changed
    """
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        names = os.fsencode(a), os.fsencode(b)
        if sys.platform == "darwin":
            failed = libc.renamex_np(*names, ctypes.c_uint(_SWAP))
        else:
            failed = libc.renameat2(
                _AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_EXCHANGE)
            )
    except (AttributeError, OSError, TypeError):  # a C library without it
        return False
    if failed and ctypes.get_errno() not in _UNABLE:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(b))
    return not failed


def swap(new: Path, path: Path) -> Path:
    """Put the folder `new` in the place of the folder `path`; returns where the old one is then.

    Without `exchange` it takes two renames. Between them the name is gone, but never a mixture:
    what fails there is taken back, and what is killed there `recover` puts right.
    """
    if exchange(new, path):
        return new
    retired = aside_name(path, "old-")
    with claimed(path):  # or somebody who looks between the two renames puts it back
        try:
            path.rename(retired)
            new.rename(path)
        except BaseException:
            if not os.path.lexists(path) and retired.exists():
                retired.rename(path)
            raise
    return retired


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk, where the system can."""
    try:  # Windows opens no folder, and syncs only what may be written
        handle = os.open(path, os.O_RDONLY if fcntl else os.O_RDWR)
    except PermissionError:
        if fcntl:
            raise
        return
    try:
        os.fsync(handle)
    except OSError as error:  # some file systems cannot sync a folder
        if not (stat.S_ISDIR(os.fstat(handle).st_mode) and error.errno in (*_UNABLE, errno.EBADF)):
            raise
    finally:
        os.close(handle)

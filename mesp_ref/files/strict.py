"""What strangers wrote, read strictly: JSON by the letter, regular files, paths that stay inside."""

import errno
import json
import os
import re
import stat
from collections import Counter
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from mesp_ref.errors import MespRefError, shown

JSON_LIMIT = 1 << 26  # bytes of a JSON file; the largest known, an index of shards, has some MB
# Bytes as they are, which Windows must be told, and no waiting for a pipe's other end; links are not
# followed where the system can be told so.
READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
NO_LINK: int = getattr(os, "O_NOFOLLOW", 0)
# What Python's json accepts and others do not: worth a second, slower look where it may occur.
_LONG_NUMBER = re.compile(r"\d{19}|[eE]\+?\d{3}")
_POINTER = b"version https://git-lfs.github.com/spec/"  # how Git LFS's stand-in for a file begins
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: bytes | str) -> Any:
    """JSON as RFC 8259 has it, where Python's own reader is more generous.

    Raises ValueError, with the reason in one line, for what is not UTF-8 or not JSON: NaN and
    infinity, a name given twice in an object, a number beyond 64 bits, half a surrogate pair, and
    nesting that would exhaust the stack.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    numbers: dict[str, Any] = {}
    if _LONG_NUMBER.search(text):
        numbers = {"parse_int": _integer, "parse_float": _real}
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant, **numbers)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("half a surrogate pair, which is no character") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        times = Counter(name for name, _ in pairs)
        twice = next(name for name, count in times.items() if count > 1)
        raise ValueError(f"{shown(twice)} is given twice")
    return found


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def _integer(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= (value := int(digits)) < 2**63:
        raise ValueError(f"{digits[:20]}… is beyond 64 bits")
    return value


def _real(digits: str) -> float:
    if (value := float(digits)) in (float("inf"), float("-inf")):
        raise ValueError(f"{digits[:20]} is beyond the range of numbers")
    return value


def open_regular(file: str | Path) -> BufferedReader:
    """A file opened for reading.

    OSError for a pipe or a device, which could block or never end, and for what Git LFS leaves in
    the place of a large file that was not fetched.
    """
    handle = os.open(file, READ)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file")
    opened = os.fdopen(handle, "rb")
    if opened.peek(len(_POINTER)).startswith(_POINTER):
        opened.close()
        raise OSError(errno.EINVAL, "a pointer of Git LFS, not the file; fetch it: git lfs pull")
    return opened


def read_bytes(file: Path, limit: int = JSON_LIMIT) -> bytes:
    """All bytes of a regular file; OSError for one of more than `limit`, before it is read."""
    with open_regular(file) as opened:
        size = os.fstat(opened.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"found {size} bytes, expected at most {limit}")
        return opened.read(size)  # read(limit) would take memory for the limit


def read_object(file: Path, missing: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises MespRefError for a file that is not there (`missing` says what was expected), too large,
    not JSON, or JSON of another kind.
    """
    try:
        values = parse_json(read_bytes(file))
    except FileNotFoundError:
        raise MespRefError(f"{file}: not found, expected {missing}") from None
    except OSError as error:
        raise MespRefError(f"{file}: not readable as JSON: {error.strerror or error}") from None
    except ValueError as error:
        raise MespRefError(f"{file}: not readable as JSON: {error}") from None
    if not isinstance(values, dict):
        raise MespRefError(f"{file}: found {type(values).__name__}, expected a JSON object")
    return values


def inside(folder: str | Path, name: str) -> Path:
    """The path of `name` in a folder.

    Raises MespRefError for a name that leads out of it: absolute, with .., or a link to another
    place. A link from a snapshot of the Hugging Face cache to the cache's own blobs is inside.
    """
    path, root = Path(folder) / name, Path(os.path.realpath(folder))
    parts = PurePosixPath(name).parts
    if not parts or parts[0] == "/" or ".." in parts or "\\" in name or "\0" in name:
        raise MespRefError(f"{folder}: found {shown(name)}, expected a file inside the folder")
    target = Path(os.path.realpath(path))
    blobs = [p.parent / "blobs" for p in root.parents if p.name == "snapshots"]
    if not (target.is_relative_to(root) or target.parent in blobs):
        raise MespRefError(
            f"{path}: found a link to {target}, expected a file inside the folder; replace it "
            "with a copy if you trust it"
        )
    return path

"""What mesp-ref wrote in a folder, file by file: only that may be replaced or removed again.

The manifest is a hidden file of the folder: {"format", "state", "files": {name: [[size, sha256]]}}.
A file is ours while its content is listed; two contents are listed while one takes the other's
place, so that a kill leaves either. A folder inside with a manifest of its own answers for itself.
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mesp_ref.files.aside import aside_name, is_aside, leftovers, sync
from mesp_ref.files.strict import NO_LINK, READ, parse_json, read_bytes

NAME = ".mesp-ref.json"
_FORMAT = "mesp-ref manifest 1"
_STATES = ("unfinished", "pending", "complete", "retired")
_PIECE = 1 << 20

Content = tuple[int, str]  # bytes, SHA-256
Ours = Callable[[str, Path], bool]


def nothing_more(name: str, path: Path) -> bool:
    """Of an `Ours`: no file is ours beyond those that are listed."""
    return False


def content(path: Path) -> Content:
    """Size and SHA-256 of a regular file, which is not followed if it is a link."""
    if not NO_LINK and path.is_symlink():
        raise OSError(errno.ELOOP, "found a link", str(path))
    digest, size = hashlib.sha256(), 0
    handle = os.open(path, READ | NO_LINK)
    with os.fdopen(handle, "rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            size += len(piece)
    return size, digest.hexdigest()


class Manifest:
    """The list of a folder's files.

    state    unfinished: of a folder aside that is still being written, so all in it is ours;
             pending: of a run that takes another's place when it is complete; complete;
             retired: of a folder that is being removed
    """

    def __init__(self, folder: Path, state: str = "complete"):
        self.folder, self.state = folder, state
        self.files: dict[str, list[Content]] = {}
        self._seen: dict[str, tuple[int, ...]] = {}  # what was read, so that it is read once

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """The manifest of a folder; None where there is none that we could have written.

        Raises    OSError where there may be one that cannot be read
        """
        file = folder / NAME
        try:
            if not stat.S_ISREG(file.lstat().st_mode):
                return None
            values = parse_json(read_bytes(file))
            if values["format"] != _FORMAT or values["state"] not in _STATES:
                return None
            found = cls(folder, values["state"])
            for name, contents in values["files"].items():
                found.files[name] = [(int(size), str(digest)) for size, digest in contents]
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        return found

    @property
    def _writing(self) -> bool:
        """Whether all in the folder is ours: never in one that has been given a name of its own."""
        return self.state == "unfinished" and is_aside(self.folder.name)

    @classmethod
    def begun(cls, folder: Path, ours: Ours = nothing_more) -> "Manifest | None":
        """As `read`; an unfinished one where nothing lies yet but what comes before a manifest."""
        found = cls.read(folder)
        if found is None and folder.is_dir() and not folder.is_symlink():
            names = os.listdir(folder)  # noqa: PTH208
            if all(is_aside(name, NAME) or ours(name, folder / name) for name in names):
                return cls(folder, "unfinished")
        return found

    def save(self, durable: bool = True) -> None:
        """Write the manifest, the old one or the new one at every moment."""
        values = {"format": _FORMAT, "state": self.state, "files": self.files}
        for left in leftovers(self.folder / NAME):  # of a process that was killed just here
            if left.is_file() and not left.is_symlink():
                left.unlink(missing_ok=True)
        aside = aside_name(self.folder / NAME)
        try:
            aside.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
            if durable:
                sync(aside)
            aside.replace(self.folder / NAME)
        finally:
            aside.unlink(missing_ok=True)

    def seal(self) -> None:
        """List every file that is there, each brought to the disk: the folder is complete."""
        folders = [self.folder]
        for path in sorted(self.folder.rglob("*")):
            if path.is_dir():
                folders.append(path)
            elif path != self.folder / NAME:
                sync(path)
                self.files[path.relative_to(self.folder).as_posix()] = [content(path)]
        self.state = "complete"
        self.save()
        for folder in folders:
            sync(folder)

    def foreign(self, ours: Ours = nothing_more) -> Iterator[str]:
        """What lies in the folder and is not ours, one by one: "name, which …".

        `ours` may know more: it is asked about regular files that are not as listed.
        """
        yield from self._foreign(self.folder, "", ours)

    def _foreign(self, folder: Path, prefix: str, ours: Ours) -> Iterator[str]:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        begun = self._writing or self.state == "retired"
        known = begun or any(name.startswith(prefix) for name in self.files)
        if prefix and not entries and not known:
            yield f"{prefix} (an empty folder)"
        for entry in entries:
            name, path = prefix + entry.name, folder / entry.name
            if entry.is_dir(follow_symlinks=False):
                own = Manifest.begun(path) if is_aside(entry.name) else Manifest.read(path)
                if own is not None:
                    yield from (f"{name}/{other}" for other in own.foreign())
                else:
                    yield from self._foreign(path, f"{name}/", ours)
            elif name != NAME and not self._lists(name, path, entry.stat(follow_symlinks=False)):
                if not entry.is_file(follow_symlinks=False):
                    yield f"{name} (a link, pipe or device)"
                elif not ours(name, path):
                    yield name if name not in self.files else f"{name} (changed since)"

    def _lists(self, name: str, path: Path, status: os.stat_result) -> bool:
        """Whether a file is there as it was written; it is read only if it changed since."""
        if not stat.S_ISREG(status.st_mode):
            return False
        if self._writing or is_aside(path.name):
            return True
        identity = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if self._seen.get(name) == identity:
            return True
        if status.st_size not in [size for size, _ in self.files.get(name, [])]:
            return False
        if content(path) not in self.files[name]:
            return False
        self._seen[name] = identity
        return True

    def remove(self, ours: Ours = nothing_more, *, keep_folder: bool = False) -> bool:
        """Remove what is ours, the manifest last, and the folder; False where something stays.

        A file is looked at once more before it goes: what changed since it was read stays.
        """
        with suppress(OSError):  # a full disk, for one: what is removed needs no record then
            if self.state != "unfinished":
                self.state = "retired"
                self.save(durable=False)
        with suppress(OSError):
            self._remove(self.folder, "", ours)
            if os.listdir(self.folder) in ([NAME], []):  # noqa: PTH208
                (self.folder / NAME).unlink(missing_ok=True)
                if not keep_folder:
                    self.folder.rmdir()
        return not self.folder.exists()

    def _remove(self, folder: Path, prefix: str, ours: Ours) -> None:
        for entry in list(os.scandir(folder)):
            name, path = prefix + entry.name, folder / entry.name
            if entry.is_dir(follow_symlinks=False):
                own = Manifest.begun(path) if is_aside(entry.name) else Manifest.read(path)
                if own is not None:
                    own.remove()
                else:
                    self._remove(path, f"{name}/", ours)
                    with suppress(OSError):
                        path.rmdir()
            elif (
                name != NAME
                and entry.is_file(follow_symlinks=False)
                and (self._lists(name, path, entry.stat(follow_symlinks=False)) or ours(name, path))
            ):
                path.unlink(missing_ok=True)

    @contextmanager
    def admitting(self, name: str, aside: Path) -> Iterator[None]:
        """List the content of `aside` under `name` while it takes its place there."""
        new = content(aside)
        self.files[name] = [new, *(old for old in self.files.get(name, []) if old != new)]
        self.save()
        yield
        self.files[name] = [new]
        self.save(durable=False)


def listed(path: Path) -> tuple[Manifest, str] | None:
    """The manifest, and the name in it, of a file that is about to be written; None for no folder
    of ours, and for one that is still being written and will be listed as a whole."""
    found: Any = Manifest.read(path.parent)
    if found is None or found.state == "unfinished":
        return None
    return found, path.name

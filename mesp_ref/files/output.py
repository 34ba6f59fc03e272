"""Outputs appear whole or not at all, and never in the place of what mesp-ref did not write.

A file is written aside, synced and renamed. A folder is written aside, listed in its manifest and
swapped with the old one, which is then removed file by file as its own manifest lists it.
"""

import os
import stat
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

from safetensors import SafetensorError

from mesp_ref.errors import MespRefError, MespRefWarning
from mesp_ref.files.aside import aside_name, claimed, is_aside, leftovers, swap, sync
from mesp_ref.files.manifest import Manifest, Ours, listed, nothing_more
from mesp_ref.files.names import copy_shared
from mesp_ref.files.strict import NO_LINK, inside

# What lies beside the weights of a checkpoint and belongs to the model, not to the weights.
COMPANIONS = (
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template*",
)

_LOOKS, _PAUSE = 50, 0.01
Inputs = Sequence[str | Path | None]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Whatever the system refuses becomes one line that names `path`."""
    try:
        yield
    except OSError as error:
        raise MespRefError(f"{path}: cannot be written: {error.strerror or error}") from None
    except SafetensorError as error:  # how the package tells of a full disk
        raise MespRefError(f"{path}: cannot be written: {error}") from None


def check_file(
    path: str | Path, overwrite: bool = True, inputs: Inputs = (), option: str = ""
) -> Path:
    """The place of a file to be written, which `option` named, before any work is done for it.

    Raises    MespRefError for a folder, a link, a pipe or device; for a file that is there, unless
              `overwrite`, and even then for one that is an input or lies in one
    """
    path = Path(path)
    with writing(path):
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:
            return path
    where = f"{path}: {option}" if option else path
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a link, pipe or device"
        raise MespRefError(f"{where}: found {kind}, expected the name of a file")
    if not overwrite:
        raise MespRefError(f"{where}: exists; name another file, or add --overwrite")
    for source in (Path(given) for given in inputs if given):
        if source.exists() and _lies_in(path, source):
            raise MespRefError(
                f"{where}: is, or lies in, {source}, which is read; name another place"
            )
    return path


def check_directory(
    path: str | Path, overwrite: bool = False, inputs: Inputs = (), ours: Ours = nothing_more
) -> Manifest | None:
    """The manifest of the folder to be replaced; None for a place where nothing is.

    Raises    MespRefError for a file or a link, for a folder that is not empty, unless
              `overwrite`, and even then for one that is an input or holds one, or that holds
              anything which no manifest of ours lists
    """
    path = Path(path)
    with writing(path):
        try:
            mode = path.lstat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not stat.S_ISDIR(mode):
            kind = "a link, which is not followed" if stat.S_ISLNK(mode) else "a file"
            raise MespRefError(f"{path}: found {kind}, expected a directory; name another place")
        entries = sorted(os.listdir(path))  # noqa: PTH208
        if not entries:
            return None
        if not overwrite:
            raise MespRefError(
                f"{path}: exists and is not empty; name another directory, or add --overwrite "
                "where mesp-ref wrote it"
            )
        for given in inputs:
            if given and Path(given).exists() and _lies_in(Path(given), path):
                raise MespRefError(f"{path}: holds {given}, which is read; name another directory")
        manifest = Manifest.read(path)
        if manifest is None:
            raise MespRefError(
                f"{path}: found {entries[0]} and no manifest, expected a directory that mesp-ref "
                "wrote; nothing was replaced, name another directory"
            )
        require_ours(manifest, ours)
    return manifest


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether a path is `folder` or below it, whatever links, cases and names of one file there are."""
    real = path.resolve()
    return any(place.samefile(folder) for place in (real, *real.parents))


def require_ours(manifest: Manifest, ours: Ours = nothing_more) -> None:
    """MespRefError for the first thing in the folder that its manifest does not list."""
    for name in manifest.foreign(ours):
        raise MespRefError(
            f"{manifest.folder}: found {name}, which mesp-ref did not write; nothing was replaced, "
            "move it or name another directory"
        )


@contextmanager
def write_aside(path: str | Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed to `path`.

    The file has the mode of the one it replaces, or what the umask leaves. In a folder with a
    manifest it is listed.

    Raises MespRefError when the file cannot be written, or as `check_file` does; the temporary
    file never stays behind.
    """
    path = Path(path)
    with writing(path), ExitStack() as stack:
        path.parent.mkdir(parents=True, exist_ok=True)
        recover(path)
        check_file(path, overwrite)
        aside = aside_name(path)
        stack.callback(aside.unlink, missing_ok=True)
        handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINK, 0o666)
        mode = os.fstat(handle).st_mode
        os.close(handle)
        stack.enter_context(claimed(aside))
        yield aside
        check_file(path, overwrite)
        if path.exists():
            mode = path.stat().st_mode
        aside.chmod(stat.S_IMODE(mode))  # save_file of safetensors makes a file of its own
        sync(aside)
        entry = listed(path)
        with entry[0].admitting(entry[1], aside) if entry else nullcontext():
            aside.replace(path)


@contextmanager
def new_directory(
    path: str | Path, *, overwrite: bool = False, inputs: Inputs = ()
) -> Iterator[Path]:
    """Yield a temporary directory beside `path` that becomes `path` on success.

    `inputs` are the files and folders that are read on the way. A directory inside one that is
    still being written is simply made.

    Raises MespRefError as `check_directory` does; on any failure what was there stays as it was.
    """
    path = Path(path)
    if any(is_aside(parent.name) for parent in path.absolute().parents):
        path.mkdir(parents=True, exist_ok=True)
        yield path
        return
    if path.name in ("", ".."):
        path = Path(os.path.realpath(path))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        recover(path)
        old = check_directory(path, overwrite, inputs)
        aside = aside_name(path)
        try:
            aside.mkdir()
            with claimed(aside):
                Manifest(aside, "unfinished").save(durable=False)
                yield aside
                Manifest(aside).seal()
                replace_directory(aside, path, old)
        finally:
            if (left := Manifest.begun(aside)) is not None:
                left.remove()


def replace_directory(
    new: Path, path: Path, old: Manifest | None, ours: Ours = nothing_more
) -> None:
    """Put the complete folder `new` at `path`, in one step; then remove the `old` one, if any.

    Raises    MespRefError when `old` holds by now what its manifest does not list
    """
    if path.exists():
        new.chmod(stat.S_IMODE(path.stat().st_mode))
    if old is None:
        new.rename(path)  # where an empty folder may be, and nothing else
        sync(path.parent)
        return
    require_ours(old, ours)
    old.folder = swap(new, path)
    sync(path.parent)
    if not old.remove(ours):
        _tell(f"{old.folder}: left of the old {path.name}, could not be removed; look into it")


def recover(path: Path, ours: Ours = nothing_more) -> None:
    """Put right what a killed process left beside `path`: a version back at its name, if there is
    none, and nothing of ours aside. What is not ours stays and is named in a warning."""
    for left in leftovers(path):
        with claimed(left) as free:
            if not free or not (left.is_dir() or left.is_file()):  # in use, or nobody can know
                continue
            if not left.is_dir():
                left.unlink(missing_ok=True)
                continue
            manifest = Manifest.begun(left)
            if manifest is not None and not any(manifest.foreign(ours)):
                _settle(manifest, path, ours)
            else:
                _tell(f"{left}: found beside {path.name}, holds what mesp-ref did not write")


def await_folder(path: Path) -> None:
    """Before a folder is read: if it is just being replaced in two renames, wait for the second;
    if that was killed between them, put it back."""
    for _ in range(_LOOKS):
        if path.exists() or not leftovers(path):
            return
        recover(path)
        time.sleep(0 if path.exists() else _PAUSE)


def _settle(left: Manifest, path: Path, ours: Ours) -> None:
    """What becomes of a folder that lies aside of `path` and is all ours."""
    if left.state in ("unfinished", "retired") or Manifest.read(path) is not None:
        if not left.remove(ours):
            _tell(f"{left.folder}: left by a run that was killed, cannot be removed")
    elif not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir())):
        left.folder.rename(path)
        _tell(f"{path}: put back; replacing it had been cut short")
    else:
        _tell(
            f"{left.folder}: a whole version of {path.name}, which is not ours by now; choose one"
        )


def _tell(message: str) -> None:
    warnings.warn(MespRefWarning(message), stacklevel=3)


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template and generation settings of one checkpoint to another.

    Raises MespRefError for a link that leads out of `source`: the copy may be published.
    """
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            if inside(source, file.name).is_file():
                copy_shared(file, target / file.name)

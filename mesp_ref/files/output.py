"""Files appear whole or not at all: write aside, fsync, rename."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from mesp_ref.errors import MespRefError
from mesp_ref.files.names import copy_shared
from mesp_ref.files.strict import inside

# What lies beside the weights of a checkpoint and belongs to the model, not to the weights.
_COMPANIONS = (
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template*",
)


@contextmanager
def write_aside(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed to `path`.

    Raises MespRefError when the file cannot be written; the temporary file never stays behind.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise MespRefError(f"{path}: cannot be written: {error.strerror}") from None
    aside = Path(name)
    try:
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.chmod(0o644)
        aside.replace(path)
    except OSError as error:
        raise MespRefError(f"{path}: cannot be written: {error.strerror or error}") from None
    except SafetensorError as error:  # how the package tells of a full disk
        raise MespRefError(f"{path}: cannot be written: {error}") from None
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def new_directory(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary directory beside `path` that becomes `path` on success.

    Raises MespRefError when `path` exists and is not an empty directory, unless `overwrite`;
    on any failure what was there before stays as it was.
    """
    path = Path(path)
    if path.exists() and not overwrite and not (path.is_dir() and not any(path.iterdir())):
        raise MespRefError(f"{path}: exists and is not empty; name another directory")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise MespRefError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        yield aside
        aside.chmod(0o755)
        if path.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
            path.replace(retired / "old")
            aside.replace(path)
            shutil.rmtree(retired)
        else:
            aside.replace(path)
    except OSError as error:
        raise MespRefError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template and generation settings of one checkpoint to another.

    Raises MespRefError for a link that leads out of `source`: the copy may be published.
    """
    for pattern in _COMPANIONS:
        for file in source.glob(pattern):
            if inside(source, file.name).is_file():
                copy_shared(file, target / file.name)

"""Shards: files that hold one data set together, numbered in their names, and a name for all of them.

`train-00000-of-00002.parquet` and `train-00001-of-00002.parquet` are `train-*-of-00002.parquet`.
"""

import fnmatch
import re
from collections.abc import Iterable
from pathlib import Path

from mesp_ref.errors import MespRefError

# A stem, a number, perhaps how many there are, perhaps a digest, the kind of file.
_SHARD = re.compile(r"(.*?)(\d+)(-of-(\d+))?(-[0-9a-f]{16})?((?:\.[A-Za-z][A-Za-z0-9]*)+)")


def family(name: str) -> str | None:
    """The name of all shards that a file's name belongs to, the star in the place of its number."""
    found = _SHARD.fullmatch(name)
    if found is None:
        return None
    stem, _, of, _, digest, kind = found.groups()
    return f"{stem}*{of or ''}{'-*' if digest else ''}{kind}"


def families(names: Iterable[str]) -> dict[str, list[str]]:
    """By the name of all: shards in the order of their numbers, and files that are none."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(family(name) or name, []).append(name)
    return {pattern: sorted(group, key=_number) for pattern, group in found.items()}


def _number(name: str) -> tuple[int, str]:
    found = _SHARD.fullmatch(name)
    return (int(found[2]) if found else -1), name


def require_all(where: object, pattern: str, names: list[str]) -> None:
    """Raises MespRefError where a number is missing, or comes twice."""
    found = [_number(name)[0] for name in names]
    of = re.search(r"-of-(\d+)", pattern)
    first = min(found[0], 1)
    expected = list(range(first, first + (int(of[1]) if of else len(found))))
    if found != expected:
        missing = sorted(set(expected) - set(found))
        what = f"no shard {missing[0]}" if missing else "a number twice, or one too many"
        raise MespRefError(
            f"{where}: {pattern}: found {what} among {len(found)} files, expected {len(expected)} "
            f"numbered from {first}; fetch what is missing, or name one file"
        )


def shards(path: Path) -> list[Path]:
    """The files that a path with a star in its name stands for, in order.

    Raises MespRefError for none, for several data sets, and where some are missing
    """
    folder = path.parent
    held = sorted(p.name for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []
    groups = families(name for name in held if fnmatch.fnmatchcase(name, path.name))
    if len(groups) != 1:
        shown = f" ({', '.join(list(groups)[:3])})" if groups else ""
        raise MespRefError(
            f"{path}: found {len(groups)} sets of files{shown}, expected the shards of one, such as "
            "train-*-of-00003.parquet"
        )
    ((pattern, names),) = groups.items()
    if "*" in pattern:
        require_all(folder, pattern, names)
    return [folder / name for name in names]

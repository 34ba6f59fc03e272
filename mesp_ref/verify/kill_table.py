"""The stored kill table: every seeded bug against every check, as `mesp-ref mutants` printed it."""

from pathlib import Path
from typing import NamedTuple

from mesp_ref.errors import MespRefError

_PACKAGE = Path(__file__).resolve().parents[1]
_PLACES = (_PACKAGE / "verify" / "kill-table.md", _PACKAGE.parent / "docs" / "kill-table.md")


class Row(NamedTuple):
    """A bug: its name, its kind (backward, forward or method), and by check whether it was rejected."""

    bug: str
    kind: str
    killed: dict[str, bool]


def kill_table() -> list[Row]:
    """A row for each bug. The table is beside the package in a clone, inside it once installed.

    Raises MespRefError when it is missing
    """
    for place in _PLACES:
        if place.is_file():
            lines = place.read_text(encoding="utf-8").splitlines()
            return _rows([line for line in lines if line.startswith("|")])
    raise MespRefError(
        f"{_PLACES[-1]}: not found, expected the kill table; restore it, or write it with "
        "mesp-ref mutants"
    )


def _rows(lines: list[str]) -> list[Row]:
    """Rows of the first table of a page."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    (_, _, *checks), rows = cells[0], [row for row in cells[2:] if len(row) == len(cells[0])]
    return [
        Row(bug, kind, {c: m == "killed" for c, m in zip(checks, marks, strict=True)})
        for bug, kind, *marks in rows
    ]

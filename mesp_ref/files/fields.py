"""Fields of JSON files that other programs write: each is known and typed, or refused by name.

A table maps a field's name to its reader. A reader takes the value and returns it as it is used, or
raises Unfit. `anything` reads fields that change no number; what no table knows is refused, since a
model or adapter might compute something else with it. null is how such files say "not given": a
field that is null counts as absent, known or not.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from mesp_ref.errors import MespRefError, shown

Reader = Callable[[Any], Any]
Table = Mapping[str, Reader]

_UNKNOWN = "no such field (it might change what is computed; remove it if it does not)"
_LARGEST = 2**31 - 1
_FINITE = sys.float_info.max


class Unfit(Exception):
    """What was found, what was expected, and the field where, from the outermost object inwards."""

    def __init__(self, found: Any, expected: str, path: tuple[str, ...] = ()):
        super().__init__(expected)
        self.found, self.expected, self.path = found, expected, path


def read_fields(
    values: Mapping[str, Any], table: Table, source: object, why: str = ""
) -> dict[str, Any]:
    """All fields of an object that are not null, read by their table.

    Raises MespRefError naming `source` and the field for one that is unknown or does not fit; `why`
    ends the message.
    """
    try:
        found: dict[str, Any] = record(table)(values)
    except Unfit as error:
        path = ".".join(map(_plain, error.path))
        raise MespRefError(
            f"{source}: {path}: found {shown(error.found)}, expected {error.expected}"
            + (why and f"; {why}")
        ) from None
    return found


def _plain(name: str) -> str:
    """A field's name as a message has it; what a stranger made up is quoted and cut."""
    return name if len(name) <= 60 and name.isprintable() and name.strip() else shown(name)


def rows(reader: Reader, names: str) -> dict[str, Reader]:
    """Rows of a table for all of some names, which blanks separate."""
    return dict.fromkeys(names.split(), reader)


def harmless(names: str) -> dict[str, Reader]:
    """Rows of a table for fields that change no number, whatever they hold."""
    return rows(anything, names)


def anything(value: Any) -> Any:
    return value


def record(table: Table) -> Reader:
    """An object with the fields of a table; the known ones are judged first, in its order."""

    def read(value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise Unfit(value, "an object")
        given = {name: item for name, item in value.items() if item is not None}
        found = {}
        for name in [*(n for n in table if n in given), *(n for n in given if n not in table)]:
            if name not in table:
                raise Unfit(given[name], _UNKNOWN, (name,))
            try:
                found[name] = table[name](given[name])
            except Unfit as error:
                raise Unfit(error.found, error.expected, (name, *error.path)) from None
        return found

    return read


def exactly(*allowed: Any) -> Reader:
    """One of some values, in type too: neither 0 nor "false" is False."""

    def read(value: Any) -> Any:
        if not any(type(value) is type(item) and value == item for item in allowed):
            raise Unfit(value, " or ".join(map(repr, allowed)))
        return value

    return read


def integer(least: int = 1, most: int = _LARGEST) -> Reader:
    expected = f"{'a positive' if least == 1 else 'an'} integer up to {most}"

    def read(value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            raise Unfit(value, expected)
        return value

    return read


def number(least: float = -_FINITE, most: float = _FINITE) -> Reader:
    """A finite number, not a text or true; as a float."""
    expected = f"a number from {least:g} to {most:g}" if least < most else f"{least:g}"
    if (least, most) == (-_FINITE, _FINITE):
        expected = "a finite number"

    def read(value: Any) -> float:
        if type(value) not in (int, float) or not least <= value <= most:
            raise Unfit(value, expected)
        return float(value)

    return read


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise Unfit(value, "a text")
    return value


def boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise Unfit(value, "true or false")
    return value


def list_of(reader: Reader, most: int = _LARGEST) -> Reader:
    def read(value: Any) -> list[Any]:
        if not isinstance(value, list) or len(value) > most:
            raise Unfit(value, "a list")
        return [reader(item) for item in value]

    return read


def either(expected: str, *readers: Reader) -> Reader:
    """What the first reader that fits makes of a value."""

    def read(value: Any) -> Any:
        for reader in readers:
            try:
                return reader(value)
            except Unfit:
                continue
        raise Unfit(value, expected)

    return read


def empty(value: Any) -> Any:
    """A feature that is not used: null, false, or an empty list, object or text."""
    if value is not False and value not in ([], {}, ""):
        raise Unfit(value, "null or nothing in it")
    return value


token = integer(0)
tokens = either("a token id or a list of them", token, list_of(token))

"""The one exception a user of mesp_ref can cause, and how texts of strangers are quoted."""

import reprlib
import unicodedata
from collections.abc import Callable
from typing import Any

_LONGEST = 1000  # characters of a line; a name in a file may have millions
_NAME = 120  # of a name; PEFT's longest tensor names have 80
_TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # the direction of writing
Stays = Callable[[str], bool]
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 2, 60, 60, 40


def shown(value: object) -> str:
    """A value as an error message quotes it: `repr`, but short whatever it holds."""
    return _SHORT.repr(value)


def escaped(text: str, limit: int | None = _LONGEST, *, stays: Stays = str.isprintable) -> str:
    """Text of a stranger as one line that no terminal obeys.

    Characters that do not `stays` are shown as Python would escape them: terminal codes, line ends,
    marks that turn the direction of writing, halves of surrogate pairs. What is longer than `limit`
    loses its middle, so that the end can still be read.
    """
    if limit is not None and len(text) > limit:
        half = limit // 2
        return (
            f"{escaped(text[:half], None, stays=stays)}…{escaped(text[-half:], None, stays=stays)}"
        )
    return "".join(c if stays(c) else _code(c) for c in text)


def named(name: str) -> str:
    """A tensor's or a case's name as it stands in a line: `escaped`, short, without white space.

    With spaces a name could go on with words of its own, such as "dx: ok".
    """
    return escaped(name, _NAME, stays=lambda c: c.isprintable() and c != " ")


def prose(text: str) -> str:
    """Text of a model as it is printed: line ends, tabs and joiners stay, terminal codes do not."""
    return escaped(text, None, stays=_is_writing)


def _is_writing(c: str) -> bool:
    """Whether a character belongs to somebody's script, not to a terminal."""
    if c.isprintable() or c in "\n\t":
        return True
    return unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") and c not in _TURNS


def _code(c: str) -> str:
    return r"\x20" if c == " " else c.encode("unicode_escape").decode()


class MespRefError(ValueError):
    """A mistake in what the user gave: a file, a field, a tensor, an argument.

    The message is one line that names where, what was found, what was expected and what to do.
    The command line prints that line and exits with code 2. Names and texts of a stranger's file
    may stand in it: it is `escaped`.
    """

    def __init__(self, message: str):
        super().__init__(escaped(message))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and sent to other processes as it is, whatever a subclass's `__init__` takes."""
        return _again, (type(self), self.args, vars(self))


def _again(kind: type[MespRefError], args: tuple[Any, ...], more: dict[str, Any]) -> MespRefError:
    error = kind.__new__(kind, *args)
    error.args = args
    vars(error).update(more)
    return error


class MespRefWarning(UserWarning):
    """Something a user should know that ends nothing, in one line."""

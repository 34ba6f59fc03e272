"""The one exception a user of mesp_ref can cause, and how it quotes what was found."""

import reprlib
from typing import Any

_LONGEST = 1000  # characters; a name in a file may have millions
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 2, 60, 60, 40


def shown(value: object) -> str:
    """A value as an error message quotes it: `repr`, but short whatever it holds."""
    return _SHORT.repr(value)


class MespRefError(ValueError):
    """A mistake in what the user gave: a file, a field, a tensor, an argument.

    The message is one line that names where, what was found, what was expected and what to do.
    The command line prints that line and exits with code 2. Names and texts of a stranger's file
    may stand in it: what cannot be printed, line ends and terminal codes too, is shown escaped.
    """

    def __init__(self, message: str):
        shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message[:_LONGEST])
        super().__init__(shown if len(message) <= _LONGEST else f"{shown}…")

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and sent to other processes as it is, whatever a subclass's `__init__` takes."""
        return _again, (type(self), self.args, vars(self))


def _again(kind: type[MespRefError], args: tuple[Any, ...], more: dict[str, Any]) -> MespRefError:
    error = kind.__new__(kind, *args)
    error.args = args
    vars(error).update(more)
    return error

"""Realistic wrong implementations, each an edit of the source of the right one.

A bug names a function, a piece of its text and what stands there instead. So a bug is one line, is
always a bug of today's code, and stops the suite when the code it was about has changed.
"""

import inspect
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

from mesp_ref.verify.planted import original


class Bug(NamedTuple):
    """A wrong implementation.

    kind       "backward": the forward is right; "forward": the backward may fit it; "method"
    edits      (path, old text, new text), all of them together
    subjects   the rows of the registry it shows in, "model" or "mezo"
    """

    name: str
    kind: str
    subjects: tuple[str, ...]
    edits: tuple[tuple[str, str, str], ...]

    def functions(self) -> dict[str, Any]:
        """What to plant: the edited functions by path."""
        texts: dict[str, str] = {}
        for path, old, new in self.edits:
            text = texts.get(path) or source(original(path))
            if text.count(old) != 1:
                raise LookupError(f"{self.name}: {path} has {text.count(old)} times {old!r}")
            texts[path] = text.replace(old, new)
        return {path: compiled(path, text) for path, text in texts.items()}


def source(target: Any) -> str:
    """Source of a function, method or property, indented as at top level."""
    function: Any = target.fget if isinstance(target, property) else target
    return textwrap.dedent(inspect.getsource(function))


def compiled(path: str, text: str) -> Callable[..., Any]:
    """The function that `text` defines, among the globals of the one at `path`."""
    target = original(path)
    function: Any = target.fget if isinstance(target, property) else target
    namespace: dict[str, Any] = {}
    code = compile(text, f"<edited {path}>", "exec", dont_inherit=True)
    exec(code, function.__globals__, namespace)
    result: Callable[..., Any] = namespace[function.__name__]
    return result


def bug(name: str, kind: str, subjects: str, *edits: tuple[str, str, str]) -> Bug:
    return Bug(name, kind, tuple(subjects.split()), edits)


def one(path: str, kind: str, subjects: str, *rows: tuple[str, str, str]) -> list[Bug]:
    """Bugs of one function: name, old text, new text."""
    return [bug(name, kind, subjects, (path, old, new)) for name, old, new in rows]

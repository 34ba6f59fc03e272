"""gradcheck over drawn examples: a decorator that makes a Hypothesis test of a pair in one line.

@gradcheck_property(rmsnorm_bwd, "n c", "c")
def rmsnorm(x, w): ...

test_rmsnorm = rmsnorm.test          # or: pytest --mesp-gradcheck my.module
"""

import inspect
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from mesp_ref.errors import MespRefError
from mesp_ref.verify.gradcheck import gradcheck
from mesp_ref.verify.strategies import shapes, values
from mesp_ref.verify.strategies.shapes import TILES
from mesp_ref.verify.tree import leaves

KEPT = ".mesp-gradcheck"  # directory of failing examples, below the one where the test runs


def arguments(*axes: str, tiles: Sequence[int] = TILES) -> st.SearchStrategy[tuple[Any, ...]]:
    """Arrays whose axes are named: arguments("n c", "c") draws x [n, c] and w [c] that fit.

    A number stands for itself, "" for a scalar. Raises MespRefError where nothing is named.
    """
    if not axes:
        raise MespRefError('arguments: found no axes, expected one string per argument, as "n c"')
    names = list(dict.fromkeys(a for each in axes for a in each.split() if not a.isdigit()))

    @st.composite
    def drawn(draw: st.DrawFn) -> tuple[Any, ...]:
        lengths = dict(zip(names, draw(shapes(len(names), tiles=tiles)), strict=True))
        found = [
            tuple(int(a) if a.isdigit() else lengths[a] for a in each.split()) for each in axes
        ]
        return tuple(draw(values(shape)) for shape in found)

    return drawn()


def pasted(value: Any) -> str:
    """An argument as one writes it, arrays in lists and dictionaries too."""
    if isinstance(value, np.ndarray):
        plain = value.dtype.kind in "biuf"
        numbers = (value if plain else np.asarray(value, np.float64)).tolist()
        return f"np.array({numbers}, dtype={'np' if plain else 'ml_dtypes'}.{value.dtype})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {pasted(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        parts = ", ".join(map(pasted, value))
        return f"[{parts}]" if isinstance(value, list) else f"({parts},)" if value else "()"
    return repr(value)


def _origin(function: Callable[..., Any], role: str) -> str:
    """The import that brings a function back, or nothing where it has no name of its own."""
    module, name = getattr(function, "__module__", None), getattr(function, "__name__", "")
    known = getattr(sys.modules.get(module or ""), name, None) is function
    return f"; from {module} import {name} as {role}" if known and module != "__main__" else ""


def to_paste(
    forward: Callable[..., Any], backward: Callable[..., Any], args: Sequence[Any], number: int,
    **options: Any,
) -> str:  # fmt: skip
    """A failing example in three lines that run: with many numbers they are read from the kept file.

    Functions without a place to import them from stand there as forward and backward.
    """
    many = sum(leaf.size for _, leaf in leaves(tuple(args)) if isinstance(leaf, np.ndarray)) > 64
    written = pasted(tuple(args))
    narrow = "; import ml_dtypes" if "ml_dtypes." in written else ""
    more = "".join(
        f", {k}={v!r}" for k, v in options.items() if isinstance(v, str | tuple | bool | float)
    )
    name = _name(forward)
    return (
        f"import numpy as np; from mesp_ref.verify import gradcheck{narrow}; "
        f"from numpy import inf, nan{_origin(forward, 'forward')}{_origin(backward, 'backward')}\n"
        + (f"from mesp_ref.verify.drawn import kept; args, _ = kept({name!r})\n" if many
           else f"args = {written}\n")
        + f"print(gradcheck(forward, backward, args, seed={number}{more}))"
    )  # fmt: skip


def _name(forward: Callable[..., Any]) -> str:
    return getattr(forward, "__name__", "pair").strip("<>")


def _stored(value: Any) -> Any:
    """What JSON can hold of an argument; arrays with their dtype, tuples and dictionaries as such."""
    if isinstance(value, np.ndarray):
        numbers = value if value.dtype.kind in "biuf" else np.asarray(value, np.float64)
        return {
            "dtype": str(value.dtype), "shape": list(value.shape), "values": numbers.ravel().tolist()
        }  # fmt: skip
    if isinstance(value, dict):
        return {"dict": [[k, _stored(v)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_stored(v) for v in value]}
    return [_stored(v) for v in value] if isinstance(value, list) else value


def _restored(value: Any) -> Any:
    """The other way."""
    if isinstance(value, list):
        return [_restored(v) for v in value]
    if not isinstance(value, dict):
        return value
    if "dict" in value:
        return {k: _restored(v) for k, v in value["dict"]}
    if "tuple" in value:
        return tuple(_restored(v) for v in value["tuple"])
    if value["dtype"].startswith(("bfloat", "float8")):
        import ml_dtypes  # noqa: F401  NumPy knows its types by name from then on
    return np.array(value["values"]).astype(value["dtype"]).reshape(value["shape"])


def keep(name: str, args: Sequence[Any], number: int) -> Path:
    """Writes a failing example where the next run looks first."""
    folder = Path(KEPT)
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    stored = [_stored(a) for a in args]
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps({"seed": number, "args": stored}), encoding="utf-8")
    aside.replace(path)
    return path


def kept(name: str) -> tuple[tuple[Any, ...], int] | None:
    """The example that failed last time, or None.

    Raises MespRefError where the file is not one that keep() wrote.
    """
    path = Path(KEPT) / f"{name}.json"
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        args = [_restored(a) for a in stored["args"]]
        return tuple(args), int(stored["seed"])
    except (KeyError, TypeError, ValueError) as error:
        raise MespRefError(f"{path}: found no kept example ({error}); delete it") from None


def make_test(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    examples: st.SearchStrategy[tuple[Any, ...]],
    max_examples: int = 100,
    **options: Any,
) -> Callable[[], None]:
    """A test of the pair: the example kept from the last failure first, then drawn ones.

    A failing example is shrunk, printed as lines to paste, and kept in .mesp-gradcheck; a kept one
    that passes again is removed.
    """
    name = _name(forward)
    names = options.pop("names", None) or _names(forward)
    last: dict[str, Any] = {}

    def judged(args: tuple[Any, ...], number: int) -> None:
        usual = names if names and len(names) == len(args) else None
        result = gradcheck(forward, backward, args, names=usual, seed=number, **options)
        if not result.passed:
            last.update(args=args, seed=number)
            again = to_paste(forward, backward, args, number, **options)
            raise AssertionError(f"{result}\nTo see it again:\n{again}")

    @seed(0)
    @settings(max_examples=max_examples, deadline=None, database=None)
    @given(args=examples, number=st.integers(0, 2**16))
    def drawn(args: tuple[Any, ...], number: int) -> None:
        judged(args, number)

    def test() -> None:
        before = kept(name)
        try:
            if before is not None:
                judged(*before)
                (Path(KEPT) / f"{name}.json").unlink()
            drawn()
        except AssertionError:
            if last:
                keep(name, last["args"], last["seed"])
            raise

    test.__name__ = test.__qualname__ = f"test_gradient_of_{name}"
    return test


def _names(forward: Callable[..., Any]) -> tuple[str, ...]:
    try:
        parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):  # a builtin
        return ()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


def gradcheck_property(
    backward: Callable[..., Any],
    *axes: str,
    examples: st.SearchStrategy[tuple[Any, ...]] | None = None,
    tiles: Sequence[int] = TILES,
    max_examples: int = 100,
    **options: Any,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a forward: forward.test is then a Hypothesis test of it with `backward`.

    axes      one string per argument: "n c" is an array of two axes; equal names, equal lengths
    examples  a strategy of argument tuples instead, for arguments that are no plain arrays
    tiles     lengths that kernels are cut at; drawn lengths lie around them
    options   those of gradcheck
    """

    def decorated(forward: Callable[..., Any]) -> Callable[..., Any]:
        drawn = arguments(*axes, tiles=tiles) if examples is None else examples
        test = make_test(forward, backward, drawn, max_examples, **options)
        setattr(forward, "test", test)  # noqa: B010  a function has no such attribute for mypy
        return forward

    return decorated

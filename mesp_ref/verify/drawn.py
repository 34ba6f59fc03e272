"""gradcheck over drawn examples: a decorator that makes a Hypothesis test of a pair in one line.

@gradcheck_property(rmsnorm_bwd, "n c", "c")
def rmsnorm(x, w): ...

test_rmsnorm = rmsnorm.test          # or: pytest --mesp-gradcheck my.module
"""

import inspect
import json
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
    """An argument as one writes it: small arrays in full, others by their first entries."""
    if isinstance(value, np.ndarray):
        numbers = np.asarray(value, np.float64) if value.dtype.kind not in "biuf" else value
        if value.size > 64:
            first = numbers.reshape(-1)[:8].tolist()
            return f"np.resize(np.array({first}, np.{value.dtype}), {value.shape})  # begins so"
        return f"np.array({numbers.tolist()}, dtype=np.{value.dtype})"
    return repr(value)


def to_paste(args: Sequence[Any], number: int) -> str:
    """A failing example in three lines."""
    lines = ", ".join(pasted(a) for a in args)
    return (
        "nan, inf = float('nan'), float('inf')\n"
        f"args = ({lines},)\n"
        f"print(gradcheck(forward, backward, args, seed={number}))"
    )


def keep(name: str, args: Sequence[Any], number: int) -> Path:
    """Writes a failing example where the next run looks first."""
    folder = Path(KEPT)
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    stored = [
        {"dtype": str(a.dtype), "shape": list(a.shape), "values": np.asarray(a).ravel().tolist()}
        if isinstance(a, np.ndarray) else a
        for a in args
    ]  # fmt: skip
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
        args = [
            np.array(a["values"], a["dtype"]).reshape(a["shape"]) if isinstance(a, dict) else a
            for a in stored["args"]
        ]
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
    name = getattr(forward, "__name__", "pair").strip("<>")
    names = options.pop("names", None) or _names(forward)
    last: dict[str, Any] = {}

    def judged(args: tuple[Any, ...], number: int) -> None:
        usual = names if names and len(names) == len(args) else None
        result = gradcheck(forward, backward, args, names=usual, seed=number, **options)
        if not result.passed:
            last.update(args=args, seed=number)
            raise AssertionError(f"{result}\nTo see it again:\n{to_paste(args, number)}")

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

"""pytest --mesp-gradcheck module[:pairs] checks every decorated forward, or every pair, of a module.

pairs is a list of (forward, backward, what they are tried with): "n c", "c", …, the axes of every
argument; or a Hypothesis strategy of arguments; or the arguments of one call, in a tuple.
"""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest

_FORM = (
    '(forward, backward, "n c", "c", …), or a strategy or a tuple of arguments in place of the axes'
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """--mesp-gradcheck, which may be given more than once."""
    parser.getgroup("mesp_ref").addoption(
        "--mesp-gradcheck", action="append", default=[], metavar="MODULE[:PAIRS]",
        help="check the gradients of a module's decorated forwards, or of its list of pairs",
    )  # fmt: skip


class GradcheckItem(pytest.Item):
    """One pair."""

    def __init__(self, *, test: Any, **more: Any):
        super().__init__(**more)
        self.test = test

    def runtest(self) -> None:
        """Draws examples and judges them."""
        self.test()

    def repr_failure(self, excinfo: Any, style: Any = None) -> Any:
        """The report of gradcheck alone, with the lines to paste."""
        if isinstance(excinfo.value, AssertionError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        """Where it belongs."""
        return self.path, None, self.name


def _tests(module: Any, pairs: str) -> Iterator[tuple[str, Any]]:
    from mesp_ref.verify.drawn import make_test

    if not pairs:
        for name, value in vars(module).items():
            if callable(value) and callable(getattr(value, "test", None)):
                yield name, value.test
        return
    for pair in getattr(module, pairs):
        if not isinstance(pair, tuple | list) or len(pair) < 3 or not all(map(callable, pair[:2])):
            raise ValueError(f"found {pair!r:.60}, expected {_FORM}")
        forward, backward, *given = pair
        name = getattr(forward, "__name__", "pair")
        yield name, make_test(forward, backward, _examples(given))


def _examples(given: list[Any]) -> Any:
    """A strategy of arguments, from what stands behind a pair."""
    from hypothesis import strategies as st

    from mesp_ref.verify.drawn import arguments

    if all(isinstance(each, str) for each in given):
        return arguments(*given)
    if len(given) == 1 and isinstance(given[0], st.SearchStrategy):
        return given[0]
    if len(given) == 1 and isinstance(given[0], tuple):
        return st.just(given[0])
    raise ValueError(f"found {given!r:.60} behind a pair, expected {_FORM}")


def pytest_collection_modifyitems(session: Any, config: Any, items: list[Any]) -> None:
    """Adds one item per pair to what was collected."""
    for wanted in config.getoption("--mesp-gradcheck"):
        name, _, pairs = wanted.partition(":")
        try:
            found = list(_tests(importlib.import_module(name), pairs))
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise pytest.UsageError(f"--mesp-gradcheck {wanted}: {error}") from None
        if not found:
            raise pytest.UsageError(
                f"--mesp-gradcheck {wanted}: found no pair, expected forwards decorated with "
                "gradcheck_property, or MODULE:LIST"
            )
        items.extend(
            GradcheckItem.from_parent(session, name=f"gradient of {each}", test=test)
            for each, test in found
        )

"""pytest --mesp-gradcheck module[:pairs] checks every decorated forward, or every pair, of a module.

pairs is a list of (forward, backward, "n c", "c", …), the axes of every argument after the pair.
"""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest


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
    from mesp_ref.verify.drawn import arguments, make_test

    if not pairs:
        for name, value in vars(module).items():
            if callable(value) and callable(getattr(value, "test", None)):
                yield name, value.test
        return
    for forward, backward, *axes in getattr(module, pairs):
        yield forward.__name__, make_test(forward, backward, arguments(*axes))


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

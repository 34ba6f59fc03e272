"""Workers: threads that share the work of a block, each with one BLAS thread of its own.

A BLAS with several threads speeds up matrix products alone; NumPy's elementwise work stays on one
core, and so does every product too small to be cut. Workers cut the block instead (parts.py), and
then all of it runs on all cores.
"""

import contextvars
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple, Protocol, TypeVar

from threadpoolctl import ThreadpoolController

Item = TypeVar("Item")
Result = TypeVar("Result")


class Each(Protocol):
    """`map` with a list for a result."""

    def __call__(self, f: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]: ...


def _in_turn(f: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    return [f(item) for item in items]


class Workers(NamedTuple):
    """How many workers there are, and how they share: `each(f, items)`, results in order."""

    size: int = 1
    each: Each = _in_turn


ALONE = Workers()


@cache
def _blas() -> ThreadpoolController:
    """The BLAS libraries of this process; looking for them takes a millisecond or more."""
    return ThreadpoolController()


def blas_threads() -> int:
    """Threads that BLAS may use now: as many as the environment allows, or the cores there are."""
    found = (pool["num_threads"] for pool in _blas().info() if pool["user_api"] == "blas")
    return max(found, default=1)


@contextmanager
def hire(count: int) -> Iterator[Workers]:
    """Workers for the time of a `with`; meanwhile BLAS has one thread in the whole process."""
    if count == 1:
        yield ALONE
        return
    with _blas().limit(limits=1, user_api="blas"), ThreadPoolExecutor(count - 1) as pool:

        def each(f: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
            """The first item here, the others in the pool, which sees the caller's np.errstate."""
            first, *others = items
            futures = [pool.submit(contextvars.copy_context().run, f, item) for item in others]
            try:
                result = f(first)
            finally:
                wait(futures)  # nobody works on after an error
            return [result, *(future.result() for future in futures)]

        yield Workers(count, each)

"""At kinks and ties every convention inside the subgradient passes, and nothing outside of it does.

Right slopes and wrong ones are written by hand; the tie masks use comparisons only.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from mesp_ref.verify import gradcheck

Backward = Callable[..., Any]
A = np.array
MANY = np.random.default_rng(5).integers(-2, 3, (3, 8)).astype(float)  # ties and zeros in every row
FEW = A([[1.0, 1, 0], [2, 2, 1], [0, 0, -1]])
NOTHING = np.zeros((2, 4))
LARGE = np.random.default_rng(6).integers(-2, 3, (40, 50)).astype(float)  # 1 entry in 80 looked at


def largest(x: Any) -> Any:
    return x == x.max(-1, keepdims=True)


def first(dy: Any, mask: Any) -> Any:
    """All of dy to the first True of each row."""
    dx = np.zeros(mask.shape)
    np.put_along_axis(dx, mask.argmax(-1)[..., None], dy[..., None], -1)
    return dx


def shared(dy: Any, mask: Any) -> Any:
    return dy[..., None] * mask / mask.sum(-1, keepdims=True)


def to_all(dy: Any, mask: Any) -> Any:
    return dy[..., None] * mask


def pairs(x: Any) -> Any:
    return x.reshape(*x.shape[:-1], -1, 2)


def of(mask: Backward, give: Backward) -> Backward:
    """A backward that gives dy to what mask(x) says."""
    return lambda dy, x: give(dy, mask(x)).reshape(x.shape)


def ordered(dy: Any, x: Any) -> Any:
    """Of sort."""
    ranks = np.argsort(np.argsort(x, -1, kind="stable"), -1, kind="stable")
    return np.take_along_axis(dy, ranks, -1)


def middle(dy: Any, x: Any) -> Any:
    """Of the median of an even number: the two in the middle."""
    half = x.shape[-1] // 2
    order = np.argsort(x, -1, kind="stable")[..., half - 1 : half + 1]
    dx = np.zeros_like(x)
    np.put_along_axis(dx, order, np.repeat(dy[..., None] / 2, 2, -1), -1)
    return dx


def tied(x: Any) -> Any:
    """Entries that have an equal in their row."""
    return (x[..., None] == x[..., None, :]).sum(-1) > 1


def spoiled(right: Backward) -> Iterator[tuple[str, Backward]]:
    """Wrong ones made of a right one."""
    yield "nothing", lambda dy, x: 0 * x
    for name, factor in (("doubled", 2), ("halved", 0.5), ("of wrong sign", -1)):
        yield name, lambda dy, x, f=factor: f * right(dy, x)
    for name, factor in (("nothing", 0), ("twice", 2), ("wrong sign", -1), ("nan", np.nan)):
        yield (
            f"{name} at ties",
            lambda dy, x, f=factor: np.where(tied(x), f * right(dy, x), right(dy, x)),
        )


def kinked(
    slope: Backward, at: Backward, low: float, high: float
) -> list[tuple[str, str, Backward]]:
    """Values at the kinks inside and outside of [low, high]; the slope elsewhere."""

    def backward(value: float) -> Backward:
        return lambda dy, x: dy * np.where(at(x), value, slope(x))

    right = [(f"{v:g}", backward(v)) for v in (low, (low + high) / 2, high)]
    out = (low - 0.05, high + 0.05, 2 * high + 1, np.nan)
    wrong = [(f"{v:g}", backward(v)) for v in out]
    return [("right", *r) for r in right] + [("wrong", *w) for w in wrong]


def cases() -> Iterator[tuple[str, Any, Any, Backward, bool]]:
    """Name, forward, point, backward, is it right?"""
    top = lambda x: x.max(-1)  # noqa: E731
    pool = lambda x: pairs(x).max(-1)  # noqa: E731
    for where, x in (("many", MANY), ("few", FEW), ("zeros", NOTHING), ("large", LARGE)):
        for name, give in (("first", first), ("shared", shared)):
            yield f"max, {where}, {name}", top, x, of(largest, give), True
            if where != "large":
                for wrong, backward in spoiled(of(largest, give)):
                    yield f"max, {where}, {name}: {wrong}", top, x, backward, False
        yield f"max, {where}: dy to each", top, x, of(largest, to_all), False
        if where != "zeros":
            least = of(lambda x: largest(-x), first)
            yield f"max, {where}: to another element", top, x, least, False
    for give in (first, shared):
        pooled = of(lambda x: largest(pairs(x)), give)
        yield f"pool, {give.__name__}", pool, MANY, pooled, True
        for wrong, backward in spoiled(pooled):
            yield f"pool, {give.__name__}: {wrong}", pool, MANY, backward, False
    yield "pool: dy to each", pool, MANY, of(lambda x: largest(pairs(x)), to_all), False
    for name, forward, right in (
        ("sort", lambda x: np.sort(x, -1), ordered),
        ("median", lambda x: np.median(x, -1), middle),
    ):
        yield name, forward, MANY, right, True
        for wrong, backward in spoiled(right):
            yield f"{name}: {wrong}", forward, MANY, backward, False
    for name, forward, slope, at, ends in (
        ("relu", lambda x: np.maximum(x, 0), lambda x: x > 0, lambda x: x == 0, (0, 1)),
        ("abs", np.abs, np.sign, lambda x: x == 0, (-1, 1)),
        ("clip", lambda x: np.clip(x, -1, 1), lambda x: abs(x) < 1, lambda x: abs(x) == 1, (0, 1)),
        (
            "hinge",
            lambda x: np.maximum(0, 1 - x),
            lambda x: -1.0 * (x < 1),
            lambda x: x == 1,
            (-1, 0),
        ),
    ):
        for where, x in (("many", MANY), ("zeros", NOTHING)):
            if where == "zeros" and name in ("clip", "hinge"):
                continue
            for kind, value, backward in kinked(slope, at, *ends):
                yield f"{name}, {where}: {value}", forward, x, backward, kind == "right"
    size = lambda x: np.abs(x).max(-1)  # noqa: E731
    yield "largest size of nothing", size, NOTHING, lambda dy, x: 0 * x, True
    yield "largest size of nothing: dy to each", size, NOTHING, of(largest, to_all), False


CASES = list(cases())


@pytest.mark.parametrize("case", CASES, ids=[c[0] for c in CASES])
def test_nothing_wrong_passes_and_every_convention_does(case: Any) -> None:
    _, forward, x, backward, right = case
    result = gradcheck(forward, backward, (x.copy(),), ranks=False)
    assert result.passed == right, str(result)


def test_beyond_the_pieces_seen_is_not_passed() -> None:
    """A hull seen in full leaves nothing beside it; of one seen in part the sides are open."""
    from mesp_ref.verify.judge import Hull

    full, part = Hull(-1.0, 1.0, True), Hull(-1.0, 1.0, False)
    assert full.ruling(1.5, 0.1, False, False) is None
    assert [part.ruling(v, 0.1, False, False).verdict for v in (0.5, 1.5)] == ["ok", "unsure"]  # type: ignore[union-attr]
    assert part.ruling(2.5, 0.1, True, True) is None

"""Questions about measuring: forgetting, the best pair of checks, rounding to bfloat16."""

import itertools
from typing import Any

import numpy as np

from mesp_ref.learn.exercise import Case, Given, Outputs, Wrong
from mesp_ref.learn.exercises.question import question
from mesp_ref.ops import Array


def forgetting(with_adapter: Array, without: Array, tokens: Array) -> float:
    """Has it forgotten?

    Asked     Of each held-out story there is the mean loss with and without the adapter, and its number of tokens.
              By how many nats per token is the loss of them all higher with the adapter?
    Shapes    with_adapter, without, tokens [stories] -> a number, above 0 where it has forgotten
    Answer    Σ tokens·(with − without)/Σ tokens: every token counts once
    """
    return float(((with_adapter - without) * tokens).sum() / tokens.sum())


def _exp(losses: Array, tokens: Array) -> float:
    return float(np.exp((losses * tokens).sum() / tokens.sum()))


def _forgetting(g: Given, m: Wrong) -> Outputs:
    a, b, n = g.with_adapter, g.without, g.tokens
    more = m.pick(a - b, exchanged=b - a, divided=a / b, relative=(a - b) / b, perplexity=np.exp(a) - np.exp(b), with_alone=a, without_alone=b, absolute=abs(a - b))  # fmt: skip
    one = m.pick(
        (more * n).sum() / n.sum(), mean_of_means=more.mean(), total=(more * n).sum(), by_stories=(more * n).sum() / len(n),
        sum_over_tokens=more.sum() / n.sum(), median=np.median(more), summed=more.sum(), upside_down=(more / n).sum() / (1 / n).sum(), largest=more.max(),
    )  # fmt: skip
    return {
        "nats": m.pick(
            one,
            bits=one / np.log(2),
            zero=0.0,
            perplexity_of_all=_exp(g.with_adapter, n) - _exp(g.without, n),
        )
    }


def _stories(name: str, note: str, count: int, worse: float) -> Case:
    def draw(rng: np.random.Generator) -> dict[str, Any]:
        without = 0.4 + rng.random(count)
        return {"with_adapter": without + worse * rng.standard_normal(count), "without": without, "tokens": rng.integers(3, 300, count).astype(float)}  # fmt: skip

    return Case(name, note, draw)


FORGETTING = question(
    forgetting,
    "how much was forgotten, in nats per token",
    outputs="nats",
    cases=(_stories("few", "three stories", 3, 0.1), _stories("more", "twenty stories of very different length", 20, 0.3), _stories("one", "a single story", 1, 0.2)),
    formula=_forgetting,
    numbers=lambda g: {"stories": len(g.tokens)},
    hints=("A long story has more tokens: how often does each token count?", "Sums of losses over all tokens, then one division."),
    mistakes={
        "exchanged": "the sign is wrong, the two are exchanged: with the adapter less without.",
        "divided": "the losses are divided: their difference is asked for.",
        "relative": "it is relative to the loss without: nats per token are asked for.",
        "perplexity": "it is a difference of perplexities (exp of a loss): nats per token are losses themselves.",
        "with_alone": "it is the loss with the adapter: the difference is asked for.",
        "without_alone": "it is the loss without the adapter: the difference is asked for.",
        "absolute": "the sign is lost story by story: absolute values are taken.",
        "mean_of_means": "it is a mean of means: each story counts alike, however few tokens it has. Weight by tokens.",
        "total": "it is the sum over all tokens: it is not divided by their number.",
        "by_stories": "it is divided by the number of stories: per token is asked for.",
        "sum_over_tokens": "means of stories are summed without their tokens: weight each by its tokens first.",
        "median": "it is the median of the stories: a mean over tokens is asked for.",
        "summed": "it is the sum over the stories: a mean over tokens is asked for.",
        "upside_down": "short stories weigh more: multiply by tokens, do not divide.",
        "largest": "it is the largest of the stories.",
        "bits": "it is in bits: nats are asked for, so no division by log 2.",
        "zero": "it is 0.",
        "perplexity_of_all": "it is a difference of perplexities (exp of a loss): nats per token are losses themselves.",
    },
)  # fmt: skip


def best_pair(marks: Array) -> tuple[int, int]:
    """Two checks, not eight.

    Asked     marks[b, c] is True where check c sees bug b. Which two checks together see the most bugs?
    Shapes    marks [bugs, checks] of True and False -> the numbers of two columns, from 0
    Answer    the pair with the largest number of rows in which at least one of the two is True
    """
    pairs = itertools.combinations(range(marks.shape[1]), 2)
    return max(pairs, key=lambda pair: int((marks[:, pair[0]] | marks[:, pair[1]]).sum()))


def _as_pair(returned: Any) -> Outputs:
    """Two numbers in order. Raises ValueError in a student's words."""
    try:
        first, second = sorted(int(i) for i in returned)
    except (TypeError, ValueError):
        found = (
            f"{len(returned)} values" if isinstance(returned, tuple | list) else "something else"
        )
        raise ValueError(f"expected the numbers of two columns, a pair; found {found}") from None
    return {"first": float(first), "second": float(second)}


def _pair_of(g: Given, m: Wrong) -> Outputs:
    marks = m.pick(g.marks, by_rows=g.marks.T)
    count = marks.sum(axis=0)

    def sees(i: int, j: int) -> Any:
        a, b = marks[:, i], marks[:, j]
        return m.pick((a | b).sum(), both=(a & b).sum(), one_of_two=(a ^ b).sum(), counted_twice=a.sum() + b.sum(), fewest=-(a | b).sum())  # fmt: skip

    pairs = list(itertools.combinations(range(marks.shape[1]), 2))
    best = int(count.argmax())
    pairs = m.pick(pairs, greedy=[p for p in pairs if best in p], greedy_after=[(best, j) for j in range(best + 1, len(count))], neighbours=[p for p in pairs if p[1] == p[0] + 1], itself=[(i, i) for i in range(len(count))])  # fmt: skip
    found = max(pairs, key=lambda pair: sees(*pair))
    alone = sorted(np.argsort(-count, kind="stable")[:2])
    return _as_pair(
        m.pick(
            found,
            best_alone=alone,
            from_1=(found[0] + 1, found[1] + 1),
            worst_alone=sorted(np.argsort(count, kind="stable")[:2]),
        )
    )


def _table(name: str, note: str, text: str) -> Case:
    marks = np.array([[mark == "x" for mark in row] for row in text.split()])
    return Case(name, note, lambda rng: {"marks": marks.copy()})


PAIR = question(
    best_pair,
    "the two checks that see the most together",
    outputs="first second",
    cases=(
        _table("small", "nine bugs, four checks; the best alone is not in the best pair", "xx.. xx.. x.x. x.x. x... .x.. .x.. ..x. ..xx"),
        _table("overlap", "ten bugs, five checks; two good checks see the same", "xx..x xx... xx... xx... xx... x...x .x... ...x. ...x. x.x.."),
        _table("apart", "seven bugs, three checks; two see almost the same", "xx. xx. xx. xx. xxx x.. .x."),
        _table("wide", "three bugs, five checks", ".x..x ..x.x x...."),
    ),
    formula=_pair_of,
    named=_as_pair,
    numbers=lambda g: {},
    hints=("A bug is seen when at least one of the two sees it: or, not and.", "Try every pair: count the rows of marks[:, i] | marks[:, j]."),
    mistakes={
        "by_rows": "rows and columns are exchanged: checks are columns.",
        "both": "bugs that both see are counted (and): one of the two is enough (or).",
        "one_of_two": "bugs that exactly one sees are counted (xor): those that both see count as well.",
        "counted_twice": "these are the two that see most alone, with what both see counted twice: they may see the same bugs.",
        "fewest": "it is the worst pair: the fewest bugs.",
        "greedy": "it is greedy: the best single check and what adds most to it. The best pair need not hold the best single one.",
        "greedy_after": "it is greedy: the best single check first, with one that comes after it. The best pair need not hold the best single one.",
        "neighbours": "only neighbouring columns are tried: every pair counts.",
        "itself": "a check is paired with itself: two checks are asked for.",
        "best_alone": "these are the two that see most alone, with what both see counted twice: they may see the same bugs.",
        "worst_alone": "these are the two that see least alone.",
        "from_1": "the columns are counted from 1: numbers begin at 0.",
    },
)  # fmt: skip


def to_bfloat16(x: Array) -> Array:
    """A rounding by hand.

    Asked     Round float32 numbers to bfloat16, whose bits are the upper 16 of a float32: to the nearest, and a tie
              to the one whose last bit is 0. Return float32.
    Shapes    x [K] of float32 -> [K] of float32, with the lower 16 bits 0
    Answer    bits + 0x7FFF + the lowest bit that stays; then clear the lower 16 bits
    """
    bits = x.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    found: Array = (rounded & np.uint32(0xFFFF0000)).view(np.float32)
    return found


def _bfloat16(g: Given, m: Wrong) -> Outputs:
    bits = np.ascontiguousarray(g.x).view(np.uint32)

    def cut(plus: Any, keep: int = 0xFFFF0000) -> Array:
        found: Array = ((bits + plus).astype(np.uint32) & np.uint32(keep)).view(np.float32)
        return found

    last = (bits >> np.uint32(16)) & np.uint32(1)
    half, one = np.uint32(0x7FFF), np.uint32(1)
    fewer = ((bits >> np.uint32(15)) & one) + np.uint32(0x3FFF)
    return {"x": m.pick(
        cut(half + last), truncated=cut(np.uint32(0)), ties_away=cut(half + one), ties_down=cut(half), ties_odd=cut(half + one - last), upwards=cut(np.uint32(0xFFFF)),
        as_float16=g.x.astype(np.float16).astype(np.float32), unchanged=g.x.copy(), one_bit_fewer=cut(half + last, 0xFFFE0000), one_bit_more=cut(fewer, 0xFFFF8000),
        two_digits=np.round(g.x, 2), bits_shifted=(cut(half + last).view(np.uint32) >> np.uint32(16)).astype(np.float64), bits_rounded=cut(half + last).view(np.uint32).astype(np.float64), added_1=cut(np.uint32(0x10000)),
        value_of_bits=(bits >> np.uint32(16)).astype(np.float64),
    )}  # fmt: skip


def _numbers(name: str, note: str, *, ties: bool, size: float = 1.0) -> Case:
    def draw(rng: np.random.Generator) -> dict[str, Any]:
        bits = rng.uniform(1, 2, 12).astype(np.float32).view(np.uint32)
        bits = (bits & np.uint32(0xFFFF0000)) | np.uint32(0x8000) if ties else bits
        signs = np.where(np.arange(12) % 3 == 0, -1, 1).astype(np.float32)
        return {"x": bits.view(np.float32) * signs * np.float32(size)}

    return Case(name, note, draw)


BFLOAT16 = question(
    to_bfloat16,
    "rounding to bfloat16, bit by bit",
    outputs="x",
    cases=(
        _numbers("between 1 and 2", "some negative", ties=False),
        _numbers("ties", "exactly between two bfloat16", ties=True),
        Case("exact", "bfloat16 already: nothing changes", lambda rng: {"x": np.array([1.0, -2.5, 0.15625, 96.0], np.float32)}),
        _numbers("large", "beyond the range of float16", ties=False, size=2.0**20),
    ),
    formula=_bfloat16,
    numbers=lambda g: {},
    magnitudes=lambda args, want: {"x": np.abs(want["x"]).astype(np.float64)},
    hints=("x.view(np.uint32) shows the bits; adding to them carries into the bits that stay.", "Adding 0x8000 rounds ties away from 0; 0x7FFF plus the last bit that stays rounds them to even."),
    mistakes={
        "truncated": "the lower bits are cut off (truncated): round to the nearest.",
        "ties_away": "ties are rounded away from 0: to the even one, whose last bit is 0.",
        "ties_down": "ties are rounded down, towards 0: to the even one, whose last bit is 0.",
        "ties_odd": "ties are rounded to the odd one: to the one whose last bit is 0.",
        "upwards": "everything is rounded up, away from 0: to the nearest.",
        "added_1": "one unit is added to everything: to the nearest.",
        "as_float16": "it is float16, which has 5 exponent bits: bfloat16 has float32's 8.",
        "unchanged": "nothing is rounded: x itself is returned.",
        "one_bit_fewer": "one bit too many is cleared: 15 are left, bfloat16 has 16.",
        "one_bit_more": "one bit too few is cleared: 17 are left, bfloat16 has 16.",
        "two_digits": "it is rounded to decimal digits: bfloat16 keeps 8 binary ones.",
        "bits_shifted": "the bits themselves are returned, shifted, as an integer: view them as float32.",
        "bits_rounded": "the bits themselves are returned as an integer: view them as float32.",
        "value_of_bits": "the upper bits are returned as an integer, not rounded: view them as float32.",
    },
)  # fmt: skip

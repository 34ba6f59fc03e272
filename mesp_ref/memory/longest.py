"""The longest sequence that each exact method can do within a limit, and what stops it there."""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from mesp_ref.memory.schedule import SCHEDULES, Schedule, need
from mesp_ref.memory.shapes import Shapes
from mesp_ref.ops import Array

MOST = 1 << 20  # tokens: the longest context of a published Qwen2.5 is 1,010,000
_FINE, _COARSE = 16, 256  # tokens: lengths that are looked at, below and above _LONG
_LONG = 4096
_LINES = 4  # lengths that are guessed by a line

# MiB of the process above the model, of Qwen2.5-0.5B with rank 8 and batch 1 in float32, at 256 and at
# 1024 tokens: benchmarks/frameworks.py on 25 November 2026. Both grow with the length alone.
TORCH = {
    "torch + peft": (1908.8, 6969.0),
    "torch + peft, gradient checkpointing": (1298.0, 4448.9),
}
_MEASURED = 256, 1024


class Reach(NamedTuple):
    """How far a schedule gets."""

    schedule: Schedule
    tokens: int  # 0 where not even the shortest fits
    need: int  # bytes of memory there
    file: int  # bytes of the temporary file there
    bound: str  # what a longer one exceeds: "limit", "disk", or "" at MOST


def longest(
    shapes: Shapes, limit: int, room: float = math.inf, schedules: Iterable[Schedule] = SCHEDULES
) -> list[Reach]:
    """Every schedule's longest sequence of a step, furthest first.

    limit     bytes above weights, LoRA parameters and optimiser state
    room      bytes that a temporary file may take
    """
    found = [_reach(s, shapes, limit, room) for s in schedules]
    return sorted(found, key=lambda reach: -reach.tokens)


def _reach(schedule: Schedule, shapes: Shapes, limit: int, room: float) -> Reach:
    def at(tokens: int) -> tuple[int, int, str]:
        here = shapes._replace(tokens=tokens)
        size, file = need(schedule, here), schedule.cost(here).file
        return size, file, "limit" if size > limit else "disk" if file > room else ""

    low, high, bound, sizes = 0, _FINE, "", (0, 0)
    while high <= MOST:  # twice as long, as long as that fits
        size, file, bound = at(high)
        if bound:
            break
        low, sizes, high = high, (size, file), 2 * high
    above, tries = (size, file), 0
    while bound and (middle := _between(low, high, _share(sizes, above, limit, room, tries))):
        tries += 1
        size, file, wrong = at(middle)
        if wrong:
            high, above, bound = middle, (size, file), wrong
        else:
            low, sizes = middle, (size, file)
    return Reach(schedule, low, *sizes, bound)


def _share(
    low: tuple[int, int], high: tuple[int, int], limit: int, room: float, tries: int
) -> float:
    """How far between two lengths the limit or the room is met, if memory and file grow on a line.

    They nearly do; where a few tries by the line do not end it, it is the middle.
    """
    if tries > _LINES:
        return 0.5
    met = [
        (most - below) / (above - below)
        for most, below, above in zip((limit, room), low, high, strict=True)
        if above > most
    ]
    return min(met)


def _between(low: int, high: int, share: float) -> int:
    """The length between two that is looked at, at that share of the way; 0 where there is none."""
    step = _FINE if high <= _LONG else _COARSE
    middle = int(low + (high - low) * share) // step * step
    return min(max(middle, low + step), high - step) if high - low > step else 0


def torch_peak(tokens: Array) -> dict[str, Array]:
    """Megabytes of torch for so many tokens each, by the line through what was measured."""
    (short, long) = _MEASURED
    lines = {n: (low, (high - low) / (long - short)) for n, (low, high) in TORCH.items()}
    return {n: (low + slope * (tokens - short)) * 2**20 / 1e6 for n, (low, slope) in lines.items()}


def torch_reach(limit: float) -> Iterator[tuple[str, int]]:
    """How many tokens torch gets through within so many bytes, by the line through what was measured."""
    (short, long), mib = _MEASURED, limit / 2**20
    for name, (low, high) in TORCH.items():
        slope = (high - low) / (long - short)
        yield name, max(0, int(short + (mib - low) / slope))

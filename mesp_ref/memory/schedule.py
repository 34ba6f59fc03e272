"""The memory dial: the fastest exact way to the gradients whose peak fits below a limit.

A schedule is a method and a place for its checkpoints. Its need is the predicted peak, plus the LoRA
gradients where all of them are held (clipping, accumulation), plus OVERHEAD. Which of two is faster is
decided by arithmetic and by what goes through a file, a byte of which stands for FILE_WORK operations:
that of a page cache with room for the file.
"""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

from mesp_ref.engine.init import adapter_shapes
from mesp_ref.errors import MespRefError
from mesp_ref.memory.predict import Cost, cost, peak
from mesp_ref.memory.shapes import Shapes

# Python objects and small temporaries of a step, beside the arrays that are predicted.
OVERHEAD = 256 * 1024

# FLOPs in whose time a byte is written to a file and read: 1 ns at 200 GFLOP/s. Measured on one virtual
# machine: 0.3 ns where the page cache had pages at hand, 3 ns where the host had to find them first.
FILE_WORK = 200

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**power
    for suffix, base in (("B", 1000), ("iB", 1024))
    for power, letter in enumerate("kMGT", start=1)
}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) *([A-Za-z]*)", re.ASCII)


PLACES = {
    "ram": "checkpoints in RAM",
    "disk": "checkpoints on disk",
    "offload": "activations on disk",
}


def at(shapes: Shapes, checkpoints: str) -> Shapes:
    """The shapes of a step whose checkpoints lie where one of PLACES says."""
    return shapes._replace(disk=checkpoints != "ram", offload=checkpoints == "offload")


class Schedule(NamedTuple):
    """One exact way to the gradients."""

    method: str
    checkpoints: str  # one of checkpoints.KINDS

    def __str__(self) -> str:
        if self.method == "store_all":
            return self.method
        return f"{self.method}, {PLACES[self.checkpoints]}"

    def shapes(self, shapes: Shapes) -> Shapes:
        return at(shapes, self.checkpoints)

    def cost(self, shapes: Shapes) -> Cost:
        return cost(self.method, self.shapes(shapes))


SCHEDULES = (
    Schedule("store_all", "ram"),
    *(Schedule(m, where) for where in ("ram", "disk") for m in ("mebp", "mesp", "mesp_tiled")),
    Schedule("mesp_tiled", "offload"),
    Schedule("mesp_streamed", "disk"),
)


class Choice(NamedTuple):
    """The schedule that a limit allows. Bytes."""

    schedule: Schedule
    need: int
    limit: int
    held_gradients: int  # of `need`: LoRA gradients beyond those of one block
    faster: tuple[Schedule, int] | None  # the one that would be next, and its need
    file: int = 0  # of the temporary file that a step writes and reads
    seconds: float | None = None  # about how long a step takes here, where that was asked for

    def __str__(self) -> str:
        """What was chosen and why, in one line."""
        parts = f"needs {megabytes(self.need)} of {megabytes(self.limit)}"
        if self.held_gradients:
            parts += f", {megabytes(self.held_gradients)} of them LoRA gradients held for the step"
        if self.file:
            parts += f", and {megabytes(self.file)} of a temporary file"
        if self.seconds is not None:
            parts += f"; about {duration(self.seconds)} a step"
        if self.faster is None:
            return f"{self.schedule}: {parts}; none is faster"
        other, size = self.faster
        return f"{self.schedule}: {parts}; {other} is faster and needs {megabytes(size)}"


def megabytes(size: float) -> str:
    """Bytes in MB (10⁶), rounded up to two digits behind the point."""
    return f"{-(-int(size) // 10_000) / 100:,.2f} MB"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def parse_size(text: str | int, name: str = "memory_limit") -> int:
    """Bytes of "64MB" (10⁶), "64MiB" (2²⁰), "1.5 GB", or a plain number of bytes.

    Raises MespRefError naming `name` for anything else
    """
    found = _SIZE.fullmatch(str(text).strip())
    unit = None if found is None else _UNITS.get(_canonical(found[2]))
    size = 0 if found is None or unit is None else int(float(found[1]) * unit)
    if not 0 < size < 2**62:
        raise MespRefError(
            f"{name}: found {str(text)[:40]!r}, expected a size such as 64MB (10⁶ bytes), 64MiB "
            "(2²⁰) or a number of bytes"
        )
    return size


def _canonical(unit: str) -> str:
    """The spelling in _UNITS of MB, mb, MIB …; M alone is no size that all agree on."""
    return next((known for known in _UNITS if known.lower() == unit.lower()), unit)


def held_gradients(shapes: Shapes) -> int:
    """Bytes of all LoRA gradients: what clipping and accumulation hold beyond the step's own."""
    sizes = adapter_shapes(shapes.config, shapes.rank, shapes.targets).values()
    return sum(a * b for a, b in sizes) * shapes.itemsize


def need(schedule: Schedule, shapes: Shapes, *, hold_gradients: bool = False) -> int:
    """Bytes above weights, LoRA parameters and optimiser state that a step takes at most."""
    held = held_gradients(shapes) if hold_gradients else 0
    return peak(schedule.method, schedule.shapes(shapes)).total + held + OVERHEAD


def by_speed(shapes: Shapes, schedules: Iterable[Schedule] = SCHEDULES) -> list[Schedule]:
    """Schedules, least work first: arithmetic, and bytes that go through a file."""

    def work(schedule: Schedule) -> float:
        found = schedule.cost(shapes)
        return found.flops + FILE_WORK * found.file

    return sorted(schedules, key=work)


def choose(
    shapes: Shapes,
    limit: int,
    *,
    hold_gradients: bool = False,
    schedules: Iterable[Schedule] = SCHEDULES,
    room: float = math.inf,
    name: str = "memory_limit",
) -> Choice:
    """The fastest schedule that needs no more than `limit` bytes.

    hold_gradients   whether all LoRA gradients live until the end of the step
    room             bytes that a temporary file may take

    Raises MespRefError saying what is missing and which schedule needs least, when none fits
    """
    files = {s: s.cost(shapes).file for s in schedules}
    ranked = by_speed(shapes, [s for s, size in files.items() if size <= room])
    if not ranked:
        raise MespRefError(f"{name}: no schedule fits {megabytes(room)} of room for files")
    needs = [need(s, shapes, hold_gradients=hold_gradients) for s in ranked]
    held = held_gradients(shapes) if hold_gradients else 0
    for place, (schedule, size) in enumerate(zip(ranked, needs, strict=True)):
        if size <= limit:
            faster = (ranked[place - 1], needs[place - 1]) if place else None
            return Choice(schedule, size, limit, held, faster, files[schedule])
    least = min(needs)
    shorter = "without --clip and --accumulate it is less" if held else "shorten the sequence"
    raise MespRefError(
        f"{name}: found {megabytes(limit)}, expected at least {least} bytes ({megabytes(least)}), "
        f"{megabytes(least - limit)} more, for {ranked[needs.index(least)]}; raise it, or {shorter}"
        + "".join(
            f"; {s} fits with {megabytes(size)} free for temporary files (TMPDIR)"
            for s, size in files.items()
            if size > room and need(s, shapes, hold_gradients=hold_gradients) <= limit
        )
    )

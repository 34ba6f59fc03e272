"""mesp-ref memory --longest: how long a sequence each method can do on this machine."""

import argparse
import math
import shutil
import tempfile
from typing import Any

import psutil

from mesp_ref.cli.options import print_json, say
from mesp_ref.memory import (
    SCHEDULES,
    Schedule,
    Shapes,
    duration,
    longest,
    megabytes,
    parse_size,
    seconds,
    torch_reach,
)
from mesp_ref.memory.longest import Reach

_BOUND = {"limit": "", "disk": "; the disk is full there", "": "; no end in sight"}


def run(args: argparse.Namespace, shapes: Shapes, schedules: list[Schedule]) -> int:
    """Print how far each schedule gets within --longest, memory and disk being what they are here."""
    machine = psutil.virtual_memory().total
    limit = min(parse_size(args.longest, "--longest"), machine)
    room = _room()
    found = longest(shapes, limit, room, schedules or SCHEDULES)
    torch = _torch(args, limit, machine)
    if args.json:
        print_json(_facts(limit, room, found, torch))
        return 0
    free = "an unknown size" if math.isinf(room) else megabytes(room)
    say(
        f"{args.model}: the longest sequence of a step in {megabytes(limit)}, batch {shapes.batch}, "
        f"rank {shapes.rank}; {free} free for a temporary file",
        "",
    )
    for reach in found:
        say(f"{reach.schedule!s:<38} {reach.tokens:>9,} tokens{_beside(reach)}")
    furthest = found[0]
    if furthest.tokens:
        here = furthest.schedule.shapes(shapes._replace(tokens=furthest.tokens))
        took = duration(seconds(furthest.schedule.method, here))
        say(
            "",
            f"a step of {furthest.tokens:,} tokens by {furthest.schedule} takes about {took} here",
        )
    say("", *_torch_lines(torch, machine))
    return 0


def _room() -> float:
    """Bytes free where temporary files lie; without end where the system does not tell."""
    try:
        return shutil.disk_usage(tempfile.gettempdir()).free
    except OSError:
        return math.inf


def _beside(reach: Reach) -> str:
    if not reach.tokens:
        return ""
    file = f", and {megabytes(reach.file)} of a file" if reach.file else ""
    return f"  {megabytes(reach.need):>12}{file}{_BOUND[reach.bound]}"


def _torch(args: argparse.Namespace, limit: float, machine: int) -> dict[str, tuple[int, int]]:
    """Tokens of torch within the limit and in all of the machine's memory, of the shape measured."""
    measured = args.model.lower() == "qwen2.5-0.5b" and args.batch_size == 1 and not args.bits
    if not measured:
        return {}
    in_limit, in_all = dict(torch_reach(limit)), dict(torch_reach(machine))
    return {name: (in_limit[name], in_all[name]) for name in in_limit}


def _torch_lines(torch: dict[str, tuple[int, int]], machine: int) -> list[str]:
    if not torch:
        return ["torch was measured on qwen2.5-0.5b in float32 alone: docs/benchmarks/length.md"]
    lines = [
        f"{name:<38} {few:>9,} tokens; {all_:,} in all {megabytes(machine)} of this machine"
        for name, (few, all_) in torch.items()
    ]
    return [*lines, "torch by the line through 256 and 1,024 tokens: docs/benchmarks/length.md"]


def _facts(
    limit: int, room: float, found: list[Reach], torch: dict[str, tuple[int, int]]
) -> dict[str, Any]:
    schedules = [
        {
            "method": reach.schedule.method, "checkpoints": reach.schedule.checkpoints,
            "tokens": reach.tokens, "need_bytes": reach.need, "file_bytes": reach.file,
            "bound": reach.bound or None,
        }
        for reach in found
    ]  # fmt: skip
    return {
        "limit_bytes": limit,
        "room_bytes": None if math.isinf(room) else int(room),
        "schedules": schedules,
        "torch": {n: {"tokens": a, "in_all_memory": b} for n, (a, b) in torch.items()},
    }

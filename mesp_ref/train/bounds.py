"""What an option says of itself, and how small and how large it may be: in Python and as --option.

A number beyond them is a slip of the keyboard: it would take memory that no machine has, or never
end. One name means one thing in all commands, so each stands here once. What a person hands over
as a result, `golden compare --loss`, is judged, not bounded.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from mesp_ref.errors import MespRefError, shown

_TOKENS = 1 << 20  # in a sequence; the longest context of a published Qwen2.5 is 1,010,000
_LARGE = 1e30  # a rate or a factor
RANGES: dict[str, tuple[float, float]] = {
    # the data
    "seq_len": (2, _TOKENS), "val_fraction": (0, 1), "rows": (1, 10**8), "eval_rows": (0, 10**6),
    # the adapter
    "rank": (1, 8192), "alpha": (-_LARGE, _LARGE),
    # the training
    "steps": (1, 10**8), "batch_size": (1, 65_536), "accumulate": (1, 65_536),
    "warmup": (0, 10**8), "perturbations": (1, 4096), "workers": (1, 256), "seed": (0, 2**63 - 1),
    "chunk": (1, _TOKENS),
    "lr": (0, _LARGE), "mezo_lr": (0, _LARGE), "clip": (0, _LARGE), "weight_decay": (0, _LARGE),
    "momentum": (0, 1), "eps": (0, _LARGE),
    # the run
    "eval_every": (0, 10**8), "patience": (0, 10**8), "save_every": (1, 10**8),
    "sample_tokens": (0, _TOKENS), "mpi_patience": (1, 10**8),
    # generation
    "max_new_tokens": (1, _TOKENS), "temperature": (0, _LARGE), "top_k": (1, 10**8),
    "top_p": (0, 1),
    # checks
    "directions": (0, 4096), "entries": (0, 4096), "tensors": (0, 10**6),
    # a student's code
    "hint": (0, 3), "time_limit": (1, 3600),
    # packed weights
    "bits": (1, 64), "group_size": (1, 1 << 20),
    # a model from nothing
    "vocab_size": (1, 1 << 20), "hidden_size": (1, 16_384), "intermediate_size": (1, 65_536),
    "layers": (1, 1024), "heads": (1, 1024), "kv_heads": (1, 1024), "head_dim": (1, 1024),
    "heldout": (1, 10**6), "samples": (1, 10**6),
}  # fmt: skip


def option(
    default: Any, help: str, *, metavar: str | None = None, choices: tuple[str, ...] = ()
) -> Any:
    """A dataclass field that is an option of the command line, too: `cli.options.add_fields`.

    help     "(default: …)" is added from the field, where the words do not say it
    """
    said = {"help": help, "metavar": metavar, "choices": choices}
    return dataclasses.field(default=default, metadata=said)


def check_bounds(values: Mapping[str, Any], options: bool = False) -> None:
    """Raise MespRefError for the first number in `values` that lies out of its range, or is NaN.

    options     whether the names are those of a command line, which --name quotes
    """
    for name, value in values.items():
        if type(value) not in (int, float) or name not in RANGES:
            continue
        low, high = RANGES[name]
        if low <= value <= high:
            continue
        where = f"--{name.replace('_', '-')}" if options else name
        if isinstance(value, float) and not math.isfinite(value):
            expected = f"a number from {_written(low)} to {_written(high)}"
        else:
            expected = f"at least {_written(low)}" if value < low else f"at most {_written(high)}"
        raise MespRefError(f"{where}: found {shown(value)}, expected {expected}")


def _written(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"

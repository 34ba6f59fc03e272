"""What all ranks must have alike before they train together."""

import dataclasses
import platform
from collections.abc import Mapping
from typing import Any

from threadpoolctl import threadpool_info

from mesp_ref.errors import shown
from mesp_ref.job.finetune import Run
from mesp_ref.job.state import arrays_hash, environment

# How a rank may differ: what it reads and writes is rank 0's, what it prints is nothing.
_OWN = ("out", "overwrite", "resume", "inexact", "quiet", "json", "run")
_CONTENT = ("model", "data", "val_data", "adapter")


@dataclasses.dataclass(frozen=True)
class Facts:
    """What decides the bits of a run, by name: options, files (as hashes), environment."""

    arguments: dict[str, Any]
    identity: dict[str, Any]
    environment: dict[str, str]


def own_facts(run: Run, arguments: dict[str, Any]) -> Facts:
    """The facts of this rank of a training."""
    new = {} if run.trainer.step else {"adapter": arrays_hash(run.trainer.params)}
    return facts_of(run.identity | new, arguments)


def facts_of(identity: Mapping[str, Any], arguments: dict[str, Any]) -> Facts:
    """The facts of this rank: of the command line what decides the bits, and the environment."""
    options = {
        name: value
        for name, value in arguments.items()
        if name not in _OWN and isinstance(value, (str, int, float, type(None)))
    }
    return Facts(options, dict(identity), environment() | _versions())


def _versions() -> dict[str, str]:
    """What else decides the bits: this package and the kernel that BLAS chose for this processor."""
    from mesp_ref import __version__

    kernels = {str(pool.get("architecture")) for pool in threadpool_info() if _is_blas(pool)}
    return {
        "mesp_ref": __version__,
        "python": platform.python_version(),
        "blas kernel": ", ".join(sorted(kernels)) or "unknown",
    }


def _is_blas(pool: dict[str, Any]) -> bool:
    return pool.get("user_api") == "blas"


def difference(first: Facts, own: Facts, inexact: bool) -> str | None:
    """In words, the first thing of this rank that is not as on rank 0; None if there is none.

    inexact   another environment is allowed: its last bits differ
    """
    for name in sorted(first.arguments.keys() | own.arguments.keys()):
        here, there = own.arguments.get(name), first.arguments.get(name)
        if here != there:
            option = f"--{name.replace('_', '-')}"
            return f"{option}: found {shown(here)}, expected {shown(there)} as on rank 0"
    for name in (name for name in first.identity if name in own.identity):
        here, there = own.identity[name], first.identity[name]
        if here != there and name in _CONTENT:
            return f"{name}: found another file or content than on rank 0, expected the same"
        if here != there:
            return f"{name}: found {shown(here)}, expected {shown(there)} as on rank 0"
    for name, there in first.environment.items():
        here = own.environment.get(name, "nothing")
        if here != there and not inexact:
            return (
                f"{name}: found {here}, expected {there} as on rank 0 for the same bits; make them "
                "alike, or add --inexact"
            )
    return None

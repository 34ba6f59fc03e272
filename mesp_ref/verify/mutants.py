"""The kill table: every seeded bug against every oracle, and what "the loss goes down" would see."""

import warnings
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from mesp_ref.api import loss_and_grads
from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.model import Model
from mesp_ref.train.ranks import ALONE, Ranks
from mesp_ref.verify.automatic import Mutant, equivalent, mutants, prepare, reachable, survives
from mesp_ref.verify.bugs import BUGS, Bug
from mesp_ref.verify.planted import planted
from mesp_ref.verify.samples import sample_adapter, sample_model, small_config
from mesp_ref.verify.suite import ORACLES, killed


class Fate(NamedTuple):
    """What became of a bug: the oracles that rejected it, and whether a training run would have."""

    bug: Bug
    killers: tuple[str, ...]
    loss_went_down: bool


def loss_goes_down(steps: int = 60, lr: float = 0.5) -> bool:
    """Does SGD on a tiny model lower its loss by a tenth, as it does with right gradients?

    What a training curve shows of a bug: nothing, as long as the steps go roughly downhill.
    """
    rng = np.random.default_rng(6)
    config = small_config()
    model, adapter = sample_model(rng, config), sample_adapter(rng, config)
    ids = rng.integers(0, config.vocab_size, (2, 8))
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            losses = [_step(model, adapter, ids, lr) for _ in range(steps)]
        except Exception:  # whatever a wrong implementation raises
            return False
    return bool(losses[-1] < 0.9 * losses[0])


def _step(model: Model, adapter: Adapter, ids: np.ndarray, lr: float) -> float:
    loss, grads = loss_and_grads(model, adapter, ids, ids)
    for name, grad in grads.items():
        adapter.weights[name] -= lr * grad
    return loss


def fate(bug: Bug) -> Fate:
    """Plant a bug and ask every oracle."""
    return Fate(bug, *_verdict(bug))


def _verdict(bug: Bug) -> tuple[tuple[str, ...], bool]:
    """A fate without its bug, which cannot travel between processes."""
    prepare()
    with planted(bug.functions()):
        killers = tuple(
            name for name in ORACLES if any(killed(name, subject) for subject in bug.subjects)
        )
        return killers, loss_goes_down()


def table(fates: Sequence[Fate]) -> str:
    """The kill table in Markdown: oracle × bug, and the shares."""
    names = list(ORACLES)
    head = ["bug", "kind", *names, "loss goes down"]
    lines = [_row(head), _row(["---"] * len(head))]
    for item in fates:
        marks = ["killed" if name in item.killers else "" for name in names]
        curve = "" if item.loss_went_down else "killed"
        lines.append(_row([item.bug.name, item.bug.kind, *marks, curve]))
    return "\n".join([*lines, "", *summary(fates)])


def summary(fates: Sequence[Fate]) -> list[str]:
    """How many bugs each oracle killed."""
    backward = [item for item in fates if item.bug.kind == "backward"]
    lines = [f"seeded bugs: {len(fates)}, of them in a backward: {len(backward)}"]
    for name in ORACLES:
        lines.append(
            f"{name}: {_share(name in i.killers for i in fates)} of all, "
            f"{_share(name in i.killers for i in backward)} of those in a backward"
        )
    lines.append(f"some oracle: {_share(bool(i.killers) for i in fates)}")
    lines.append(f'"the loss goes down": {_share(not i.loss_went_down for i in fates)}')
    return lines


def _share(kills: Iterable[bool]) -> str:
    marks = list(kills)
    return f"{sum(marks)}/{len(marks)} ({100 * sum(marks) / max(1, len(marks)):.0f}%)"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


class Automatic(NamedTuple):
    """The automatic mutants: of how many functions, how many, who lives for a reason, who without."""

    functions: int
    total: int
    excused: list[tuple[Mutant, str]]
    alive: list[Mutant]


def run_automatic(ranks: Ranks = ALONE) -> Automatic:
    """Every mutant of every function that a gradient passes through."""
    found = reachable()
    planned = ((mutant, subjects) for path, subjects in found.items() for mutant in mutants(path))
    survivors = ranks.shared(planned, lambda both: both[0] if survives(*both) else None)
    excused, alive = [], []
    for mutant in filter(None, survivors):
        reason = equivalent(mutant)
        if reason is None:
            alive.append(mutant)
        else:
            excused.append((mutant, reason))
    return Automatic(len(found), len(survivors), excused, alive)


def _report(found: Automatic) -> str:
    killed = found.total - len(found.excused) - len(found.alive)
    lines = [
        f"automatic mutants: {found.total}, of {found.functions} functions; killed {killed}, "
        f"the same function {len(found.excused)}, alive {len(found.alive)}"
    ]
    lines += [f"- `{m.path}`: `{m.change}`: {reason}" for m, reason in found.excused]
    lines += [f"- ALIVE `{m.path}`: `{m.change}`" for m in found.alive]
    return "\n".join(lines)


def main(automatic: bool = True, ranks: Ranks = ALONE) -> int:
    """Print the kill table and the automatic mutants; 1 when one survives, otherwise 0."""
    verdicts = ranks.shared(BUGS.values(), _verdict)
    fates = [Fate(bug, *verdict) for bug, verdict in zip(BUGS.values(), verdicts, strict=True)]
    print(table(fates))
    found = run_automatic(ranks) if automatic else Automatic(0, 0, [], [])
    if automatic:
        print("\n" + _report(found))
    return int(any(not item.killers for item in fates) or bool(found.alive))

"""What a run went like, for people: metrics.csv for a spreadsheet, loss.png to look at."""

import csv
import itertools
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mesp_ref.files.figure import new_figure
from mesp_ref.files.output import write_aside
from mesp_ref.job.metrics import Event

_COLUMNS = (
    "step", "loss", "heldout_loss", "heldout_accuracy", "lr", "grad_norm",
    "tokens", "seconds", "tokens_per_second", "memory_mb", "best_step",
)  # fmt: skip


def write_csv(path: Path, events: Iterable[Event]) -> None:
    """A row per step, step 0 included; cells that a step has nothing for are empty.

    Row by row as the events come, whose steps ascend: a long run is not held in memory.
    """
    with write_aside(path) as aside, aside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        told = (event for event in events if event["event"] in ("step", "eval"))
        for step, group in itertools.groupby(told, lambda event: event["step"]):
            row: dict[str, Any] = {"step": step}
            for event in group:
                if event["event"] == "step":
                    row |= {name: event[name] for name in _COLUMNS if name in event}
                else:
                    row |= {"heldout_loss": event["loss"], "heldout_accuracy": event["accuracy"]}
                    row["best_step"] = event.get("best_step")
            writer.writerow(row)


def plot_loss(path: Path, events: Iterable[Event], title: str) -> None:
    """The loss of every training step, and the held-out losses as points."""
    steps, heldout = (array("d"), array("d")), (array("d"), array("d"))
    for event in events:
        if event["event"] in ("step", "eval"):
            x, y = steps if event["event"] == "step" else heldout
            x.append(event["step"])
            y.append(event["loss"])
    with new_figure(figsize=(7.2, 4.2), dpi=120, layout="constrained") as figure:
        axes = figure.add_subplot()
        if steps[0]:
            axes.plot(*steps, color="#4477aa", lw=1.2, label="training step")
        if heldout[0]:
            axes.plot(*heldout, "o", color="#cc3311", ms=7, label="held out")
        axes.set(title=title, xlabel="step", ylabel="loss, nats per token")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        with write_aside(path) as aside:
            figure.savefig(aside, format="png")

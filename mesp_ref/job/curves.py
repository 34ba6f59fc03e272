"""What a run went like, for people: metrics.csv for a spreadsheet, loss.png to look at."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mesp_ref.files.output import write_aside
from mesp_ref.job.directory import Event

_COLUMNS = (
    "step", "loss", "heldout_loss", "heldout_accuracy", "lr", "grad_norm",
    "tokens", "seconds", "tokens_per_second", "memory_mib", "best_step",
)  # fmt: skip


def write_csv(path: Path, events: Sequence[Event]) -> None:
    """A row per step, step 0 included; cells that a step has nothing for are empty."""
    rows: dict[int, dict[str, Any]] = {}
    for event in events:
        row = rows.setdefault(event["step"], {"step": event["step"]})
        if event["event"] == "step":
            row |= {name: event[name] for name in _COLUMNS if name in event}
        elif event["event"] == "eval":
            row |= {"heldout_loss": event["loss"], "heldout_accuracy": event["accuracy"]}
            row["best_step"] = event.get("best_step")
    with write_aside(path) as aside, aside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[step] for step in sorted(rows))


def plot_loss(path: Path, events: Sequence[Event], title: str) -> None:
    """The loss of every training step, and the held-out losses as points."""
    from matplotlib.figure import Figure  # draws without a window; 0.4 s to import

    steps = [(e["step"], e["loss"]) for e in events if e["event"] == "step"]
    heldout = [(e["step"], e["loss"]) for e in events if e["event"] == "eval"]
    figure = Figure(figsize=(7.2, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if steps:
        axes.plot(*zip(*steps, strict=True), color="#4477aa", lw=1.2, label="training step")
    if heldout:
        axes.plot(*zip(*heldout, strict=True), "o", color="#cc3311", ms=7, label="held out")
    axes.set(title=title, xlabel="step", ylabel="loss, nats per token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with write_aside(path) as aside:
        figure.savefig(aside, format="png")

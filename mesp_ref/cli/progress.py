"""A run told to a person: a progress bar on a terminal, some lines in a log."""

import contextlib
import sys
import time
from typing import Any

from tqdm import tqdm

from mesp_ref.errors import escaped
from mesp_ref.job.metrics import Event
from mesp_ref.train.contents import table

_LINES = 10  # how many steps a log shows


class Progress:
    """Receives the events of a run. Everything goes to standard error, or nowhere with `quiet`."""

    def __init__(self, quiet: bool = False):
        self.quiet, self.terminal = quiet, sys.stderr is not None and sys.stderr.isatty()
        self.bar: Any = None
        self.steps, self.began = 0, time.time()

    def __call__(self, event: Event) -> None:
        if not self.quiet:
            handle = getattr(self, f"_{event['event']}", None)
            if handle is not None:
                handle(event)

    def close(self) -> None:
        """Take the bar off the terminal, if that still takes anything."""
        bar, self.bar = self.bar, None
        if bar is not None:
            with contextlib.suppress(OSError, ValueError):
                bar.close()

    def _say(self, *lines: str) -> None:
        tqdm.write("\n".join(map(escaped, lines)), file=sys.stderr)

    def _new_bar(self, **settings: Any) -> None:
        self.close()
        self.bar = tqdm(file=sys.stderr, dynamic_ncols=True, leave=False, **settings)

    def _ready(self, event: Event) -> None:
        self.steps = event["steps"]
        targets = event["targets"]
        names = "all seven projections" if targets == "all" else ", ".join(targets)
        self._say(
            f"model    {event['model']}: {event['blocks']} blocks, "
            f"{event['parameters'] / 1e6:.1f} M parameters, {event['dtype']}",
            f"adapter  rank {event['rank']}, alpha {event['alpha']:g} on {names}: "
            f"{event['lora_parameters'] / 1e6:.2f} M parameters",
            f"data     {event['data']}: {event['data_bytes'] / 1e6:.2f} MB, "
            f"{event['heldout_rows']} sequences held out",
            *(f"         {line}" for line in table(event["contents"])),
        )
        if event["memory"]:
            self._say(f"memory   {event['memory']}")
        self.began = time.time() - event["seconds"]
        if event["step"]:
            more = "; it is complete: --steps with a larger number goes on" * event["complete"]
            self._say(f"resume   after step {event['step']} of {self.steps}{more}")

    def _warning(self, event: Event) -> None:
        self._say(f"warning  {event['text']}")

    def _evaluating(self, event: Event) -> None:
        if self.terminal:
            if self.bar is None or self.bar.desc != "evaluating":
                self._new_bar(total=event["of"], desc="evaluating", unit="seq")
                self.bar.desc = "evaluating"
            self.bar.update(event["rows"] - self.bar.n)

    def _comparing(self, event: Event) -> None:
        if not self.terminal:
            return
        if self.bar is None:
            self._new_bar(total=event.get("of"), desc=event["what"], unit="step")
        self.bar.set_description(event["what"], refresh=False)
        self.bar.total = event.get("of")
        self.bar.update(event.get("step", 0) - self.bar.n)

    def _eval(self, event: Event) -> None:
        if self.bar is not None and self.bar.desc == "evaluating":
            self.close()
        shown = "inf" if event["perplexity"] is None else f"{event['perplexity']:.2f}"
        self._say(
            f"held out after step {event['step']}: loss {event['loss']:.4f}, perplexity {shown}, "
            f"accuracy {event['accuracy']:.1%}"
            + (
                f"; lower after step {event['best_step']}"
                if event["evaluations_since_best"]
                else ""
            )
        )

    def _quiz(self, event: Event) -> None:
        self._say(f"quiz after step {event['step']}: {event['right']} of {event['of']} right")

    def _step(self, event: Event) -> None:
        speed, memory = event["tokens_per_second"], event["memory_mb"]
        if self.terminal:
            if self.bar is None or self.bar.desc != "training":
                self._new_bar(
                    total=self.steps, desc="training", unit="step", initial=event["step"] - 1
                )
                self.bar.desc = "training"
                self.bar.start_t = self.began  # a resumed run's clock goes on
            self.bar.set_postfix_str(
                f"loss {event['loss']:.3f}, {speed:.0f} tokens/s, {memory:.0f} MB", refresh=False
            )
            self.bar.update(event["step"] - self.bar.n)
        elif event["step"] % max(self.steps // _LINES, 1) == 0 or event["step"] in (1, self.steps):
            self._say(
                f"step {event['step']}/{self.steps}: loss {event['loss']:.4f}, "
                f"lr {event['lr']:.2e}, {speed:.0f} tokens/s, {memory:.0f} MB"
            )

"""--report-to: the numbers of a run in TensorBoard or Trackio, through their own packages."""

import contextlib
import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mesp_ref.errors import MespRefError
from mesp_ref.files.output import writing
from mesp_ref.job.metrics import Event

_SHOWN = {
    "step": ("train", ("loss", "lr", "grad_norm", "tokens_per_second", "memory_mb")),
    "eval": ("eval", ("loss", "perplexity", "accuracy")),
}
Log = Callable[[int, Mapping[str, float]], None]


class Tracker:
    """Hands the numbers of step and eval events to a package. No text of the data leaves with them.

    What comes before the run has a name, its first evaluation, waits. A run that goes on logs on
    under the name it had.

    Raises MespRefError where the package is missing
    """

    def __init__(self, name: str):
        self._module = _package(name)
        self._open = {"tensorboard": _tensorboard, "trackio": _trackio}[name]
        self._waiting: list[Event] = []
        self._ready: Event = {}
        self._log: Log | None = None
        self._end: Callable[[], object] = lambda: None
        self.place = ""

    def __call__(self, event: Event) -> None:
        if event["event"] == "ready":
            self._ready = event
        if self._log is None and (event["event"] == "saved" or self._ready.get("step")):
            out = self._ready["out"] or event["out"]
            self._log, self._end, self.place = self._open(self._module, Path(out), self._ready)
        if event["event"] in _SHOWN:
            self._waiting.append(event)
        if self._log is not None:
            for kept in self._waiting:
                self._log(kept["step"], _numbers(kept))
            self._waiting.clear()

    def close(self) -> None:
        """Write what the package holds back."""
        with contextlib.redirect_stdout(sys.stderr):
            self._end()


class Reporters:
    """Several who listen to one run: each hears every event, whatever another raises."""

    def __init__(self, *listeners: Callable[[Event], object]):
        self._listeners = listeners

    def __call__(self, event: Event) -> None:
        raised: list[Exception] = []
        for listener in self._listeners:
            try:
                listener(event)
            except Exception as error:
                raised.append(error)
        if raised:
            raise raised[0]


def _numbers(event: Event) -> dict[str, float]:
    kind, names = _SHOWN[event["event"]]
    return {f"{kind}/{name}": event[name] for name in names if event.get(name) is not None}


def _package(name: str) -> Any:
    module = {"tensorboard": "tensorboard.summary", "trackio": "trackio"}[name]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return importlib.import_module(module)
    except ImportError:
        raise MespRefError(
            f"--report-to: {name} is not installed; pip install 'mesp-ref[{name}]'"
        ) from None


def _tensorboard(module: Any, out: Path, ready: Event) -> tuple[Log, Callable[[], object], str]:
    """Event files beside the runs, in tensorboard/NAME: a run's own folder holds nothing of others."""
    folder = out.parent / "tensorboard" / out.name
    number = 2
    while not ready["step"] and folder.exists():  # of a run that this one replaces
        folder = folder.with_name(f"{out.name}-{number}")
        number += 1
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    writer = module.Writer(str(folder))

    def log(step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log, writer.close, f"tensorboard --logdir {folder.parent}"


def _trackio(module: Any, out: Path, ready: Event) -> tuple[Log, Callable[[], object], str]:
    """A run of the project mesp-ref, on this machine (TRACKIO_DIR); what it prints is progress."""
    names = "model", "rank", "alpha", "dtype", "steps", "parameters", "lora_parameters"
    with contextlib.redirect_stdout(sys.stderr):
        module.init(
            project="mesp-ref", name=out.name, resume="allow" if ready["step"] else "never",
            auto_log_cpu=False, auto_log_gpu=False,
            config={name: ready[name] for name in names},
        )  # fmt: skip

    def log(step: int, numbers: Mapping[str, float]) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            module.log(dict(numbers), step=step)

    return log, module.finish, "trackio show --project mesp-ref"

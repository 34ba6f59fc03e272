"""The main job: fine-tune a checkpoint with LoRA, from a data file to an adapter directory."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.config import PROJECTIONS
from mesp_ref.engine.generate import generate
from mesp_ref.engine.init import init_lora, parse_targets
from mesp_ref.engine.model import Model
from mesp_ref.errors import MespRefError, escaped
from mesp_ref.files.models import load_model
from mesp_ref.files.names import model_name
from mesp_ref.files.peft import load_adapter, save_adapter
from mesp_ref.job.curves import plot_loss, write_csv
from mesp_ref.job.defaults import data_file
from mesp_ref.job.directory import Event, RunDirectory, finite, write_json
from mesp_ref.job.limit import sampling_need, within
from mesp_ref.job.patience import Best
from mesp_ref.job.process import PeakMemory, StopRequest
from mesp_ref.job.state import environment, model_fingerprint, save_state
from mesp_ref.memory import Choice, Schedule
from mesp_ref.ops import IGNORED
from mesp_ref.train.data import DataFile, open_data, split_pages
from mesp_ref.train.opening import open_encoder
from mesp_ref.train.ranks import ALONE, Ranks
from mesp_ref.train.rows import Encoder, Row, RowStream
from mesp_ref.train.trainer import (
    NonFinite,
    TrainConfig,
    Trainer,
    evaluate,
    perplexity,
    require_least,
)

Report = Callable[[Event], object]


@dataclass(frozen=True)
class FinetuneOptions:
    """What `mesp-ref finetune` is told, see its --help: `train` how, the rest what and where.

    model, data   None: the checkpoint and the conversations that come with the package
    patience      evaluations without a better held-out loss after which the run stops; 0: never.
                  With it adapter/ holds the best adapter, without it the latest
    """

    model: str | None = None
    data: str | None = None
    out: str | None = None
    train: TrainConfig = field(default_factory=TrainConfig)
    adapter: str | None = None
    rank: int | None = None
    alpha: float | None = None
    targets: str | None = None
    rslora: bool = False
    dtype: str = "float32"
    form: str = "auto"
    packing: str = "auto"
    val_data: str | None = None
    val_fraction: float = 0.05
    eval_rows: int = 32
    eval_every: int = 0
    patience: int = 0
    save_every: int = 50
    prompt: str | None = None
    sample_tokens: int = 48
    memory_limit: str | int | None = None
    overwrite: bool = False
    resume: bool = False
    inexact: bool = False

    def __post_init__(self) -> None:
        require_least(self, eval_rows=0, eval_every=0, patience=0, save_every=1, sample_tokens=0)
        if self.patience and not (self.eval_every and self.eval_rows):
            raise MespRefError(
                f"patience: found {self.patience} without evaluations to wait for, expected "
                "--eval-every and --eval-rows of at least 1 beside it"
            )


# What an option that a saved run does not know must have been.
_DEFAULTS = {"perturbations": 1, "patience": 0, "workers": 1}


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with a line that says what was saved and how to go on."""


def _open_adapter(options: FinetuneOptions, model: Model) -> Adapter:
    """The adapter to go on from, or a fresh one."""
    if options.adapter is not None:
        for name in ("rank", "alpha", "targets"):
            if getattr(options, name) is not None:
                raise MespRefError(
                    f"--{name}: found beside --adapter, expected one of the two; "
                    f"{options.adapter} has its own"
                )
        return load_adapter(options.adapter, dtype=options.dtype, config=model.config)
    return init_lora(
        model.config,
        rank=8 if options.rank is None else options.rank,
        alpha=16.0 if options.alpha is None else options.alpha,
        targets=parse_targets(options.targets or "all"),
        seed=options.train.seed,
        use_rslora=options.rslora,
        dtype=options.dtype,
    )


def _open_files(options: FinetuneOptions, model: Model, data: Path) -> list[DataFile]:
    """The data file, and the validation file where there is one."""
    paths = [data] if options.val_data is None else [data, Path(options.val_data)]
    length, vocab = options.train.seq_len, model.config.vocab_size
    return [open_data(p, seq_len=length, form=options.form, vocab_size=vocab) for p in paths]


def _open_streams(
    options: FinetuneOptions, files: list[DataFile], encoder: Encoder
) -> tuple[RowStream, list[Row]]:
    """Rows to train on, without end, and the rows held out."""
    seed, packing, length = options.train.seed, options.packing, options.train.seq_len
    if len(files) == 1:
        pages, held = split_pages(files[0].pages, options.val_fraction, seed)
    else:
        pages, held = np.arange(files[0].pages), np.arange(files[1].pages)
    stream = RowStream(files[0], encoder, pages, seq_len=length, packing=packing, seed=seed)
    stream.require_full_row()
    if not len(held):
        if options.patience:
            raise MespRefError(
                f"patience: found {options.patience} without held-out data, expected --val-fraction "
                "above 0 or --val-data"
            )
        return stream, []
    held_stream = RowStream(
        files[-1], encoder, held, seq_len=length, packing=packing, shuffle=False
    )
    return stream, list(held_stream.once(options.eval_rows))


def finetune(
    options: FinetuneOptions, report: Report = lambda event: None, ranks: Ranks = ALONE
) -> Event:
    """Fine-tune; returns the summary that is also written to summary.json.

    Everything is checked before the first file is written. `report` receives events as they happen:
    ready, eval, sample, step, saved. `ranks` train together; this process alone reads the options,
    writes and reports.

    Raises MespRefError for whatever is wrong with the options, files, data, or the loss;
    Interrupted after Ctrl-C, when state and adapter are saved.
    """
    with data_file(options.data) as data:
        directory = RunDirectory(options.out, overwrite=options.overwrite, resume=options.resume)
        try:
            run = Run(options, data, report, directory, ranks)
            ranks.meet(run)
            return run.execute()
        finally:
            directory.release()


class Run:
    """A fine-tuning run on a data file that is ready to go: all inputs opened and checked."""

    def __init__(
        self,
        options: FinetuneOptions,
        data: Path,
        report: Report,
        directory: RunDirectory,
        ranks: Ranks = ALONE,
    ):
        self.options, self.report, self.directory = options, report, directory
        saved = self.directory.saved() if options.resume else None
        self.started = saved[1]["started"] if saved else datetime.now().isoformat("T", "seconds")
        now = datetime.fromisoformat(self.started)
        self.model = load_model(options.model, dtype=options.dtype)
        files = _open_files(options, self.model, data)
        encoder = open_encoder(self.model, {k for f in files for k in f.kinds}, now)
        self.tokenizer = encoder.tokenizer
        self.stream, self.heldout = _open_streams(options, files, encoder)
        adapter = _open_adapter(options, self.model)
        assert self.model.path is not None
        self.name = model_name(self.model.path, options.model)
        adapter.base_model_name_or_path = self.name
        self.choice: Choice | None = None
        if options.memory_limit is not None:
            identity = saved[1]["identity"] if saved else {}
            train, self.choice = within(
                options.memory_limit, options.train, self.model, adapter,
                schedule=saved and Schedule(identity["method"], identity["checkpoints"]),
            )  # fmt: skip
            self.options = options = dataclasses.replace(options, train=train)
        self.identity = self._identity(adapter, files)
        self.trainer = Trainer(self.model, adapter, self.stream, options.train, ranks=ranks)
        self.adapter, self.resumed, self.best = adapter, saved is not None, Best()
        self.prompt = self._affordable(self._prompt_ids(encoder))
        if saved:
            self._restore(*saved)
        self._clean, self._trained, self._seconds, self._peak = True, 0, 0.0, 0.0
        self.written: int | None = None  # the step whose adapter is on disk

    def _identity(self, adapter: Adapter, files: list[DataFile]) -> dict[str, Any]:
        """What must be the same for a resumed run to go on with the same bits."""
        options = self.options
        return {
            **dataclasses.asdict(options.train),
            "lr": options.train.base_lr,
            "dtype": options.dtype,
            "rank": adapter.rank,
            "alpha": adapter.alpha,
            "targets": list(adapter.targets),
            "rslora": adapter.use_rslora,
            "packing": options.packing,
            "val_fraction": options.val_fraction,
            "patience": options.patience,
            "eval_every": options.eval_every if options.patience else None,
            "eval_rows": options.eval_rows if options.patience else None,
            "data": files[0].sha256,
            "val_data": files[1].sha256 if len(files) > 1 else None,
            "model": model_fingerprint(self.model),
        }

    def _restore(self, arrays: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Continue from a save, if it is this run's."""
        directory, before = self.directory.path, facts["identity"]
        for name, now in self.identity.items():
            then = before.get(name, _DEFAULTS.get(name))
            longer = name == "steps" and self.options.train.schedule == "constant"
            if then == now or (longer and now >= facts["step"]):
                continue
            kind = "another file or content" if name in ("data", "val_data", "model") else repr(now)
            was = (
                "the one it was started with"
                if name in ("data", "val_data", "model")
                else repr(then)
            )
            raise MespRefError(
                f"{directory}: --resume: {name}: found {kind}, expected {was}; repeat the command "
                "of the run and add --resume"
            )
        for name, here in environment().items():
            there = facts["environment"].get(name)
            if here != there and not self.options.inexact:
                raise MespRefError(
                    f"{directory}: --resume: {name}: found {here}, expected {there} for the same "
                    "bits; restore it (threads: OPENBLAS_NUM_THREADS), or add --inexact"
                )
        self.trainer.restore(arrays, facts)
        self.best = Best(**(facts.get("best") or {}))

    @property
    def prompt_source(self) -> str:
        """Where the text that the samples continue comes from: a row may hold private data."""
        if self.options.prompt is not None:
            return "--prompt"
        return "the first held-out row" if self.heldout else "the first row of the data"

    def _prompt_ids(self, encoder: Encoder) -> list[int]:
        """What the samples continue: --prompt, or the beginning of a held-out (or first) row."""
        if self.tokenizer is None or not self.options.sample_tokens:
            return []
        if self.options.prompt is not None:
            text = self.options.prompt
            if encoder.template is not None:
                turn = {"role": "user", "content": text}
                text = encoder.template.render([turn], add_generation_prompt=True)
            ids = encoder.text(text).tolist()
            if not ids:
                raise MespRefError("--prompt: found no text, expected some to continue")
            return ids
        row = self.heldout[0] if self.heldout else next(self.stream.once(1), None)
        if row is None:
            return []
        said = np.flatnonzero(row.labels[1:] != IGNORED) + 1
        length = max(int(said[0]), min(16, len(row.ids) // 2)) if said[0] <= 1 else int(said[0])
        return row.ids[:length].tolist()

    def _affordable(self, prompt: list[int]) -> list[int]:
        """The prompt, or none where a sample would need more than the memory limit."""
        if self.choice is None or not prompt:
            return prompt
        tokens = len(prompt) + self.options.sample_tokens
        need = sampling_need(tokens, self.model, self.adapter)
        return prompt if need <= self.choice.limit else []

    def execute(self) -> Event:
        """Evaluate, train, evaluate; save on the way and whatever happens."""
        self.report(self._ready())
        with StopRequest() as stop, PeakMemory() as memory:
            try:
                self._begin(stop)
                self._loop(stop, memory)
                self._evaluate(stop)
                if self.kept != self.trainer.step:
                    self.adapter = self._best_adapter()
                self._sample()
                self._peak = max(self._peak, memory.take())
                return self._finish()
            except KeyboardInterrupt:
                raise Interrupted(self._interrupted()) from None
            except MespRefError as error:
                raise MespRefError(self._failed(error)) from None

    def _begin(self, stop: StopRequest) -> None:
        """The run's files: those of a new run after its first evaluation, or those of the old."""
        if self.resumed:
            self.directory.reopen(self.trainer.step)
            self.written = self.kept
            if self.kept == self.trainer.step:  # a save may have been cut in two
                save_adapter(self.adapter, self.directory.adapter)
            return
        self._evaluate(stop)
        self._sample()
        stop.check()
        self.directory.create(self._configuration())
        self._save()

    @property
    def kept(self) -> int:
        """The step whose adapter lies in adapter/: with --patience the best, else the latest."""
        return self.best.step if self.options.patience else self.trainer.step

    @property
    def stopped(self) -> bool:
        """Whether the held-out loss has not improved for too long."""
        return 0 < self.options.patience <= self.best.waited

    def _best_adapter(self) -> Adapter:
        return load_adapter(
            self.directory.adapter, dtype=self.options.dtype, config=self.model.config
        )

    def _finish(self) -> Event:
        """Table, picture and summary of a complete run."""
        summary = self._summary()
        self._draw()
        write_json(self.directory.file("summary.json"), summary)
        return summary

    def _loop(self, stop: StopRequest, memory: PeakMemory) -> None:
        options, trainer = self.options, self.trainer
        memory.take()
        while trainer.step < options.train.steps and not self.stopped:
            stop.check()
            begin = time.perf_counter()
            self._clean = False
            result = trainer.advance()
            self._clean = True
            seconds, peak = time.perf_counter() - begin, memory.take()
            self._seconds, self._trained = self._seconds + seconds, self._trained + result.tokens
            self._peak = max(self._peak, peak)
            event = {"event": "step", **result._asdict(), "epoch": self.stream.cursor.epoch}
            event |= {"seconds": seconds, "tokens_per_second": result.tokens / seconds}
            self._log(event | {"memory_mib": peak})
            last = trainer.step == options.train.steps
            if options.eval_every and trainer.step % options.eval_every == 0 and not last:
                self._evaluate(stop)
            if trainer.step % options.save_every == 0 or last or self.stopped:
                self._save()

    def _log(self, event: Event) -> None:
        self.directory.log(event)
        self.report(event)

    def _logged(self, kind: str, step: int) -> Event | None:
        found = [e for e in self.directory.events() if e["event"] == kind and e["step"] == step]
        return found[-1] if found else None

    def _evaluate(self, stop: StopRequest) -> None:
        """Held-out loss at this step, unless it is known already; with --patience, keep the best."""
        if not self.heldout:
            return
        step = self.trainer.step
        known = self._logged("eval", step)
        event = known or self._measure(step, stop)
        self.best = self.best.after(step, event["loss"])
        if known is None:
            best = {"best_step": self.best.step, "evaluations_since_best": self.best.waited}
            self._log(event | best)
        if self.options.patience and self.kept == step and self.directory.created:
            self._save()

    def _measure(self, step: int, stop: StopRequest) -> Event:
        """The held-out rows evaluated. Raises NonFinite after step 0."""

        def progress(done: int) -> None:
            stop.check()
            self.report({"event": "evaluating", "rows": done, "of": len(self.heldout)})

        size = self.options.train.batch_size
        value, tokens, accuracy = evaluate(
            self.model, self.adapter, self.heldout, size, progress, self.trainer.ranks
        )
        if not math.isfinite(value):
            what = f"step {step}: held-out loss: found {value}, expected a finite number; "
            if step == 0:
                raise MespRefError(what + "the model itself computes it")
            raise NonFinite(what + "try a smaller --lr", torn=True)
        return {
            "event": "eval",
            "step": step,
            "loss": value,
            "perplexity": finite(perplexity(value)),
            "accuracy": accuracy,
            "tokens": tokens,
        }

    def _sample(self) -> None:
        """What the model says now, greedily, unless it is known already."""
        step = self.kept
        if not self.prompt or self._logged("sample", step):
            return
        assert self.tokenizer is not None
        [new] = generate(
            self.model, [self.prompt], self.adapter, max_new_tokens=self.options.sample_tokens
        )
        event = {"event": "sample", "step": step, "source": self.prompt_source}
        event["prompt"] = self.tokenizer.decode(self.prompt, skip_special_tokens=False)
        self._log(event | {"text": self.tokenizer.decode(new, skip_special_tokens=True)})

    def _save(self) -> None:
        """The state first, then the adapter, if it is the one to keep."""
        arrays, facts = self.trainer.state()
        facts |= {
            "identity": self.identity,
            "environment": environment(),
            "started": self.started,
            "best": self.best._asdict(),
        }
        save_state(self.directory.file("state.safetensors"), arrays, facts)
        if self.kept == self.trainer.step:
            save_adapter(self.adapter, self.directory.adapter)
            self.written = self.kept
        self.report({"event": "saved", "step": self.trainer.step, "out": str(self.directory.path)})

    def _interrupted(self) -> str:
        """Save if no step was cut through, and say what is there."""
        if not self.directory.created:
            return "interrupted before the first step; nothing was written"
        if self._clean:
            self._save()
        return (
            f"interrupted at step {self.trainer.step}; {self._saved()} are in "
            f"{self.directory.path}: repeat the command with --resume to go on"
        )

    def _saved(self) -> str:
        """What the files of the run hold."""
        saved = self.directory.saved()
        step = saved[1]["step"] if saved else 0
        adapter = "adapter" if self.written == step else f"adapter as of step {self.written}"
        return f"{adapter} and state as of step {step}"

    def _failed(self, error: MespRefError) -> str:
        """Save if the last step was a good one, and say what is there and how to go on."""
        if not self.directory.created:
            return str(error)
        if isinstance(error, NonFinite) and not error.torn:
            self._save()
        if self.written is None and not self.resumed:
            self.directory.discard()
            return str(error)
        line = f"{error}; the adapter as of step {self.written} is kept in {self.directory.adapter}"
        if isinstance(error.__context__, OSError):  # a full disk, for one
            line += "; when that is mended, repeat the command with --resume to go on"
        return line

    def _ready(self) -> Event:
        """What the run is about to do."""
        config, adapter = self.model.config, self.adapter
        return {
            "event": "ready",
            "step": self.trainer.step,
            "steps": self.options.train.steps,
            "model": self._model_name(),
            "blocks": config.num_hidden_layers,
            "parameters": sum(math.prod(s) for s in config.weight_shapes().values()),
            "dtype": self.options.dtype,
            "rank": adapter.rank,
            "alpha": adapter.alpha,
            "targets": "all" if len(adapter.targets) == len(PROJECTIONS) else list(adapter.targets),
            "lora_parameters": sum(array.size for array in adapter.weights.values()),
            "data": self.options.data or "questions about stories",
            "data_bytes": self.stream.data.size,
            "heldout_rows": len(self.heldout),
            "out": None if self.directory.numbered else str(self.directory.path),
            "memory": None if self.choice is None else str(self.choice),
        }

    def _configuration(self) -> dict[str, Any]:
        """run.json: the options, what they came to, and where."""
        return {
            "options": dataclasses.asdict(self.options),
            "identity": self.identity,
            "environment": environment(),
            "started": self.started,
        }

    def _draw(self) -> None:
        """The metrics as a table and as a picture."""
        events, train = self.directory.events(), self.options.train
        write_csv(self.directory.file("metrics.csv"), events)
        title = f"Fine-tuning {escaped(self.name or 'a model')} with {train.method}"
        plot_loss(self.directory.file("loss.png"), events, title)

    def _model_name(self) -> str:
        return self.options.model or "the default checkpoint"

    def _said(self, step: int) -> Event | None:
        """The sample of a step, unless there are to be none, though an earlier start had some."""
        return self._logged("sample", step) if self.options.sample_tokens else None

    def _summary(self) -> Event:
        sides = {}
        for side, step in (("before", 0), ("after", self.kept)):
            loss, sample = self._logged("eval", step), self._said(step)
            sides[side] = {
                "loss": loss and loss["loss"],
                "perplexity": loss and loss["perplexity"],
                "accuracy": loss and loss["accuracy"],
                "sample": sample and sample["text"],
            }
        sample = self._said(self.kept)
        return {
            "out": str(self.directory.path),
            "adapter": str(self.directory.adapter),
            "curve": str(self.directory.file("loss.png")),
            "method": self.options.train.method,
            "steps": self.trainer.step,
            "adapter_step": self.kept,
            "stopped_early": self.trainer.step < self.options.train.steps,
            "tokens": self.trainer.tokens,
            "epochs": self.stream.cursor.epoch,
            "seconds": self._seconds,
            "tokens_per_second": self._trained / self._seconds if self._seconds else None,
            "peak_memory_mib": self._peak,
            "prompt": sample and sample["prompt"],
            "prompt_source": sample and self.prompt_source,
            **sides,
        }

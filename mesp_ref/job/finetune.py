"""The main job: fine-tune a checkpoint with LoRA, from a data file to an adapter directory."""

import contextlib
import dataclasses
import math
import signal
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
from mesp_ref.files.hub import data_path, revision_of
from mesp_ref.files.models import load_model
from mesp_ref.files.names import model_name
from mesp_ref.files.peft import load_adapter, save_adapter
from mesp_ref.job.curves import plot_loss, write_csv
from mesp_ref.job.defaults import EVAL_EVERY, data_file
from mesp_ref.job.directory import RunDirectory, finite, write_json
from mesp_ref.job.limit import sampling_need, within
from mesp_ref.job.metrics import Event, Totals
from mesp_ref.job.patience import Best
from mesp_ref.job.process import StopRequest
from mesp_ref.job.quiz import Quiz
from mesp_ref.job.report import Reporter
from mesp_ref.job.state import environment, model_fingerprint, save_state
from mesp_ref.lean.tiled_weight import tiled_model
from mesp_ref.memory import Choice, PeakResident, Schedule
from mesp_ref.ops import IGNORED
from mesp_ref.train.bounds import check_bounds, option
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
    rslora: bool = option(False, "scale alpha/sqrt(R) instead")
    dtype: str = "float32"
    form: str = "auto"
    packing: str = "auto"
    special_tokens_in_text: bool = False
    val_data: str | None = option(
        None, "held-out data of its own (default: a part of --data)", metavar="FILE"
    )
    val_fraction: float = option(
        0.05, "part of --data that is held out (default: {default}; 0 for none)", metavar="P"
    )
    eval_rows: int = option(32, "held-out sequences to evaluate on, at most")
    eval_every: int = option(
        0, "evaluate also every N steps; 0: only before and after "
        f"(default: {{default}}; {EVAL_EVERY} without --model)",
    )  # fmt: skip
    patience: int = option(
        0, "stop after N evaluations without a better held-out loss, and keep the best adapter instead "
        "of the last one; 0: train all steps",
    )  # fmt: skip
    save_every: int = option(50, "save adapter and state every N steps")
    prompt: str | None = option(
        None, "what the samples continue or answer (default: the beginning of a held-out row, which "
        "is then printed and kept in summary.json and metrics.jsonl)", metavar="TEXT",
    )  # fmt: skip
    sample_tokens: int = option(48, "tokens of the samples; 0 for none")
    memory_limit: str | int | None = option(
        None, "take the fastest exact method and place for checkpoints whose step fits: 64MB (10⁶ "
        "bytes), 64MiB (2²⁰) or bytes, above weights, LoRA and optimiser; samples that need more "
        "are left out (default: no limit)", metavar="SIZE",
    )  # fmt: skip
    overwrite: bool = False
    resume: bool = False
    inexact: bool = False

    def __post_init__(self) -> None:
        check_bounds(vars(self))
        if self.patience and not (self.eval_every and self.eval_rows):
            raise MespRefError(
                f"patience: found {self.patience} without evaluations to wait for, expected "
                "--eval-every and --eval-rows of at least 1 beside it"
            )


# What an option that a saved run does not know must have been.
_DEFAULTS = {
    "perturbations": 1,
    "patience": 0,
    "workers": 1,
    "form": "auto",
    "special_tokens_in_text": False,
}


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or a signal like it, with a line that says what was saved and how to go on."""

    signal = int(signal.SIGINT)


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


def _name_base(adapter: Adapter, model: Model, options: FinetuneOptions) -> str | None:
    """Say in an adapter which model it is of, by the name under which others find it."""
    assert model.path is not None
    adapter.base_model_name_or_path = model_name(model.path, options.model)
    adapter.revision = revision_of(options.model)
    return adapter.base_model_name_or_path


def _open_files(options: FinetuneOptions, model: Model, data: Path) -> list[DataFile]:
    """The data file, and the validation file where there is one."""
    paths = [data] if options.val_data is None else [data, data_path(options.val_data)]
    length, vocab = options.train.seq_len, model.config.vocab_size
    return [open_data(p, seq_len=length, form=options.form, vocab_size=vocab) for p in paths]


def _open_streams(
    options: FinetuneOptions, files: list[DataFile], encoder: Encoder
) -> tuple[RowStream, list[Row], dict[str, Event]]:
    """Rows to train on, without end, the rows held out, and what both come to."""
    seed, packing, length = options.train.seed, options.packing, options.train.seq_len
    if len(files) == 1:
        pages, held = split_pages(files[0].pages, options.val_fraction, seed)
    else:
        pages, held = np.arange(files[0].pages), np.arange(files[1].pages)
    stream = RowStream(files[0], encoder, pages, seq_len=length, packing=packing, seed=seed)
    contents = {"train": dataclasses.asdict(stream.contents())}
    stream.require_full_row()
    rows: list[Row] = []
    if len(held):
        held_stream = RowStream(
            files[-1], encoder, held, seq_len=length, packing=packing, shuffle=False
        )
        contents["held out"] = dataclasses.asdict(held_stream.contents())
        rows = list(held_stream.once(options.eval_rows))
    if options.patience and not rows:
        raise MespRefError(
            f"patience: found {options.patience} without held-out data, expected --val-fraction "
            "above 0 or --val-data, with rows that fit into --seq-len"
        )
    return stream, rows, contents


def finetune(
    options: FinetuneOptions, report: Report = lambda event: None, ranks: Ranks = ALONE
) -> Event:
    """Fine-tune; returns the summary that is also written to summary.json.

    Everything is checked before the first file is written. `report` receives events as they happen:
    ready, eval, sample, quiz, step, saved, warning. What it raises is warned of and ends nothing, but
    KeyboardInterrupt, which stops the run as Ctrl-C does. `ranks` train together; this process alone
    reads the options, writes and reports.

    Raises MespRefError for whatever is wrong with the options, files, data, or the loss;
    Interrupted after Ctrl-C, SIGTERM or SIGHUP, when state and adapter are saved.
    """
    with data_file(options.data) as data:
        directory = RunDirectory(
            options.out, overwrite=options.overwrite, resume=options.resume,
            inputs=[options.model, options.data, options.val_data, options.adapter],
        )  # fmt: skip
        try:
            run = Run(options, data, Reporter(report), directory, ranks)
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
        report: Reporter,
        directory: RunDirectory,
        ranks: Ranks = ALONE,
    ):
        self.options, self.report, self.directory = options, report, directory
        saved = self.directory.resumable() if options.resume else None
        self.started = saved[1]["started"] if saved else datetime.now().isoformat("T", "seconds")
        now = datetime.fromisoformat(self.started)
        self.model = load_model(options.model, dtype=options.dtype)
        files = _open_files(options, self.model, data)
        kinds = {k for f in files for k in f.kinds}
        encoder = open_encoder(self.model, kinds, now, options.special_tokens_in_text)
        self.tokenizer, self.ends = encoder.tokenizer, encoder.turn_ends
        self.chat = encoder.template is not None
        self.stream, self.heldout, self.contents = _open_streams(options, files, encoder)
        adapter = _open_adapter(options, self.model)
        self.name = _name_base(adapter, self.model, options)
        self.choice: Choice | None = None
        if options.memory_limit is not None:
            identity = saved[1]["identity"] if saved else {}
            train, self.choice = within(
                options.memory_limit, options.train, self.model, adapter,
                saved and Schedule(identity["method"], identity["checkpoints"]), self.stream.pack,
            )  # fmt: skip
            self.options = options = dataclasses.replace(options, train=train)
        self.identity = self._identity(adapter, files)
        self.trainer = Trainer(self.model, adapter, self.stream, options.train, ranks=ranks)
        self.adapter, self.resumed, self.best = adapter, saved is not None, Best()
        self.prompt, self.quiz = self._affordable(self._prompt_ids(encoder)), self._quiz(encoder)
        if saved:
            self._restore(*saved)
        self._clean, self.totals = True, Totals()
        self._results: dict[str, dict[int, Event]] = {"eval": {}, "sample": {}, "quiz": {}}
        self._warn_of_length()
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
            "special_tokens_in_text": options.special_tokens_in_text,
            "form": options.form,
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
            if then == now or (name == "steps" and self._extends(then, facts["step"])):
                continue
            kind = "another file or content" if name in ("data", "val_data", "model") else repr(now)
            was = (
                "the one it was started with"
                if name in ("data", "val_data", "model")
                else repr(then)
            )
            raise MespRefError(
                f"{directory}: --resume: {name}: found {kind}, expected {was}; --resume with the "
                "directory alone takes the options of the run"
            )
        for name, here in environment().items():
            there = facts["environment"].get(name)
            if here != there and not self.options.inexact:
                raise MespRefError(
                    f"{directory}: --resume: {name}: found {here}, expected {there} for the same "
                    "bits; restore it (threads: OPENBLAS_NUM_THREADS), or add --inexact"
                )
        self._check_progress(facts)
        self.trainer.restore(arrays, facts)
        self.best = Best(**(facts.get("best") or {}))

    @property
    def prompt_source(self) -> str:
        """Where the text that the samples continue comes from: a row may hold private data."""
        if self.options.prompt is not None:
            return "--prompt"
        return "the first held-out row" if self.heldout else "the first row of the data"

    def _check_progress(self, facts: Mapping[str, Any]) -> None:
        """Raise MespRefError for a place in the data where this many steps cannot have come to."""
        train, (epoch, pool, start) = self.options.train, facts["cursor"]
        rows = facts["step"] * train.batch_size * train.accumulate
        most = {"step": (facts["step"], facts["identity"]["steps"]),
                "tokens": (facts["tokens"], rows * train.seq_len),
                "cursor": (max(epoch, start), rows),
                "cursor's pool": (pool, self.stream.pools - 1)}  # fmt: skip
        for name, (found, limit) in most.items():
            if found > limit:
                raise MespRefError(
                    f"{self.directory.path}: --resume: state.safetensors: {name}: found {found}, "
                    f"expected at most {limit}; the file is damaged, start a new run"
                )

    def _extends(self, before: object, step: int) -> bool:
        """Whether the run may have more steps than it was started with: finished, or never slowing."""
        train = self.options.train
        if not isinstance(before, int) or train.steps < step:
            return False
        if train.schedule != "constant" and step >= before:
            self.report.warn(
                f"{before} steps become {train.steps}: the learning rate goes on as the "
                f"{train.schedule} of a run of {train.steps}"
            )
        return train.schedule == "constant" or step >= before

    def _warn_of_length(self) -> None:
        if "held out" in self.contents and self.options.eval_rows and not self.heldout:
            self.report.warn("no held-out row has a token to learn: nothing is evaluated")
        length, known = self.options.train.seq_len, self.model.config.max_position_embeddings
        train = self.contents["train"]
        if train["too_long"]:
            self.report.warn(
                f"{train['too_long']} of {train['documents']} documents are left out: no answer ends "
                f"within {length} tokens; --seq-len {train['longest']} would hold the longest"
            )
        if length > known:
            self.report.warn(
                f"seq_len {length} is beyond max_position_embeddings, {known}: the model has never "
                "seen such positions"
            )

    def _prompt_ids(self, encoder: Encoder) -> list[int]:
        """What the samples continue: --prompt, or the beginning of a held-out (or first) row."""
        if self.tokenizer is None or not self.options.sample_tokens:
            return []
        if self.options.prompt is not None:
            text = self.options.prompt
            turn = {"role": "user", "content": text}
            chat = encoder.template is not None
            ids = (encoder.prompt([turn]) if chat else encoder.text(text)).tolist()
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

    def _quiz(self, encoder: Encoder) -> Quiz | None:
        """Questions with known answers, where the data is the package's own and the limit lets them."""
        options = self.options
        if options.data is not None or not options.sample_tokens or encoder.template is None:
            return None
        quiz = Quiz(encoder)
        fits = self.choice is None or quiz.need(self.model, self.adapter) <= self.choice.limit
        return quiz if fits else None

    def execute(self) -> Event:
        """Evaluate, train, evaluate; save on the way and whatever happens."""
        self.report(self._ready())
        with StopRequest() as stop, PeakResident() as memory:
            try:
                self._begin(stop)
                self._loop(stop, memory)
                self._evaluate(stop)
                if self.kept != self.trainer.step:
                    self.adapter = self._best_adapter()
                self._decorate("sample", self._sample)
                self._decorate("quiz", self._ask)
                self.totals.peak_mb = max(self.totals.peak_mb, memory.take())
                return self._finish()
            except KeyboardInterrupt:
                interrupted = Interrupted(self._interrupted())
                interrupted.signal = stop.requested or interrupted.signal
                raise interrupted from None
            except MespRefError as error:
                raise MespRefError(self._failed(error)) from None

    def _begin(self, stop: StopRequest) -> None:
        """The run's files: those of a new run after its first evaluation, or those of the old."""
        if self.resumed:
            self._go_on(stop)
            return
        self._evaluate(stop)
        self._decorate("sample", self._sample)
        self._decorate("quiz", self._ask)
        stop.check()
        self.directory.create(self._configuration())
        self._save()

    def _go_on(self, stop: StopRequest) -> None:
        """What was saved and logged; an evaluation that was cut short is made up for."""
        self.totals = self.directory.reopen(self.trainer.step)
        if self.totals.steps < self.trainer.step:
            self.report.warn(
                f"{self.directory.metrics.file} holds {self.totals.steps} of {self.trainer.step} "
                "steps: table, curve and summary lack the others"
            )
        for event in self.directory.metrics:
            self._remember(event)
        self.written = self.kept
        write_json(self.directory.file("run.json"), self._configuration())  # it may have more steps
        if self.kept == self.trainer.step:  # a save may have been cut in two
            save_adapter(self.adapter, self.directory.adapter, overwrite=True)
        if self._due():
            self._evaluate(stop)

    def _due(self) -> bool:
        """Whether the held-out rows are to be evaluated at this step."""
        every, step = self.options.eval_every, self.trainer.step
        return step == 0 or bool(every and step % every == 0 and step != self.options.train.steps)

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
        """Table, picture and summary of a complete run; without a picture it is complete, too."""
        self.directory.metrics.write()
        self._decorate("metrics.csv or loss.png", self._draw)
        summary = self._summary()
        write_json(self.directory.file("summary.json"), summary)
        self.directory.complete()
        return summary

    def _decorate(self, what: str, make: Callable[[], object]) -> None:
        """Make what a run can do without."""
        try:
            make()
        except Exception as error:
            self.report.warn(f"{what}: not made: {type(error).__name__}: {error}")

    def _loop(self, stop: StopRequest, memory: PeakResident) -> None:
        options, trainer = self.options, self.trainer
        memory.take()
        while trainer.step < options.train.steps and not self.stopped:
            stop.check()
            begin = time.perf_counter()
            self._clean = False
            result = trainer.advance()
            self._clean = True
            seconds = max(time.perf_counter() - begin, 1e-9)  # the clock of some systems is coarse
            event = {"event": "step", **result._asdict(), "epoch": self.stream.cursor.epoch}
            event |= {"seconds": seconds, "tokens_per_second": result.computed_tokens / seconds}
            event["memory_mb"] = memory.take()
            self.totals.add(event)
            self._log(event)
            if self._due():
                self._evaluate(stop)
            last = trainer.step == options.train.steps
            if trainer.step % options.save_every == 0 or last or self.stopped:
                self._save()

    def _log(self, event: Event) -> None:
        """Tell and write an event. One that the disk has no room for waits for the next."""
        try:
            self.directory.metrics.log(event)
        except MespRefError as error:
            self.report.warn(f"{error}; trying again with each step")
        self._remember(event)
        self.report(event)

    def _remember(self, event: Event) -> None:
        """Keep results of the first, the best and the latest step; a long run has many."""
        if event["event"] in self._results:
            results = self._results[event["event"]]
            results[event["step"]] = event
            for step in results.keys() - {0, self.best.step, self.trainer.step}:
                del results[step]

    def _logged(self, kind: str, step: int) -> Event | None:
        return self._results[kind].get(step)

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
            self.model, self.adapter, self.heldout, size, progress, self.trainer.ranks,
            self.options.train.score_chunk(self.model),
        )  # fmt: skip
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
            tiled_model(self.model), [self.prompt], self.adapter,
            max_new_tokens=self.options.sample_tokens, eos_token_id=self.ends,
        )  # fmt: skip
        event = {"event": "sample", "step": step, "source": self.prompt_source}
        event["prompt"] = self.tokenizer.decode(self.prompt, skip_special_tokens=False)
        self._log(event | {"text": self.tokenizer.decode(new, skip_special_tokens=True)})

    def _ask(self) -> None:
        """What the model answers to the quiz now, unless it is known already."""
        if self.quiz is not None and not self._logged("quiz", self.kept):
            self._log({"step": self.kept} | self.quiz.event(self.model, self.adapter))

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
            save_adapter(self.adapter, self.directory.adapter, overwrite=True)
            self.written = self.kept
        self.report({"event": "saved", "step": self.trainer.step, "out": str(self.directory.path)})

    def _interrupted(self) -> str:
        """Save if no step was cut through, and say what is there."""
        if not self.directory.created:
            return "interrupted before the first step; nothing was written"
        if self._clean:
            with contextlib.suppress(KeyboardInterrupt):  # what is told is read from the disk
                self._save()
        return (
            f"interrupted at step {self.trainer.step}; {self._saved()} are in "
            f"{self.directory.path}: {self.directory.how_to_go_on}"
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
            line += f"; when that is mended, {self.directory.how_to_go_on}"
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
            "contents": self.contents,
            "out": None if self.directory.numbered else str(self.directory.place),
            "complete": self.resumed and self.trainer.step >= self.options.train.steps,
            "seconds": self.totals.seconds,
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
        events = self.directory.metrics
        write_csv(self.directory.file("metrics.csv"), events)
        title = f"Fine-tuning {escaped(self.name or 'a model')} with {self.options.train.method}"
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
        sample, totals, place = self._said(self.kept), self.totals, self.directory.place
        drawn = self.directory.file("loss.png").is_file()
        return {
            "out": str(place),
            "adapter": str(place / "adapter"),
            "curve": str(place / "loss.png") if drawn else None,
            "method": self.options.train.method,
            "steps": self.trainer.step,
            "adapter_step": self.kept,
            "stopped_early": self.trainer.step < self.options.train.steps,
            "tokens": self.trainer.tokens,
            "epochs": self.stream.cursor.epoch,
            "contents": self.contents,
            "computed_tokens": totals.computed_tokens,
            "seconds": totals.seconds,
            "tokens_per_second": totals.computed_tokens / totals.seconds
            if totals.seconds
            else None,
            "peak_memory_mb": totals.peak_mb,
            "warnings": list(self.report.warnings),
            "prompt": sample and sample["prompt"],
            "prompt_source": sample and self.prompt_source,
            "chat": self.chat,
            "quiz": self.quiz
            and self.quiz.summary(*(self._logged("quiz", s) for s in (0, self.kept))),
            **sides,
        }

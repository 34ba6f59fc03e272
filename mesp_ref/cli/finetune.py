"""mesp-ref finetune: train a LoRA adapter."""

import argparse
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mesp_ref.cli.options import (
    add_command,
    add_data,
    add_fields,
    add_json,
    add_lora,
    add_model,
    add_patience,
    add_special_tokens,
    print_json,
    say,
)
from mesp_ref.cli.progress import Progress
from mesp_ref.cli.recipe import with_config
from mesp_ref.errors import MespRefError
from mesp_ref.job.defaults import EVAL_EVERY, RECIPE
from mesp_ref.job.directory import resumed_folder, run_place
from mesp_ref.job.finetune import FinetuneOptions, Report, finetune
from mesp_ref.job.metrics import Event
from mesp_ref.job.quiz import described
from mesp_ref.job.record import saved_options
from mesp_ref.job.trackers import Reporters, Tracker
from mesp_ref.train.trainer import TrainConfig

_HELP = """\
Train a LoRA adapter. Without --model and --data it is the story model that comes with this
package, which learns to answer questions about stories, in about a minute: a quiz of 20 that it has
not seen is put to it before and after. The base model stays as it is; the adapter is a PEFT
directory of a few MB. The held-out loss and a sample are taken before and after.

The data is plain text, or records as JSON lines, a JSON list, CSV, TSV, Parquet, Arrow or a data
set's directory, gzip of any; what a file is, its content says. A record is {"text": ...},
{"tokens": [...]}, {"prompt": ..., "completion": ...}, Alpaca's instruction, input and output, ShareGPT's
conversations, or {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]}, which is
rendered with the model's own chat template and learns only what the assistant says, up to the
token with which the template ends its turn. Turns with "weight": 0 or "train": false are read and
not learned. Words of a turn are words: they make no control token. An answer that does not end
within --seq-len is not learned. A table tells before the first step what all comes to; mesp-ref data
shows it alone. Files are streamed: their size does not matter. A part is held out for evaluation.

The run directory gets adapter/, run.json (the configuration), metrics.jsonl and .csv, loss.png,
summary.json, and state.safetensors, from which --resume goes on with the same bits. Ctrl-C saves
and stops.

examples:
  mesp-ref finetune
  mesp-ref finetune --rank 4 --lr 1e-2 --method mebp --steps 2 --out runs/quick
  mesp-ref finetune --data notes.txt --seq-len 64 --steps 2 --optimizer sgd --clip 0 --accumulate 1
  mesp-ref finetune --method mezo --perturbations 4 --steps 2 --out runs/forward-only
  mesp-ref finetune --data notes.txt --seq-len 64 --steps 4 --eval-every 1 --patience 2
  mesp-ref finetune --model Qwen2.5-0.5B --data chats.jsonl --steps 2 --out runs/chats
  mesp-ref finetune --resume runs/chats
  mesp-ref finetune --config runs/chats/run.json --lr 1e-3 --out runs/again
"""


def add(commands: Any) -> None:
    parser = add_command(commands, "finetune", run, "train a LoRA adapter", _HELP)
    parser.usage = (
        "mesp-ref finetune [--config FILE] [--model DIR] [--data FILE] [--out DIR] [options]"
    )
    parser.add_argument(
        "--config", metavar="FILE",
        help="options from a YAML or JSON file, or a run's run.json to repeat it; what the command line "
        "says goes before",
    )  # fmt: skip
    add_model(parser)
    _add_data(parser.add_argument_group("data"))
    group = parser.add_argument_group("adapter")
    add_lora(group)
    add_fields(group, FinetuneOptions, "rslora")
    _add_training(parser.add_argument_group("training", _recipe()))
    _add_output(parser.add_argument_group("evaluation and output"))
    _add_ranks(parser.add_argument_group("several processes"))
    # What was not given is None, so that the options of a run that goes on are not overruled.
    fields = {**FinetuneOptions.__dataclass_fields__, **TrainConfig.__dataclass_fields__}
    parser.set_defaults(**dict.fromkeys(fields))


def _recipe() -> str:
    settings = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in RECIPE.items())
    return f"without --model the defaults are {settings}"


def _add_data(group: Any) -> None:
    add_data(group)
    add_special_tokens(group)
    add_fields(group, TrainConfig, "seq_len")
    add_fields(group, FinetuneOptions, "val_data", "val_fraction")


def _add_training(group: Any) -> None:
    names = [name for name in TrainConfig.__dataclass_fields__ if name != "seq_len"]
    add_fields(group, TrainConfig, *names)
    add_fields(group, FinetuneOptions, "memory_limit")


def _add_output(group: Any) -> None:
    group.add_argument("--out", metavar="DIR", help="run directory (default: the next runs/NNN)")
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the run in --out, once this one is complete",
    )
    group.add_argument(
        "--resume", nargs="?", const=True, metavar="DIR",
        help="go on with the run in DIR, in --out, or with the last runs/NNN, with the options of its "
        "run.json; a complete run is prolonged by --steps",
    )  # fmt: skip
    group.add_argument(
        "--inexact", action="store_true",
        help="resume even with other threads or another NumPy, which changes the last bits",
    )  # fmt: skip
    names = "eval_every", "patience", "eval_rows", "save_every", "sample_tokens", "prompt"
    add_fields(group, FinetuneOptions, *names)
    group.add_argument(
        "--no-sample", action="store_const", const=0, dest="sample_tokens",
        default=argparse.SUPPRESS, help="no samples: no text of the data is printed or kept",
    )  # fmt: skip
    group.add_argument(
        "--report-to", choices=("tensorboard", "trackio"), action="append",
        help="log losses and speed there, too, through its own package; repeat for both",
    )  # fmt: skip
    group.add_argument("--quiet", action="store_true", help="no progress on standard error")
    add_json(group)


def _add_ranks(group: Any) -> None:
    group.add_argument(
        "--mpi", action="store_true",
        help="train together with the other processes of mpiexec -n N: each takes --accumulate batches "
        "of a step; the adapter is, byte for byte, that of one process with N times as many",
    )  # fmt: skip
    add_patience(group)


def _options(args: argparse.Namespace) -> FinetuneOptions:
    """The command line as options; what was not given keeps the library's default."""
    saved = _saved(args) if args.resume else {}
    for name in ("method", "checkpoints", "chunk"):
        if args.memory_limit is not None and getattr(args, name) is not None:
            raise MespRefError(
                f"--{name}: found beside --memory-limit, expected one of the two; the limit chooses"
            )
    given = {name: value for name, value in vars(args).items() if value is not None}
    train = {name: given.pop(name) for name in TrainConfig.__dataclass_fields__ if name in given}
    if saved:
        train, given = saved.pop("train") | train, saved | given
    elif args.model is None:
        train = RECIPE | train
        given = {"eval_every": EVAL_EVERY} | given
    known = FinetuneOptions.__dataclass_fields__
    rest = {name: value for name, value in given.items() if name in known}
    return FinetuneOptions(train=TrainConfig(**train), **rest)


def _saved(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the run to go on with; --out becomes its directory."""
    if isinstance(args.resume, str):
        if args.out is not None and Path(args.out) != Path(args.resume):
            raise MespRefError(
                f"--out: found {args.out} beside --resume {args.resume}, expected one of the two"
            )
        args.out = args.resume
    if args.overwrite:
        raise MespRefError("--overwrite: found beside --resume, expected one of the two")
    args.resume = True
    place = run_place(args.out, resume=True)
    args.out = str(place)
    return saved_options(resumed_folder(place)) | {"overwrite": False, "inexact": False}


def run(args: argparse.Namespace) -> int:
    args = with_config(args)
    if args.mpi:
        from mesp_ref.spread.start import over_mpi

        return over_mpi(vars(args), args.mpi_patience, lambda job: _train(args, job))
    return _train(args, finetune)


def _train(args: argparse.Namespace, job: Callable[[FinetuneOptions, Report], Event]) -> int:
    options = _options(args)
    progress, trackers = Progress(args.quiet), [Tracker(name) for name in args.report_to or ()]
    try:
        summary = job(options, Reporters(progress, *trackers) if trackers else progress)
    finally:
        progress.close()
        for tracker in trackers:
            tracker.close()
    if args.json:
        print_json(summary)
    else:
        say(*_describe(summary), *(f"logged   {tracker.place}" for tracker in trackers))
    return 0


# How the templates of Qwen and Llama 3 mark turns; others are shown as they are.
_TURN = re.compile(
    r"(?:<\|im_start\|>|<\|start_header_id\|>)(\w+)(?:<\|end_header_id\|>\n)?\n"
    r"(.*?)(?:<\|im_end\|>|<\|endoftext\|>|<\|eot_id\|>|$)", re.DOTALL
)  # fmt: skip


def _turns(prompt: str) -> list[str]:
    """A sample's prompt: who says what, a line each, or the text that is continued."""
    turns = [(role, said) for role, said in _TURN.findall(prompt) if said]
    if not turns:
        return [f"prompt   {prompt!r}"]
    return [f"{role:<8} {said!r}" for role, said in turns]


def _describe(summary: Event) -> list[str]:
    before, after = summary["before"], summary["after"]
    lines: list[str] = []
    if summary["quiz"]:
        lines += described(summary["quiz"])
    elif summary["prompt"] is not None:
        lines += _turns(summary["prompt"])
        lines[-1] += f", from {summary['prompt_source']}"
        lines += [f"before   {before['sample']!r}", f"after    {after['sample']!r}"]
    if None not in (before["loss"], after["loss"]):
        change = "held-out loss {:.4f} -> {:.4f}".format(before["loss"], after["loss"])
        if None not in (before["perplexity"], after["perplexity"]):
            change += f", perplexity {before['perplexity']:.2f} -> {after['perplexity']:.2f}"
        change += f", accuracy {before['accuracy']:.1%} -> {after['accuracy']:.1%}"
        lines.append(change)
    if summary["stopped_early"]:
        lines.append(f"stopped early: no better held-out loss since step {summary['adapter_step']}")
    if summary["adapter_step"] != summary["steps"]:
        lines.append(f"the adapter is that of step {summary['adapter_step']}, the best")
    lines.append(
        f"{summary['steps']} steps, {summary['computed_tokens']} tokens, {summary['tokens']} of them "
        f"learned, in {summary['seconds']:.1f} s, "
        f"peak memory {summary['peak_memory_mb']:.0f} MB beside the mapped weights"
    )
    lines.append(
        f"adapter in {summary['adapter']}, metrics in {summary['out']}/metrics.jsonl, "
        f"loss curve in {summary['curve'] or 'no file'}"
    )
    lines += [f"warning  {text}" for text in summary["warnings"]]
    return [*lines, _how_to_try(summary)]


def _how_to_try(summary: Event) -> str:
    """The command that puts a question to the result."""
    chat, prompt = " --chat" * summary["chat"], '"..."'
    if summary["quiz"]:
        first = summary["quiz"]["questions"][0]
        prompt = shlex.quote(f"{first['scene']} {first['question']}")
    out = shlex.quote(summary["out"])
    return f"try it:  mesp-ref generate --adapter {out}{chat} --prompt {prompt}"

"""mesp-ref finetune: train a LoRA adapter."""

import argparse
from collections.abc import Callable
from typing import Any

from mesp_ref.api import METHODS
from mesp_ref.cli.options import (
    add_command,
    add_data,
    add_json,
    add_lora,
    add_model,
    print_json,
    say,
)
from mesp_ref.cli.progress import Progress
from mesp_ref.errors import MespRefError
from mesp_ref.job.defaults import EVAL_EVERY, RECIPE
from mesp_ref.job.directory import Event
from mesp_ref.job.finetune import FinetuneOptions, Report, finetune
from mesp_ref.lean.activations import KINDS
from mesp_ref.train.optim import SCHEDULES
from mesp_ref.train.trainer import DEFAULT_LR, TrainConfig

_HELP = """\
Train a LoRA adapter. Without --model and --data it is the story model that comes with this
package, which learns to answer questions about stories, in about a minute on two cores. The base
model stays as it is; the adapter is a PEFT directory of a few MB. The held-out loss and a sample
are taken before and after.

The data is plain text, or JSONL with an object per line: {"text": ...}, {"tokens": [...]}, or
{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}, which
is rendered with the model's own chat template and learns only what the assistant says. Files
are streamed: their size does not matter. A part is held out for evaluation.

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
  mesp-ref finetune --model Qwen2.5-0.5B --data chats.jsonl --steps 2 --out runs/chats --resume
"""


def add(commands: Any) -> None:
    parser = add_command(commands, "finetune", run, "train a LoRA adapter", _HELP)
    parser.usage = "mesp-ref finetune [--model DIR] [--data FILE] [--out DIR] [options]"
    add_model(parser)
    _add_data(parser.add_argument_group("data"))
    group = parser.add_argument_group("adapter")
    add_lora(group)
    group.add_argument("--rslora", action="store_true", help="scale alpha/sqrt(R) instead")
    _add_training(parser.add_argument_group("training", _recipe()))
    _add_output(parser.add_argument_group("evaluation and output"))
    _add_ranks(parser.add_argument_group("several processes"))


def _recipe() -> str:
    settings = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in RECIPE.items())
    return f"without --model the defaults are {settings}"


def _add_data(group: Any) -> None:
    add_data(group)
    group.add_argument(
        "--seq-len", type=int, metavar="T", help="tokens per sequence (default: 256)"
    )
    group.add_argument("--val-data", metavar="FILE", help="held-out data of its own")
    group.add_argument(
        "--val-fraction", type=float, default=0.05, metavar="P",
        help="part of --data that is held out (default: 0.05; 0 for none)",
    )  # fmt: skip


def _add_training(group: Any) -> None:
    rates = ", ".join(f"{rate:g} for {name}" for name, rate in DEFAULT_LR.items())
    texts = {
        "steps": "optimiser steps (default: 100)",
        "batch_size": "sequences per batch (default: 1)",
        "accumulate": "batches per step; the gradient is that of one large batch (default: 4)",
        "warmup": "steps until the full learning rate (default: 5%% of the steps; 0 if constant)",
        "perturbations": "of MeZO per batch, two forwards each; the estimate is their mean (default: 1)",
        "workers": "threads that share each block, one BLAS thread each; their number decides the "
        "last bits (default: 1)",
        "seed": "decides the adapter's start, the data's order and MeZO's noise (default: 0)",
    }
    numbers = {
        "lr": f"learning rate (default: {rates})",
        "clip": "bound on the gradient's norm (default: 1). With 0 and --accumulate 1 each block "
        "is updated at once and only one block's gradients are ever in memory",
        "weight_decay": "decoupled for adamw (default: 0)",
        "momentum": "for sgd (default: 0)",
        "eps": "step of MeZO's difference (default: 0.01)",
    }
    group.add_argument(
        "--method", choices=tuple(METHODS), help="where gradients come from (default: mesp)"
    )
    group.add_argument("--optimizer", choices=("adamw", "sgd"), help="default: adamw")
    group.add_argument("--schedule", choices=SCHEDULES, help="default: cosine")
    for kind, letter, options in ((int, "N", texts), (float, "X", numbers)):
        for name, text in options.items():
            option = f"--{name.replace('_', '-')}"
            group.add_argument(option, type=kind, metavar=letter, help=text)
    group.add_argument(
        "--checkpoints", choices=KINDS,
        help="where block inputs wait for the backward (default: ram); disk: in TMPDIR, which should be "
        "no tmpfs; offload: results of projections, too, faster while they fit into the page cache",
    )  # fmt: skip
    group.add_argument(
        "--memory-limit", metavar="SIZE",
        help="take the fastest exact method and place for checkpoints whose step fits: 64MB (10⁶ "
        "bytes), 64MiB (2²⁰) or bytes, above weights, LoRA and optimiser; samples that need more "
        "are left out",
    )  # fmt: skip


def _add_output(group: Any) -> None:
    group.add_argument("--out", metavar="DIR", help="run directory (default: the next runs/NNN)")
    group.add_argument("--overwrite", action="store_true", help="replace the run that is in --out")
    group.add_argument(
        "--resume", action="store_true",
        help="go on with the run in --out, or with the last runs/NNN; the rest of the command is "
        "that of the run",
    )  # fmt: skip
    group.add_argument(
        "--inexact", action="store_true",
        help="resume even with other threads or another NumPy, which changes the last bits",
    )  # fmt: skip
    group.add_argument(
        "--eval-every", type=int, metavar="N",
        help="evaluate also every N steps; 0: only before and after "
        f"(default: 0; {EVAL_EVERY} without --model)",
    )  # fmt: skip
    group.add_argument(
        "--patience", type=int, metavar="N",
        help="stop after N evaluations without a better held-out loss, and keep the best adapter "
        "instead of the last one; 0: train all steps (default: 0)",
    )  # fmt: skip
    for name, default, text in (
        ("eval-rows", 32, "held-out sequences to evaluate on, at most"),
        ("save-every", 50, "save adapter and state every N steps"),
        ("sample-tokens", 48, "tokens of the samples; 0 for none"),
    ):
        group.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})"
        )
    _add_samples(group)
    group.add_argument("--quiet", action="store_true", help="no progress on standard error")
    add_json(group)


def _add_ranks(group: Any) -> None:
    group.add_argument(
        "--mpi", action="store_true",
        help="train together with the other processes of mpiexec -n N: each takes --accumulate batches "
        "of a step; the adapter is, byte for byte, that of one process with N times as many",
    )  # fmt: skip
    group.add_argument(
        "--mpi-patience", type=float, default=600, metavar="SECONDS",
        help="how long the others wait for a process that does not get on (default: 600)",
    )  # fmt: skip


def _add_samples(group: Any) -> None:
    """--prompt and --no-sample."""
    group.add_argument(
        "--prompt", metavar="TEXT",
        help="what the samples continue or answer (default: the beginning of a held-out row, which "
        "is then printed and kept in summary.json and metrics.jsonl)",
    )  # fmt: skip
    group.add_argument(
        "--no-sample", action="store_const", const=0, dest="sample_tokens",
        default=argparse.SUPPRESS, help="no samples: no text of the data is printed or kept",
    )  # fmt: skip


def _options(args: argparse.Namespace) -> FinetuneOptions:
    """The command line as options; what was not given keeps the library's default."""
    for name in ("method", "checkpoints"):
        if args.memory_limit is not None and getattr(args, name) is not None:
            raise MespRefError(
                f"--{name}: found beside --memory-limit, expected one of the two; the limit chooses"
            )
    given = {name: value for name, value in vars(args).items() if value is not None}
    train = {name: given.pop(name) for name in TrainConfig.__dataclass_fields__ if name in given}
    if args.model is None:
        train = RECIPE | train
        given = {"eval_every": EVAL_EVERY} | given
    known = FinetuneOptions.__dataclass_fields__
    rest = {name: value for name, value in given.items() if name in known}
    return FinetuneOptions(train=TrainConfig(**train), **rest)


def run(args: argparse.Namespace) -> int:
    if args.mpi:
        from mesp_ref.spread.start import over_mpi

        return over_mpi(vars(args), args.mpi_patience, lambda job: _train(args, job))
    return _train(args, finetune)


def _train(args: argparse.Namespace, job: Callable[[FinetuneOptions, Report], Event]) -> int:
    options = _options(args)
    progress = Progress(args.quiet)
    try:
        summary = job(options, progress)
    finally:
        progress.close()
    if args.json:
        print_json(summary)
    else:
        say(*_describe(summary))
    return 0


def _describe(summary: Event) -> list[str]:
    before, after = summary["before"], summary["after"]
    lines = []
    if summary["prompt"] is not None:
        lines += [f"prompt   {summary['prompt']!r}, from {summary['prompt_source']}"]
        lines += [f"before   {before['sample']!r}", f"after    {after['sample']!r}"]
    if after["loss"] is not None:
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
        f"{summary['steps']} steps, {summary['tokens']} tokens in {summary['seconds']:.1f} s, "
        f"peak memory {summary['peak_memory_mib']:.0f} MiB beside the mapped weights"
    )
    lines.append(
        f"adapter in {summary['adapter']}, metrics in {summary['out']}/metrics.jsonl, "
        f"loss curve in {summary['curve']}"
    )
    return lines

"""mesp-ref compare: every method on one model, from one seed."""

import argparse
from pathlib import Path
from typing import Any

from mesp_ref.cli.options import (
    DTYPES,
    add_command,
    add_data,
    add_integers,
    add_json,
    add_lora,
    add_model_only,
    lora_settings,
    print_json,
    say,
)
from mesp_ref.cli.progress import Progress
from mesp_ref.errors import MespRefError, escaped
from mesp_ref.files.names import shared_name
from mesp_ref.files.output import check_file
from mesp_ref.job.defaults import RECIPE, data_file
from mesp_ref.job.metrics import Event
from mesp_ref.train.trainer import DEFAULT_LR, TrainConfig
from mesp_ref.verify.compare import CompareOptions, compare, describe_gradient, plot_comparison

_HELP = """\
Train by every method from one seed on one model and the same batches. Compared are the gradients
of the first batch (at an adapter with random B) with those of store_all, the peak of NumPy's memory
above weights, adapter and optimiser state (tracemalloc), the time per step (the methods take
turns; the median counts), and the losses. All but MeZO are exact and draw one and the same curve.
Exit code 0: the exact gradients agree within rounding; 1: they do not; 2: misuse.

examples:
  mesp-ref compare --steps 3
  mesp-ref compare --batch-size 1 --steps 2 --rank 2 --out quick.png --json
  mesp-ref compare --perturbations 8 --steps 2 --out averaged.png
  mesp-ref compare --model Qwen2.5-0.5B --data notes.txt --seq-len 64 --steps 2 --out notes.png
"""


def add(commands: Any) -> None:
    parser = add_command(commands, "compare", run, "all methods side by side", _HELP)
    add_model_only(parser)
    add_data(parser)
    add_lora(parser)
    add_integers(
        parser,
        ("steps", 20, "optimiser steps"),
        ("batch-size", 4, "sequences per batch"),
        ("seq-len", 256, "tokens per sequence, at most"),
        ("seed", 0, "of the adapter, the data's order and MeZO's noise"),
        ("perturbations", 1, "of MeZO per batch, two forwards each; the estimate is their mean"),
    )
    parser.add_argument(
        "--lr", type=float, metavar="X",
        help=f"of AdamW (default: {DEFAULT_LR['adamw']:g}; {RECIPE['lr']:g} without --model)",
    )  # fmt: skip
    parser.add_argument(
        "--mezo-lr", type=float, metavar="X", default=DEFAULT_LR["mezo"],
        help="of AdamW on MeZO's estimate (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument(
        "--out", metavar="PNG", default="compare.png", help="the figure (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the figure --out")
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    add_json(parser)


def _figure(args: argparse.Namespace) -> Path:
    """Where the figure goes, refused before the work is done rather than after."""
    path = Path(args.out)
    if path.is_dir():
        raise MespRefError(f"{path}: --out: found a directory, expected the name of a PNG file")
    check_file(path, args.overwrite, [args.model, args.data], "--out")
    if not path.absolute().parent.is_dir():
        raise MespRefError(f"{path}: --out: its directory does not exist; create it first")
    return path


def run(args: argparse.Namespace) -> int:
    figure, progress = _figure(args), Progress(args.quiet)
    lr = args.lr if args.lr is not None or args.model else RECIPE["lr"]
    train = TrainConfig(
        lr=lr, steps=args.steps, batch_size=args.batch_size, accumulate=1, seq_len=args.seq_len,
        seed=args.seed, schedule="constant",
    )  # fmt: skip
    names = ("model", "dtype", "form", "packing", "mezo_lr", "perturbations")
    shared = {name: getattr(args, name) for name in names}
    try:
        with data_file(args.data, count=400) as data:
            options = CompareOptions(data=data, train=train, **shared, **lora_settings(args))
            found = compare(options, progress)
    finally:
        progress.close()
    model = args.model or "the default checkpoint"
    name = escaped(
        shared_name(str(Path(model).absolute())) or "a model"
    )  # the figure is for others
    batch = f"batches of {args.batch_size} x {args.seq_len} tokens at most"
    plot_comparison(figure, found, f"{name}, {args.steps} steps, {batch}", args.overwrite)
    if args.json:
        print_json({"model": model, "steps": args.steps, "figure": str(figure), "methods": found})
    else:
        say(*_table(found), f"figure in {figure}")
    exact = [facts["within_rounding"] for name, facts in found.items() if name != "mezo"]
    return 0 if all(exact) else 1


def _table(found: dict[str, Event]) -> list[str]:
    """A line per method."""
    lines = [
        f"{'method':<11} {'gradient of batch 1':<20} {'cosine':>7} {'largest diff':>12} "
        f"{'peak MiB':>9} {'s/step':>7}  loss, first -> last step"
    ]
    for name, facts in found.items():
        cosine, worst = facts["cosine"], facts["relative_difference"]
        lines.append(
            f"{name:<11} {describe_gradient(name, facts):<20} "
            f"{'-' if cosine is None else f'{cosine:.4f}':>7} "
            f"{'-' if worst is None else f'{worst:.1e}':>12} "
            f"{facts['peak_bytes'] / 2**20:>9.1f} {facts['seconds_per_step']:>7.3f}  "
            f"{facts['losses'][0]:.4f} -> {facts['losses'][-1]:.4f}"
        )
    return [*lines, "largest diff: of any entry, over the largest entry of store_all's"]

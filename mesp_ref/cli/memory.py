"""mesp-ref memory: what a training step needs, predicted, explained and measured."""

import argparse
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np

from mesp_ref.api import check_chunk, check_offload, loss_and_grads, place_of
from mesp_ref.cli import longest
from mesp_ref.cli.options import add_command, add_json, add_revision, print_json, say
from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.config import Qwen2Config
from mesp_ref.engine.init import init_lora, parse_targets
from mesp_ref.engine.model import Model
from mesp_ref.errors import MespRefError, escaped
from mesp_ref.files.affine import Affine
from mesp_ref.files.hub import hub_name
from mesp_ref.files.models import SHAPES, load_model, named_shape, random_checkpoint
from mesp_ref.files.names import shared_name
from mesp_ref.files.output import check_file
from mesp_ref.memory import (
    PEAKS,
    PLACES,
    SCHEDULES,
    Base,
    Choice,
    Ledger,
    PeakResident,
    Schedule,
    Shapes,
    at,
    choose,
    cost,
    measure,
    megabytes,
    parse_size,
    peak,
    plot_timelines,
    seconds,
)
from mesp_ref.ops import Array

_DTYPES = ("float32", "bfloat16", "float16")

_HELP = f"""\
Peak memory of one LoRA training step per method, from the shapes alone, and what it is made of:
NumPy bytes above weights, LoRA parameters and optimiser state, decoding and all scratch included,
gradients used block by block. MODEL is a checkpoint directory or a published shape,
{", ".join(SHAPES)}, whose weights are random, written once into
$MESP_REF_CACHE (default ~/.cache/mesp_ref) and mapped when --measure or --plot needs them.

--measure runs the step, and puts tracemalloc's count and the process's own memory beside the
prediction. --memory-limit names the fastest exact method that fits, the size of its file and about how
long a step takes here. --longest says how long a sequence each method can do within a limit.

examples:
  mesp-ref memory qwen2.5-0.5b --seq-len 1024 --checkpoints disk
  mesp-ref memory qwen2.5-0.5b --method mesp_tiled --checkpoints disk --bits 4 --measure
  mesp-ref memory Qwen2.5-0.5B --method mesp --method mesp_tiled --plot timeline.html
  mesp-ref memory qwen2.5-3b --memory-limit 64MB --seq-len 32768
  mesp-ref memory qwen2.5-0.5b --longest 64MB
"""


def add(commands: Any) -> None:
    parser = add_command(commands, "memory", run, "what a training step needs", _HELP)
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=f"checkpoint directory, org/name of the hub, or {', '.join(SHAPES)}",
    )
    add_revision(parser)
    parser.add_argument(
        "--method", choices=tuple(PEAKS), action="append",
        help="repeat for several (default: every method)",
    )  # fmt: skip
    parser.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--seq-len", type=int, default=256, metavar="T", help="default: %(default)s"
    )
    parser.add_argument("--rank", type=int, default=8, metavar="R", help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="as for finetune")
    parser.add_argument("--targets", default="all", metavar="NAMES", help="as for finetune")
    _add_places(parser)
    _add_base(parser.add_argument_group("base weights"))
    _add_questions(parser)
    parser.add_argument(
        "--plot", metavar="FILE", help="timeline of each method as .png or .html; runs the step"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file --plot")
    add_json(parser)


def _add_places(parser: Any) -> None:
    parser.add_argument(
        "--checkpoints", choices=tuple(PLACES),
        help="offload: results of projections, too, of mesp_tiled; others as with disk (default: ram, "
        "and disk for mesp_streamed; any with --memory-limit and --longest)",
    )  # fmt: skip
    parser.add_argument(
        "--chunk", type=int, metavar="ROWS",
        help="rows at once of mesp_streamed (default: 256 for each worker, at least 512 where weights "
        "are decoded)",
    )  # fmt: skip


def _add_questions(parser: Any) -> None:
    parser.add_argument("--measure", action="store_true", help="run the step, too")
    parser.add_argument(
        "--memory-limit", metavar="SIZE",
        help="say which exact method to take: 64MB (10⁶ bytes), 64MiB (2²⁰) or a number of bytes",
    )  # fmt: skip
    parser.add_argument(
        "--longest", metavar="SIZE",
        help="say how many tokens each exact method can do in so much memory, with the room there is "
        "for files here, and torch by its measured slope",
    )  # fmt: skip


def _add_base(group: Any) -> None:
    group.add_argument(
        "--dtype", choices=_DTYPES,
        help="what a published shape is stored in (default: float32; with --bits bfloat16)",
    )  # fmt: skip
    group.add_argument("--bits", type=int, metavar="N", help="packed into 4 or 8 bits a weight")
    group.add_argument(
        "--group-size", type=int, metavar="N",
        help="weights that share a scale: 32, 64 or 128 (default: 64)",
    )  # fmt: skip


def _affine(args: argparse.Namespace) -> Affine | None:
    """What --bits and --group-size say."""
    if args.bits is None:
        if args.group_size is not None:
            raise MespRefError("--group-size: found without --bits, expected both")
        return None
    return Affine(args.bits, 64 if args.group_size is None else args.group_size, "--bits")


def _open(args: argparse.Namespace) -> tuple[Qwen2Config, Base, Model | None]:
    """A checkpoint, or a published shape, with weights only when the step is to run."""
    affine, runs = _affine(args), args.measure or args.plot
    dtype = args.dtype or ("bfloat16" if affine else "float32")
    if not (Path(args.model).is_dir() or hub_name(args.model)):
        config = named_shape(args.model)
        base = Base.uniform(config, dtype, affine)
        return config, base, random_checkpoint(args.model, dtype, affine) if runs else None
    model = load_model(args.model)
    if affine is None and args.dtype is None:
        return model.config, Base.of(model.weights, model.head), model
    if runs:
        raise MespRefError(
            f"{args.model}: found --bits or --dtype beside a checkpoint to be run, expected the "
            "weights as they are; write them with mesp-ref quantize and name the result"
        )
    return model.config, Base.uniform(model.config, dtype, affine), None


def _check(args: argparse.Namespace) -> None:
    if args.plot and Path(args.plot).suffix not in (".png", ".html"):
        raise MespRefError(f"--plot: found {args.plot!r}, expected a file ending in .png or .html")
    if args.plot:
        check_file(args.plot, args.overwrite, [args.model], "--plot")
    if args.plot and args.workers > 1:
        raise MespRefError(
            "--workers: found beside --plot, expected 1: its ledger is of one thread"
        )
    for method in args.method or ():
        check_offload(args.checkpoints, method)
    check_chunk(args.chunk, "mesp_streamed")
    for name in ("memory_limit", "longest"):
        if getattr(args, name) is not None and (args.plot or args.measure):
            raise MespRefError(
                f"--{name.replace('_', '-')}: found beside --measure or --plot, expected one of the "
                "two; measure the method that it names"
            )
    if args.memory_limit is not None and args.longest is not None:
        raise MespRefError("--longest: found beside --memory-limit, expected one of the two")


def _place(checkpoints: str | None, method: str) -> str:
    """Where a method keeps what it keeps: only mesp_tiled offloads, others do as with disk."""
    place = place_of(checkpoints, method)
    return "disk" if place == "offload" and method != "mesp_tiled" else place


class _Subject:
    """A step that can be run, and measured in three ways."""

    def __init__(self, model: Model, shapes: Shapes, checkpoints: str | None):
        self.adapter: Adapter = init_lora(
            model.config, shapes.rank, targets=shapes.targets, b_std=0.02
        )
        rng, size = np.random.default_rng(0), (shapes.batch, shapes.tokens)
        self.ids: Array = rng.integers(0, model.config.vocab_size, size)
        self.model, self.shapes, self.checkpoints = model, shapes, checkpoints

    def step(self, method: str) -> None:
        streamed = method == "mesp_streamed"
        loss_and_grads(
            self.model, self.adapter, self.ids, self.ids, method=method,
            checkpoints=_place(self.checkpoints, method), on_gradients=lambda layer, grads: None,
            workers=self.shapes.workers, chunk=self.shapes.chunk if streamed else None,
        )  # fmt: skip

    def measured(self, method: str) -> dict[str, Any]:
        """The process's memory around a step, and tracemalloc's peak above what stood before."""
        with PeakResident(0.005) as seen:
            self.step(method)
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            self.step(method)
            traced = tracemalloc.get_traced_memory()[1] - before
        finally:
            tracemalloc.stop()
        return {
            "measured_peak_bytes": traced,
            "anonymous_bytes": {"before": seen.before.anonymous, "peak": seen.peak.anonymous},
            "mapped_bytes": {"before": seen.before.mapped, "peak": seen.peak.mapped},
        }

    def ledger(self, method: str) -> Ledger:
        owned = [*self.adapter.weights.values(), self.ids]
        return measure(lambda: self.step(method), owned, self.model.weights)


def _facts(args: argparse.Namespace, shapes: Shapes, model: Model | None) -> dict[str, Any]:
    """By method: predicted, and measured where the step is to run."""
    methods = args.method or list(PEAKS)
    facts: dict[str, Any] = {}
    for method in methods:
        here = at(shapes, _place(args.checkpoints, method))
        found = peak(method, here)
        parts = {name: size for name, size in found.parts.items() if size}
        facts[method] = {"predicted_peak_bytes": found.total, "op": found.op, "parts": parts}
        if size := cost(method, here).file:
            facts[method]["file_bytes"] = size
    if model is not None and (args.measure or args.plot):
        subject = _Subject(model, shapes, args.checkpoints)
        for method in methods if args.measure else ():
            facts[method] |= subject.measured(method)
        if args.plot:
            ledgers = {method: subject.ledger(method) for method in methods}
            shared = hub_name(args.model) or shared_name(str(Path(args.model).absolute()))
            title = _title(args, escaped(str(shared or "a model")))  # a page is made to be shown
            plot_timelines(ledgers, args.plot, title, shapes.rank, args.overwrite)
    return facts


def _title(args: argparse.Namespace, model: str) -> str:
    where = {PLACES[_place(args.checkpoints, method)]: None for method in args.method or PEAKS}
    bits = f", {args.bits} bits" if args.bits else ""
    batch = f"batch {args.batch_size}, {args.seq_len} tokens, rank {args.rank}"
    return f"{model}{bits}: {batch}, {' or '.join(where)}"


def _schedules(args: argparse.Namespace, name: str) -> list[Schedule]:
    """Those that --method and --checkpoints leave."""
    schedules = [
        s for s in SCHEDULES
        if (not args.method or s.method in args.method)
        and args.checkpoints in (None, s.checkpoints)
    ]  # fmt: skip
    if not schedules:
        found = f"--method {', '.join(args.method)}"
        if args.checkpoints:
            found += f" and --checkpoints {args.checkpoints}"
        raise MespRefError(
            f"{name}: found beside {found}, expected an exact method; mezo is none, store_all has no "
            "checkpoints on disk, and mesp_streamed none elsewhere"
        )
    return schedules


def _choice(args: argparse.Namespace, shapes: Shapes) -> Choice:
    limit, schedules = (
        parse_size(args.memory_limit, "--memory-limit"),
        _schedules(args, "--memory-limit"),
    )
    choice = choose(shapes, limit, schedules=schedules, name="--memory-limit")
    if not choice.file or args.json:
        return choice
    took = seconds(choice.schedule.method, choice.schedule.shapes(shapes))
    return choice._replace(seconds=took)


def run(args: argparse.Namespace) -> int:
    _check(args)
    targets = parse_targets(args.targets)
    config, base, model = _open(args)
    shapes = Shapes(
        config, args.batch_size, args.seq_len, args.rank, targets, base=base, workers=args.workers,
        chunk=args.chunk,
    )  # fmt: skip
    if args.longest is not None:
        return longest.run(args, shapes, _schedules(args, "--longest"))
    if args.memory_limit is not None:
        return _print_choice(args, _choice(args, shapes))
    facts = _facts(args, shapes, model)
    if args.json:
        print_json({"methods": facts})
        return 0
    say(_title(args, args.model), "MB are 10⁶ bytes")
    for method, found in facts.items():
        peak_at = f"predicted {megabytes(found['predicted_peak_bytes'])} in {found['op']}"
        say("", f"{method:<13} {peak_at}{_measured(found)}")
        if found.get("anonymous_bytes", {}).get("peak"):  # only Linux tells
            say(_process(found))
        if "file_bytes" in found:
            say(f"  {found['file_bytes'] / 1e6:9.3f}  beside it, in a temporary file")
        for name, size in sorted(found["parts"].items(), key=lambda item: -item[1]):
            if size >= 0.005 * found["predicted_peak_bytes"]:
                say(f"  {size / 1e6:9.3f}  {name}")
    return 0


def _measured(found: dict[str, Any]) -> str:
    """The measured figures of a method, for people."""
    if "measured_peak_bytes" not in found:
        return ""
    return f", measured {megabytes(found['measured_peak_bytes'])}"


def _process(found: dict[str, Any]) -> str:
    """The process's own memory around a step, for people."""
    own, files = found["anonymous_bytes"], found["mapped_bytes"]
    return (
        f"            process: {megabytes(own['peak'])} of its own at most "
        f"({megabytes(own['before'])} before), {megabytes(files['peak'])} of mapped files"
    )


def _print_choice(args: argparse.Namespace, choice: Choice) -> int:
    if args.json:
        method, checkpoints = choice.schedule
        facts = {"method": method, "checkpoints": checkpoints, "need_bytes": choice.need}
        print_json(facts | ({"file_bytes": choice.file} if choice.file else {}))
    else:
        say(str(choice))
    return 0

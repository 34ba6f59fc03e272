"""mesp-ref memory: what a training step needs, predicted, explained and measured."""

import argparse
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np

from mesp_ref.cli.options import add_command, add_json, print_json
from mesp_ref.config import Qwen2Config
from mesp_ref.errors import MespRefError
from mesp_ref.gradients import loss_and_grads
from mesp_ref.loading import load_model
from mesp_ref.lora import Adapter, init_lora, parse_targets
from mesp_ref.memory import PEAKS, Ledger, Shapes, measure, peak, plot_timeline
from mesp_ref.model import Model
from mesp_ref.weights import ArrayWeights

SHAPES = {
    "qwen2.5-0.5b": Qwen2Config(151936, 896, 4864, 24, 14, 2, 64),
    "qwen2.5-1.5b": Qwen2Config(151936, 1536, 8960, 28, 12, 2, 128),
    "qwen2.5-3b": Qwen2Config(151936, 2048, 11008, 36, 16, 2, 128),
}

_HELP = """\
Peak memory of one LoRA training step per method, from the shapes alone, and what it is made of:
NumPy bytes above weights, LoRA parameters and optimiser state, gradients used block by block.
--measure runs the step and puts tracemalloc's count beside the prediction.

examples:
  mesp-ref memory qwen2.5-0.5b --seq-len 1024 --checkpoints disk
  mesp-ref memory Qwen2.5-0.5B --method mesp_tiled --measure --plot timeline.html
"""


def add(commands: Any) -> None:
    parser = add_command(commands, "memory", run, "what a training step needs", _HELP)
    parser.add_argument(
        "model", metavar="MODEL", help=f"checkpoint directory or {', '.join(SHAPES)}"
    )
    parser.add_argument(
        "--method", choices=tuple(PEAKS), action="append", help="default: every method"
    )
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--seq-len", type=int, default=256, metavar="T", help="default: 256")
    parser.add_argument("--rank", type=int, default=8, metavar="R", help="default: 8")
    parser.add_argument("--targets", default="all", metavar="NAMES", help="as for finetune")
    parser.add_argument(
        "--checkpoints", choices=("ram", "disk"), default="ram", help="default: %(default)s"
    )
    parser.add_argument("--measure", action="store_true", help="run the step, too")
    parser.add_argument(
        "--plot", metavar="FILE", help="timeline of the last method as .png or .html; runs it"
    )
    add_json(parser)


def _open(name: str, measured: bool) -> tuple[Qwen2Config, Model | None]:
    """A checkpoint, or a published shape with weights of zeros, which no page is touched for."""
    if Path(name).is_dir():
        model = load_model(name)
        return model.config, model
    config = SHAPES.get(name.lower())
    if config is None:
        raise MespRefError(
            f"{name}: no such directory, and no shape among {', '.join(SHAPES)}; name one of them"
        )
    if not measured:
        return config, None
    shapes = config.weight_shapes()
    return config, Model(
        config, ArrayWeights({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    )


def _check(args: argparse.Namespace) -> None:
    for option in ("batch_size", "seq_len", "rank"):
        if (value := getattr(args, option)) < (2 if option == "seq_len" else 1):
            name = option.replace("_", "-")
            raise MespRefError(f"--{name}: found {value}, expected a larger number")
    if args.plot and Path(args.plot).suffix not in (".png", ".html"):
        raise MespRefError(f"--plot: found {args.plot!r}, expected a file ending in .png or .html")


def _step(model: Model, adapter: Adapter, ids: Any, method: str, checkpoints: str) -> None:
    loss_and_grads(
        model, adapter, ids, ids, method=method, checkpoints=checkpoints,
        on_gradients=lambda layer, grads: None,
    )  # fmt: skip


def _traced_peak(model: Model, adapter: Adapter, ids: Any, method: str, checkpoints: str) -> int:
    """tracemalloc's peak above what stood before the step."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        _step(model, adapter, ids, method, checkpoints)
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def _timeline(model: Model, adapter: Adapter, ids: Any, method: str, checkpoints: str) -> Ledger:
    arrays = getattr(model.weights, "arrays", {})
    owned = [*arrays.values(), *adapter.weights.values(), ids]
    return measure(lambda: _step(model, adapter, ids, method, checkpoints), owned)


def _facts(args: argparse.Namespace) -> dict[str, Any]:
    config, model = _open(args.model, args.measure or bool(args.plot))
    targets, methods = parse_targets(args.targets), args.method or list(PEAKS)
    shape = args.batch_size, args.seq_len
    shapes = Shapes(config, *shape, args.rank, targets, args.checkpoints == "disk")
    facts: dict[str, Any] = {}
    for method in methods:
        found = peak(method, shapes)
        parts = {name: size for name, size in found.parts.items() if size}
        facts[method] = {"predicted_peak_bytes": found.total, "op": found.op, "parts": parts}
    if model is not None and (args.measure or args.plot):
        adapter = init_lora(config, args.rank, targets=targets, b_std=0.02)
        ids = np.random.default_rng(0).integers(0, config.vocab_size, shape)
        given = model, adapter, ids
        for method in methods if args.measure else ():
            traced = _traced_peak(*given, method, args.checkpoints)
            facts[method]["measured_peak_bytes"] = traced
        if args.plot:
            ledger = _timeline(*given, methods[-1], args.checkpoints)
            plot_timeline(ledger, args.plot, f"{args.model}, {methods[-1]}, {args.seq_len} tokens")
    return {"model": args.model, "methods": facts}


def run(args: argparse.Namespace) -> int:
    _check(args)
    facts = _facts(args)
    if args.json:
        print_json(facts)
        return 0
    where = "on disk" if args.checkpoints == "disk" else "in RAM"
    print(f"{args.model}: batch {args.batch_size}, {args.seq_len} tokens, rank {args.rank}")
    print(f"checkpoints {where}; MB are 10⁶ bytes")
    for method, found in facts["methods"].items():
        measured = found.get("measured_peak_bytes")
        beside = f", measured {measured / 1e6:.2f} MB" if measured is not None else ""
        peak_at = f"predicted {found['predicted_peak_bytes'] / 1e6:.2f} MB in {found['op']}"
        print(f"\n{method:<11} {peak_at}{beside}")
        for name, size in sorted(found["parts"].items(), key=lambda item: -item[1]):
            if size >= 0.005 * found["predicted_peak_bytes"]:
                print(f"  {size / 1e6:9.3f}  {name}")
    return 0

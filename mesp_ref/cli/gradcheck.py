"""mesp-ref gradcheck: prove the gradients of a model, an adapter and a batch."""

import argparse
from collections.abc import Sequence
from typing import Any

from mesp_ref.api import METHODS
from mesp_ref.cli.options import (
    add_command,
    add_data,
    add_integers,
    add_json,
    add_lora,
    add_model_only,
    lora_settings,
    open_adapter,
    print_json,
    say,
)
from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.init import init_lora, parse_targets
from mesp_ref.engine.model import Model
from mesp_ref.errors import MespRefError
from mesp_ref.files.models import load_model
from mesp_ref.job.defaults import data_file
from mesp_ref.job.directory import finite
from mesp_ref.ops import IGNORED, Array
from mesp_ref.train.opening import open_stream
from mesp_ref.train.rows import as_batch
from mesp_ref.verify import Finding, checkpoint_gradcheck, failures
from mesp_ref.verify.whole_model import documents

_HELP = """\
Prove the gradients of a batch by complex step through the whole model, in float64: the derivative
of the loss along random directions in all LoRA tensors together, then for each tensor along one
direction and at single entries, against what the backward gives. Complex step subtracts nothing,
so the two agree up to rounding or the backward is wrong. Packed rows are held to the loss of their
documents, each run by itself.

Without --adapter it is a new one with random B (at B = 0, where training starts, all of dA is 0).
Exit code 0: proven; 1: not; 2: misuse. MeZO's gradient is an estimate, so --method mezo fails.

examples:
  mesp-ref gradcheck --tensors 5
  mesp-ref gradcheck --adapter runs/001/adapter --method mesp_tiled --tensors 4 --entries 3 --json
  mesp-ref gradcheck --model Qwen2.5-0.5B --data notes.txt --seq-len 16 --targets q_proj --tensors 1
"""


def add(commands: Any) -> None:
    parser = add_command(commands, "gradcheck", run, "prove the gradients of a batch", _HELP)
    add_model_only(parser)
    parser.add_argument("--adapter", metavar="DIR", help="PEFT adapter directory")
    add_data(parser)
    add_lora(parser)
    parser.add_argument(
        "--method", choices=tuple(METHODS), default="mesp", help="default: %(default)s"
    )
    add_integers(
        parser,
        ("seq-len", 192, "tokens per sequence, at most"),
        ("batch-size", 1, "sequences in the batch"),
        ("directions", 2, "random directions in all tensors together"),
        ("entries", 1, "single entries per tensor"),
        ("seed", 0, "of directions, entries and a new adapter"),
    )
    parser.add_argument(
        "--tensors", type=int, metavar="N", help="check N drawn tensors (default: all)"
    )
    add_json(parser)


def _adapter(args: argparse.Namespace, model: Model) -> Adapter:
    settings, adapter = lora_settings(args), open_adapter(args.adapter, model)
    if adapter is not None:
        return adapter
    settings["targets"] = parse_targets(settings.get("targets", "all"))
    return init_lora(model.config, seed=args.seed, b_std=0.02, dtype="float64", **settings)


def run(args: argparse.Namespace) -> int:
    if args.directions == args.tensors == 0:
        raise MespRefError("--directions: found 0 beside --tensors 0, expected something to check")
    model = load_model(args.model, dtype="float64")
    adapter = _adapter(args, model)
    with data_file(args.data, count=32) as data:
        stream = open_stream(
            model, data, seq_len=args.seq_len, form=args.form, packing=args.packing
        )
        ids, labels, positions = as_batch(stream.once(args.batch_size))
    found = list(
        checkpoint_gradcheck(
            model, adapter, ids, labels, position_ids=positions, method=args.method,
            directions=args.directions, tensors=args.tensors, entries=args.entries, seed=args.seed,
        )
    )  # fmt: skip
    proven = bool(found) and not failures(found)
    if args.json:
        print_json({"proven": proven, "method": args.method, "checks": [_facts(f) for f in found]})
    else:
        packed = "" if positions is None else f", {_packed(labels, positions)} documents packed"
        say(
            f"{args.method}, {ids.shape[0]} x {ids.shape[1]} tokens{packed}, float64",
            *_table(found),
        )
    return 0 if proven else 1


def _packed(labels: Array, positions: Array) -> int:
    """How many documents there is something to learn from."""
    return sum((labels[row, a:b] != IGNORED).any() for row, a, b in documents(positions))


def _facts(finding: Finding) -> dict[str, Any]:
    return {
        "what": finding.argument,
        "gradient": finite(finding.got),
        "complex_step": finite(finding.expected),
        "error": finite(finding.error),
        "gate": finite(finding.gate),
        "passed": finding.passed,
    }


def _table(found: Sequence[Finding]) -> list[str]:
    """One line per check, and what they come to."""
    names = [f.argument.replace("base_model.model.model.", "") for f in found]
    wide = max(map(len, [*names, "derivative of the loss along"]))
    head = f"{'derivative of the loss along':<{wide}}  {'gradient':>14}  {'complex step':>14}"
    lines = [f"{head}  {'error':>8}  {'gate':>8}"]
    lines += [
        f"{name:<{wide}}  {f.got:>14.7e}  {f.expected:>14.7e}  {f.error:>8.1e}  {f.gate:>8.1e}"
        f"  {'ok' if f.passed else 'FAIL'}"
        for name, f in zip(names, found, strict=True)
    ]
    wrong = failures(found)
    if wrong or not found:
        lines.append(f"NOT PROVEN: {len(wrong)} of {len(found)} checks fail")
    else:
        margin = min(f.margin for f in found)
        lines.append(f"proven: all {len(found)} checks pass, the tightest {margin:.0f} times over")
    return lines

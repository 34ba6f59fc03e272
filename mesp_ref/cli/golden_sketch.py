"""mesp-ref golden sketch and compare: gradients of a user's own model in a small file."""

import argparse
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from mesp_ref.cli.options import add_command, add_json, print_json, say
from mesp_ref.errors import MespRefError, named
from mesp_ref.files.hub import model_directory
from mesp_ref.files.output import check_file
from mesp_ref.files.strict import read_object
from mesp_ref.files.tokenizer import load_tokenizer
from mesp_ref.golden.sketch import check_sketch, load_sketch, make_sketch, save_sketch
from mesp_ref.golden.suite import DTYPES
from mesp_ref.golden.tolerance import UNITS

_SKETCH = """\
Record, for a real model, adapter and batch, the loss, and of every LoRA gradient its norm and 64
random projections: a JSON file of some 100 KB, whatever the model's size. The adapter should have been
trained a little: with B = 0 every dA is 0. Gradients are taken in float64 and again in float32.

examples:
  mesp-ref golden sketch --model Qwen2.5-0.5B --adapter adapter --text "Once upon a time" --out s.json
  mesp-ref golden sketch --model Qwen2.5-0.5B --adapter adapter --batch batch.json --out s.json
"""
_COMPARE = """\
Compare another backend's gradients with a sketch: a safetensors file with PEFT's tensor names.
Exit code 0: all agree; 1: some differ; 2: misuse.

examples:
  mesp-ref golden compare s.json gradients.safetensors --loss 3.1415 --dtype bfloat16
"""


def add(actions: Any) -> None:
    parser = add_command(actions, "sketch", run_sketch, "record a real model's gradients", _SKETCH)
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint directory")
    parser.add_argument("--adapter", required=True, metavar="DIR", help="PEFT adapter directory")
    batch = parser.add_mutually_exclusive_group(required=True)
    batch.add_argument("--text", help="one sequence, with the model's own tokenizer")
    batch.add_argument("--batch", metavar="FILE", help='JSON {"input_ids": [[…]], "labels": [[…]]}')
    parser.add_argument("--out", required=True, metavar="FILE", help="the sketch")
    parser.add_argument("--overwrite", action="store_true", help="replace the file --out")
    parser = add_command(actions, "compare", run_compare, "compare with a sketch", _COMPARE)
    parser.add_argument("sketch", metavar="SKETCH", help="written by golden sketch")
    parser.add_argument("gradients", metavar="FILE", help="safetensors")
    parser.add_argument("--loss", type=float, metavar="L", help="the backend's loss")
    parser.add_argument(
        "--dtype", choices=DTYPES,
        help="precision it computed in (default: float32, or 16 bits as stored)",
    )  # fmt: skip
    add_json(parser)


def _batch(args: argparse.Namespace) -> tuple[Any, Any]:
    if args.text is not None:
        ids = [load_tokenizer(args.model).encode(args.text).ids]
        return ids, ids
    try:
        values = read_object(Path(args.batch), "a batch of tokens")
        return values["input_ids"], values["labels"]
    except KeyError:
        raise MespRefError(
            f"{args.batch}: not readable, expected JSON with input_ids and labels"
        ) from None


def run_sketch(args: argparse.Namespace) -> int:
    check_file(args.out, args.overwrite, [args.model, args.adapter, args.batch], "--out")
    args.model = str(model_directory(args.model))
    sketch = make_sketch(args.model, args.adapter, *_batch(args))
    save_sketch(sketch, args.out, overwrite=args.overwrite)
    say(f"loss {sketch['loss']:.6f} and {len(sketch['tensors'])} gradients written to {args.out}")
    return 0


def _loss_row(sketch: dict[str, Any], loss: float, dtype: str) -> dict[str, Any]:
    unit, size = UNITS[dtype].store, max(abs(sketch["loss"]), 1e-3)
    drift = sketch["loss_drift"] / size * unit / UNITS["float32"].store
    error, gate = abs(loss - sketch["loss"]) / size, 4 * max(drift, unit)
    problem = "" if error <= gate else "differs"
    error = error if math.isfinite(error) else np.inf
    return {"name": "loss", "dtype": dtype, "problem": problem, "error": error, "gate": gate,
            "norm_ratio": loss / (sketch["loss"] or 1.0)}  # fmt: skip


def _line(row: dict[str, Any]) -> str:
    """A tensor that differs, with what could be measured."""
    numbers = {"relative error about {:.2g}": row["error"], "size × {:.4g}": row["norm_ratio"]}
    known = [text.format(n) for text, n in numbers.items() if math.isfinite(n)]
    known.insert(1, f"gate {row['gate']:.2g}")
    measured = f": {', '.join(known)}" if len(known) > 1 else ""
    return f"FAIL  {named(row['name'])}: {row['problem']}{measured}"


def run_compare(args: argparse.Namespace) -> int:
    sketch = load_sketch(args.sketch)
    rows = check_sketch(sketch, args.gradients, args.dtype)
    dtype = args.dtype or Counter(row["dtype"] for row in rows).most_common(1)[0][0]
    if args.loss is not None:
        rows.insert(0, _loss_row(sketch, args.loss, dtype))
    wrong = [row for row in rows if row["problem"]]
    if args.json:
        finite = [{k: v if not isinstance(v, float) or math.isfinite(v) else None
                   for k, v in row.items()} for row in rows]  # fmt: skip
        print_json({"passed": not wrong, "tensors": finite})
        return int(bool(wrong))
    say(*map(_line, wrong), f"{len(rows) - len(wrong)} of {len(rows)} agree ({dtype})")
    return int(bool(wrong))

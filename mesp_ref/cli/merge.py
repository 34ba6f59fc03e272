"""mesp-ref merge: fold an adapter into its model."""

import argparse
from typing import Any

from mesp_ref.cli.options import DTYPES, add_command, add_json, add_model_only, print_json, say
from mesp_ref.cli.trained import open_trained
from mesp_ref.files.merge import merge
from mesp_ref.files.output import check_directory

_HELP = """\
Write a checkpoint directory whose weights are W + (alpha/R)·B·A, with the tokenizer beside them.
It needs no adapter any more and loads in transformers as well as here.

examples:
  mesp-ref merge --adapter runs/001/adapter --out merged
  mesp-ref merge --model Qwen2.5-0.5B --adapter runs/notes/adapter --out merged16 --dtype bfloat16
"""


def add(commands: Any) -> None:
    parser = add_command(commands, "merge", run, "fold an adapter into its model", _HELP)
    add_model_only(parser)
    parser.add_argument(
        "--adapter", required=True, metavar="DIR", help="PEFT adapter directory, or a run's"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="new checkpoint directory")
    parser.add_argument(
        "--dtype", choices=("float16", "bfloat16", *DTYPES), default="float32",
        help="type to store; the sum is formed in float32 or wider (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    check_directory(args.out, args.overwrite, [args.model, args.adapter])
    compute = "float64" if args.dtype == "float64" else "float32"
    model, adapter = open_trained(argparse.Namespace(**vars(args) | {"dtype": compute}))
    assert adapter is not None
    merge(model, adapter, args.out, dtype=args.dtype, overwrite=args.overwrite)
    if args.json:
        print_json({"out": args.out, "dtype": args.dtype, "tensors": len(adapter.weights) // 2})
    else:
        say(f"{len(adapter.weights) // 2} projections merged into {args.out} ({args.dtype})")
    return 0

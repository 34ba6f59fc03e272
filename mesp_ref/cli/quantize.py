"""mesp-ref quantize: a checkpoint with 4-bit or 8-bit matrices."""

import argparse
from pathlib import Path
from typing import Any

from mesp_ref.cli.options import add_command, add_json, add_revision, print_json, say
from mesp_ref.files.affine import BITS, GROUP_SIZES, SCALE_DTYPES
from mesp_ref.files.hub import model_directory
from mesp_ref.files.quantize import quantize_checkpoint

_HELP = """\
Write a copy of a checkpoint whose matrices, the embedding included, are MLX affine 4-bit or
8-bit: neighbours in a row share a scale and a bias. Bit for bit what mlx-lm writes, and mlx-lm
loads it. The other commands run on the result as it is: weights are decoded where an operation
needs them, and adapters train on it as in QLoRA.

examples:
  mesp-ref quantize Qwen2.5-0.5B Qwen2.5-0.5B-4bit
  mesp-ref quantize Qwen2.5-0.5B Qwen2.5-0.5B-8bit --bits 8 --group-size 32 --dtype float16 --json
"""


def add(commands: Any) -> None:
    parser = add_command(commands, "quantize", run, "pack a checkpoint into 4 or 8 bits", _HELP)
    parser.add_argument("model", metavar="DIR", help="checkpoint directory, or org/name of the hub")
    add_revision(parser)
    parser.add_argument("out", metavar="OUT", help="new checkpoint directory")
    parser.add_argument(
        "--bits", type=int, default=4, metavar="N",
        help=f"per weight: {' or '.join(map(str, BITS))} (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--group-size", type=int, default=64, metavar="N",
        help=f"weights that share a scale: {', '.join(map(str, GROUP_SIZES))} "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=SCALE_DTYPES,
        help="of scales, norms and biases (default: that of the stored weights)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace what is in OUT")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    quantize_checkpoint(
        model_directory(args.model),
        args.out,
        args.bits,
        args.group_size,
        args.dtype,
        args.overwrite,
    )
    size = (Path(args.out) / "model.safetensors").stat().st_size
    if args.json:
        facts = {"out": args.out, "bits": args.bits, "group_size": args.group_size, "bytes": size}
        print_json(facts)
    else:
        groups = f"{args.bits} bits in groups of {args.group_size}"
        say(f"wrote {args.out}: {groups}, {size / 1e6:.1f} MB")
    return 0

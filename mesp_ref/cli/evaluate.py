"""mesp-ref eval: loss, perplexity and token accuracy of a model on a data file."""

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any, NoReturn

from mesp_ref.cli.options import (
    add_command,
    add_data,
    add_fields,
    add_json,
    add_model,
    add_ranks,
    add_special_tokens,
    on_ranks,
    print_json,
    say,
)
from mesp_ref.cli.trained import open_trained, warn_of_length
from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.model import Model
from mesp_ref.errors import MespRefError
from mesp_ref.files.finite import not_finite
from mesp_ref.job.defaults import data_file
from mesp_ref.job.directory import finite
from mesp_ref.job.state import arrays_hash, model_fingerprint
from mesp_ref.train.contents import table
from mesp_ref.train.opening import open_stream
from mesp_ref.train.ranks import Ranks
from mesp_ref.train.rows import Row, RowStream
from mesp_ref.train.trainer import TrainConfig, evaluate, perplexity

_HELP = """\
Mean loss per token, perplexity, and the share of tokens that are the model's first choice, on a
whole data file (or its first --rows sequences), in the order of the file. Data as for finetune; what
it comes to is told first, on standard error. Without --data it is 200 conversations about stories
that finetune never trains on.

examples:
  mesp-ref eval --rows 8
  mesp-ref eval --adapter runs/001/adapter --rows 8 --json
  mesp-ref eval --model Qwen2.5-0.5B --data notes.txt --seq-len 64
  mpiexec -n 2 mesp-ref eval --rows 8 --mpi
"""


def add(commands: Any) -> None:
    parser = add_command(commands, "eval", run, "loss and perplexity on a data file", _HELP)
    add_model(parser)
    add_data(parser)
    add_special_tokens(parser)
    add_fields(parser, TrainConfig, "seq_len", "batch_size")
    parser.add_argument("--rows", type=int, metavar="N", help="number of sequences (default: all)")
    add_json(parser)
    add_ranks(parser, "the batches")


def _refuse(value: float, model: Model) -> NoReturn:
    """A loss that is no number is a fault of the model or of its numbers' range, not a result."""
    name = not_finite(model.weights)
    where, why = f"{model.path}: {name}", "found NaN or infinity, expected finite weights"
    if name is None:
        where, why = "--dtype", "the sums overflow in this type; try float64"
    raise MespRefError(f"{where}: {why} (loss {value})")


def _identity(model: Model, adapter: Adapter | None, stream: RowStream) -> dict[str, str]:
    """What all ranks must have alike, as hashes."""
    found = {"model": model_fingerprint(model), "data": stream.data.sha256}
    return found if adapter is None else found | {"adapter": arrays_hash(adapter.weights)}


def run(args: argparse.Namespace) -> int:
    return on_ranks(args, partial(_run, args))


def _run(args: argparse.Namespace, ranks: Ranks) -> int:
    model, adapter = open_trained(args)
    with data_file(args.data, count=200, seed=1) as data:
        stream = open_stream(
            model,
            data,
            seq_len=args.seq_len,
            form=args.form,
            packing=args.packing,
            special_in_text=args.special_tokens_in_text,
        )
        contents = asdict(stream.contents())
        say(*table({"all": contents}), file=sys.stderr)
        longest = 0

        def rows() -> Iterator[Row]:
            nonlocal longest
            for row in stream.once(args.rows):
                longest = max(longest, len(row.ids))
                yield row

        ranks.alike(_identity(model, adapter, stream))
        value, tokens, accuracy = evaluate(model, adapter, rows(), args.batch_size, ranks=ranks)
    if not math.isfinite(value):
        _refuse(value, model)
    warn_of_length(model, longest)
    if args.json:
        found = {"loss": finite(value), "perplexity": finite(perplexity(value))}
        print_json(found | {"accuracy": accuracy, "tokens": tokens, "contents": contents})
    else:
        say(
            f"loss {value:.4f}, perplexity {perplexity(value):.2f}, "
            f"{accuracy:.1%} of {tokens} tokens are the model's first choice"
        )
    return 0

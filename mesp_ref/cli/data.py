"""mesp-ref data: what a data file comes to, and what of it is learned."""

import argparse
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mesp_ref.cli.options import (
    add_command,
    add_forms,
    add_integers,
    add_json,
    add_model_only,
    add_special_tokens,
    print_json,
    say,
)
from mesp_ref.errors import prose
from mesp_ref.files.models import load_model
from mesp_ref.files.output import check_file, write_aside
from mesp_ref.job.defaults import data_file
from mesp_ref.train.contents import table
from mesp_ref.train.opening import open_stream
from mesp_ref.train.page import as_html, pieces
from mesp_ref.train.rows import Row

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_HELP = """\
What finetune would make of a data file with a model's tokenizer and chat template: documents, rows,
tokens, learned tokens, what is cut, left out and excluded, and why; then the first rows as text, with
what is learned marked: green on a terminal, [[between brackets]] elsewhere. All of the file is
counted; nothing is trained. Without FILE it is the conversations that finetune trains on by default.

examples:
  mesp-ref data
  mesp-ref data notes.txt --seq-len 64 --rows 1
  mesp-ref data chats.jsonl --model Qwen2.5-0.5B --html chats.html
  mesp-ref data chats.jsonl --json
"""
_LEARNED, _PLAIN = "\x1b[32m", "\x1b[0m"


def add(commands: Any) -> None:
    parser = add_command(commands, "data", run, "what a data file comes to, what is learned", _HELP)
    parser.add_argument("data", metavar="FILE", nargs="?", help="as --data of finetune")
    add_model_only(parser)
    add_forms(parser)
    add_special_tokens(parser)
    add_integers(
        parser, ("seq-len", 256, "tokens per sequence"), ("rows", 3, "rows to show, at most")
    )
    parser.add_argument("--html", metavar="FILE", help="write table and rows as a page instead")
    parser.add_argument("--overwrite", action="store_true", help="replace the page --html")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    if args.html:
        check_file(args.html, args.overwrite, [args.data, args.model], "--html")
    model = load_model(args.model)
    with data_file(args.data) as file:
        stream = open_stream(
            model, file, seq_len=args.seq_len, form=args.form, packing=args.packing,
            special_in_text=args.special_tokens_in_text,
        )  # fmt: skip
        contents = asdict(stream.contents(None))
        rows, tokenizer = list(stream.once(args.rows)), stream.encoder.tokenizer
    if args.html:
        name = args.data or "questions about stories"
        with write_aside(args.html, overwrite=args.overwrite) as aside:
            aside.write_text(as_html(name, contents, rows, tokenizer), encoding="utf-8")
    if args.json:
        shown = [[piece._asdict() for piece in pieces(row, tokenizer)] for row in rows]
        print_json({"contents": contents, "rows": shown})
        return 0
    say(*table({"all": contents}))
    if args.html:
        say(f"wrote {args.html}")
        return 0
    for number, row in enumerate(rows, 1):
        _show(number, row, tokenizer)
    return 0


def _show(number: int, row: Row, tokenizer: "Tokenizer | None") -> None:
    """A row as text. Only the colours are ours: what stands in the data, no terminal obeys."""
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    before, after = (_LEARNED, _PLAIN) if colour else ("[[", "]]")
    say("", f"row {number}: {len(row.ids)} tokens, {row.counted} learned")
    for piece in pieces(row, tokenizer):
        if piece.begins:
            sys.stdout.write("\n--- another document ---\n")
        text = prose(piece.text)
        sys.stdout.write(f"{before}{text}{after}" if piece.learned else text)
    sys.stdout.write("\n")

"""mesp-ref generate: let a model write."""

import argparse
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers.decoders import DecodeStream

from mesp_ref.cli.options import (
    add_command,
    add_json,
    add_model,
    add_special_tokens,
    print_json,
)
from mesp_ref.cli.trained import open_trained, warn_of_length
from mesp_ref.engine.generate import generate
from mesp_ref.errors import MespRefError, prose
from mesp_ref.lean.tiled_weight import tiled_model
from mesp_ref.train.opening import open_encoder
from mesp_ref.train.rows import Encoder

_HELP = """\
Continue a prompt, or with --chat answer it through the model's own chat template. The text goes
to standard output, without the prompt. Greedy unless a --temperature is given.

examples:
  mesp-ref generate --prompt "Once upon a time"
  mesp-ref generate --chat --prompt "Tell me a story about Ivy." --temperature 0.8 --top-p 0.9 --json
  mesp-ref generate --adapter runs/001 --chat --prompt "Tell me a story about Ruby."
  mesp-ref generate --model Qwen2.5-0.5B --adapter runs/notes/adapter --prompt "I" --max-new-tokens 5
"""


def add(commands: Any) -> None:
    parser = add_command(commands, "generate", run, "let a model write", _HELP)
    add_model(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="what to continue; - for standard input")
    source.add_argument("--prompt-file", metavar="FILE", help="read the prompt from a file")
    parser.add_argument("--chat", action="store_true", help="answer the prompt as a user's message")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: the system message")
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="X",
        help="0 is greedy (default: %(default)g)",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest mass P")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the drawing (default: %(default)s)"
    )
    add_special_tokens(parser)
    add_json(parser)


def _standard_input() -> str:
    """All of it, as UTF-8 in any locale, without a byte order mark: some editors begin texts so."""
    binary = getattr(sys.stdin, "buffer", None)
    try:
        text = sys.stdin.read() if binary is None else binary.read().decode("utf-8")
    except UnicodeDecodeError:
        raise MespRefError("--prompt -: standard input: not UTF-8 text") from None
    return str(text).removeprefix("\ufeff")


def _text(args: argparse.Namespace) -> str:
    """The prompt as it was given."""
    if args.prompt_file is not None:
        try:
            text = Path(args.prompt_file).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise MespRefError(f"{args.prompt_file}: --prompt-file: {reason}") from None
    else:
        text = _standard_input() if args.prompt == "-" else args.prompt
    return str(text)


def _prompt(args: argparse.Namespace, encoder: Encoder, directory: Path) -> tuple[str, list[int]]:
    """The prompt as the model reads it: its text and its tokens."""
    text = _text(args)
    if args.system is not None and not args.chat:
        raise MespRefError("--system: found without --chat, expected both")
    if not args.chat:
        return text, encoder.text(text, special=True).tolist()
    if encoder.template is None:
        raise MespRefError(
            f"{directory}: --chat: found no chat template, expected chat_template in "
            "tokenizer_config.json; leave --chat out"
        )
    messages = [{"role": "user", "content": text}]
    if args.system is not None:
        messages.insert(0, {"role": "system", "content": args.system})
    asked = encoder.template.render(messages, add_generation_prompt=True)
    return asked, encoder.prompt(messages).tolist()


def run(args: argparse.Namespace) -> int:
    model, adapter = open_trained(args)
    assert model.path is not None
    kind = "messages" if args.chat else "text"
    encoder = open_encoder(model, {kind}, datetime.now(), args.special_tokens_in_text)
    (prompt, ids), tokenizer = _prompt(args, encoder, model.path), encoder.tokenizer
    assert tokenizer is not None
    if not ids:
        raise MespRefError("--prompt: found no text, expected some to continue")
    written = _Written(tokenizer, quiet=args.json)
    begin = time.perf_counter()
    [new] = generate(
        tiled_model(model),
        [ids],
        adapter,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        eos_token_id=encoder.turn_ends,
        on_token=written,
    )
    seconds = time.perf_counter() - begin
    text = tokenizer.decode(new, skip_special_tokens=True)
    if args.json:
        print_json({"prompt": prompt, "text": text, "token_ids": new, "seconds": seconds})
    else:
        written.end(text)
    warn_of_length(model, len(ids) + len(new))
    return 0


class _Written:
    """Text on standard output as its tokens come, whole characters at a time; none is obeyed."""

    def __init__(self, tokenizer: Any, quiet: bool):
        self._stream, self._tokenizer = DecodeStream(skip_special_tokens=True), tokenizer
        self._quiet, self._text = quiet, ""

    def __call__(self, prompt: int, token: int) -> None:
        if not self._quiet:
            self._say(self._stream.step(self._tokenizer, token) or "")

    def end(self, text: str) -> None:
        """What `text`, the whole of it, has beyond that; on a line of its own where they differ."""
        same = text.startswith(self._text)
        self._say(text[len(self._text) :] + "\n" if same else f"\n{text}\n")

    def _say(self, piece: str) -> None:
        self._text += piece
        sys.stdout.write(prose(piece))
        sys.stdout.flush()

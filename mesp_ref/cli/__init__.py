"""The command line, mesp-ref: one module per command, each with `add` (its options) and `run`.

Results go to standard output, progress to standard error. A user's mistake is one line on standard
error and exit code 2; Ctrl-C is 130.
"""

import os
import sys
import warnings
from collections.abc import Sequence

from mesp_ref import __version__
from mesp_ref.cli import (
    compare,
    convert,
    evaluate,
    finetune,
    generate,
    golden,
    gradcheck,
    info,
    memory,
    merge,
    mutants,
    pretrain,
    quantize,
)
from mesp_ref.cli.options import Parser
from mesp_ref.errors import MespRefError, MespRefWarning, escaped
from mesp_ref.lean.allocator import keep_freed_memory

_DESCRIPTION = """\
Qwen2.5 with LoRA in pure NumPy, every backward pass written by hand.

Fine-tune a Hugging Face checkpoint directory on your own text, on a laptop CPU, with exact
gradients in little memory (MeSP); try the adapter; evaluate it; fold it into the model.
"""

_EPILOG = """\
each command explains itself: mesp-ref finetune --help

examples:
  mesp-ref finetune
  mesp-ref finetune --model Qwen2.5-0.5B --data notes.txt --steps 2 --seq-len 64
"""


def build_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(prog="mesp-ref", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"mesp-ref {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (
        finetune,
        generate,
        evaluate,
        merge,
        info,
        compare,
        gradcheck,
        memory,
        quantize,
        convert,
        pretrain,
        golden,
        mutants,
    ):
        command.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code: 0, 1 for a check that failed, 2 for a mistake,
    130 for Ctrl-C."""
    warnings.formatwarning = _warning
    if argv is None:  # a process of its own, whose allocator is ours to set
        keep_freed_memory()
    try:
        args = build_parser().parse_args(argv)
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except MespRefError as error:
        return _fail(str(error))
    except KeyboardInterrupt as interrupt:
        print(f"\nmesp-ref: {escaped(str(interrupt)) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(f"{error.filename or 'system'}: {error.strerror or error}")
    except MemoryError:
        return _fail("out of memory; try a smaller --batch-size or --seq-len")


_usual = warnings.formatwarning


def _warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """One line for a warning of ours; as usual for those of others."""
    if issubclass(category, MespRefWarning):
        return f"mesp-ref: warning: {' '.join(str(message).split())}\n"
    return _usual(message, category, filename, lineno, line)


def _fail(message: str) -> int:
    print(f"mesp-ref: error: {escaped(' '.join(message.split()))}", file=sys.stderr)
    return 2

"""The command line, mesp-ref: one module per command, each with `add` (its options) and `run`.

Results go to standard output, progress to standard error. A user's mistake is one line on standard
error and exit code 2; Ctrl-C is 130.
"""

import argparse
import contextlib
import io
import os
import signal
import sys
import warnings
from collections.abc import Sequence

from mesp_ref import __version__
from mesp_ref.cli import (
    compare,
    convert,
    data,
    evaluate,
    finetune,
    generate,
    golden,
    gradcheck,
    info,
    learn,
    memory,
    merge,
    mutants,
    pretrain,
    push,
    quantize,
)
from mesp_ref.cli.options import Parser
from mesp_ref.errors import MespRefError, MespRefWarning, escaped, shown
from mesp_ref.spread.launcher import check_alone, is_first

_DESCRIPTION = """\
Qwen2.5 with LoRA in pure NumPy, every backward pass written by hand.

Fine-tune a Hugging Face checkpoint directory on your own text, on a laptop CPU, with exact
gradients in little memory (MeSP); try the adapter; evaluate it; fold it into the model.
"""

_EPILOG = """\
each command explains itself: mesp-ref finetune --help
BLAS has one thread, which is never slow beside other work, unless OPENBLAS_NUM_THREADS says otherwise;
finetune --workers N uses N idle cores.

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
        data,
        merge,
        info,
        compare,
        gradcheck,
        memory,
        quantize,
        convert,
        push,
        pretrain,
        golden,
        mutants,
        learn,
    ):
        command.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code: 0, 1 for a check that failed, 2 for a mistake,
    130 for Ctrl-C, 128 and its number for another signal."""
    warnings.formatwarning = _warning
    try:
        args = _parsed(list(sys.argv[1:] if argv is None else argv))
        if args is None:
            return 0
        if getattr(args, "quiet", False):  # huggingface_hub reads it when it is imported
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        if not getattr(args, "mpi", False) and not check_alone(hasattr(args, "mpi"), os.environ):
            return 0  # rank 0 says that each rank would do the whole work
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except MespRefError as error:
        return _fail(str(error))
    except KeyboardInterrupt as interrupt:
        _say(str(interrupt) or "interrupted", before="\n")
        return 128 + getattr(interrupt, "signal", signal.SIGINT)
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        return 0
    except OSError as error:
        return _fail(f"{error.filename or 'system'}: {error.strerror or error}")
    except UnicodeEncodeError as error:
        return _fail(f"found characters that are no text, {shown(error.object)}, expected UTF-8")
    except (MemoryError, OverflowError):
        return _fail("out of memory; try a smaller --batch-size or --seq-len")


def _parsed(given: list[str]) -> argparse.Namespace | None:
    """The words of a command line; None where there is nothing to run.

    Of the processes of mpiexec, which are all given the same words, rank 0 alone says what is wrong
    with them, or helps; the others end without a word, and with 0: theirs is not to stop it.
    """
    if not is_first(os.environ):
        with (
            contextlib.suppress(MespRefError, SystemExit),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            return _understood(given)
        return None
    return _understood(given)


def _understood(given: list[str]) -> argparse.Namespace | None:
    parser = build_parser()
    if not given:
        parser.print_help()
        return None
    if given[0].startswith("-") and given[0] not in ("-h", "--help", "--version"):
        raise MespRefError(
            f"found {shown(given[0])} before a command, expected the command first, such as "
            "mesp-ref finetune; see mesp-ref --help"
        )
    return parser.parse_args(given)


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
        return f"mesp-ref: warning: {escaped(' '.join(str(message).split()))}\n"
    return _usual(message, category, filename, lineno, line)


def _fail(message: str) -> int:
    _say(f"error: {' '.join(message.split())}")
    return 2


def _say(line: str, before: str = "") -> None:
    """One line on standard error, where there is one that takes it."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(f"{before}mesp-ref: {escaped(line)}", file=sys.stderr)

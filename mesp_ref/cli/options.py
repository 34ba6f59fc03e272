"""What the commands share: a parser that fails in one line, common options, JSON output."""

import argparse
import inspect
import json
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TextIO, get_args

from mesp_ref.cli.meant import meant_command, meant_option
from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.init import init_lora
from mesp_ref.engine.model import Model
from mesp_ref.errors import MespRefError, escaped, shown
from mesp_ref.files.hub import hub_name
from mesp_ref.files.peft import load_adapter
from mesp_ref.train.bounds import check_bounds
from mesp_ref.train.ranks import ALONE, Ranks
from mesp_ref.train.rows import PACKINGS
from mesp_ref.train.sources import FORMATS

_NO_SUCH_COMMAND = (
    r"^argument (?:COMMAND|ACTION|KIND): invalid choice: '(.*?)' \(choose from (.*)\)"
)
_TEXTS = ("prompt", "system", "text")
DTYPES = ("float32", "float64")
_LINE = 10_000  # characters: of our own lines none is longer


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are MespRefErrors and whose examples keep their lines."""

    def __init__(self, **settings: Any):
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **settings)

    def parse_args(self, *given: Any, **settings: Any) -> Any:
        """As argparse does; every number held against its bounds, and no path without a name."""
        args, unknown = self.parse_known_args(*given, **settings)
        if unknown:
            parser = getattr(args, "parser", self)
            meant = meant_option(unknown[0], parser.format_help())
            parser.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        check_bounds(vars(args), options=True)
        _name_revision(args)
        for name, value in vars(args).items():
            if isinstance(value, str) and name in _TEXTS:
                setattr(args, name, _text(value, f"--{name}"))
            elif value == "" and name != "memory_limit":  # which says what a size looks like
                raise MespRefError(f"--{name.replace('_', '-')}: found nothing, expected a name")
        return args

    def error(self, message: str) -> NoReturn:
        choice = re.search(_NO_SUCH_COMMAND, message)
        if choice:
            message += meant_command(choice[1], re.findall(r"[\w-]+", choice[2]))
        raise MespRefError(f"{message}; see {self.prog} --help")


def _text(value: str, option: str) -> str:
    """Words of the command line as UTF-8, whatever encoding the locale has Python take them for."""
    try:
        return os.fsencode(value).decode("utf-8")
    except UnicodeError:
        raise MespRefError(f"{option}: found bytes that are no text, expected UTF-8") from None


def _name_revision(args: argparse.Namespace) -> None:
    """--model org/name --revision REV becomes org/name@REV, which is what all else knows."""
    if (revision := getattr(args, "revision", None)) is None:
        return
    found = hub_name(args.model)
    if found is None or found.revision or not hub_name(f"{found.repo}@{revision}"):
        raise MespRefError(
            f"--revision: found {shown(revision)} beside {shown(args.model)}, expected a branch, tag or "
            "commit beside a model org/name of the hub"
        )
    args.model = f"{found.repo}@{revision}"


def add_command(commands: Any, name: str, module: Any, summary: str, text: str) -> Parser:
    """A command whose help is `text`, description first, examples from the line "examples:" on."""
    description, _, examples = text.partition("examples:\n")
    parser: Parser = commands.add_parser(
        name, help=summary, description=description.strip(), epilog="examples:\n" + examples
    )
    parser.set_defaults(run=module, parser=parser)
    return parser


def add_model(parser: Any) -> None:
    """--model, --adapter and --dtype."""
    add_model_only(parser)
    parser.add_argument(
        "--adapter", metavar="DIR", help="PEFT adapter directory, a run's, or org/name of the hub"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="arithmetic (default: %(default)s)"
    )


def add_model_only(parser: Any) -> None:
    """--model."""
    parser.add_argument(
        "--model", metavar="DIR",
        help="Hugging Face checkpoint directory (Qwen2, Qwen3, Llama, SmolLM3, text of Gemma 3), or a "
        "name of the hub such as Qwen/Qwen2.5-0.5B-Instruct; default: the one an --adapter was trained "
        "on, or the small story model that comes with this package",
    )  # fmt: skip
    add_revision(parser)


def add_revision(parser: Any) -> None:
    """--revision."""
    parser.add_argument(
        "--revision", metavar="REV",
        help="branch, tag or commit of a --model of the hub; the same as --model org/name@REV",
    )  # fmt: skip


def add_data(parser: Any) -> None:
    """--data, --format and --packing."""
    parser.add_argument(
        "--data", metavar="FILE",
        help="text, JSONL, a JSON list, CSV, TSV, Parquet, Arrow, a directory of save_to_disk, or gzip "
        "of one, or org/name of a data set on the hub; default: conversations about stories that come "
        "with this package",
    )  # fmt: skip
    add_forms(parser)


def add_forms(parser: Any) -> None:
    """--format and --packing."""
    parser.add_argument(
        "--format", choices=FORMATS, default="auto", dest="form",
        help="default: what the file's content is",
    )  # fmt: skip
    parser.add_argument(
        "--packing", choices=PACKINGS, default="auto",
        help="pack: documents one after another, cut into sequences in which none sees another and "
        "each begins at position 0, so that gradients are those of the documents apart; pad: one "
        "document per sequence (default: pad for conversations and prompts, else pack)",
    )  # fmt: skip


def add_special_tokens(parser: Any) -> None:
    """--special-tokens-in-text."""
    parser.add_argument(
        "--special-tokens-in-text", action="store_true", dest="special_tokens_in_text",
        help="let the words of a message make control tokens, such as <|im_end|>, as transformers "
        "does; by default they are spelled as any other text, so that no data ends a turn",
    )  # fmt: skip


def add_lora(parser: Any) -> None:
    """--rank, --alpha and --targets."""
    usual = {name: p.default for name, p in inspect.signature(init_lora).parameters.items()}
    parser.add_argument(
        "--rank", type=int, metavar="R", help=f"LoRA rank (default: {usual['rank']})"
    )
    parser.add_argument(
        "--alpha", type=float, metavar="X",
        help=f"LoRA alpha; the scale is alpha/R (default: {usual['alpha']:g})",
    )  # fmt: skip
    parser.add_argument(
        "--targets", metavar="NAMES",
        help="all (default), or some of q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
    )  # fmt: skip


def lora_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What was said about a new adapter: arguments of init_lora."""
    said = {name: getattr(args, name) for name in ("rank", "alpha", "targets")}
    found = {name: value for name, value in said.items() if value is not None}
    if found and getattr(args, "adapter", None) is not None:
        raise MespRefError(
            f"--{next(iter(found))}: found beside --adapter, expected one of the two; "
            f"{args.adapter} has its own"
        )
    return found


def add_fields(parser: Any, options: Any, *names: str) -> None:
    """An option for each named field of a dataclass, whose type, default and help stand there."""
    for name in names:
        field = options.__dataclass_fields__[name]
        text, metavar, choices = (field.metadata[key] for key in ("help", "metavar", "choices"))
        kinds = get_args(field.type) or (field.type,)
        kind = next(found for found in kinds if found is not type(None))
        default = getattr(options, name)
        shown = f"{default:g}" if kind is float and default else str(default)
        if "(default:" not in text and kind is not bool:
            text += " (default: {default})"
        text = text.replace("{default}", shown)
        settings: dict[str, Any] = {"action": "store_true"} if kind is bool else {"type": kind}
        if choices:
            settings = {"choices": choices}
        elif kind is not bool:
            settings["metavar"] = metavar or {int: "N", float: "X"}.get(kind)
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, default=default, help=text, **settings)


def add_integers(parser: Any, *rows: tuple[str, int, str]) -> None:
    """Options that take an integer: name, default and what it is."""
    for name, default, text in rows:
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})"
        )


def add_json(parser: Any) -> None:
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object on standard output"
    )


def add_ranks(parser: Any, shares: str) -> None:
    """--mpi, --mpi-patience and --inexact of a command that several processes share."""
    group = parser.add_argument_group("several processes")
    group.add_argument(
        "--mpi", action="store_true",
        help=f"share {shares} with the other processes of mpiexec -n N; the result is that of one",
    )  # fmt: skip
    add_patience(group)
    group.add_argument(
        "--inexact", action="store_true",
        help="let the processes differ in threads, NumPy or its BLAS, which changes the last bits",
    )  # fmt: skip


def add_patience(group: Any) -> None:
    """--mpi-patience."""
    group.add_argument(
        "--mpi-patience", type=float, default=600, metavar="SECONDS",
        help="how long the others wait for a process that does not get on (default: 600)",
    )  # fmt: skip


def on_ranks(args: argparse.Namespace, command: Callable[[Ranks], int]) -> int:
    """Run a command alone, or with --mpi on all ranks; its exit code."""
    if not args.mpi:
        return command(ALONE)
    from mesp_ref.spread.start import share_over_mpi

    return share_over_mpi(vars(args), args.mpi_patience, command)


def open_adapter(path: str | None, model: Model) -> Adapter | None:
    """The adapter named on the command line, held against its model."""
    if path is None:
        return None
    return load_adapter(path, dtype=model.dtype, config=model.config)


def print_json(value: Any) -> None:
    """One JSON object, on a line of its own. What a terminal would obey is written \\uXXXX, and so
    is what is not ASCII where the output is not UTF-8."""
    utf8 = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"
    text = json.dumps(value, ensure_ascii=not utf8)
    print(text if text.isprintable() else "".join(map(_printable, text)))


def _printable(c: str) -> str:
    if c.isprintable():
        return c
    return f"\\u{ord(c):04x}" if ord(c) < 0x10000 else json.dumps(c)[1:-1]


def say(*lines: str, file: TextIO | None = None) -> None:
    """Lines on standard output, or in `file`. Whatever stands in one, no terminal obeys it and it
    stays one line."""
    print("\n".join(escaped(line, _LINE) for line in lines), file=file)

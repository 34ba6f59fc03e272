"""The tokenizer of a checkpoint directory."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mesp_ref.errors import MespRefError, shown
from mesp_ref.files.fields import read_fields
from mesp_ref.files.strict import inside, read_bytes, read_object
from mesp_ref.files.tables import TOKENIZER
from mesp_ref.lean.allocator import return_freed_memory

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_LIMIT = 1 << 28  # bytes; Qwen2.5's has 7 MB, Gemma 3's 33
_LARGE = 1 << 22


def load_tokenizer(path: str | Path) -> "Tokenizer":
    """The tokenizer.json of a checkpoint directory, without truncation or padding of its own.

    Raises MespRefError when the file is missing or is not a tokenizer.
    """
    from tokenizers import Tokenizer

    file = inside(path, "tokenizer.json")
    if not file.is_file():
        raise MespRefError(
            f"{file}: not found, expected the model's tokenizer; copy it beside config.json"
        )
    try:
        content = read_bytes(file, _LIMIT)
    except OSError as error:
        raise MespRefError(f"{file}: cannot be read: {error.strerror}") from None
    with reasons(f"{file}: not a tokenizer"):
        tokenizer = Tokenizer.from_buffer(content)
        tokenizer.no_truncation()
        tokenizer.no_padding()
    if file.stat().st_size > _LARGE:
        return_freed_memory()  # parsing took six times the file; a step needs less
    return tokenizer


def read_tokenizer_config(path: str | Path) -> dict[str, Any]:
    """The fields of a checkpoint directory's tokenizer_config.json; none where it has no such file.

    Raises MespRefError naming the field for one that is unknown or of another type.
    """
    file = inside(path, "tokenizer_config.json")
    if not file.exists():
        return {}
    return read_fields(read_object(file, "a tokenizer's settings"), TOKENIZER, file)


def read_chat_template(path: str | Path) -> tuple[str | None, str]:
    """The source of a checkpoint directory's chat template, and where it stands; None without one.

    It is chat_template.jinja, or `chat_template` of tokenizer_config.json (a text, or a list of
    named ones of which "default" is taken).

    Raises MespRefError for files that cannot be read.
    """
    directory = Path(path)
    file, config = inside(directory, "chat_template.jinja"), read_tokenizer_config(directory)
    if file.is_file():
        try:
            return read_bytes(file).decode("utf-8"), f"{file}: chat_template"
        except (OSError, ValueError) as error:
            raise MespRefError(f"{file}: not readable as UTF-8: {error}") from None
    file, source = inside(directory, "tokenizer_config.json"), config.get("chat_template")
    if isinstance(source, list):
        named = [t.get("template") for t in source if t.get("name") == "default"]
        source = named[0] if named else None
    return source, f"{file}: chat_template"


@contextmanager
def reasons(what: str) -> Iterator[None]:
    """Whatever goes wrong inside the tokenizers package, as a MespRefError that begins with `what`.

    The package raises bare Exception for what it cannot parse, and its panics are no Exception.
    """
    try:
        yield
    except (MespRefError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise MespRefError(f"{what}: {shown(' '.join(str(error).split()))}") from None

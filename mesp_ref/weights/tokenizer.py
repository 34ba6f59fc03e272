"""The tokenizer of a checkpoint directory."""

from pathlib import Path
from typing import TYPE_CHECKING

from mesp_ref.errors import MespRefError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load_tokenizer(path: str | Path) -> "Tokenizer":
    """The tokenizer.json of a checkpoint directory, without truncation or padding of its own.

    Raises MespRefError when the file is missing or is not a tokenizer.
    """
    from tokenizers import Tokenizer

    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        raise MespRefError(
            f"{file}: not found, expected the model's tokenizer; copy it beside config.json"
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises bare Exception for whatever it cannot parse
        raise MespRefError(f"{file}: not a tokenizer: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer

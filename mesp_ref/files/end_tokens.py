"""The tokens at which a model stops writing."""

from pathlib import Path

from mesp_ref.files.config import read_generation_config


def generation_ends(folder: str | Path) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json, one number or a list; empty where there is none.

    transformers ends at these alone, whatever config.json says.

    Raises MespRefError for a file that cannot be read and for what is no token id.
    """
    ends = read_generation_config(folder).get("eos_token_id", [])
    return tuple(ends) if isinstance(ends, list | tuple) else (ends,)


def end_tokens(folder: str | Path | None, ends: tuple[int, ...]) -> tuple[int, ...]:
    """Every token that ends a text: those of config.json, `ends`, first, then generation_config's."""
    more = () if folder is None else generation_ends(folder)
    return tuple(dict.fromkeys(ends + more))

"""The tokens at which a model stops writing."""

from pathlib import Path

from mesp_ref.errors import MespRefError, shown
from mesp_ref.files.strict import inside, read_object


def generation_ends(folder: str | Path) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json, one number or a list; empty where there is none.

    transformers ends at these alone, whatever config.json says.

    Raises MespRefError for a file that cannot be read and for what is no token id.
    """
    file = inside(folder, "generation_config.json")
    if not file.is_file():
        return ()
    given = read_object(file, "settings for generation").get("eos_token_id")
    if given is None:
        return ()
    ends = given if isinstance(given, list) else [given]
    for end in ends:
        if type(end) is not int or not 0 <= end < 2**31:
            raise MespRefError(
                f"{file}: eos_token_id: found {shown(end)}, expected a token id or a list of them"
            )
    return tuple(ends)


def end_tokens(folder: str | Path | None, ends: tuple[int, ...]) -> tuple[int, ...]:
    """Every token that ends a text: those of config.json, `ends`, first, then generation_config's."""
    more = () if folder is None else generation_ends(folder)
    return tuple(dict.fromkeys(ends + more))

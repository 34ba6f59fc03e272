"""What a model is called in files that are shared: a name, never a place on this machine."""

import contextlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mesp_ref.errors import MespRefError
from mesp_ref.files.default import default_checkpoint
from mesp_ref.files.strict import inside, read_object

DEFAULT = "mesp-ref-story-model"
_PLACES = (
    "_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file", "vocab_file",
)  # fmt: skip
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}"
HUB = re.compile(f"{_PART}/{_PART}")
_CACHED = re.compile(f"models--({_PART}?)--({_PART})")  # a folder of the Hugging Face cache


def shared_name(name: str | None) -> str | None:
    """A base model's name as it may leave this machine.

    org/name of the Hugging Face hub stays, a folder of its cache is called by it, of any other path
    the folder's own name is left; None where there is none, as of "/".
    """
    if name is None or HUB.fullmatch(name):
        return name
    parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".", "..", "~")]
    for part in parts:
        if found := _CACHED.fullmatch(part):
            return f"{found[1]}/{found[2]}"
    last = parts[-1] if parts else ""
    return None if not last or re.fullmatch("[A-Za-z]:", last) else last


def without_places(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration whose fields that say where a thing lay on somebody's machine say its name."""
    return {
        field: shared_name(value) if field in _PLACES and isinstance(value, str) else value
        for field, value in values.items()
    }


def copy_shared(file: Path, target: Path) -> None:
    """Copy a file of a checkpoint as it is, but for places in tokenizer_config.json."""
    if file.name == "tokenizer_config.json":
        with contextlib.suppress(MespRefError):  # what is no JSON is copied as it is
            values = read_object(file, "a tokenizer's configuration")
            if (named := without_places(values)) != values:
                text = json.dumps(named, indent=2, ensure_ascii=False)
                target.write_text(text + "\n", encoding="utf-8")
                return
    shutil.copyfile(file, target)


def model_name(directory: Path, given: str | None = None) -> str | None:
    """The name under which others may know a checkpoint directory.

    given     how the user called it, without @revision; a path of the user's is not repeated
    Of config.json's _name_or_path, which says what a model was once made from, only org/name with
    the directory's own name is believed.
    """
    if given is not None and not Path(given).exists():
        repo = given.partition("@")[0]
        if HUB.fullmatch(repo):
            return repo
    place = directory.resolve()
    if place == default_place():
        return DEFAULT
    own = shared_name(str(place))
    stated = _stated(directory)
    if own and stated and HUB.fullmatch(stated) and stated.partition("/")[2] == own:
        return stated
    return own


def default_place() -> Path | None:
    """Where the default checkpoint lies, if it does."""
    try:
        return default_checkpoint().resolve()
    except MespRefError:
        return None


def _stated(directory: Path) -> str | None:
    try:
        stated = read_object(inside(directory, "config.json"), "a checkpoint").get("_name_or_path")
    except MespRefError:
        return None
    return stated if isinstance(stated, str) else None

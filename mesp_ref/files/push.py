"""An adapter or a merged model to the Hugging Face hub: what others load, and nothing of the run."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mesp_ref.errors import MespRefError
from mesp_ref.files.checkpoint import open_checkpoint, weight_files
from mesp_ref.files.hub import HubName, answered, hub_package
from mesp_ref.files.names import HUB, shared_name, without_places
from mesp_ref.files.output import COMPANIONS
from mesp_ref.files.peft import load_adapter
from mesp_ref.files.strict import inside, read_object

_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "README.md")
_NAMED = ("config.json", "adapter_config.json", "tokenizer_config.json")
_CARD = """\
---
{header}---

# {title}

{text}
"""


class Pushed(NamedTuple):
    """What went to the hub, and where it is now."""

    url: str
    files: list[str]
    size: int


def push(
    folder: str | Path, name: str, private: bool = False, message: str | None = None
) -> Pushed:
    """Upload a PEFT adapter's folder, a run's adapter, or a checkpoint directory to user/name.

    A repository that is not there is made: public, as `hf upload` does, unless `private`; one that is
    there keeps what it is. Adapter and model are opened first, so that nothing broken is published.
    Of a run only adapter/ goes: no state, no metrics, no text of the data; and no file says where a
    thing lay on this machine. A README.md is written where neither the folder nor the hub has one.

    Raises MespRefError for a folder that is neither, and for a hub that refuses, each in one line
    """
    if not HUB.fullmatch(name):
        raise MespRefError(f"push: found {name!r}, expected user/name of the hub")
    place = Path(folder)
    if not place.is_dir():
        raise MespRefError(f"{place}: found no directory, expected an adapter's or a model's")
    if not (place / "adapter_config.json").exists() and (place / "adapter").is_dir():
        place = place / "adapter"
    found = HubName(name)
    hub = hub_package(found)
    parts = {file.name: _shared(file) for file in _files(place)}
    with answered(found, "repository", hub, here=""):
        api = hub.HfApi(library_name="mesp-ref")
        url = str(api.create_repo(name, private=private or None, exist_ok=True))
        if "README.md" not in parts and not api.file_exists(name, "README.md"):
            parts["README.md"] = _card(place, name.partition("/")[2]).encode()
        operations = [
            hub.CommitOperationAdd(path_in_repo=file, path_or_fileobj=part)
            for file, part in parts.items()
        ]
        api.create_commit(name, operations, commit_message=message or "Upload with mesp-ref")
    size = sum(len(p) if isinstance(p, bytes) else Path(p).stat().st_size for p in parts.values())
    return Pushed(url, sorted(parts), size)


def _files(place: Path) -> Iterator[Path]:
    """What others load; opened once, so that it can be."""
    if (place / "adapter_config.json").exists():
        load_adapter(place)
        yield from (inside(place, n) for n in _ADAPTER if (place / n).is_file())
        return
    if not (place / "config.json").exists():
        raise MespRefError(
            f"{place}: found neither adapter_config.json nor config.json, expected the directory of an "
            "adapter, of a run or of a model"
        )
    open_checkpoint(place)
    yield from weight_files(place)
    for pattern in ("config.json", "model.safetensors.index.json", "README.md", *COMPANIONS):
        for file in sorted(place.glob(pattern)):
            if file.is_file():
                yield inside(place, file.name)


def _shared(file: Path) -> str | bytes:
    """The file itself, or what it says without places on this machine."""
    if file.name not in _NAMED:
        return str(file)
    values = read_object(file, "a configuration")
    named = without_places(values)
    if isinstance(base := values.get("base_model_name_or_path"), str):
        named["base_model_name_or_path"] = shared_name(base)
    return str(file) if named == values else json.dumps(named, indent=2).encode() + b"\n"


def _card(place: Path, title: str) -> str:
    """A README.md by which the hub knows what this is and of which model."""
    if not (place / "adapter_config.json").exists():
        header = "library_name: transformers\npipeline_tag: text-generation\n"
        return _CARD.format(header=header, title=title, text="Written by mesp-ref.")
    values: dict[str, Any] = read_object(place / "adapter_config.json", "an adapter")
    base = shared_name(values.get("base_model_name_or_path"))
    header = "library_name: peft\npipeline_tag: text-generation\n"
    text = f"A LoRA adapter of rank {values.get('r')}, trained with mesp-ref."
    if base and HUB.fullmatch(base):
        header += f"base_model: {base}\n"
        text += f"\n\n    mesp-ref generate --adapter OWNER/{title} --prompt ..."
    return _CARD.format(header=header, title=title, text=text)

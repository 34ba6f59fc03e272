"""From --adapter to a model: the folder of a run stands for its adapter, which knows its base."""

import argparse
import contextlib
import sys
from pathlib import Path

from mesp_ref.cli.options import say
from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.model import Model
from mesp_ref.errors import MespRefError, shown
from mesp_ref.files.hub import adapter_directory, hub_name
from mesp_ref.files.models import load_model
from mesp_ref.files.names import DEFAULT
from mesp_ref.files.peft import load_adapter
from mesp_ref.files.strict import inside, read_object


def open_trained(args: argparse.Namespace) -> tuple[Model, Adapter | None]:
    """The model of --model, or the one that the adapter was trained on, with the adapter.

    Raises MespRefError for whatever is wrong with either, and for a base that is not here.
    """
    if args.adapter is None:
        return load_model(args.model, dtype=args.dtype), None
    adapter = adapter_directory(args.adapter)
    if not (adapter / "adapter_config.json").exists() and (adapter / "adapter").is_dir():
        adapter = adapter / "adapter"
    base = _base(adapter) if args.model is None else args.model
    try:
        model = load_model(base, dtype=args.dtype)
    except MespRefError as error:
        if args.model is not None or hub_name(base) is None:
            raise
        raise MespRefError(f"{adapter}: its model {error}; --model names another place") from None
    return model, load_adapter(adapter, dtype=model.dtype, config=model.config)


def _base(adapter: Path) -> str | None:
    """The model an adapter was trained on, a directory or a name of the hub; None: this package's.

    A run says it in run.json; an adapter from elsewhere in its configuration.
    """
    if adapter.name == "adapter" and (adapter.parent / "run.json").is_file():
        found = read_object(inside(adapter.parent, "run.json"), "a run").get("options")
        found = found.get("model", ...) if isinstance(found, dict) else ...
        if found is None or (isinstance(found, str) and (Path(found).is_dir() or hub_name(found))):
            return found
    values = read_object(
        inside(adapter, "adapter_config.json"), "a PEFT adapter directory, or the folder of a run"
    )
    name, revision = values.get("base_model_name_or_path"), values.get("revision")
    if not isinstance(name, str) or name in ("", DEFAULT):
        return None
    if Path(name).is_dir():
        return name
    if hub_name(name):
        return f"{name}@{revision}" if isinstance(revision, str) and revision else name
    raise MespRefError(
        f"{adapter}: was trained on {shown(name)}, which is no directory here; name the directory "
        "with --model"
    )


def warn_of_length(model: Model, length: int) -> None:
    """Say so on standard error where a sequence is longer than any the model was trained on."""
    known = model.config.max_position_embeddings
    if length > known:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            say(
                f"mesp-ref: warning: {length} tokens are beyond max_position_embeddings, {known}: "
                "the model has never seen such positions", file=sys.stderr,
            )  # fmt: skip

"""Where the default checkpoint lies: beside the package in a clone, inside it once installed."""

from pathlib import Path

from mesp_ref.errors import MespRefError

_PACKAGE = Path(__file__).resolve().parents[1]
_PLACES = (_PACKAGE / "default_checkpoint", _PACKAGE.parent / "weights")


def default_checkpoint() -> Path:
    """Directory of the small story model that comes with this package.

    Raises MespRefError when it is missing, as in a clone without its weights directory.
    """
    for place in _PLACES:
        if (place / "model.safetensors").is_file():
            return place
    raise MespRefError(
        f"{_PLACES[-1]}: not found, expected the default checkpoint; restore it, train it with "
        "mesp-ref pretrain, or name another model"
    )

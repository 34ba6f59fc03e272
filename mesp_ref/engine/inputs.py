"""Token ids and labels, checked before any arithmetic."""

import cmath
from typing import Any

import numpy as np

from mesp_ref.engine.config import Qwen2Config
from mesp_ref.errors import MespRefError
from mesp_ref.ops import IGNORED, Array


def check_ids(config: Qwen2Config, ids: Any, what: str = "input_ids") -> Array:
    """Token ids as an integer array [N, T]; one sequence may come without its batch axis.

    Raises MespRefError for other shapes or types and for ids outside the vocabulary.
    """
    try:
        array = np.atleast_2d(np.asarray(ids))
    except ValueError:
        array = np.empty(0)
    if array.ndim != 2 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise MespRefError(
            f"{what}: found {array.dtype} {list(array.shape)}, expected integers [batch, tokens] "
            "with every sequence of one length; pad on the right and give the padding label -100"
        )
    values = array[array != IGNORED] if what == "labels" else array
    if values.size and not (values.min() >= 0 and values.max() < config.vocab_size):
        found = int(values.min()) if values.min() < 0 else int(values.max())
        raise MespRefError(
            f"{what}: found token id {found}, expected 0 to {config.vocab_size - 1} "
            "(vocab_size); is this the model's own tokenizer?"
        )
    return array.astype(np.int64, copy=False)  # unsigned ids could not hold −100


def check_batch(config: Qwen2Config, input_ids: Any, labels: Any) -> tuple[Array, Array]:
    """input_ids and labels as two integer arrays of one shape [N, T]."""
    ids = check_ids(config, input_ids)
    targets = check_ids(config, labels, "labels")
    if ids.shape != targets.shape:
        raise MespRefError(
            f"labels: found shape {list(targets.shape)}, expected that of input_ids "
            f"{list(ids.shape)}; labels are shifted inside"
        )
    return ids, targets


def check_positions(position_ids: Any, shape: tuple[int, ...]) -> Array | None:
    """position_ids as an integer array of the shape of input_ids, [N, T]; None for None.

    Raises MespRefError unless every row counts up by 1 from 0, and from 0 anew at each document.
    """
    if position_ids is None:
        return None
    found = np.atleast_2d(np.asarray(position_ids))
    if found.shape != shape or not np.issubdtype(found.dtype, np.integer):
        raise MespRefError(
            f"position_ids: found {found.dtype} {list(found.shape)}, expected integers of the shape of "
            f"input_ids {list(shape)}"
        )
    if (found[:, 0] != 0).any() or ((np.diff(found) != 1) & (found[:, 1:] != 0)).any():
        raise MespRefError(
            "position_ids: expected each row to count up by 1 from 0, and from 0 anew where a document "
            "begins"
        )
    return found.astype(np.int64, copy=False)


def apart(labels: Array, positions: Array | None) -> Array:
    """Labels in which the first token of a document is nobody's target."""
    return labels if positions is None else np.where(positions == 0, IGNORED, labels)


class NotFinite(MespRefError):
    """A result of the forward that is NaN or infinite."""


def finite(what: str, value: float) -> float:
    """The value itself, complex ones too; NotFinite, a MespRefError, where it is NaN or infinite."""
    if not cmath.isfinite(value):
        raise NotFinite(
            f"{what}: found {value}, expected a finite number; weights or adapter hold NaN or "
            "infinity, or are so large that the dtype overflows"
        )
    return value

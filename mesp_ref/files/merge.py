"""Fold an adapter into its base: W + s·B·A, as a checkpoint directory of its own."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.init import check_adapter
from mesp_ref.engine.model import Model
from mesp_ref.files.checkpoint import check_unchanged, save_checkpoint, storage_dtype
from mesp_ref.files.config import kept_fields
from mesp_ref.files.finite import cast_finite
from mesp_ref.files.output import copy_companions, new_directory
from mesp_ref.files.safetensors import Gain, Stored


class _Merged(Mapping[str, Any]):
    """The model's tensors with the adapter folded in, each formed and cast when it is asked for."""

    def __init__(self, model: Model, adapter: Adapter, dtype: np.dtype):
        self._model, self._adapter, self._dtype = model, adapter, dtype

    def __getitem__(self, name: str) -> Any:
        table: Any = self._model.weights[name]
        mapped = isinstance(table, Stored)  # is read: a file cut short meanwhile is an error
        w = table.read(0, len(table)).astype(table.dtype) if mapped else table[...]
        pair = self._adapter.pair(name.removesuffix(".weight"))
        if pair is not None:
            A, B = pair
            with np.errstate(over="ignore", invalid="ignore"):
                w = w + self._adapter.scale * (B @ A)
        where = f"{self._model.path or self._model.config.source}: {name}, merged"
        found = cast_finite(w, self._dtype, where, "try a wider --dtype, or another adapter")
        return table if isinstance(table, Gain) else found  # a gain is written as it is stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._model.weights)

    def __len__(self) -> int:
        return len(list(self._model.weights))


def merge(
    model: Model, adapter: Adapter, path: str | Path, dtype: Any = None, overwrite: bool = False
) -> None:
    """Write the merged model as a Hugging Face directory, tokenizer files beside it.

    Forward   W′ = W + s·B·A, rounded once to the stored dtype (default: the model's own)
    Fields    of config.json stay as they are, but for the type and how the weights are packed
    Raises    MespRefError for an adapter of another model; for a directory that is not empty,
              unless `overwrite`, and even then for one that mesp-ref did not write or is reading;
              for NaN and infinity in the stored type, and for a model that changes meanwhile
    """
    check_adapter(adapter, model.config)
    with new_directory(path, overwrite=overwrite, inputs=[model.path]) as aside:
        stored = storage_dtype(dtype or model.dtype)
        arrays = _Merged(model, adapter, stored)
        save_checkpoint(model.config, arrays, aside, stored, kept_fields(model.path))
        if model.path is not None:
            copy_companions(model.path, aside)
        check_unchanged(model.weights)

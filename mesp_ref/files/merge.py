"""Fold an adapter into its base: W + s·B·A, as a checkpoint directory of its own."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.init import check_adapter
from mesp_ref.engine.model import Model
from mesp_ref.files.checkpoint import save_checkpoint
from mesp_ref.files.output import copy_companions, new_directory
from mesp_ref.ops import Array


class _Merged(Mapping[str, Array]):
    """The model's tensors with the adapter folded in, each formed when it is asked for."""

    def __init__(self, model: Model, adapter: Adapter):
        self._model, self._adapter = model, adapter

    def __getitem__(self, name: str) -> Array:
        w = self._model.weights[name][...]
        pair = self._adapter.pair(name.removesuffix(".weight"))
        if pair is None:
            return w
        A, B = pair
        return w + self._adapter.scale * (B @ A)

    def __iter__(self) -> Iterator[str]:
        return iter(self._model.weights)

    def __len__(self) -> int:
        return len(list(self._model.weights))


def merge(
    model: Model, adapter: Adapter, path: str | Path, dtype: Any = None, overwrite: bool = False
) -> None:
    """Write the merged model as a Hugging Face directory, tokenizer files beside it.

    Forward   W′ = W + s·B·A, rounded once to the stored dtype (default: the model's own)
    Raises    MespRefError for an adapter of another model and for a directory that is not empty,
              unless `overwrite`, and even then for one that mesp-ref did not write or is reading
    """
    check_adapter(adapter, model.config)
    with new_directory(path, overwrite=overwrite, inputs=[model.path]) as aside:
        save_checkpoint(model.config, _Merged(model, adapter), aside, dtype or model.dtype)
        if model.path is not None:
            copy_companions(model.path, aside)

"""Models from a checkpoint directory, from random numbers, or copied into memory."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from mesp_ref.engine.config import Qwen2Config
from mesp_ref.engine.init import random_arrays
from mesp_ref.engine.model import Model
from mesp_ref.errors import MespRefError
from mesp_ref.files.affine import Affine
from mesp_ref.files.checkpoint import open_checkpoint, storage_dtype
from mesp_ref.files.config import read_config
from mesp_ref.files.default import default_checkpoint
from mesp_ref.files.end_tokens import end_tokens
from mesp_ref.files.hub import model_directory
from mesp_ref.files.output import await_folder
from mesp_ref.files.random import write_random_checkpoint

# Published shapes by name, config.json of Qwen/Qwen2.5-*: all heads tied.
SHAPES = {
    "qwen2.5-0.5b": Qwen2Config(151936, 896, 4864, 24, 14, 2, 64),
    "qwen2.5-1.5b": Qwen2Config(151936, 1536, 8960, 28, 12, 2, 128),
    "qwen2.5-3b": Qwen2Config(151936, 2048, 11008, 36, 16, 2, 128),
}


def load_model(path: str | Path | None = None, dtype: Any = "float32") -> Model:
    """Open a Hugging Face Qwen2 directory; its weights stay in the mapped files.

    org/name or org/name@revision, where no such path is here, is fetched from the Hugging Face hub.
    Without a path it is the small story model that comes with the package. It ends at the end tokens
    of config.json and of generation_config.json, where there is one.

    Raises MespRefError naming file and field for what is missing, malformed or not computed.
    """
    directory = default_checkpoint() if path is None else model_directory(path)
    await_folder(directory)
    config, weights = open_checkpoint(directory, dtype)
    ends = end_tokens(directory, config.eos_token_ids)
    if ends != config.eos_token_ids:
        config = dataclasses.replace(config, eos_token_id=ends)
    return Model(config, weights, directory)


def random_model(
    config: Qwen2Config, *, seed: int = 0, dtype: Any = "float32", std: float = 0.02
) -> Model:
    """A model with seeded random weights in memory, ready to be trained from scratch."""
    return Model(config, random_arrays(config, seed=seed, dtype=dtype, std=std))


def read_into_memory(model: Model, dtype: Any = None) -> Model:
    """A writable copy of a model, so that every weight can be trained or perturbed."""
    names = model.weights
    arrays = {name: np.array(model.weights[name][...], dtype=dtype) for name in names}
    return Model(model.config, arrays, model.path)


def named_shape(name: str) -> Qwen2Config:
    """One of SHAPES. Raises MespRefError for another name."""
    config = SHAPES.get(name.lower())
    if config is None:
        raise MespRefError(
            f"{name}: no such directory, and no shape among {', '.join(SHAPES)}; name one of them"
        )
    return config


def cache_directory() -> Path:
    """Where what can be made again is kept: $MESP_REF_CACHE, or ~/.cache/mesp_ref."""
    return Path(os.environ.get("MESP_REF_CACHE") or Path.home() / ".cache" / "mesp_ref")


def random_checkpoint(name: str, dtype: str = "float32", affine: Affine | None = None) -> Model:
    """A published shape with random weights, in a mapped file that is written once.

    The file lies in `cache_directory`: 2 GB for qwen2.5-0.5b in float32, 0.3 GB in 4 bits. One of
    another shape under its name is written anew.

    Raises MespRefError for an unknown shape or type, and for a disk that is too full
    """
    config, kind = named_shape(name), storage_dtype(dtype).name
    if affine:
        kind = f"{affine.bits}bit-g{affine.group_size}-{kind}"
    path = cache_directory() / "random" / f"{name.lower()}-{kind}"
    if not _holds(path, config):
        write_random_checkpoint(config, path, dtype=dtype, affine=affine)
    return load_model(path)


def _holds(path: Path, config: Qwen2Config) -> bool:
    """Whether a checkpoint of this very shape lies there."""
    if not (path / "config.json").is_file():
        return False
    return dataclasses.replace(read_config(path), source=config.source) == config

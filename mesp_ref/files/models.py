"""Models from a checkpoint directory, from random numbers, or copied into memory."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from mesp_ref.engine.config import FAMILIES, Qwen2Config
from mesp_ref.engine.init import random_arrays
from mesp_ref.engine.model import Model
from mesp_ref.errors import MespRefError
from mesp_ref.files.affine import Affine
from mesp_ref.files.checkpoint import open_checkpoint, storage_dtype
from mesp_ref.files.config import pattern, read_config
from mesp_ref.files.default import default_checkpoint
from mesp_ref.files.end_tokens import end_tokens
from mesp_ref.files.hub import model_directory
from mesp_ref.files.output import await_folder
from mesp_ref.files.random import write_random_checkpoint
from mesp_ref.ops import RopeScaling

_UNTIED: dict[str, Any] = {"tie_word_embeddings": False}
_QWEN3: dict[str, Any] = {"traits": FAMILIES["qwen3"], "max_position_embeddings": 40960}
_LLAMA: dict[str, Any] = {
    "traits": FAMILIES["llama"], "rms_norm_eps": 1e-5, "rope_theta": 5e5,
    "rope_scaling": RopeScaling(32.0, 8192, 1.0, 4.0), "max_position_embeddings": 131072,
}  # fmt: skip


def _gemma(
    vocabulary: int, hidden: int, inner: int, layers: int, heads: int, groups: int, *, window: int,
    scaling: RopeScaling | None = None,
) -> Qwen2Config:  # fmt: skip
    """A Gemma 3 of the published kind: heads of 256, every sixth layer without a window."""
    return Qwen2Config(
        vocabulary, hidden, inner, layers, heads, groups, 256, traits=FAMILIES["gemma3_text"],
        attention_scale=256**-0.5, layer_types=tuple(pattern(6, layers)), sliding_window=window,
        rope_scaling=scaling, max_position_embeddings=32768 if scaling is None else 131072,
    )  # fmt: skip


# Published shapes by name: config.json of Qwen/Qwen2.5-* (base), Qwen/Qwen3-*, meta-llama/Llama-3.2-*
# and google/gemma-3-*, text alone. Checked against torchtune's model builders (qwen2_5, qwen3, llama3_2)
# and transformers' convert_gemma3_weights.py, which adds 64 tokens where there is a vision tower, too.
SHAPES = {
    "qwen2.5-0.5b": Qwen2Config(151936, 896, 4864, 24, 14, 2, 64),
    "qwen2.5-1.5b": Qwen2Config(151936, 1536, 8960, 28, 12, 2, 128),
    "qwen2.5-3b": Qwen2Config(151936, 2048, 11008, 36, 16, 2, 128),
    "qwen2.5-7b": Qwen2Config(152064, 3584, 18944, 28, 28, 4, 128, **_UNTIED),
    "qwen2.5-14b": Qwen2Config(152064, 5120, 13824, 48, 40, 8, 128, 1e-5, **_UNTIED),
    "qwen2.5-32b": Qwen2Config(152064, 5120, 27648, 64, 40, 8, 128, 1e-5, **_UNTIED),
    "qwen2.5-72b": Qwen2Config(152064, 8192, 29568, 80, 64, 8, 128, 1e-5, **_UNTIED),
    "qwen3-0.6b": Qwen2Config(151936, 1024, 3072, 28, 16, 8, 128, **_QWEN3),
    "qwen3-1.7b": Qwen2Config(151936, 2048, 6144, 28, 16, 8, 128, **_QWEN3),
    "qwen3-4b": Qwen2Config(151936, 2560, 9728, 36, 32, 8, 128, **_QWEN3),
    "qwen3-8b": Qwen2Config(151936, 4096, 12288, 36, 32, 8, 128, **_QWEN3, **_UNTIED),
    "llama-3.2-1b": Qwen2Config(128256, 2048, 8192, 16, 32, 8, 64, **_LLAMA),
    "llama-3.2-3b": Qwen2Config(128256, 3072, 8192, 28, 24, 8, 128, **_LLAMA),
    "gemma-3-270m": _gemma(262144, 640, 2048, 18, 4, 1, window=512),
    "gemma-3-1b": _gemma(262144, 1152, 6912, 26, 4, 1, window=512),
    "gemma-3-4b": _gemma(262208, 2560, 10240, 34, 8, 4, window=1024, scaling=RopeScaling(8.0)),
}


def load_model(path: str | Path | None = None, dtype: Any = "float32") -> Model:
    """Open a Hugging Face directory; its weights stay in the mapped files.

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

"""Models from a checkpoint directory, from random numbers, or copied into memory."""

from pathlib import Path
from typing import Any

import numpy as np

from mesp_ref.config import Qwen2Config
from mesp_ref.model import Model
from mesp_ref.weights import ArrayWeights, default_checkpoint, open_checkpoint, random_arrays


def load_model(path: str | Path | None = None, dtype: Any = "float32") -> Model:
    """Open a Hugging Face Qwen2 directory; its weights stay in the mapped files.

    Without a path it is the small story model that comes with the package.

    Raises MespRefError naming file and field for what is missing, malformed or not computed.
    """
    directory = default_checkpoint() if path is None else Path(path)
    config, weights = open_checkpoint(directory, dtype)
    return Model(config, weights, directory)


def random_model(
    config: Qwen2Config, *, seed: int = 0, dtype: Any = "float32", std: float = 0.02
) -> Model:
    """A model with seeded random weights in memory, ready to be trained from scratch."""
    return Model(config, ArrayWeights(random_arrays(config, seed=seed, dtype=dtype, std=std)))


def read_into_memory(model: Model, dtype: Any = None) -> Model:
    """A writable copy of a model, so that every weight can be trained or perturbed."""
    names = model.weights.names()
    arrays = {name: np.array(model.weights(name), dtype=dtype) for name in names}
    return Model(model.config, ArrayWeights(arrays), model.path)

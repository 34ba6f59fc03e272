"""Hugging Face checkpoint directories of Qwen2: opened mapped, written whole."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from mesp_ref.engine.config import Qwen2Config
from mesp_ref.engine.init import compute_dtype
from mesp_ref.errors import MespRefError, shown
from mesp_ref.files.affine import Quantization, is_packed, open_quantized, part_names
from mesp_ref.files.config import config_fields, read_config
from mesp_ref.files.output import write_aside
from mesp_ref.files.quantized import Quantized
from mesp_ref.files.safetensors import MappedFile, Stored
from mesp_ref.files.strict import inside, read_object
from mesp_ref.ops import Array

_FLOATS = ("float16", "bfloat16", "float32", "float64")


def storage_dtype(dtype: Any) -> np.dtype:
    """A floating type that a checkpoint can store, by name."""
    name = str(dtype) if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in _FLOATS:
        raise MespRefError(f"dtype: found {name}, expected one of {', '.join(_FLOATS)}")
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def _shards(directory: Path) -> dict[str, MappedFile]:
    """Tensor name -> the mapped file that holds it, for one file or for an index of shards."""
    index = inside(directory, "model.safetensors.index.json")
    if not index.is_file():
        file = MappedFile(inside(directory, "model.safetensors"))
        return dict.fromkeys(file, file)
    weight_map = read_object(index, "an index of shards").get("weight_map")
    if not isinstance(weight_map, dict):
        raise MespRefError(f"{index}: weight_map: expected tensor names to file names")
    files: dict[str, MappedFile] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or "/" in name or "\\" in name:
            raise MespRefError(
                f"{index}: weight_map: found {shown(name)}, expected a file name inside the folder"
            )
        if name not in files:
            files[name] = MappedFile(inside(directory, name))
        if tensor not in files[name]:
            raise MespRefError(f"{directory / name}: {tensor}: missing, expected by {index.name}")
    for name, file in files.items():
        for tensor in file:
            if weight_map.get(tensor) != name:
                raise MespRefError(f"{file.path}: {tensor}: found, but not by {index.name}")
    return {tensor: files[name] for tensor, name in weight_map.items()}


def _ignorable(name: str, config: Qwen2Config) -> bool:
    """Tensors that some writers add and that carry nothing: RoPE buffers, a tied head's copy."""
    return name.endswith("rotary_emb.inv_freq") or (
        name.startswith("lm_head.") and config.tie_word_embeddings
    )


def _stored(name: str, shape: tuple[int, ...], file: MappedFile, dtype: np.dtype) -> Stored:
    """The table of a dense tensor, checked against the shape that config.json implies."""
    raw, where = file.raw(name), f"{file.path}: {name}"
    if raw.shape != shape:
        raise MespRefError(
            f"{where}: shape: found {list(raw.shape)}, expected {list(shape)} from config.json"
        )
    if raw.dtype.name not in _FLOATS:
        raise MespRefError(f"{where}: dtype: found {raw.dtype}, expected a floating type")
    return Stored(raw, dtype, file.check_unchanged)


def open_checkpoint(
    path: str | Path, dtype: Any = "float32"
) -> tuple[Qwen2Config, dict[str, Stored | Quantized]]:
    """Map a checkpoint directory: config.json with model.safetensors or its shards.

    Stored float16, bfloat16, float32 or float64 is decoded to `dtype` when an op asks for it;
    the same dtype is a view of the file. MLX affine 4-bit and 8-bit tensors are decoded at use.

    Raises MespRefError naming file and tensor for whatever is missing, extra, of another shape or
    type, or not computed by the engine.
    """
    directory, wanted = Path(path), compute_dtype(dtype)
    config = read_config(directory)
    source = directory / "config.json"
    quantization = Quantization(read_object(source, "a checkpoint directory"), str(source))
    held = _shards(directory)
    tables: dict[str, Stored | Quantized] = {}
    expected: set[str] = set()
    for name, shape in config.weight_shapes().items():
        if name not in held:
            raise MespRefError(f"{directory}: {name}: missing, expected {list(shape)}")
        if len(shape) == 2 and is_packed(name, held):
            tables[name] = open_quantized(name, shape, quantization.of(name), held, wanted)
            expected.update(part_names(name).values())
        else:
            tables[name] = _stored(name, shape, held[name], wanted)
            expected.add(name)
    for name in held:
        if name not in expected and not _ignorable(name, config):
            raise MespRefError(
                f"{held[name].path}: {name}: found, expected no such tensor in a Qwen2 model; "
                "the engine would ignore it and compute something else"
            )
    return config, tables


def save_checkpoint(
    config: Qwen2Config, arrays: Mapping[str, Array], path: str | Path, dtype: Any = "float32"
) -> None:
    """Write config.json and model.safetensors, each whole or not at all.

    Shapes    `arrays` holds every tensor of config.weight_shapes()
    Dtypes    stored as `dtype`: float32, float16, bfloat16 or float64
    """
    directory, stored = Path(path), storage_dtype(dtype)
    tensors = {
        name: np.ascontiguousarray(arrays[name], dtype=stored) for name in config.weight_shapes()
    }
    with write_aside(directory / "model.safetensors") as aside:
        save_file(tensors, aside, metadata={"format": "pt"})
    write_config(config, directory, stored)


def write_config(
    config: Qwen2Config, directory: Path, dtype: np.dtype, fields: Mapping[str, Any] | None = None
) -> None:
    """Write config.json: the model's sizes, the type its weights are stored in, further fields."""
    types = {"dtype": dtype.name, "torch_dtype": dtype.name}
    values = config_fields(config) | types | dict(fields or {})
    with write_aside(directory / "config.json") as aside:
        aside.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

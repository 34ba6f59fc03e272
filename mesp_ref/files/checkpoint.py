"""Hugging Face checkpoint directories: opened mapped, written whole."""

import difflib
import json
import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

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
from mesp_ref.files.safetensors import Gain, MappedFile, Stored
from mesp_ref.files.strict import inside, read_object
from mesp_ref.ops import Array

_INDEX = "model.safetensors.index.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz")  # files that may be meant
_PIECE = 1 << 20  # bytes compared at a time
_LONGEST = 255  # bytes of a file's name
_FLOATS = ("float16", "bfloat16", "float32", "float64")


def storage_dtype(dtype: Any) -> np.dtype:
    """A floating type that a checkpoint can store, by name."""
    name = str(dtype) if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in _FLOATS:
        raise MespRefError(f"dtype: found {name}, expected one of {', '.join(_FLOATS)}")
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def weight_files(path: str | Path) -> list[Path]:
    """The files of a checkpoint directory that hold its tensors; nothing else there is opened.

    They are what model.safetensors.index.json names where there is one, else model.safetensors.

    Raises MespRefError for an index that leads out of the folder, and for files by the names of
    weights that the index leaves out: transformers prefers model.safetensors, mlx-lm reads all.
    """
    return _weight_files(Path(path), _weight_map(Path(path)))


def _weight_files(directory: Path, weight_map: Mapping[str, str]) -> list[Path]:
    names = sorted(set(weight_map.values())) or ["model.safetensors"]
    files = [inside(directory, name) for name in names]
    if not files[0].exists():
        held = sorted(p.name for p in directory.iterdir() if p.suffix in _WEIGHTS)
        raise MespRefError(
            f"{files[0]}: not found, expected a safetensors file; the folder holds "
            f"{', '.join(held[:5]) or 'no weights'}"
        )
    for other in sorted(directory.glob("model*.safetensors")):
        if other.name not in names:
            raise MespRefError(
                f"{other}: found beside {names[0]}, expected one set of weights; programs differ in "
                "which they take, remove the one that is out of date"
            )
    return files


def _weight_map(directory: Path) -> dict[str, str]:
    """Tensor name -> file name, as model.safetensors.index.json has it; nothing without one."""
    index = inside(directory, _INDEX)
    if not os.path.lexists(index):
        return {}
    weight_map = read_object(index, "an index of shards").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MespRefError(f"{index}: weight_map: expected tensor names to file names")
    for name in weight_map.values():
        if not isinstance(name, str) or "/" in name or "\\" in name or _is_long(name):
            raise MespRefError(
                f"{index}: weight_map: found {shown(name)}, expected a file name inside the folder"
            )
    return weight_map


def _is_long(name: str) -> bool:
    """Whether no file system takes the name of a file."""
    return len(name.encode("utf-8", "surrogatepass")) > _LONGEST


def _shards(directory: Path) -> dict[str, MappedFile]:
    """Tensor name -> the mapped file that holds it, for one file or for an index of shards."""
    weight_map = _weight_map(directory)
    files = {file.name: MappedFile(file) for file in _weight_files(directory, weight_map)}
    for tensor, name in weight_map.items():
        if tensor not in files[name]:
            raise MespRefError(f"{directory / name}: {tensor}: missing, expected by {_INDEX}")
    for name, file in files.items():
        for tensor in file if weight_map else ():
            if weight_map.get(tensor) != name:
                raise MespRefError(f"{file.path}: {tensor}: found, but not by {_INDEX}")
    return {tensor: file for file in files.values() for tensor in file}


def _same_bytes(a: Array, b: Array) -> bool:
    """Whether two stored tensors are equal to the last bit, compared piece by piece."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    flat, other = (array.reshape(-1).view(np.uint8) for array in (a, b))
    pieces = range(0, flat.size, _PIECE)
    return all(np.array_equal(flat[i : i + _PIECE], other[i : i + _PIECE]) for i in pieces)


def _copies_of_head(name: str, config: Qwen2Config, held: Mapping[str, MappedFile]) -> bool:
    """Whether this is a tied head stored once more: a part of lm_head that equals the embedding's.

    Raises MespRefError where it differs: transformers takes the one or the other, by its version.
    """
    if not (name.startswith("lm_head.") and config.tie_word_embeddings):
        return False
    twin = name.replace("lm_head.", "model.embed_tokens.", 1)
    if twin not in held:
        raise MespRefError(
            f"{held[name].path}: {name}: found without {twin}, expected a head stored as the "
            "embedding is, since config.json ties them (tie_word_embeddings)"
        )
    if not _same_bytes(held[name].raw(name), held[twin].raw(twin)):
        raise MespRefError(
            f"{held[name].path}: {name}: found other numbers than {twin}, expected equal ones, "
            "since config.json ties them; set tie_word_embeddings to false or remove the tensor"
        )
    return True


def _stored(
    name: str,
    shape: tuple[int, ...],
    file: MappedFile,
    dtype: np.dtype,
    kind: type[Stored] = Stored,
) -> Stored:
    """The table of a dense tensor, checked against the shape that config.json implies."""
    raw, where = file.raw(name), f"{file.path}: {name}"
    if raw.shape != shape:
        raise MespRefError(
            f"{where}: shape: found {list(raw.shape)}, expected {list(shape)} from config.json"
        )
    if raw.dtype.name not in _FLOATS:
        raise MespRefError(f"{where}: dtype: found {raw.dtype}, expected a floating type")
    return kind(raw, dtype, file.check_unchanged, partial(file.read_rows, name))


def _nearest(name: str, held: Iterable[str], config: Qwen2Config) -> str:
    """The name most like a missing one, of those that are no tensor's of the model if there are any."""
    known, short = config.weight_shapes(), [other for other in held if len(other) < 200][:2000]
    strange = [other for other in short if other not in known]
    return next(iter(difflib.get_close_matches(name, strange or short, 1, 0.0)), "none")


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
            near = _nearest(name, held, config)
            raise MespRefError(
                f"{directory}: {name}: missing, expected {list(shape)}; the nearest of "
                f"{len(held)} names there is {near}"
            )
        if len(shape) == 2 and is_packed(name, held):
            tables[name] = open_quantized(name, shape, quantization.of(name), held, wanted)
            expected.update(part_names(name).values())
        else:
            kind = Gain if is_gain(name, config) else Stored
            tables[name] = _stored(name, shape, held[name], wanted, kind)
            expected.add(name)
    for name in held:
        ignorable = name in expected or name.endswith("rotary_emb.inv_freq")
        if not ignorable and not _copies_of_head(name, config, held):
            raise MespRefError(
                f"{held[name].path}: {name}: found, expected no such tensor in a "
                f"{config.traits.model_type} model; "
                "the engine would ignore it and compute something else"
            )
    return config, tables


def check_unchanged(weights: Mapping[str, Any]) -> None:
    """Raise MespRefError when a file behind mapped weights is no longer the one that was opened.

    What was read since then may be of two models: called when a result is whole, before it appears.
    """
    for table in weights.values():
        if isinstance(table, Stored | Quantized):
            table.guard()


def save_checkpoint(
    config: Qwen2Config,
    arrays: Mapping[str, Array],
    path: str | Path,
    dtype: Any = "float32",
    kept: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json and model.safetensors, each whole or not at all.

    Shapes    `arrays` holds every tensor of config.weight_shapes(), gains of norms whole: files of
              some families leave their 1 out
    Dtypes    stored as `dtype`: float32, float16, bfloat16 or float64
    kept      fields of another config.json that stay as they are
    """
    directory, stored = Path(path), storage_dtype(dtype)
    tensors = {
        name: np.ascontiguousarray(_left(name, arrays[name], config), dtype=stored)
        for name in config.weight_shapes()
    }
    with write_aside(directory / "model.safetensors") as aside:
        save_file(tensors, aside, metadata={"format": "pt"})
    write_config(config, directory, stored, kept=kept)


def is_gain(name: str, config: Qwen2Config) -> bool:
    """Whether a tensor is a norm's gain that files of its family hold without its 1."""
    return bool(config.traits.gain) and name.endswith("norm.weight")


def _left(name: str, w: Any, config: Qwen2Config) -> Array:
    """A tensor as its file holds it."""
    if not is_gain(name, config):
        return cast(Array, w)
    return w.read(0, len(w)) if isinstance(w, Gain) else w[...] - config.traits.gain


def write_config(
    config: Qwen2Config,
    directory: Path,
    dtype: np.dtype,
    fields: Mapping[str, Any] | None = None,
    kept: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json: the model's sizes, the type its weights are stored in, further fields."""
    types = {"dtype": dtype.name, "torch_dtype": dtype.name}
    values = config_fields(config, kept) | types | dict(fields or {})
    with write_aside(directory / "config.json") as aside:
        aside.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

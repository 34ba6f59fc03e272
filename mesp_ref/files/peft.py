"""PEFT adapter directories: adapter_config.json and adapter_model.safetensors, read and written."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mesp_ref.engine.adapter import Adapter, check_adapter, check_rank, parse_targets
from mesp_ref.engine.config import PROJECTIONS, Qwen2Config
from mesp_ref.engine.weights import compute_dtype
from mesp_ref.errors import MespRefError, shown
from mesp_ref.files.fields import read_fields
from mesp_ref.files.finite import cast_finite
from mesp_ref.files.output import write_aside
from mesp_ref.files.safetensors import MappedFile
from mesp_ref.files.strict import inside, read_object
from mesp_ref.files.tables import ADAPTER
from mesp_ref.files.targets import adapted
from mesp_ref.ops import Array

_MODULE = re.compile(r"(?<=^base_model\.model\.).+(?=\.lora_[AB]\.weight$)")
_TENSOR = re.compile(r"base_model\.model\.model\.layers\.([0-9]{1,6})\.(.+)\.lora_(A|B)\.weight")


def save_adapter(adapter: Adapter, path: str | Path) -> None:
    """Write a PEFT directory: adapter_model.safetensors and adapter_config.json.

    Each file appears whole or not at all. float32 and float64 are stored as they are.
    """
    directory = Path(path)
    tensors = finite_matrices(adapter)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model_name_or_path,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(adapter.targets),
        "use_rslora": adapter.use_rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "revision": None,
    }
    with write_aside(directory / "adapter_config.json") as aside:
        aside.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    # The weights last: a save of the same run that fails leaves the adapter of the save before.
    with write_aside(directory / "adapter_model.safetensors") as aside:
        save_file(tensors, aside, metadata={"format": "pt"})


def finite_matrices(adapter: Adapter) -> dict[str, Array]:
    """The matrices as they are written; MespRefError for NaN and infinity, which leave no run."""
    return {
        name: cast_finite(array, array.dtype, name, "a run that diverged is not saved")
        for name, array in adapter.weights.items()
    }


# Begun so, B is zero: a module that is adapted but not stored stays as it is.
_FROM_ZERO = (True, "gaussian", "eva")


def read_adapter_config(path: str | Path) -> dict[str, Any]:
    """The fields of a PEFT directory's adapter_config.json.

    Raises MespRefError naming the field for what the engine does not compute or does not know.
    """
    file = inside(path, "adapter_config.json")
    given = read_object(file, "a PEFT adapter directory")
    if given.get("peft_type") is None:
        raise MespRefError(f"{file}: peft_type: missing, expected 'LORA'")
    values = read_fields(given, ADAPTER, file, "the engine computes plain LoRA only")
    check_rank(values.get("r"), values.get("lora_alpha"), f"{file}: r")
    return values


def _check_targets(
    weights: Iterable[str], values: Mapping[str, Any], file: Path, config: Qwen2Config | None
) -> None:
    """Hold the tensors that are there against the modules that PEFT would adapt.

    PEFT drops a stored module that it does not adapt, and one that it adapts and does not find
    stays as it is begun: with a B that is zero, or not.
    """
    stored = {m[0] for m in (_MODULE.search(name) for name in weights) if m}
    begun = values.get("init_lora_weights", True)
    every: set[str] = set()
    if config is not None and begun not in _FROM_ZERO:
        blocks = range(config.num_hidden_layers)
        every = {f"model.layers.{i}.{path}" for i in blocks for path in PROJECTIONS.values()}
    wanted = adapted(sorted(stored | every), values, file)
    if stored - wanted:
        raise MespRefError(
            f"{file}: target_modules: found {shown(values.get('target_modules'))}, expected "
            f"{min(stored - wanted)} among the modules that it, exclude_modules and "
            "layers_to_transform leave, since adapter_model.safetensors holds it; PEFT would drop it"
        )
    if wanted - stored:
        raise MespRefError(
            f"{file}: init_lora_weights: found {shown(begun)}, expected matrices of "
            f"{min(wanted - stored)} in adapter_model.safetensors; PEFT would draw them at random"
        )


def load_adapter(
    path: str | Path, dtype: Any = "float32", config: Qwen2Config | None = None
) -> Adapter:
    """Read a PEFT directory into writable arrays.

    With `config` the adapter is held against that model, so that an adapter of another model is
    refused here and not in the middle of a GEMM.

    Raises MespRefError naming the file and the field or tensor.
    """
    directory, wanted = Path(path), compute_dtype(dtype)
    values = read_adapter_config(directory)
    file, weights = open_matrices(directory, "adapter_model.safetensors"), {}
    for name in file:
        match = _TENSOR.fullmatch(name)
        if match is None or match[2] not in PROJECTIONS.values():
            raise MespRefError(
                f"{file.path}: {name}: found, expected "
                "base_model.model.model.layers.N.<projection>.lora_A|lora_B.weight"
            )
        weights[name] = read_matrix(file, name, wanted)
    _check_targets(weights, values, directory / "adapter_config.json", config)
    targets = [t for t, p in PROJECTIONS.items() if any(f".{p}.lora_" in name for name in weights)]
    adapter = Adapter(
        values["r"], values["lora_alpha"], parse_targets(targets),
        values.get("use_rslora", False), weights, values.get("base_model_name_or_path"),
    )  # fmt: skip
    check_pairs(adapter, file.path)
    if config is not None:
        check_adapter(adapter, config, str(file.path))
    return adapter


def open_matrices(directory: Path, name: str) -> MappedFile:
    """An adapter's file of matrices; MespRefError says what is there where it is not."""
    file = inside(directory, name)
    if not file.exists():
        held = sorted(p.name for p in directory.iterdir() if "adapter" in p.name)
        raise MespRefError(
            f"{file}: not found, expected a safetensors file; the folder holds "
            f"{', '.join(held[:5]) or 'no adapter'}"
        )
    return MappedFile(file)


def read_matrix(file: MappedFile, name: str, dtype: np.dtype, transposed: bool = False) -> Array:
    """A tensor as a writable array of its own.

    Raises MespRefError for one that is no matrix of a floating type, and for NaN and infinity.
    """
    raw = file.raw(name)
    if raw.ndim != 2 or raw.dtype.name not in ("float16", "bfloat16", "float32", "float64"):
        raise MespRefError(
            f"{file.path}: {name}: found {raw.dtype} {list(raw.shape)}, expected a matrix of a "
            "floating type"
        )
    with np.errstate(over="ignore"):
        array = np.array(raw.T if transposed else raw, dtype=dtype, order="C")
    return cast_finite(array, dtype, f"{file.path}: {name}", "train the adapter anew")


def check_pairs(adapter: Adapter, file: Path) -> None:
    """Every A has its B, and both have the rank of the configuration."""
    for name, array in adapter.weights.items():
        is_a = name.endswith("lora_A.weight")
        partner = name.replace("lora_A", "lora_B") if is_a else name.replace("lora_B", "lora_A")
        if partner not in adapter.weights:
            raise MespRefError(f"{file}: {partner}: missing, expected beside {name}")
        if array.ndim != 2 or array.shape[0 if is_a else 1] != adapter.rank:
            raise MespRefError(
                f"{file}: {name}: shape: found {list(array.shape)}, expected rank {adapter.rank} "
                "as adapter_config.json says"
            )

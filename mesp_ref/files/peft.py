"""PEFT adapter directories: adapter_config.json and adapter_model.safetensors, read and written."""

import json
import re
import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.config import PROJECTIONS, Qwen2Config
from mesp_ref.engine.init import check_adapter, check_rank, compute_dtype, parse_targets
from mesp_ref.errors import MespRefError, shown
from mesp_ref.files.fields import read_fields
from mesp_ref.files.finite import cast_finite
from mesp_ref.files.hub import adapter_directory
from mesp_ref.files.names import shared_name
from mesp_ref.files.output import await_folder, new_directory, write_aside
from mesp_ref.files.safetensors import MappedFile
from mesp_ref.files.strict import inside, parse_json, read_object
from mesp_ref.files.tables import ADAPTER
from mesp_ref.files.targets import adapted
from mesp_ref.files.writer import save_tensors
from mesp_ref.ops import Array

# The weights carry what scales them: a configuration that says otherwise is not theirs.
SCALING, _SCALING = "mesp_ref.scaling", ("r", "lora_alpha", "use_rslora")
_BASE, _REVISION = "base_model_name_or_path", "revision"
_LOOKS, _PAUSE = 50, 0.01  # a save takes some milliseconds
_MODULE = re.compile(r"(?<=^base_model\.model\.).+(?=\.lora_[AB]\.weight$)")
_TENSOR = re.compile(r"base_model\.model\.model\.layers\.([0-9]{1,6})\.(.+)\.lora_(A|B)\.weight")


def save_adapter(adapter: Adapter, path: str | Path, overwrite: bool = False) -> None:
    """Write a PEFT directory: adapter_model.safetensors and adapter_config.json.

    A reader finds one adapter at every moment. Where one of the same targets and scale lies, as in
    a run, the weights are replaced in one step, under a configuration that suits both; anything
    else there is replaced as a folder, if `overwrite` and if mesp-ref wrote it. float32 and float64
    are stored as they are.

    Raises MespRefError for a place that holds anything else, and for one that cannot be written.
    """
    directory, tensors = Path(path), finite_matrices(adapter)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        _BASE: shared_name(adapter.base_model_name_or_path),
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
        _REVISION: adapter.revision,
    }
    text = (json.dumps(config, indent=2) + "\n").encode()
    metadata = {"format": "pt", SCALING: json.dumps({name: config[name] for name in _SCALING})}
    fits = _fits(directory, config)
    with (
        nullcontext(directory) if fits else new_directory(directory, overwrite=overwrite) as folder
    ):
        if not fits or (folder / "adapter_config.json").read_bytes() != text:
            with write_aside(folder / "adapter_config.json") as aside:
                aside.write_bytes(text)
        with write_aside(folder / "adapter_model.safetensors") as aside:
            save_tensors(aside, tensors, metadata)


def _fits(directory: Path, config: dict[str, Any]) -> bool:
    """Whether a configuration lies there, and no link, under which the new weights mean the same."""
    file = directory / "adapter_config.json"
    if file.is_symlink() or not file.is_file():
        return False
    try:
        old = read_object(file, "a PEFT adapter directory")
    except MespRefError:
        return False
    same = [old[name] == config[name] for name in old.keys() & config.keys() - {_BASE, _REVISION}]
    return all(same) and {"target_modules", *_SCALING} <= old.keys() <= config.keys()


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


def _read_both(directory: Path) -> tuple[dict[str, Any], MappedFile]:
    """Configuration and weights that belong together, even while others take their place.

    Raises    MespRefError where they stay apart: edited by hand, or torn by another program
    """
    for look in range(_LOOKS):
        time.sleep(_PAUSE if look else 0)
        values = read_adapter_config(directory)
        file = open_matrices(directory, "adapter_model.safetensors")
        stated = scaling(file)
        apart = [name for name in _SCALING if name in stated and stated[name] != values.get(name)]
        if not apart:
            return values, file
    name = apart[0]
    raise MespRefError(
        f"{directory / 'adapter_config.json'}: {name}: found {shown(values.get(name))}, expected "
        f"{shown(stated[name])}, with which {file.path.name} was saved; restore it, or save the "
        "adapter again with another scale"
    )


def scaling(file: MappedFile) -> dict[str, Any]:
    """What the weights say of rank and scale; nothing, where another program saved them."""
    try:
        stated = parse_json(file.metadata[SCALING])
    except (KeyError, ValueError, TypeError):
        return {}
    return stated if isinstance(stated, dict) else {}


def load_adapter(
    path: str | Path, dtype: Any = "float32", config: Qwen2Config | None = None
) -> Adapter:
    """Read a PEFT directory, or an adapter's repository on the hub, into writable arrays.

    With `config` the adapter is held against that model, so that an adapter of another model is
    refused here and not in the middle of a GEMM.

    Raises MespRefError naming the file and the field or tensor.
    """
    directory, wanted = adapter_directory(path), compute_dtype(dtype)
    await_folder(directory)
    (values, file), weights = _read_both(directory), {}
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
        values.get("use_rslora", False), weights, values.get(_BASE), values.get(_REVISION),
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

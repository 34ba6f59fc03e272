"""LoRA adapters as mlx-lm keeps them: transposed, with the scale itself in the configuration.

PEFT      base_model.model.model.layers.0.mlp.up_proj.lora_A.weight [R, in], …lora_B [out, R]
mlx-lm    model.layers.0.mlp.up_proj.lora_a [in, R], …lora_b [R, out]
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mesp_ref.engine.adapter import Adapter, tensor_name
from mesp_ref.engine.config import PROJECTIONS, Qwen2Config
from mesp_ref.engine.init import check_adapter, check_rank, compute_dtype, parse_targets
from mesp_ref.errors import MespRefError, shown
from mesp_ref.files.names import shared_name
from mesp_ref.files.output import new_directory, write_aside
from mesp_ref.files.peft import check_pairs, read_matrix
from mesp_ref.files.safetensors import MappedFile
from mesp_ref.files.strict import inside, read_object

_TENSOR = re.compile(r"(model\.layers\.([0-9]{1,6})\.(.+))\.lora_(a|b)")


def save_mlx_adapter(adapter: Adapter, path: str | Path, overwrite: bool = False) -> None:
    """Write an mlx-lm adapter directory, whole or not at all: adapters.safetensors and
    adapter_config.json.

    Scale     s = alpha/R (alpha/√R with rank stabilisation) becomes lora_parameters.scale
    Blocks    mlx-lm counts them from the end: an adapter must reach the model's last block
    Raises    MespRefError for a place that holds anything, unless `overwrite` and mesp-ref wrote it
    """
    tensors = {}
    for name, array in adapter.weights.items():
        module, _, matrix = name.removeprefix("base_model.model.").partition(".lora_")
        tensors[f"{module}.lora_{matrix[0].lower()}"] = np.ascontiguousarray(array.T)
    blocks = {int(name.split(".")[2]) for name in tensors}
    config: dict[str, Any] = {
        "fine_tune_type": "lora",
        "model": shared_name(adapter.base_model_name_or_path),
        "num_layers": max(blocks) - min(blocks) + 1,
        "lora_parameters": {
            "rank": adapter.rank,
            "scale": adapter.scale,
            "dropout": 0.0,
            "keys": [PROJECTIONS[target] for target in adapter.targets],
        },
    }
    with new_directory(path, overwrite=overwrite) as folder:
        with write_aside(folder / "adapters.safetensors") as aside:
            save_file(tensors, aside, metadata={"format": "mlx"})
        with write_aside(folder / "adapter_config.json") as aside:
            aside.write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")


def load_mlx_adapter(
    path: str | Path, dtype: Any = "float32", config: Qwen2Config | None = None
) -> Adapter:
    """Read an mlx-lm adapter directory; blocks that it does not adapt stay as they are.

    Alpha     s·R, so that alpha/R is the scale of mlx-lm
    Raises    MespRefError naming file and field or tensor: DoRA, full fine-tunes, LoRA on other
              layers than the seven projections, an adapter of another model when `config` is given
    """
    directory, wanted = Path(path), compute_dtype(dtype)
    rank, scale, model = _read_config(inside(directory, "adapter_config.json"))
    file, weights = MappedFile(inside(directory, "adapters.safetensors")), {}
    for name in file:
        match = _TENSOR.fullmatch(name)
        if match is None or match[3] not in PROJECTIONS.values():
            raise MespRefError(
                f"{file.path}: {name}: found, expected matrices "
                "model.layers.N.<projection>.lora_a|lora_b"
            )
        peft = tensor_name(match[1], match[4].upper())
        weights[peft] = np.array(
            read_matrix(file, name).T, dtype=wanted, order="C"
        )  # a writable copy
    targets = [t for t, p in PROJECTIONS.items() if any(f".{p}.lora_" in name for name in weights)]
    adapter = Adapter(
        rank, scale * rank, parse_targets(targets), weights=weights, base_model_name_or_path=model
    )
    check_pairs(adapter, file.path)
    if config is not None:
        check_adapter(adapter, config, str(file.path))
    return adapter


def _read_config(file: Path) -> tuple[int, float, str | None]:
    """Rank, scale and base model from adapter_config.json."""
    values = read_object(file, "an mlx-lm adapter directory")
    kind = values.get("fine_tune_type", "lora")
    if kind != "lora":
        raise MespRefError(f"{file}: fine_tune_type: found {shown(kind)}, expected 'lora'")
    given = values.get("lora_parameters")
    if not isinstance(given, dict):
        raise MespRefError(
            f"{file}: lora_parameters: found {shown(given)}, expected rank and scale"
        )
    rank, scale, model = given.get("rank"), given.get("scale"), values.get("model")
    check_rank(rank, scale, f"{file}: lora_parameters.rank")
    return int(rank or 0), float(scale or 0), model if isinstance(model, str) else None

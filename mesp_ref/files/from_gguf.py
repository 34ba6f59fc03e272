"""From a GGUF file to a checkpoint directory, tensor by tensor."""

from pathlib import Path
from typing import Any

import numpy as np

from mesp_ref.engine.config import Qwen2Config
from mesp_ref.errors import MespRefError
from mesp_ref.files.affine import Affine, layout, put_parts
from mesp_ref.files.checkpoint import storage_dtype, write_config
from mesp_ref.files.finite import cast_finite
from mesp_ref.files.gguf import Gguf, Tensor
from mesp_ref.files.gguf_repack import REPACKED, repack
from mesp_ref.files.gguf_tokenizer import write_tokenizer
from mesp_ref.files.output import new_directory
from mesp_ref.files.writer import Writer, write_safetensors

_DAMAGED = "the file is damaged, or --dtype too narrow"
_CHUNK = 1 << 20  # weights dequantised at a time
_EMBEDDING = "model.embed_tokens.weight"


def convert_gguf(
    path: str | Path,
    out: str | Path,
    dtype: str = "float32",
    packed: bool = False,
    dense_embedding: bool = False,
    overwrite: bool = False,
) -> Qwen2Config:
    """Write the directory `out`, whole or not at all, from a GGUF file, as the family that it is of.

    packed    keep Q4_1 matrices as affine 4-bit and Q8_0 ones as affine 8-bit, in groups of 32
              with float32 scales: the same weights to the last bit, not dequantised. With
              `dense_embedding` all but the embedding.
    dtype     of everything else: float32, float16 or bfloat16

    Raises MespRefError naming file and tensor or key: architecture, tensor type or tokenizer that
    is not supported, a truncated file, a missing gguf package, an `out` that is not empty
    """
    file, stored = Gguf(path), storage_dtype(dtype)
    config = file.config()
    tensors = file.tensors(config)
    affine = _affine(tensors, dense_embedding) if packed else {}
    if packed and not affine:
        raise MespRefError(f"{path}: found no matrix in {' or '.join(REPACKED)} to keep packed")
    with new_directory(out, overwrite=overwrite, inputs=[p.path for p in file.parts]) as aside:
        write_tokenizer(file, aside)  # first: it may be one that is refused
        specs = layout(config.weight_shapes(), affine, stored, np.dtype(np.float32))
        target, metadata = aside / "model.safetensors", {"format": "mlx" if packed else "pt"}
        with write_safetensors(target, specs, metadata) as writer:
            for name, tensor in tensors.items():
                file.check_unchanged()
                _put(writer, f"{path}: ", name, tensor, name in affine)
        write_config(config, aside, stored, _quantization(affine))
        file.check_unchanged()
    return config


def _affine(tensors: dict[str, Tensor], dense_embedding: bool) -> dict[str, Affine]:
    """The matrices that stay packed, and how."""
    return {
        name: REPACKED[tensor.kind]
        for name, tensor in tensors.items()
        if tensor.kind in REPACKED
        and len(tensor.shape) == 2
        and not (dense_embedding and name == _EMBEDDING)
    }


def _quantization(affine: dict[str, Affine]) -> dict[str, Any]:
    """The field of config.json: 4 bits in general, and by name what differs."""
    if not affine:
        return {}
    usual = REPACKED["Q4_1"]
    others = {
        name.removesuffix(".weight"): how.to_dict() for name, how in affine.items() if how != usual
    }
    return {"quantization": usual.to_dict() | others}


def _put(writer: Writer, where: str, name: str, tensor: Tensor, packed: bool) -> None:
    """Write a tensor, dequantised or repacked, some rows at a time; nothing that is not finite."""
    rows, where = tensor.shape[0], f"{where}{name}"
    step = max(1, _CHUNK * rows // int(np.prod(tensor.shape)))
    for a in range(0, rows, step):
        with np.errstate(invalid="ignore", over="ignore"):
            w = tensor.dequantize(a, a + step)
        if packed:
            cast_finite(w, np.float32, where, _DAMAGED)
            put_parts(writer, name, repack(tensor.data[a : a + step], tensor.kind), a)
        else:
            writer.put(name, cast_finite(w, writer.dtype(name), where, _DAMAGED), a)

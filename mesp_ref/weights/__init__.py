"""Where arrays come from: mapped checkpoints, dense or 4-bit, plain dictionaries, tokenizers."""

from mesp_ref.weights.affine import Affine, part_names
from mesp_ref.weights.checkpoint import (
    open_checkpoint,
    save_checkpoint,
    storage_dtype,
    write_config,
)
from mesp_ref.weights.default import default_checkpoint
from mesp_ref.weights.files import copy_companions, new_directory, write_aside
from mesp_ref.weights.quantize import pack, quantize_checkpoint
from mesp_ref.weights.quantized import Quantized
from mesp_ref.weights.random import write_random_checkpoint
from mesp_ref.weights.safetensors import MappedFile, Stored
from mesp_ref.weights.source import ArrayWeights, Weights, compute_dtype, random_arrays
from mesp_ref.weights.tokenizer import load_tokenizer
from mesp_ref.weights.writer import Writer

__all__ = [
    "Affine",
    "ArrayWeights",
    "MappedFile",
    "Quantized",
    "Stored",
    "Weights",
    "Writer",
    "compute_dtype",
    "copy_companions",
    "default_checkpoint",
    "load_tokenizer",
    "new_directory",
    "open_checkpoint",
    "pack",
    "part_names",
    "quantize_checkpoint",
    "random_arrays",
    "save_checkpoint",
    "storage_dtype",
    "write_aside",
    "write_config",
    "write_random_checkpoint",
]

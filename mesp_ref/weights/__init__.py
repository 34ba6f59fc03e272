"""Where arrays come from: mapped Hugging Face checkpoints, plain dictionaries, tokenizers."""

from mesp_ref.weights.checkpoint import open_checkpoint, save_checkpoint
from mesp_ref.weights.files import new_directory, write_aside
from mesp_ref.weights.safetensors import MappedFile, Stored
from mesp_ref.weights.source import ArrayWeights, Weights, compute_dtype, random_arrays
from mesp_ref.weights.tokenizer import load_tokenizer

__all__ = [
    "ArrayWeights",
    "MappedFile",
    "Stored",
    "Weights",
    "compute_dtype",
    "load_tokenizer",
    "new_directory",
    "open_checkpoint",
    "random_arrays",
    "save_checkpoint",
    "write_aside",
]

"""Checkpoints of other programs as Qwen2 directories."""

from mesp_ref.convert.directory import convert_gguf

__all__ = ["convert_gguf"]

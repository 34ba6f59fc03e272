"""Qwen2.5 with LoRA in pure NumPy: every backward pass derived and written by hand.

import mesp_ref as mr
model = mr.load_model("Qwen2.5-0.5B")
adapter = mr.init_lora(model.config, rank=8, alpha=16.0)
loss, grads = mr.loss_and_grads(model, adapter, input_ids, labels, method="mesp")
"""

from mesp_ref.api import METHODS, choose_schedule, logits, loss, loss_and_grads, trace
from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.config import Qwen2Config
from mesp_ref.engine.generate import generate
from mesp_ref.engine.init import init_lora
from mesp_ref.engine.model import Model
from mesp_ref.errors import MespRefError
from mesp_ref.files.merge import merge
from mesp_ref.files.models import load_model, random_model, read_into_memory
from mesp_ref.files.peft import load_adapter, save_adapter
from mesp_ref.files.tokenizer import load_tokenizer
from mesp_ref.lean.allocator import keep_freed_memory

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Adapter",
    "MespRefError",
    "Model",
    "Qwen2Config",
    "choose_schedule",
    "generate",
    "init_lora",
    "keep_freed_memory",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "logits",
    "loss",
    "loss_and_grads",
    "merge",
    "random_model",
    "read_into_memory",
    "save_adapter",
    "trace",
]

"""Qwen2.5 and its relatives with LoRA in pure NumPy: every backward pass derived and written by hand.

import mesp_ref as mr
model = mr.load_model("Qwen2.5-0.5B")
adapter = mr.init_lora(model.config, rank=8, alpha=16.0)
loss, grads = mr.loss_and_grads(model, adapter, input_ids, labels, method="mesp")
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

# Where each name is defined: read when it is first asked for, so that importing the package takes
# no time, and Ctrl-C while NumPy is loading is the command line's to answer.
_HOME = {
    "METHODS": "mesp_ref.api",
    "choose_schedule": "mesp_ref.api",
    "logits": "mesp_ref.api",
    "loss": "mesp_ref.api",
    "loss_and_grads": "mesp_ref.api",
    "trace": "mesp_ref.api",
    "Adapter": "mesp_ref.engine.adapter",
    "Qwen2Config": "mesp_ref.engine.config",
    "generate": "mesp_ref.engine.generate",
    "init_lora": "mesp_ref.engine.init",
    "Model": "mesp_ref.engine.model",
    "MespRefError": "mesp_ref.errors",
    "merge": "mesp_ref.files.merge",
    "load_model": "mesp_ref.files.models",
    "random_model": "mesp_ref.files.models",
    "read_into_memory": "mesp_ref.files.models",
    "load_adapter": "mesp_ref.files.peft",
    "save_adapter": "mesp_ref.files.peft",
    "load_tokenizer": "mesp_ref.files.tokenizer",
    "keep_freed_memory": "mesp_ref.lean.allocator",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])

"""Qwen2.5 with LoRA in pure NumPy: every backward pass derived and written by hand.

import mesp_ref as mr
model = mr.load_model("Qwen2.5-0.5B")
adapter = mr.init_lora(model.config, rank=8, alpha=16.0)
loss, grads = mr.loss_and_grads(model, adapter, input_ids, labels, method="mesp")
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mesp_ref.api import choose_schedule, loss_and_grads, trace
    from mesp_ref.engine.adapter import Adapter, init_lora
    from mesp_ref.engine.config import Qwen2Config
    from mesp_ref.engine.generate import generate
    from mesp_ref.engine.methods import METHODS
    from mesp_ref.engine.model import Model, logits, loss
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

# What a name needs is imported when the name is asked for: `import mesp_ref.verify` stays light.
_HOME = {
    "Adapter": "mesp_ref.engine.adapter",
    "METHODS": "mesp_ref.engine.methods",
    "MespRefError": "mesp_ref.errors",
    "Model": "mesp_ref.engine.model",
    "Qwen2Config": "mesp_ref.engine.config",
    "choose_schedule": "mesp_ref.api",
    "generate": "mesp_ref.engine.generate",
    "init_lora": "mesp_ref.engine.adapter",
    "keep_freed_memory": "mesp_ref.lean.allocator",
    "load_adapter": "mesp_ref.files.peft",
    "load_model": "mesp_ref.files.models",
    "load_tokenizer": "mesp_ref.files.tokenizer",
    "logits": "mesp_ref.engine.model",
    "loss": "mesp_ref.engine.model",
    "loss_and_grads": "mesp_ref.api",
    "merge": "mesp_ref.files.merge",
    "random_model": "mesp_ref.files.models",
    "read_into_memory": "mesp_ref.files.models",
    "save_adapter": "mesp_ref.files.peft",
    "trace": "mesp_ref.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])

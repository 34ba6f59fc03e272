"""Tiny models, tokenizers and texts for tests: made in milliseconds, the same every time."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from mesp_ref.engine.config import Qwen2Config
from mesp_ref.engine.init import random_arrays
from mesp_ref.files.checkpoint import save_checkpoint

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# The pre-tokenizers of the two families of tokenizer.json that users bring.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# How Qwen2.5 lays out a conversation, without its tools.
CHATML = (
    "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

Answer = Callable[..., Path]  # writes answers to golden cases, and returns their folder


def words(count: int, seed: int = 0) -> str:
    """A text of `count` words with punctuation and paragraphs."""
    rng = np.random.default_rng(seed)
    stock = ["the", "ship", "sailed", "over", "a", "dark", "sea", "nobody", "knew", "when", "it"]
    parts = []
    for i in range(count):
        parts.append(str(rng.choice(stock)))
        parts.append("." if i % 9 == 8 else "")
        parts.append("\n\n" if i % 45 == 44 else " ")
    return "".join(parts)


def byte_level_tokenizer(pattern: str = QWEN, vocab_size: int = 300) -> Tokenizer:
    """A byte-level BPE that splits as `pattern` says, trained on `words`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, START, STOP],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([words(2000)], trainer)
    return tokenizer


def write_model(path: Path, config: Qwen2Config, tokenizer: Tokenizer, seed: int = 0) -> Path:
    """A checkpoint directory with seeded random weights, tokenizer and chat template."""
    save_checkpoint(config, random_arrays(config, seed=seed, std=0.1), path)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"chat_template": CHATML, "eos_token": STOP, "bos_token": None}
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return path

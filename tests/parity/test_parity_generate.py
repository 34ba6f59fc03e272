"""Greedy generation against transformers, token by token."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch_oracle
from torch_oracle import LAYOUTS

import mesp_ref as mr

NEW = 24
PROMPTS = [[5], [17, 3, 3, 88, 41, 0, 9], [60, 61, 62], [1, 2, 99], [44] * 40]


def greedy(model: object, prompt: list[int], eos: int | None = None) -> list[int]:
    """transformers' continuation of one prompt, the end token included."""
    ids = torch.tensor([prompt])
    options = {"eos_token_id": eos, "pad_token_id": 0, "do_sample": False}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, **options)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ["H=G", "G=1", "H/G=3", "wide heads"])
def test_greedy(tmp_path: Path, name: str) -> None:
    """Prompts of different lengths in one call continue as each alone does in transformers."""
    torch_oracle.build(LAYOUTS[name]).save_pretrained(tmp_path)
    oracle = torch_oracle.load(tmp_path)
    want = [greedy(oracle, prompt) for prompt in PROMPTS]
    assert len(set(map(tuple, want))) == len(PROMPTS), "the continuations tell nothing apart"
    model = mr.load_model(tmp_path, dtype="float64")
    assert mr.generate(model, PROMPTS, max_new_tokens=NEW) == want


def test_greedy_with_adapter(plain: Path) -> None:
    model = mr.load_model(plain, dtype="float64")
    adapter = mr.init_lora(model.config, rank=3, seed=1, b_std=0.3, dtype="float64")
    oracle = torch_oracle.with_adapter(torch_oracle.load(plain), adapter)
    want = [greedy(oracle, prompt) for prompt in PROMPTS]
    assert want != [greedy(torch_oracle.load(plain), prompt) for prompt in PROMPTS]
    assert mr.generate(model, PROMPTS, adapter=adapter, max_new_tokens=NEW) == want


def test_each_prompt_stops_at_its_own_end_token(plain: Path) -> None:
    """The end token is one that several continuations reach, at different lengths."""
    oracle, model = torch_oracle.load(plain), mr.load_model(plain, dtype="float64")
    free = [greedy(oracle, prompt) for prompt in PROMPTS]
    tokens, counts = np.unique([t for seq in free for t in set(seq[1:-1])], return_counts=True)
    eos = int(tokens[counts.argmax()])
    want = [greedy(oracle, prompt, eos) for prompt in PROMPTS]
    assert len({len(seq) for seq in want}) > 1
    assert mr.generate(model, PROMPTS, max_new_tokens=NEW, eos_token_id=eos) == want

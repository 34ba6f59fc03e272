"""Fixtures for every test: a tiny configuration and a checkpoint directory made from it."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import STOP, byte_level_tokenizer, words, write_model
from loopback_hub import Hub, serving
from profiles import TIMES
from tokenizers import Tokenizer

from mesp_ref.engine.config import Qwen2Config

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks anything of the outside


def pytest_report_header() -> str:
    """The seeds of this run, printed before its tests."""
    return (
        "seeds: Hypothesis derandomized, other generators seeded by literals in the tests; "
        f"{TIMES}× the quick examples (MESP_REF_THOROUGH)"
    )


def pytest_collection_finish() -> None:
    """What all tests hold, thousands of items, is not looked through each time memory is counted."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Byte-level BPE of 300 tokens with Qwen's splitting and ChatML's special tokens."""
    return byte_level_tokenizer()


@pytest.fixture(scope="session")
def tiny_config(tokenizer: Tokenizer) -> Qwen2Config:
    """Two blocks, all sizes different, four query heads on two key/value heads, tied head."""
    return Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=20,
        intermediate_size=28,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        rope_theta=10_000.0,
        max_position_embeddings=512,
        eos_token_id=tokenizer.token_to_id(STOP),
    )


@pytest.fixture(scope="session")
def tiny_model_dir(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: Qwen2Config, tokenizer: Tokenizer
) -> Path:
    """A checkpoint directory of tiny_config. Shared by the session: copy it before changing it."""
    return write_model(tmp_path_factory.mktemp("tiny") / "model", tiny_config, tokenizer)


@pytest.fixture
def loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub of our own, for which huggingface_hub takes it in this test, with an empty cache."""
    errors = pytest.importorskip("huggingface_hub.errors")
    if not hasattr(errors, "DryRunError"):
        pytest.skip("huggingface_hub before 1.0")
    from huggingface_hub import constants

    with serving() as (hub, address):
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        yield hub


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """Some 4 KB of plain text."""
    path = tmp_path / "text.txt"
    path.write_text(words(900, seed=1), encoding="utf-8")
    return path

"""Small random models of every family as GGUF files: llama.cpp writes the same text, and back again
every weight is the one that it was."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import byte_level_tokenizer, write_model
from test_gguf import Llama, log_softmax, same_next_tokens

import mesp_ref as mr
from mesp_ref.cli import main
from mesp_ref.engine.config import FAMILIES, Qwen2Config
from mesp_ref.files.checkpoint import save_checkpoint
from mesp_ref.files.config import pattern
from mesp_ref.files.peft import save_adapter
from mesp_ref.job.pretrain import PretrainOptions, pretrain
from mesp_ref.ops import RopeScaling

_LLAMA3 = RopeScaling(32.0, 8192, 1.0, 4.0)
SIZES: dict[str, dict[str, Any]] = {
    "llama biased, llama3": {"traits": "llama", "attention_bias": True, "rope_scaling": _LLAMA3,
                             "rope_theta": 5e5},
    "llama linear, wide heads": {"traits": "llama", "rope_scaling": RopeScaling(4.0), "head_dim": 32,
                                 "tie_word_embeddings": False},
    "smollm3": {"traits": "smollm3", "num_hidden_layers": 4,
                "layer_types": ("full_attention",) * 3 + ("no_rope",)},
    "qwen3": {"traits": "qwen3", "head_dim": 32, "num_key_value_heads": 1},
    "gemma3": {"traits": "gemma3_text", "head_dim": 32, "num_hidden_layers": 7,
               "layer_types": tuple(pattern(6, 7)), "sliding_window": 9,
               "rope_scaling": RopeScaling(8.0)},
}  # fmt: skip
# llama.cpp takes GELU from a table in float16; all else is float32 on both sides: of logits up to 30
OFF = {"gemma3": 0.05}
PROMPT = [int(i) for i in np.random.default_rng(5).integers(3, 300, 41)]


@pytest.fixture(scope="module", params=SIZES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes: dict[str, Any] = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5,
        "rope_theta": 5000.0, "max_position_embeddings": 256, "eos_token_id": 2,
    } | SIZES[request.param]  # fmt: skip
    config = Qwen2Config(**sizes | {"traits": FAMILIES[sizes["traits"]]})
    path = write_model(
        tmp_path_factory.mktemp("family") / "model", config, byte_level_tokenizer(), seed=3
    )
    rng = np.random.default_rng(1)
    arrays = {
        name: w[...]
        + rng.standard_normal(w.shape).astype("f4") * (0.2 if len(w.shape) == 1 else 0.1)
        for name, w in mr.load_model(path).weights.items()
    }
    save_checkpoint(config, arrays, path)
    return path


def test_the_same_text_in_llama_cpp(directory: Path, tmp_path: Path) -> None:
    """The base, and an adapter on all seven projections."""
    model = mr.load_model(directory)
    adapter = mr.init_lora(model.config, rank=4, alpha=6.0, seed=3, b_std=0.05)
    save_adapter(adapter, tmp_path / "adapter")
    base, lora = tmp_path / "base.gguf", tmp_path / "lora.gguf"
    assert main(["convert", "gguf-model", str(directory), str(base), "--type", "f32"]) == 0
    line = ["convert", "gguf-adapter", str(tmp_path / "adapter"), str(lora), "--base"]
    assert main([*line, str(directory)]) == 0
    off = OFF.get(model.config.traits.model_type.removesuffix("_text"), 1e-3)
    for given, judge in ((None, Llama(base)), (adapter, Llama(base, lora))):
        [want] = mr.generate(model, [PROMPT], given, max_new_tokens=16)
        got = judge.greedy(PROMPT, 24)
        assert got[: len(want)] == want[: len(got)]
        logits = mr.logits(model, [PROMPT], given)[0].astype(np.float64)
        end = max(t for t in range(len(PROMPT)) if plain(directory, int(logits[t].argmax())))
        ours = log_softmax(logits[end])
        assert np.abs(judge.logprobs(PROMPT[: end + 1], 320) - ours).max() <= off


def plain(directory: Path, token: int) -> bool:
    """Whether llama.cpp tells the probabilities of a token: it is a letter of its own, and no end."""
    text = mr.load_tokenizer(directory).decode([token])
    return token > 2 and text.isascii() and text.isprintable() and bool(text)


def test_there_and_back(directory: Path, tmp_path: Path) -> None:
    file, back = tmp_path / "m.gguf", tmp_path / "back"
    assert main(["convert", "gguf-model", str(directory), str(file), "--type", "f32"]) == 0
    assert main(["convert", "gguf", str(file), str(back)]) == 0
    old, new = mr.load_model(directory), mr.load_model(back)
    for field in ("traits", "attention_bias", "rope_scaling", "layer_types", "sliding_window"):
        assert getattr(old.config, field) == getattr(new.config, field), field
    for name in old.weights:
        assert np.allclose(old.weights[name][...], new.weights[name][...], rtol=2**-22, atol=0), (
            name
        )


STORIES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen3": {},
    "smollm3": {"num_hidden_layers": 4, "layer_types": ("full_attention",) * 3 + ("no_rope",)},
    "gemma3_text": {"num_hidden_layers": 6, "layer_types": tuple(pattern(6, 6)), "sliding_window": 32},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", STORIES)
def test_next_tokens_of_q8_0(family: str, tmp_path: Path) -> None:
    """A small model of the family learns the stories (20 to 60 s): what it writes is likely to it, as a
    random model's text is not. Along it 95 % of the next tokens stay as they are in q8_0."""

    class Options(PretrainOptions):
        def model_config(self, tokenizer: Any) -> Qwen2Config:
            traits = {"traits": FAMILIES[family]} | STORIES[family]
            return replace(super().model_config(tokenizer), **traits)

    directory, file = tmp_path / "model", tmp_path / "m.gguf"
    pretrain(
        Options(
            str(directory), steps=300, seq_len=128, vocab_size=640, hidden_size=128,
            intermediate_size=256, layers=2, heads=4, heldout=1, samples=1,
        )
    )  # fmt: skip
    assert main(["convert", "gguf-model", str(directory), str(file), "--type", "q8_0"]) == 0
    end = mr.load_model(directory).config.eos_token_ids[0]
    words = mr.load_tokenizer(directory).encode("One day, a fox and a hare went to the lake").ids
    same = same_next_tokens(Llama(file), directory, [[end], words[1:], [end, *words[4:7]]])
    print(f"{family}: {sum(same)} of {len(same)}")
    assert len(same) > 2 * 64
    assert sum(same) >= 0.95 * len(same)

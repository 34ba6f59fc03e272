"""What merge writes, opened by the front door of each program: the same greedy text in all of them."""

from pathlib import Path

import pytest

import mesp_ref as mr
from mesp_ref.cli import main
from mesp_ref.files.default import default_checkpoint

PROMPT, COUNT = "Once upon a time, there was a brave fox named Ruby.", 32


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The story model with a random adapter folded in, small enough to leave it a storyteller."""
    folder = tmp_path_factory.mktemp("merged")
    model = mr.load_model()
    mr.save_adapter(mr.init_lora(model.config, rank=4, seed=3, b_std=0.01), folder / "adapter")
    base, out = str(default_checkpoint()), str(folder / "whole")
    assert main(["merge", "--model", base, "--adapter", str(folder / "adapter"), "--out", out]) == 0
    return folder / "whole"


@pytest.fixture(scope="module")
def text(merged: Path) -> str:
    """Ours, of base and adapter."""
    model, tokenizer = mr.load_model(), mr.load_tokenizer(merged)
    adapter = mr.load_adapter(merged.parent / "adapter", config=model.config)
    [new] = mr.generate(model, [tokenizer.encode(PROMPT).ids], adapter, max_new_tokens=COUNT)
    found = str(tokenizer.decode(new))
    assert len(found.split()) > COUNT // 2
    return found


def test_in_transformers(merged: Path, text: str) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    model = transformers.AutoModelForCausalLM.from_pretrained(merged)
    asked = tokenizer(PROMPT, return_tensors="pt")
    [out] = model.generate(**asked, max_new_tokens=COUNT, do_sample=False)
    assert tokenizer.decode(out[asked["input_ids"].shape[1] :], skip_special_tokens=True) == text


def test_in_mlx_lm(merged: Path, text: str) -> None:
    mlx_lm = pytest.importorskip("mlx_lm")
    model, tokenizer = mlx_lm.load(str(merged))
    said = mlx_lm.generate(model, tokenizer, prompt=PROMPT, max_tokens=COUNT)
    assert said == text.removeprefix(" ")  # its detokeniser takes the first space away


def test_in_llama_cpp(merged: Path, text: str, tmp_path: Path) -> None:
    """By way of GGUF, the only kind of file that llama.cpp opens."""
    pytest.importorskip("xllamacpp")
    from test_gguf import Llama

    assert main(["convert", "gguf-model", str(merged), str(tmp_path / "whole.gguf")]) == 0
    question = {"prompt": PROMPT, "n_predict": COUNT, "temperature": 0}
    assert Llama(tmp_path / "whole.gguf").ask("completion", question)["content"] == text

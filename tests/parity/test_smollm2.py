"""A real pretrained model: SmolLM2-135M-Instruct."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_oracle
from peft import PeftModel
from smollm2 import convert, smollm2_directory
from torch_oracle import TOLERANCE, assert_all_close

import mesp_ref as mr
from mesp_ref.cli import main

TEXT = "The ferry leaves at 7:45, and the harbour (built in 1862) wakes slowly.\n\nThe capital of"


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return smollm2_directory()


@pytest.mark.slow
def test_logits_in_float32(smollm2: Path) -> None:
    """Logit by logit to 1e-4, absolute below 1 and relative above.

    Measured among logits up to 35: 6e-5 to 1.1e-4 from transformers, by text and BLAS kernel, with
    both sides 4e-5 to 1.3e-4 from float64.
    """
    ids = [mr.load_tokenizer(smollm2).encode(TEXT).ids]
    want = torch_oracle.logits(torch_oracle.load(smollm2, torch.float32), np.array(ids))
    got = mr.logits(mr.load_model(smollm2), ids)
    assert got.dtype == np.float32
    assert np.isfinite(got).all()
    assert (np.abs(got - want) <= 1e-4 * np.maximum(1, np.abs(want))).all()


@pytest.mark.slow
def test_every_lora_gradient_in_float64(smollm2: Path) -> None:
    """30 layers deep, on real weights: loss and LoRA gradients to 1e-10 of the largest entry."""
    ids = np.array([mr.load_tokenizer(smollm2).encode(TEXT).ids])
    model = mr.load_model(smollm2, dtype="float64")
    adapter = mr.init_lora(model.config, rank=2, alpha=3.0, b_std=0.02, dtype="float64")
    wrapped = torch_oracle.with_adapter(torch_oracle.load(smollm2), adapter)
    want_loss, want = torch_oracle.loss_and_grads(wrapped, ids, ids)
    loss, grads = mr.loss_and_grads(model, adapter, ids, ids, method="mesp")
    assert abs(loss - want_loss) <= TOLERANCE * want_loss
    assert_all_close(grads, {name: want[name] for name in grads}, TOLERANCE)


@pytest.mark.slow
def test_a_fine_tuned_adapter_in_peft(smollm2: Path, tmp_path: Path) -> None:
    """mesp-ref finetune, then peft on transformers: the same held-out loss within 1e-4 nats.

    The rows are what finetune evaluates on, token by token; the run is short, its rate is high.
    Measured: 3e-7 of 3.004.
    """
    data, held = tmp_path / "text.jsonl", tmp_path / "held.jsonl"
    tokenizer = mr.load_tokenizer(smollm2)
    rows = [
        tokenizer.encode(f"{TEXT} {word}.").ids for word in ("France is Paris", "Spain", "Rome")
    ]
    for file, some in ((data, rows[:2]), (held, rows[1:])):
        file.write_text("".join(json.dumps({"tokens": row}) + "\n" for row in some))
    line = ["finetune", "--model", smollm2, "--data", data, "--val-data", held, "--seq-len", "48"]
    line += ["--packing", "pad", "--steps", "3", "--lr", "1e-3", "--accumulate", "2", "--rank", "4"]
    line += ["--warmup", "0", "--sample-tokens", "0", "--quiet", "--out", tmp_path / "run"]
    assert main(list(map(str, line))) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    base = torch_oracle.load(smollm2, torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    total = count = 0.0
    with torch.no_grad():
        for row in rows[1:]:
            z = model(torch.tensor([row])).logits[0, :-1].double()
            total += torch.nn.functional.cross_entropy(
                z, torch.tensor(row[1:]), reduction="sum"
            ).item()
            count += len(row) - 1
    assert summary["after"]["loss"] < summary["before"]["loss"] - 0.1
    off = abs(summary["after"]["loss"] - total / count)
    assert off <= 1e-4, off


@pytest.mark.slow
def test_the_capital_of_france_is_paris(smollm2: Path) -> None:
    tokenizer = mr.load_tokenizer(smollm2)
    prompt = tokenizer.encode("The capital of France is").ids
    [new] = mr.generate(mr.load_model(smollm2), [prompt], max_new_tokens=8)
    assert tokenizer.decode(new).startswith(" Paris")
    oracle = torch_oracle.load(smollm2, torch.float32)
    want = oracle.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=8)
    assert new == want[0, len(prompt) :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("text", [TEXT, "In 1984, it's über 12345.67!", "日本語 🙂 <|im_end|>\n"])
def test_tokenizer_returns_its_text(smollm2: Path, text: str) -> None:
    tokenizer = mr.load_tokenizer(smollm2)
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert all(len(tokenizer.decode([i])) == 1 for i in ids if "0" <= tokenizer.decode([i]) <= "9")


@pytest.mark.parametrize("content", [None, b"", b"not GGUF at all", b"GGUF" + bytes(60)], ids=repr)
def test_conversion_refuses_other_files(tmp_path: Path, content: bytes | None) -> None:
    """One line that names the file, exit code 2, nothing left behind."""
    file = tmp_path / "model.gguf"
    if content is not None:
        file.write_bytes(content)
    done = convert(tmp_path / "out", "--gguf", file)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {file}: ")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [file.name] * (content is not None)

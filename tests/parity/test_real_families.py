"""Real models of other families, unconverted: SmolLM2-135M is a Llama, Gemma 3 270M a Gemma."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_oracle
from peft import PeftModel
from smollm2 import gemma3_directory, smollm2_directory
from test_gguf import Llama, same_next_tokens
from torch_oracle import TOLERANCE, assert_all_close

import mesp_ref as mr
from mesp_ref.cli import main

pytestmark = pytest.mark.slow
TEXT = "The ferry leaves at 7:45, and the harbour (built in 1862) wakes slowly.\n\nThe capital of"
MODELS = {"llama": smollm2_directory, "gemma3_text": gemma3_directory}


@pytest.fixture(scope="module", params=MODELS)
def directory(request: pytest.FixtureRequest) -> Path:
    path: Path = MODELS[request.param]()
    assert mr.load_model(path).config.traits.model_type == request.param
    return path


def ids_of(directory: Path, text: str) -> list[int]:
    found: list[int] = mr.load_tokenizer(directory).encode(text).ids
    return found


def test_logits_in_float32(directory: Path) -> None:
    """No further from transformers than four times what the two are from float64 together."""
    ids = [ids_of(directory, TEXT)]
    exact = torch_oracle.logits(torch_oracle.load(directory), np.array(ids))
    theirs = torch_oracle.logits(torch_oracle.load(directory, torch.float32), np.array(ids))
    ours = mr.logits(mr.load_model(directory), ids)
    assert ours.dtype == np.float32
    bound = 4 * np.abs(theirs - exact).max()
    error = np.abs(ours - exact).max()
    print(
        f"logits up to {np.abs(exact).max():.1f}: ours {error:.1e}, theirs {bound / 4:.1e} from float64"
    )
    assert np.isfinite(ours).all()
    assert error <= bound


def test_every_lora_gradient_in_float64(directory: Path) -> None:
    """All blocks deep, on real weights: loss and LoRA gradients to 1e-10 of the largest entry."""
    ids = np.array([ids_of(directory, TEXT)])
    model = mr.load_model(directory, dtype="float64")
    adapter = mr.init_lora(model.config, rank=2, alpha=3.0, b_std=0.02, dtype="float64")
    wrapped = torch_oracle.with_adapter(torch_oracle.load(directory), adapter)
    want_loss, want = torch_oracle.loss_and_grads(wrapped, ids, ids)
    loss, grads = mr.loss_and_grads(model, adapter, ids, ids, method="mesp")
    assert abs(loss - want_loss) <= TOLERANCE * want_loss
    assert_all_close(grads, {name: want[name] for name in grads}, TOLERANCE)


def test_greedy_text(directory: Path, tmp_path: Path) -> None:
    """32 tokens: those of transformers, and of llama.cpp on the file that is written."""
    prompt = ids_of(directory, "The capital of France is")
    [new] = mr.generate(mr.load_model(directory), [prompt], max_new_tokens=32)
    oracle = torch_oracle.load(directory, torch.float32)
    want = oracle.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=32)
    assert new == want[0, len(prompt) :].tolist()
    del oracle
    file = tmp_path / "model.gguf"
    assert main(["convert", "gguf-model", str(directory), str(file), "--type", "f32"]) == 0
    judge = Llama(file)
    for text in (TEXT, "def f(x):\n    return x\n\n\n<td>", "日本語 🙂  two\t\tblanks"):
        assert judge.tokenize(text) == ids_of(directory, text)
    assert judge.greedy(prompt, 40)[: len(new)] == new  # its answer may lack the last tokens


def test_next_tokens_of_q8_0(directory: Path, tmp_path: Path) -> None:
    """Along the model's own greedy text 95 % of the next tokens stay as they are."""
    file = tmp_path / "model.gguf"
    assert main(["convert", "gguf-model", str(directory), str(file), "--type", "q8_0"]) == 0
    prompts = [ids_of(directory, text) for text in ("The capital of France is", TEXT)]
    same = same_next_tokens(Llama(file), directory, prompts)
    print(f"{sum(same)} of {len(same)}")
    assert len(same) >= 64
    assert sum(same) >= 0.95 * len(same)


def test_a_fine_tuned_adapter_in_peft(directory: Path, tmp_path: Path) -> None:
    """mesp-ref finetune, then peft on transformers: the same held-out loss within 1e-4 nats."""
    data, held = tmp_path / "text.jsonl", tmp_path / "held.jsonl"
    rows = [ids_of(directory, f"{TEXT} {word}.") for word in ("France is Paris", "Spain", "Rome")]
    for file, some in ((data, rows[:2]), (held, rows[1:])):
        file.write_text("".join(json.dumps({"tokens": row}) + "\n" for row in some))
    line = ["finetune", "--model", directory, "--data", data, "--val-data", held, "--seq-len", "48"]
    line += ["--packing", "pad", "--steps", "3", "--lr", "1e-3", "--accumulate", "2", "--rank", "4"]
    line += ["--warmup", "0", "--sample-tokens", "0", "--quiet", "--out", tmp_path / "run"]
    assert main(list(map(str, line))) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    base = torch_oracle.load(directory, torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    total = count = 0.0
    with torch.no_grad():
        for row in rows[1:]:
            z = model(torch.tensor([row])).logits[0, :-1].double()
            target = torch.tensor(row[1:])
            total += torch.nn.functional.cross_entropy(z, target, reduction="sum").item()
            count += len(row) - 1
    assert summary["after"]["loss"] < summary["before"]["loss"] - 0.1
    assert abs(summary["after"]["loss"] - total / count) <= 1e-4

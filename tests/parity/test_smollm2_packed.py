"""SmolLM2-135M-Instruct kept in the 4-bit and 8-bit blocks of its GGUF file, against dequantised.

Both directories are made by benchmarks/convert_smollm2.py and kept in $MESP_REF_CACHE, by default
~/.cache/mesp_ref.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mesp_ref as mr

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "convert_smollm2.py"
TEXT = "The ferry leaves at 7:45, and the harbour (built in 1862) wakes slowly."


@pytest.fixture(scope="module")
def models() -> tuple[mr.Model, mr.Model]:
    """The model dequantised and packed."""
    cache = Path(os.environ.get("MESP_REF_CACHE") or Path.home() / ".cache" / "mesp_ref")
    found = []
    for name, options in (("", []), ("-packed", ["--packed"])):
        path = cache / f"smollm2-135m-instruct{name}"
        if not path.exists():
            command = [sys.executable, str(SCRIPT), str(path), *options]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if "pip cannot fetch" in done.stderr:
                pytest.skip(done.stderr.strip())
            assert done.returncode == 0, done.stderr
        found.append(mr.load_model(path))
    return found[0], found[1]


def test_every_weight_and_every_logit_is_the_same(models: tuple[mr.Model, mr.Model]) -> None:
    dense, packed = models
    for name in dense.weights:
        assert np.array_equal(packed.weights[name][...], dense.weights[name][...]), name
    ids = [mr.load_tokenizer(packed.path or "").encode(TEXT).ids]
    assert np.array_equal(mr.logits(packed, ids), mr.logits(dense, ids))


@pytest.mark.parametrize("method", ["store_all", "mebp", "mesp", "mesp_tiled"])
def test_every_gradient_is_the_same(models: tuple[mr.Model, mr.Model], method: str) -> None:
    dense, packed = models
    ids = [mr.load_tokenizer(packed.path or "").encode(TEXT).ids]
    adapter = mr.init_lora(dense.config, rank=2, b_std=0.02)
    want_loss, want = mr.loss_and_grads(dense, adapter, ids, ids, method=method)
    got_loss, got = mr.loss_and_grads(packed, adapter, ids, ids, method=method)
    assert got_loss == want_loss
    assert all(np.array_equal(got[name], want[name]) for name in want)

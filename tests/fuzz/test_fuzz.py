"""The quick profile of fuzzing, without atheris: kept inputs again, and some thousands of mutations.

Damage is seeded, so every run reads the same files. `make fuzz` is the long, coverage-guided one.
"""

import random
from collections import Counter
from pathlib import Path

import pytest
from mutate import mutate
from profiles import TIMES
from targets import HERE, TARGETS, fast_folder, run

KEPT = sorted((HERE / "corpus").rglob("*.bin"))
MUTATIONS = {
    "config": 800, "settings": 400, "safetensors": 2000, "checkpoint": 150,
    "adapter": 400, "mlx_adapter": 300, "tokenizer": 150, "text": 500, "jsonl": 150,
    "golden": 250, "sketch": 500, "resume": 400, "gguf": 300,
}  # fmt: skip


@pytest.mark.parametrize("name", TARGETS)
def test_valid_inputs_are_read(name: str, tmp_path: Path) -> None:
    """Otherwise the reader would refuse everything and prove nothing."""
    for seed in TARGETS[name].seeds():
        assert run(name, seed, tmp_path) == "read"


@pytest.mark.parametrize("file", KEPT, ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_a_kept_input_is_read_or_refused(file: Path, tmp_path: Path) -> None:
    """Inputs that once did something else than that."""
    assert run(file.parent.name, file.read_bytes(), tmp_path) in ("read", "refused")


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.filterwarnings("default")
def test_damaged_inputs_are_read_or_refused(name: str) -> None:
    rng, seeds, found = random.Random(name), TARGETS[name].seeds(), Counter[str]()
    with fast_folder() as folder:
        for _ in range(MUTATIONS[name] * TIMES):
            found[run(name, mutate(rng.choice(seeds), rng), Path(folder))] += 1
    assert found["refused"] > found.total() / 4
    assert found["read"] > 0

"""Same seed, same bytes at one thread count; across thread counts and BLAS kernels a bounded change.

Each run is a process of its own: OpenBLAS reads its settings when it is loaded.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import byte_level_tokenizer, words, write_model

import mesp_ref as mr

STEPS = 8
CONFIG = mr.Qwen2Config(300, 64, 160, 2, 4, 2, 16, rope_theta=1e4, max_position_embeddings=256)
# Largest change of a LoRA matrix, relative to its largest entry, that threads or kernel may make in
# 8 steps of AdamW at a rate of 1e-2. Measured against HASWELL with one thread: two threads 5.5e-5,
# PRESCOTT 3.1e-5, NEHALEM and SANDYBRIDGE 8.3e-5, SKYLAKEX 1.3e-4; the same settings 0.
BOUND = 1e-3


def run(folder: Path, name: str, *options: str, **settings: str) -> Path:
    """A fine-tune in a fresh process; the run directory."""
    command = [sys.executable, "-m", "mesp_ref", "finetune", "--model", str(folder / "model"),
               "--data", str(folder / "text.txt"), "--out", str(folder / name), "--steps", str(STEPS),
               "--seq-len", "64", "--batch-size", "2", "--lr", "1e-2", "--sample-tokens", "0",
               "--eval-rows", "2", "--quiet", *options]  # fmt: skip
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"} | settings
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return folder / name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("repeatable")
    write_model(place / "model", CONFIG, byte_level_tokenizer())
    (place / "text.txt").write_text(words(900, seed=1))
    return place


@pytest.fixture(scope="module")
def first(folder: Path) -> Path:
    return run(folder, "first")


def weights(directory: Path) -> dict[str, np.ndarray]:
    return mr.load_adapter(directory / "adapter").weights


def digest(directory: Path) -> str:
    return hashlib.sha256(
        (directory / "adapter/adapter_model.safetensors").read_bytes()
    ).hexdigest()


def change(one: Path, other: Path) -> float:
    """Largest difference of a matrix, of its largest entry."""
    a, b = weights(one), weights(other)
    return max(float(np.abs(a[n] - b[n]).max() / np.abs(a[n]).max()) for n in a)


def test_same_seed_same_bytes(folder: Path, first: Path) -> None:
    again = run(folder, "again")
    assert digest(again) == digest(first)
    losses = [
        [json.loads(line)["loss"] for line in (d / "metrics.jsonl").read_text().splitlines()]
        for d in (first, again)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("threads", ["1", "2"])
def test_the_run_records_what_its_bits_depend_on(folder: Path, first: Path, threads: str) -> None:
    directory = first if threads == "1" else run(folder, "two", OPENBLAS_NUM_THREADS="2")
    recorded = json.loads((directory / "run.json").read_text())
    assert recorded["environment"]["threads"] == threads
    assert recorded["environment"]["numpy"] == np.__version__
    assert recorded["identity"]["seed"] == 0
    assert change(first, directory) <= BOUND


@pytest.mark.parametrize("kernel", ["PRESCOTT", "NEHALEM", "HASWELL"])
def test_another_kernel_changes_little(folder: Path, first: Path, kernel: str) -> None:
    """Kernels that OpenBLAS can be told to use on x86-64; elsewhere the name is not known."""
    if os.uname().machine not in ("x86_64", "AMD64"):
        pytest.skip("OPENBLAS_CORETYPE names x86 kernels here")
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if kernel == "HASWELL" and " avx2" not in flags:
        pytest.skip("this processor has no AVX2")
    assert change(first, run(folder, kernel, OPENBLAS_CORETYPE=kernel)) <= BOUND


def test_another_seed_is_another_run(folder: Path, first: Path) -> None:
    """Otherwise the bound above would hold for anything."""
    a, b = weights(first), weights(run(folder, "seed", "--seed", "1"))
    assert min(float(np.abs(a[n] - b[n]).max() / np.abs(a[n]).max()) for n in a) > 100 * BOUND

"""Fixtures of the parity tests. They need the `parity` extra: torch, transformers, peft."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every model here is made or converted locally

import family_oracle
import numpy as np
import pytest
import torch
import torch_oracle
from torch_oracle import Batch
from transformers.utils import logging

logging.disable_progress_bar()
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Warnings raised in torch, transformers and peft are not ours to fail on; others are errors."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore:::(torch|transformers|peft)"))


@pytest.fixture(autouse=True, scope="session")
def _true_float64() -> Iterator[None]:
    torch.set_num_threads(1)  # the models are tiny: waking threads costs more than they save
    with pytest.MonkeyPatch.context() as patch:
        torch_oracle.true_float64(patch)
        family_oracle.true_float64(patch)
        yield


@pytest.fixture(scope="session", params=[True, False], ids=["tied", "untied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="session", params=torch_oracle.LAYOUTS)
def layout(request: pytest.FixtureRequest, tied: bool) -> torch_oracle.Layout:
    return replace(torch_oracle.LAYOUTS[request.param], tied=tied)


@pytest.fixture(scope="session")
def checkpoint(layout: torch_oracle.Layout, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory written by transformers, one per layout."""
    path = tmp_path_factory.mktemp("checkpoint")
    torch_oracle.build(layout).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory written by transformers with the layout that has nothing special."""
    path = tmp_path_factory.mktemp("plain")
    torch_oracle.build(torch_oracle.LAYOUTS["H/G=3"]).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def batch() -> Batch:
    """Two sequences of 37 tokens: the second ends in 9 tokens of padding, some labels are −100.

    2·37 = 74 positions, so that no tile of rows or queries divides them.
    """
    rng = np.random.default_rng(7)
    ids = rng.integers(0, torch_oracle.Layout(1, 1, 2).vocabulary, (2, 37))
    labels = np.where(rng.random(ids.shape) < 0.2, -100, ids)
    mask = np.ones_like(ids)
    ids[1, -9:], labels[1, -9:], mask[1, -9:] = 0, -100, 0
    return Batch(ids, labels, mask)

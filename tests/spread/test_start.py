"""How many batches a step has on several ranks, new and resumed."""

import types
from dataclasses import replace
from typing import Any

import pytest

from mesp_ref.errors import MespRefError
from mesp_ref.job.finetune import FinetuneOptions
from mesp_ref.spread.start import _batches
from mesp_ref.train.trainer import TrainConfig


def ranks(size: int, **arguments: Any) -> Any:
    return types.SimpleNamespace(size=size, arguments=arguments)


def test_accumulate_counts_the_batches_of_each_rank() -> None:
    options = FinetuneOptions(train=TrainConfig(accumulate=6))
    assert _batches(ranks(2), options) == 12  # the default, too
    assert _batches(ranks(2, accumulate=6), options) == 12


def test_a_resumed_step_has_as_many_batches_as_it_had() -> None:
    options = replace(FinetuneOptions(train=TrainConfig(accumulate=6)), resume=True)
    assert _batches(ranks(3), options) == 6
    assert (
        _batches(ranks(3, accumulate=6), options) == 18
    )  # said, and refused if the run has others
    with pytest.raises(MespRefError, match="found 4 ranks, expected a divisor of the 6 batches"):
        _batches(ranks(4), options)

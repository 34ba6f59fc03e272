"""Data that stand in where none are named."""

import pytest

import mesp_ref as mr
from mesp_ref.job.defaults import data_file


def test_an_error_in_data_that_nobody_named_does_not_name_their_file() -> None:
    with pytest.raises(mr.MespRefError) as error, data_file(None, 2) as file:
        raise mr.MespRefError(f"{file}: line 1: messages: the model has no chat template")
    assert str(error.value).startswith(
        "questions about stories, taken without --data: line 1: mess"
    )


def test_another_error_stays_what_it_is() -> None:
    other = mr.MespRefError("rank: found 0, expected a number from 1 up")
    with pytest.raises(mr.MespRefError) as error, data_file(None, 2):
        raise other
    assert error.value is other

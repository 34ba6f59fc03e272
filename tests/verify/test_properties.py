"""Every property of the mathematics, each its own test."""

import numpy as np
import pytest

from mesp_ref.registry import OPS
from mesp_ref.verify.properties import properties
from mesp_ref.verify.result import require


@pytest.mark.parametrize("name", properties())
@pytest.mark.parametrize("seed", [0, 1])
def test_property(name: str, seed: int) -> None:
    require(list(properties()[name].check(np.random.default_rng((seed, 77)))))


def test_every_op_and_method_has_properties_and_every_property_a_statement() -> None:
    assert {item.subject for item in properties().values()} == {*OPS, "model", "mezo"}
    for item in properties().values():
        assert item.statement, item.name

"""What the report says of wrong answers: stored mistakes and relations, and nothing of right ones."""

import numpy as np
import pytest
from helpers import Answer

from mesp_ref.golden import Suite, check
from mesp_ref.ops import Array

CASE = "block/usual"
LORA = "self_attn.q_proj.lora_{}.weight.grad"


@pytest.fixture(scope="module")
def want() -> dict[str, Array]:
    suite = Suite()
    return suite.read(suite.cases[CASE]).want


def likes(answer: Answer, dtype: object = np.float32, **changed: Array) -> list[str]:
    report = check(answer(CASE, dtype=dtype, **changed), only=[CASE])
    assert not report.passed
    return report.cases[0].like


@pytest.mark.parametrize("name", ["block/usual", "e2e/tied", "ops/attention/square"])
def test_stored_mistakes_are_named(name: str, answer: Answer, suite: Suite) -> None:
    for wrong in suite.wrong:
        if wrong.of == name and "bfloat16" in wrong.dtypes:
            root = answer(name, **suite.read_wrong(wrong))
            report = check(root, only=[name], dtype="bfloat16", roles=["result"])
            like = report.cases[0].like
            assert like, wrong.name
            assert any(part in like[0] for part in (wrong.bug, "×", "0 everywhere")), (
                wrong.name,
                like,
            )


def test_a_common_factor_is_named_by_what_it_equals(answer: Answer, want: dict[str, Array]) -> None:
    lora = [name for name in want if ".lora_" in name]
    (text,) = likes(answer, **{n: want[n] / 4 for n in lora})
    assert text.startswith("like: dA and dB of LoRA averaged over the rank")
    assert "(all LoRA gradients × 0.25 (= 1/rank" in text
    only_b = [name for name in lora if "lora_B" in name]
    assert likes(answer, **{n: -want[n] for n in only_b}) == ["dB of every projection × -1 (= −1)"]


def test_relations_of_single_tensors(answer: Answer, want: dict[str, Array]) -> None:
    a, b = LORA.format("A"), LORA.format("B")
    assert likes(answer, **{a: want[a].T}) == [
        f"{a}: is transposed: has shape [16, 4] instead of [4, 16]"
    ]
    stored = want[a].T.reshape(want[a].shape)
    assert likes(answer, **{a: stored}) == [f"{a} was stored column by column, transposed"]
    gate, up = (f"mlp.{part}_proj.lora_A.weight.grad" for part in ("gate", "up"))
    assert likes(answer, **{gate: want[up], up: want[gate]}) == [
        f"{gate} holds {up}",
        f"{up} holds {gate}",
    ]
    tiled = want[b].reshape(2, 2, 6, 4).swapaxes(0, 1).reshape(24, 4)
    assert likes(answer, **{b: tiled}) == [f"{b} has its heads in tiled order"]
    pairs = want[b].reshape(4, 2, 3, 4).swapaxes(1, 2).reshape(24, 4)
    assert likes(answer, **{b: pairs}) == [f"{b} has the elements of a head interleaved"]
    late = np.roll(want["self_attn.o_proj"], 1, axis=1)
    assert likes(answer, **{"self_attn.o_proj": late}) == ["self_attn.o_proj is one token late"]
    assert likes(answer, **{a: 0 * want[a]}) == [
        f"{a} is 0 everywhere: zeros, the gradient does not arrive"
    ]


def test_noise_is_named_as_such_and_nonsense_not_at_all(
    answer: Answer, want: dict[str, Array]
) -> None:
    a, rng = LORA.format("A"), np.random.default_rng(0)
    noisy = want[a] * (1 + 1e-3 * rng.standard_normal(want[a].shape))
    (text,) = likes(answer, **{a: noisy})
    assert "lower precision" in text
    (text,) = likes(answer, **{a: rng.standard_normal(want[a].shape)})
    assert text.startswith(f"not a mistake we know: {a} differs, y and 26 more agree")

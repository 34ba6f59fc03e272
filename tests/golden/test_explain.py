"""What the report says of wrong answers: stored mistakes and relations, and nothing of right ones."""

import numpy as np
import pytest
from helpers import Answer
from unseen_ops import Unseen, unseen

from mesp_ref.golden import Suite, check
from mesp_ref.golden.check import judge
from mesp_ref.golden.explain import explain, explain_op
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


@pytest.mark.parametrize(
    ("name", "every"),
    [("block/usual", 3), ("e2e/tied", 6), ("ops/attention/square", 1),
     pytest.param("block/usual", 1, marks=pytest.mark.slow),
     pytest.param("e2e/tied", 1, marks=pytest.mark.slow)],
)  # fmt: skip
def test_stored_mistakes_are_named(name: str, every: int, answer: Answer, suite: Suite) -> None:
    """Those of a block and of a model are alike and cost most: some of them, and all when slow."""
    stored = [w for w in suite.wrong if w.of == name and "bfloat16" in w.dtypes]
    assert len(stored[::every]) > 3
    for wrong in stored[::every]:
        root = answer(name, **suite.read_wrong(wrong))
        like = check(root, only=[name], dtype="bfloat16", roles=["result"]).cases[0].like
        assert like, wrong.name
        known = wrong.bug, "×", "0 everywhere"
        assert any(part in like[0] for part in known), (wrong.name, like)


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


@pytest.mark.parametrize("held_out", [False, True])
def test_unseen_mistakes_of_ops(held_out: bool, suite: Suite) -> None:
    """Mistakes written before the namer was: nearly all rejected, few named wrongly, most rightly."""
    count = {"rejected": 0, "right": 0, "wrong": 0, "all": 0}
    for mistake in unseen(list(suite.cases)):
        if mistake.held_out != held_out:
            continue
        for name in mistake.cases[:1]:
            said = sentence(suite, name, mistake)
            count["all"] += 1
            count["rejected"] += said is not None
            if said is not None and not said.startswith("not a mistake we know"):
                count["right" if mistake.pattern.search(said) else "wrong"] += 1
    print(count)
    assert count["rejected"] >= 0.98 * count["all"]
    assert count["right"] >= 0.8 * count["rejected"]
    assert count["wrong"] <= 0.03 * count["rejected"]


def sentence(suite: Suite, name: str, mistake: Unseen) -> str | None:
    """The first sentence about an answer in float32; None where it passes."""
    case, vectors = suite.cases[name], suite.read(suite.cases[name])
    given = {n: a.astype(float) if a.dtype.kind == "f" else a for n, a in vectors.inputs.items()}
    with np.errstate(all="ignore"):
        answer = mistake.answer(given, case.attributes)
        got = {n: np.asarray(a, np.float32) for n, a in answer.items()}
        wrong = [t for t in case.tensors if not judge(t, got[t.name], vectors, "float32").passed]
        if not wrong:
            return None
        return (explain(suite, case, vectors, got, "float32", wrong) or ["not a mistake we know"])[
            0
        ]


@pytest.mark.parametrize(
    "chosen", ["ops/masked_attention/", pytest.param("", marks=pytest.mark.slow)], ids=str
)
def test_unseen_mistakes_of_masks_fused_ops_and_families(chosen: str, suite: Suite) -> None:
    """All are rejected, none of them named wrongly; all of them take two minutes."""
    pytest.importorskip("torch")
    from unseen_families import OPS, results, score

    found = list(results(suite, {chosen: OPS[chosen]} if chosen else None))
    print([f for f in found if f.verdict != "right"])
    for held_out in (False, True):
        counts = score([f for f in found if f.held_out == held_out])
        assert counts["rejected"] == counts["pairs"]
        assert counts["right"] >= 0.75 * counts["pairs"]
        assert counts["wrong"] <= 0.02 * counts["pairs"]


def test_one_number_is_never_named(answer: Answer, suite: Suite) -> None:
    name = "ops/cross_entropy/usual"
    want = suite.read(suite.cases[name]).want
    (text,) = check(answer(name, y=want["y"] * 5), only=[name]).cases[0].like
    assert text.startswith("not a mistake we know: of y one number differs")


def test_any_arguments_of_an_op_are_explained() -> None:
    """The tutor's way in: no suite, no files."""
    rng = np.random.default_rng(5)
    x, w, dy = (
        rng.standard_normal((2, 5, 8)),
        rng.standard_normal(8),
        rng.standard_normal((2, 5, 8)),
    )
    r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + 0.01)
    right = dy * w * r - x * (dy * w * x).mean(-1, keepdims=True) * r**3

    def said(dx: Array) -> list[str]:
        given, allowed = {"x": x, "w": w, "dy": dy}, {"dx": np.full(x.shape, 1e-10)}
        return explain_op("rmsnorm", given, {"eps": 0.01}, {"dx": dx}, {"dx": right}, allowed)

    assert said(right) == []
    assert said(dy * w * r) == ["like: RMSNorm backward without the term along x: dx = dy ⊙ w / n"]
    assert said(0 * x) == ["dx is 0 everywhere: zeros, the gradient does not arrive"]
    assert said(rng.standard_normal(x.shape))[0].startswith("not a mistake we know")

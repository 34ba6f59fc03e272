"""Generation: the cache changes nothing, options do what they say, mixed prompts keep apart."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import mesp_ref as mr
from mesp_ref.engine.generate import _probabilities
from mesp_ref.verify.samples import sample_adapter, sample_model, small_config

CONFIG = small_config(False, vocab_size=23, eos_token_id=None)
PROMPTS = [[1, 2, 3], [4], [5, 6, 7], [8, 9, 10, 11, 12]]


@pytest.fixture(scope="module")
def model() -> mr.Model:
    return sample_model(np.random.default_rng(4), CONFIG)


@pytest.fixture(scope="module")
def adapter() -> mr.Adapter:
    return sample_adapter(np.random.default_rng(5), CONFIG)


def greedy_by_full_forwards(
    model: mr.Model, prompt: list[int], adapter: Any, count: int
) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(mr.logits(model, [ids], adapter)[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("with_adapter", [False, True])
def test_greedy_with_cache_is_greedy_without(
    model: mr.Model, adapter: mr.Adapter, with_adapter: bool
) -> None:
    given = adapter if with_adapter else None
    found = mr.generate(model, PROMPTS, given, max_new_tokens=12)
    assert found == [greedy_by_full_forwards(model, p, given, 12) for p in PROMPTS]
    assert len({tuple(tokens) for tokens in found}) > 1  # not one answer to everything


def test_each_prompt_of_a_mixed_batch_is_as_alone(model: mr.Model) -> None:
    assert mr.generate(model, PROMPTS, max_new_tokens=6) == [
        mr.generate(model, [prompt], max_new_tokens=6)[0] for prompt in PROMPTS
    ]


def test_top_k_of_one_and_tiny_top_p_are_greedy(model: mr.Model) -> None:
    greedy = mr.generate(model, PROMPTS, max_new_tokens=8)
    assert mr.generate(model, PROMPTS, max_new_tokens=8, temperature=5.0, top_k=1) == greedy
    assert mr.generate(model, PROMPTS, max_new_tokens=8, temperature=1.0, top_p=1e-9) == greedy


def test_sampling_is_seeded(model: mr.Model) -> None:
    first, same, other = (
        mr.generate(model, PROMPTS, max_new_tokens=16, temperature=1.5, seed=seed)
        for seed in (1, 1, 2)
    )
    assert first == same != other


def test_equal_prompts_draw_from_their_own_streams(model: mr.Model) -> None:
    first, second = mr.generate(model, [[1], [1]], max_new_tokens=16, temperature=2.0)
    assert first != second


def test_stops_at_any_end_token_and_keeps_it(model: mr.Model) -> None:
    free = mr.generate(model, PROMPTS, max_new_tokens=10)
    ends = [free[0][3], free[2][5]]
    for got, full in zip(
        mr.generate(model, PROMPTS, max_new_tokens=10, eos_token_id=ends), free, strict=True
    ):
        stop = min((full.index(end) + 1 for end in ends if end in full), default=10)
        assert got == full[:stop]


def test_end_token_comes_from_the_config(model: mr.Model) -> None:
    free = mr.generate(model, [[1, 2]], max_new_tokens=10)[0]
    ending = mr.Model(replace(CONFIG, eos_token_id=free[2]), model.weights)
    stopped = mr.generate(ending, [[1, 2]], max_new_tokens=10)[0]
    assert stopped == free[: free.index(free[2]) + 1]
    assert mr.generate(ending, [[1, 2]], max_new_tokens=10, eos_token_id=None)[0] == free


def test_probabilities() -> None:
    logits = np.log([0.5, 0.25, 0.125, 0.125])
    np.testing.assert_allclose(_probabilities(logits, 1.0, None, None), np.exp(logits))
    np.testing.assert_allclose(_probabilities(logits, 1.0, 2, None), [2 / 3, 1 / 3, 0, 0])
    np.testing.assert_allclose(_probabilities(logits, 1.0, None, 0.5), [1, 0, 0, 0])
    np.testing.assert_allclose(_probabilities(logits, 1.0, None, 0.51), [2 / 3, 1 / 3, 0, 0])
    np.testing.assert_allclose(
        _probabilities(logits, 0.5, None, None), np.array([16, 4, 1, 1]) / 22
    )
    equal = _probabilities(np.zeros(5), 1.0, 3, None)
    np.testing.assert_allclose(equal, [1 / 3, 1 / 3, 1 / 3, 0, 0])  # ties: the lower id stays


def test_sampled_frequencies_are_the_softmax(model: mr.Model) -> None:
    """4,000 draws of one token within 5σ of the probabilities, token by token."""
    p = _probabilities(mr.logits(model, [[3, 1]])[0, -1], 1.3, None, None)
    draws = mr.generate(model, [[3, 1]] * 4000, max_new_tokens=1, temperature=1.3)
    counts = np.bincount([tokens[0] for tokens in draws], minlength=len(p))
    sigma = np.sqrt(4000 * p * (1 - p))
    assert (np.abs(counts - 4000 * p) <= 5 * sigma + 1).all()


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[]], {}, r"prompts\[0\]: found no tokens"),
        ([[23]], {}, "token id 23"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens: found 0"),
        ([[1]], {"temperature": -1.0}, "temperature: found -1.0"),
        ([[1]], {"temperature": math.nan}, "temperature: found nan"),
        ([[1]], {"top_k": 0}, "top_k: found 0"),
        ([[1]], {"top_p": 0.0}, "top_p: found 0.0"),
        ([[1]], {"top_p": 1.5}, "top_p: found 1.5"),
    ],
)
def test_bad_options_are_one_line_errors(
    model: mr.Model, prompts: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(mr.MespRefError, match=message):
        mr.generate(model, prompts, **options)

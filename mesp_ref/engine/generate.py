"""Text from a model, token by token: the same attention op over a cache of keys and values."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.init import check_adapter
from mesp_ref.engine.inputs import check_ids, finite
from mesp_ref.engine.model import Model, hidden_states
from mesp_ref.engine.positions import layers
from mesp_ref.errors import MespRefError
from mesp_ref.ops import Array, linear


class KeyValueCache:
    """Keys and values of one block, in buffers sized for the whole generation.

    Shapes    [N, capacity, G, D] each; `length` tokens are filled
    """

    def __init__(self, shape: tuple[int, int, int, int], dtype: np.dtype):
        self._k, self._v, self.length = np.empty(shape, dtype), np.empty(shape, dtype), 0

    def extend(self, k: Array, v: Array) -> tuple[Array, Array]:
        """Append [N, T, G, D] and return all keys and values so far."""
        start, self.length = self.length, self.length + k.shape[1]
        self._k[:, start : self.length], self._v[:, start : self.length] = k, v
        return self._k[:, : self.length], self._v[:, : self.length]

    def keep(self, sequences: Array) -> None:
        """Drop the sequences of the batch that have ended."""
        self._k, self._v = self._k[sequences], self._v[sequences]


def _probabilities(
    logits: Array, temperature: float, top_k: int | None, top_p: float | None
) -> Array:
    """Distribution to draw the next token from, [V] in float64, normalised.

    top_k keeps the k likeliest tokens; top_p the shortest head of the sorted rest whose mass
    reaches p (Holtzman et al. 2020), always at least one token.
    """
    z = logits.astype(np.float64) / temperature
    if top_k is not None and top_k < len(z):
        z[np.argsort(-z, kind="stable")[top_k:]] = -np.inf
    p = np.exp(z - z.max())
    p /= p.sum()
    if top_p is not None and top_p < 1:
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= top_p]] = 0
        p /= p.sum()
    return p


def _check(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if max_new_tokens < 1:
        raise MespRefError(f"max_new_tokens: found {max_new_tokens}, expected 1 or more")
    if not (np.isfinite(temperature) and temperature >= 0):
        raise MespRefError(f"temperature: found {temperature}, expected 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise MespRefError(f"top_k: found {top_k}, expected 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise MespRefError(f"top_p: found {top_p}, expected more than 0 and at most 1")


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    adapter: Adapter | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_token_id: Any = "config",
    on_token: Callable[[int, int], object] = lambda prompt, token: None,
) -> list[list[int]]:
    """Continue each prompt; returns the new tokens only, the end token included when it came.

    Prompts of one length run as one batch, so each result is what the prompt alone would give
    (up to rounding), whatever the others are. Every prompt draws from its own stream of `seed`.

    temperature 0 is greedy. `eos_token_id` is one id, several, None for never, or "config".
    `on_token` is called with the number of the prompt and each new token as it comes.

    Raises MespRefError for an empty prompt, ids outside the vocabulary, options out of range.
    """
    _check(max_new_tokens, temperature, top_k, top_p)
    if adapter is not None:
        check_adapter(adapter, model.config)
    ends = model.config.eos_token_ids if isinstance(eos_token_id, str) else eos_token_id
    ends = frozenset(np.atleast_1d([] if ends is None else np.asarray(ends, int)).tolist())
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise MespRefError(f"prompts[{i}]: found no tokens, expected at least one")
        by_length[len(prompt)].append(i)

    pick = partial(_choose, temperature=temperature, top_k=top_k, top_p=top_p)
    results: list[list[int]] = [[] for _ in prompts]
    for indices in by_length.values():
        ids = check_ids(model.config, [list(prompts[i]) for i in indices], "prompts")
        rngs = [np.random.default_rng((seed, i)) for i in indices]

        def tell(i: int, token: int, indices: list[int] = indices) -> None:
            on_token(indices[i], token)

        texts = _run(model, ids, adapter, rngs, pick, max_new_tokens, ends, tell)
        for i, text in zip(indices, texts, strict=True):
            results[i] = text
    return results


def _choose(
    logits: Array,
    rng: np.random.Generator,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> int:
    """The next token: the likeliest at temperature 0, otherwise a draw.

    Raises MespRefError when a score is not finite: no choice among NaN means anything.
    """
    finite("generate: logits", 0.0 if np.isfinite(logits).all() else np.nan)
    if temperature == 0:
        return int(logits.argmax())
    p = _probabilities(logits, temperature, top_k, top_p)
    return int(rng.choice(len(p), p=p))


def _run(
    model: Model,
    ids: Array,
    adapter: Adapter | None,
    rngs: list[np.random.Generator],
    pick: Callable[[Array, np.random.Generator], int],
    max_new_tokens: int,
    ends: frozenset[int],
    on_token: Callable[[int, int], object],
) -> list[list[int]]:
    """Continue prompts of one length, [N, T], together; a sequence leaves the batch at its end."""
    caches = _new_caches(model, len(ids), ids.shape[1] + max_new_tokens)
    texts: list[list[int]] = [[] for _ in ids]
    alive = np.arange(len(ids))
    for _ in range(max_new_tokens):
        start = caches[0].length
        blocks = layers(model, adapter, start, start + ids.shape[1])
        blocks = [b._replace(past=cache) for b, cache in zip(blocks, caches, strict=True)]
        n = hidden_states(model, ids, blocks)[:, -1]  # [N, C]
        scores, _ = linear(n, model.weights[model.head])
        tokens = [pick(z, rngs[i]) for z, i in zip(scores, alive, strict=True)]
        for i, token in zip(alive, tokens, strict=True):
            texts[i].append(token)
            on_token(int(i), token)
        going = np.array([token not in ends for token in tokens])
        if not going.any():
            break
        if not going.all():
            alive = alive[going]
            for cache in caches:
                cache.keep(going)
        ids = np.array(tokens)[going, None]
    return texts


def _new_caches(model: Model, batch: int, capacity: int) -> list[KeyValueCache]:
    config = model.config
    shape = batch, capacity, config.num_key_value_heads, config.head_dim
    return [KeyValueCache(shape, model.dtype) for _ in range(config.num_hidden_layers)]

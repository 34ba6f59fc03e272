"""How long a step will take here: its arithmetic at rates that a moment's measurement tells."""

import time
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np

from mesp_ref import lean
from mesp_ref.engine.config import Qwen2Config
from mesp_ref.lean.workers import hire
from mesp_ref.memory.ghost import Meter, born
from mesp_ref.memory.predict import cost
from mesp_ref.memory.shapes import Shapes

# A step over its products at their measured rate, where attention is little: docs/benchmarks.
BESIDE_PRODUCTS = 1.25
_QUERIES, _KEYS = 256, 1024  # of the attention that is timed
_TRIES = 3
Clock: TypeAlias = Callable[[], float]


class Speed(NamedTuple):
    """FLOPs a second of one worker."""

    products: float  # of the MLP's matrices
    attention: float  # forward and backward, exponentials and sums included


def measure_speed(config: Qwen2Config, clock: Clock = time.perf_counter) -> Speed:
    """The speed of this machine now, in half a second: a busy machine is a slow one."""
    c, f = config.hidden_size, config.intermediate_size
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((_QUERIES, c), np.float32), rng.standard_normal((f, c), np.float32)
    products = 2 * _QUERIES * c * f / _shortest(lambda: x @ w.T, clock)
    h, g, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q = rng.standard_normal((1, _QUERIES, h, d), np.float32)
    k = rng.standard_normal((1, _KEYS + _QUERIES, g, d), np.float32)
    seconds = _shortest(lambda: _attention(q, k), clock)
    meter = Meter()
    _attention(*(born(meter, a.shape, a.dtype) for a in (q, k)))  # type: ignore[arg-type]
    return Speed(products, meter.flops / seconds)


def _attention(q: np.ndarray, k: np.ndarray) -> None:
    o, res = lean.streamed_attention(q, k, k)
    lean.streamed_attention_bwd(o, res)


def _shortest(run: Callable[[], object], clock: Clock) -> float:
    """Seconds of the fastest of a few runs after the first."""
    run()
    found = []
    for _ in range(_TRIES):
        start = clock()
        run()
        found.append(clock() - start)
    return min(found)


def seconds(method: str, shapes: Shapes, speed: Speed | None = None) -> float:
    """About how long a step takes: what grows with the square of the length is attention."""
    if speed is None:
        with hire(shapes.workers):
            speed = measure_speed(shapes.config)
    whole, half = shapes.tokens, max(1, shapes.tokens // 2)
    flops, fewer = (cost(method, shapes._replace(tokens=t)).flops for t in (whole, half))
    # a·T + c·T² at two lengths
    square = max(0.0, (flops - fewer * whole / half) / (1 - half / whole)) if half < whole else 0.0
    linear = BESIDE_PRODUCTS * (flops - square) / speed.products
    return (linear + square / speed.attention) / shapes.workers

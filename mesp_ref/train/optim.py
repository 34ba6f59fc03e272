"""Optimisers that update a dictionary of arrays in place, tensor by tensor.

`step` touches only the tensors that it is given gradients for and counts steps per tensor. So the
caller may hand over the gradients of one block, let them die, and go on with the next block: the
result is bit for bit that of one call with all of them. Arithmetic runs over pieces that fit the
cache, in two small scratch arrays, so a step allocates a few hundred KiB whatever the model.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np

from mesp_ref.errors import MespRefError
from mesp_ref.ops import Array

_PIECE = 1 << 15  # elements per piece: 128 KiB of float32
SCHEDULES = ("constant", "linear", "cosine")


class Optimizer(Protocol):
    """What the trainer asks of an optimiser."""

    def step(self, params: Mapping[str, Array], grads: Mapping[str, Array], lr: float) -> None: ...
    def state_dict(self) -> dict[str, Array]: ...
    def load_state_dict(self, state: Mapping[str, Array]) -> None: ...
    def require_state_of(self, params: Mapping[str, Array]) -> None: ...


def _flat(params: Mapping[str, Array], name: str, grad: Array) -> Array:
    """The parameter as a flat view that can be written, checked against its gradient."""
    if name not in params:
        raise MespRefError(f"{name}: found a gradient, expected none: there is no such parameter")
    w = params[name]
    if grad.shape != w.shape or grad.dtype != w.dtype:
        raise MespRefError(
            f"{name}: gradient: found {grad.dtype} {list(grad.shape)}, expected {w.dtype} "
            f"{list(w.shape)} like its parameter"
        )
    if not (w.flags.writeable and w.flags.c_contiguous):
        raise MespRefError(
            f"{name}: found a read-only or strided array, expected a writable contiguous one; "
            "read the weights into memory first"
        )
    return w.reshape(-1)


def _pieces(*arrays: Array) -> Iterator[tuple[Array, ...]]:
    """The same stretch of several flat arrays, one stretch after another (views)."""
    for start in range(0, arrays[0].size, _PIECE):
        yield tuple(array[start : start + _PIECE] for array in arrays)


class SGD:
    """Gradient descent, with optional momentum and weight decay.

    Step      d = g + wd·w;  u ← mu·u + d (momentum only, u starts at 0);  w ← w − lr·u
              without momentum u = d and nothing is kept between steps
    Source    Sutskever et al. 2013, in the form of torch.optim.SGD: lr multiplies u, not d
    Raises    MespRefError for negative settings and for a gradient that fits no parameter
    """

    def __init__(self, weight_decay: float = 0.0, momentum: float = 0.0):
        _in_range("weight_decay", weight_decay, 0.0, math.inf)
        _in_range("momentum", momentum, 0.0, 1.0)
        self.weight_decay, self.momentum = weight_decay, momentum
        self.velocity: dict[str, Array] = {}

    def step(self, params: Mapping[str, Array], grads: Mapping[str, Array], lr: float) -> None:
        """Update in place the parameters that `grads` names; `grads` is left as it is."""
        for name, grad in grads.items():
            w = _flat(params, name, grad)
            if not self.momentum:
                self._plain(w, grad.reshape(-1), lr)
                continue
            if name not in self.velocity:
                self.velocity[name] = np.zeros_like(params[name])
            _require_like(name, params[name], self.velocity[name])
            self._heavy(w, grad.reshape(-1), self.velocity[name].reshape(-1), lr)

    def _plain(self, weights: Array, grad: Array, lr: float) -> None:
        scratch = np.empty(min(_PIECE, weights.size), weights.dtype)
        for w, g in _pieces(weights, grad):
            d = scratch[: w.size]
            if self.weight_decay:
                np.multiply(w, self.weight_decay, out=d)
                d += g
                d *= lr
            else:
                np.multiply(g, lr, out=d)
            w -= d

    def _heavy(self, weights: Array, grad: Array, velocity: Array, lr: float) -> None:
        scratch = np.empty(min(_PIECE, weights.size), weights.dtype)
        for w, g, u in _pieces(weights, grad, velocity):
            d = scratch[: w.size]
            u *= self.momentum
            u += g
            if self.weight_decay:
                np.multiply(w, self.weight_decay, out=d)
                u += d
            np.multiply(u, lr, out=d)
            w -= d

    def state_dict(self) -> dict[str, Array]:
        """Everything that the next step depends on: `velocity/<name>`, the live arrays."""
        return {f"velocity/{name}": u for name, u in self.velocity.items()}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Go on from what `state_dict` gave; the arrays are copied."""
        self.velocity = _take(state, "velocity")

    def require_state_of(self, params: Mapping[str, Array]) -> None:
        """Raise MespRefError unless what is kept belongs to just these parameters."""
        _require_names(self.velocity, params if self.momentum else {}, "velocity")
        for name, velocity in self.velocity.items():
            _require_like(name, params[name], velocity)


class AdamW:
    """Adam with bias correction and decoupled weight decay.

    Step      m ← β1·m + (1−β1)·g;  v ← β2·v + (1−β2)·g²;  t counts the steps of this tensor
              w ← w − lr·wd·w − lr·(m/(1−β1ᵗ)) / (sqrt(v/(1−β2ᵗ)) + eps)
    Shapes    m and v like w, made when a tensor is first met
    Source    Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019, algorithm 2
    Raises    MespRefError for settings out of range and for a gradient that fits no parameter
    """

    def __init__(
        self,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        _in_range("beta1", betas[0], 0.0, 1.0)
        _in_range("beta2", betas[1], 0.0, 1.0)
        _in_range("eps", eps, 0.0, math.inf)
        _in_range("weight_decay", weight_decay, 0.0, math.inf)
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.mean: dict[str, Array] = {}
        self.square: dict[str, Array] = {}
        self.count: dict[str, int] = {}

    def step(self, params: Mapping[str, Array], grads: Mapping[str, Array], lr: float) -> None:
        """Update in place the parameters that `grads` names; `grads` is left as it is."""
        for name, grad in grads.items():
            w = _flat(params, name, grad)
            if name not in self.count:
                self.mean[name] = np.zeros_like(params[name])
                self.square[name] = np.zeros_like(params[name])
            _require_like(name, params[name], self.mean[name], self.square[name])
            self.count[name] = self.count.get(name, 0) + 1
            self._update(w, grad.reshape(-1), name, lr)

    def _update(self, weights: Array, grad: Array, name: str, lr: float) -> None:
        (beta1, beta2), t = self.betas, self.count[name]
        rate = lr / (1.0 - beta1**t)
        root = math.sqrt(1.0 - beta2**t)
        mean, square = self.mean[name].reshape(-1), self.square[name].reshape(-1)
        scratch = np.empty((2, min(_PIECE, weights.size)), weights.dtype)
        for w, g, m, v in _pieces(weights, grad, mean, square):
            a, b = scratch[0, : w.size], scratch[1, : w.size]
            m *= beta1
            np.multiply(g, 1.0 - beta1, out=a)
            m += a
            v *= beta2
            np.multiply(g, g, out=a)
            a *= 1.0 - beta2
            v += a
            np.sqrt(v, out=a)
            a /= root
            a += self.eps
            np.divide(m, a, out=b)
            b *= rate
            w *= 1.0 - lr * self.weight_decay
            w -= b

    def state_dict(self) -> dict[str, Array]:
        """Everything that the next step depends on: `mean/…`, `square/…` (live), `count/…`."""
        state = {f"mean/{name}": m for name, m in self.mean.items()}
        state |= {f"square/{name}": v for name, v in self.square.items()}
        return state | {f"count/{name}": np.array([t]) for name, t in self.count.items()}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Go on from what `state_dict` gave; the arrays are copied."""
        self.mean, self.square = _take(state, "mean"), _take(state, "square")
        counts = _take(state, "count")
        for name, t in counts.items():
            if t.size != 1 or t.dtype.kind != "i" or not 1 <= t.flat[0] < 2**53:
                raise MespRefError(
                    f"optimiser state: count/{name}: found {t.dtype} {list(t.shape)}, expected one "
                    "positive integer"
                )
        self.count = {name: int(t.flat[0]) for name, t in counts.items()}
        if not self.mean.keys() == self.square.keys() == self.count.keys():
            raise MespRefError("optimiser state: mean, square and count name different tensors")

    def require_state_of(self, params: Mapping[str, Array]) -> None:
        """Raise MespRefError unless what is kept belongs to just these parameters."""
        _require_names(self.count, params, "mean, square and count")
        for name in self.count:
            _require_like(name, params[name], self.mean[name], self.square[name])
            if (self.square[name] < 0).any():
                raise MespRefError(
                    f"optimiser state: square/{name}: found a negative number, expected squares"
                )


def _require_names(kept: Mapping[str, object], params: Mapping[str, Array], kinds: str) -> None:
    """Raise MespRefError when state and parameters do not name the same tensors."""
    for name in kept.keys() ^ params.keys():
        found = "found, expected none: there is no such parameter" if name in kept else "missing"
        raise MespRefError(f"optimiser state: {kinds} of {name}: {found}")


def _require_like(name: str, w: Array, *kept: Array) -> None:
    """Raise MespRefError when what an optimiser kept of a tensor has not the tensor's form."""
    for array in kept:
        if array.shape != w.shape or array.dtype != w.dtype:
            raise MespRefError(
                f"optimiser state: {name}: found {array.dtype} {list(array.shape)}, expected "
                f"{w.dtype} {list(w.shape)}"
            )


def _take(state: Mapping[str, Array], kind: str) -> dict[str, Array]:
    """Copies of the arrays filed under `kind/`, by tensor name."""
    prefix = kind + "/"
    return {key[len(prefix) :]: np.array(a) for key, a in state.items() if key.startswith(prefix)}


def _in_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value < high:
        bound = "" if high == math.inf else f" and below {high:g}"
        raise MespRefError(f"{name}: found {value}, expected at least {low:g}{bound}")


def global_norm(grads: Mapping[str, Array]) -> float:
    """Euclidean norm over all tensors, summed in float64.  sqrt(Σ_tensors Σ g²)"""
    total = 0.0
    for grad in grads.values():
        for (g,) in _pieces(grad.reshape(-1)):
            wide = g.astype(np.float64, copy=False)
            total += float(np.dot(wide, wide))
    return math.sqrt(total)


def clip_by_global_norm(grads: Mapping[str, Array], max_norm: float) -> float:
    """Scale all gradients in place so that their joint norm is at most `max_norm`.

    Step      n = global_norm(g);  g ← g·(max_norm/n) where n > max_norm
    Returns   n as it was before; NaN or infinity leaves the gradients as they are
    Source    Pascanu et al. 2013, algorithm 1, over all tensors at once
    """
    if not max_norm > 0:
        raise MespRefError(f"clip: found {max_norm}, expected a positive norm")
    norm = global_norm(grads)
    if math.isfinite(norm) and norm > max_norm:
        for grad in grads.values():
            grad *= max_norm / norm
    return norm


def learning_rate(
    step: int, *, base: float, total: int, warmup: int = 0, schedule: str = "constant"
) -> float:
    """Learning rate of step 0, 1, … total−1.

    Warm-up   base·(step+1)/warmup while step < warmup: the first step already learns
    After     with p = (step−warmup)/(total−warmup): constant base; linear base·(1−p);
              cosine base·(1+cos πp)/2. Zero would be reached at step = total
    Source    Loshchilov & Hutter 2017 eq. 5 (cosine, one period)
    Raises    MespRefError for an unknown schedule and a warm-up outside 0 … total
    """
    if schedule not in SCHEDULES:
        raise MespRefError(f"schedule: found {schedule!r}, expected one of {', '.join(SCHEDULES)}")
    if not 0 <= warmup <= total:
        raise MespRefError(f"warmup: found {warmup} steps, expected 0 to {total} (all steps)")
    if step < warmup:
        return base * (step + 1) / warmup
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    if schedule == "linear":
        return base * (1.0 - progress)
    if schedule == "cosine":
        return base * 0.5 * (1.0 + math.cos(math.pi * progress))
    return base


def make_optimizer(name: str, *, weight_decay: float = 0.0, momentum: float = 0.0) -> Optimizer:
    """The optimiser called `name`: "sgd" or "adamw"."""
    if name == "sgd":
        return SGD(weight_decay=weight_decay, momentum=momentum)
    if name == "adamw":
        if momentum:
            raise MespRefError(f"momentum: found {momentum} with adamw, expected it with sgd only")
        return AdamW(weight_decay=weight_decay)
    raise MespRefError(f"optimizer: found {name!r}, expected adamw or sgd")

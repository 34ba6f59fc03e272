"""causal_softmax: probabilities of the keys that a query sees."""

from typing import Any

import numpy as np

from mesp_ref import ops
from mesp_ref.ops import Array
from mesp_ref.registry import cases
from mesp_ref.registry.absolute import carried
from mesp_ref.registry.cases import ONE_TOKEN, USUAL, OpCase
from mesp_ref.registry.draw import normal
from mesp_ref.registry.exact import exp, total, zero
from mesp_ref.registry.row import Golden, OpSpec
from mesp_ref.registry.sizes import Args, Sizes
from mesp_ref.registry.twins import Namespace, torch_wide, wide


def sample(rng: np.random.Generator, z: Sizes, dtype: Any) -> Args:
    return {"s": normal(rng, dtype, z.n, z.h, z.t, z.t + z.past), "first": None}


def equation(s: Array, first: Array | None = None) -> Array:
    """p_ij = exp(s_ij)/Σ_{j visible} exp(s_ij); query i of Tq sees keys first_i ≤ j ≤ i + Tk − Tq"""
    tq, tk = s.shape[-2:]
    p = np.empty(s.shape, object)
    for at in np.ndindex(*s.shape[:-1]):
        start = 0 if first is None else int(first[at[0] % len(first), at[-1]])
        stop = at[-1] + tk - tq + 1
        e = [exp(value) for value in s[at][start:stop]]
        seen = [value / total(e) for value in e] if len(e) > 1 else [zero() + 1]  # e/e, exactly 1
        p[at] = [*[zero()] * start, *seen, *[zero()] * (tk - stop)]
    return p


def through(dp: Array, p: Array, mag_p: Array) -> Array:
    """mag of ds = p·(dp − Σ p·dp), when p itself has mag_p."""
    along = (dp * mag_p).sum(axis=-1, keepdims=True)
    return mag_p * (dp + (dp * p).sum(axis=-1, keepdims=True)) + p * along


def magnitude(dp: Array, res: Any) -> Array:
    """The distance of a score from its row's maximum is log(max p / p)."""
    p = res.p
    peak = p.max(axis=-1, keepdims=True)
    distance = np.log(np.divide(peak, p, out=np.ones_like(p), where=p > 0))
    return through(np.abs(dp), p, carried(p, distance))


def probabilities(s: Array, mag_s: Array, first: Array | None = None) -> tuple[Array, Array]:
    """p and mag_p = p·(1 + mag_s + Σ p·mag_s); the subtraction of the maximum adds its distance."""
    tq, tk = s.shape[-2:]
    visible = np.tri(tq, tk, tk - tq, dtype=bool)
    if first is not None:
        visible = visible & (np.arange(tk) >= first[:, None, :, None])
    s = np.where(visible, s, -np.inf)
    distance = np.where(visible, s.max(axis=-1, keepdims=True) - s, 0)
    p = np.where(visible, np.exp(-distance), 0)
    p /= p.sum(axis=-1, keepdims=True)
    return p, carried(p, mag_s + distance)


def output_magnitude(s: Array, first: Any = None) -> Array:
    return probabilities(s, np.zeros_like(s), first)[1]


def torch_twin(torch: Any, s: Any, first: Any = None) -> Any:
    tq, tk = s.shape[-2:]
    hidden = torch.ones(tq, tk, dtype=torch.bool).triu(tk - tq + 1)
    if first is not None:
        hidden = hidden | (torch.arange(tk) < first[:, None, :, None])
    return torch_wide(torch, s).masked_fill(hidden, -torch.inf).softmax(dim=-1).to(s.dtype)


def functional_twin(fw: Namespace, s: Any, first: Any = None) -> Any:
    tq, tk = s.shape[-2:]
    visible = fw.xp.array(np.tri(tq, tk, tk - tq, dtype=bool))
    if first is not None:
        visible = visible & (fw.xp.array(np.arange(tk)) >= first[:, None, :, None])
    hidden = fw.xp.array(-np.inf, dtype=wide(fw, s).dtype)
    return fw.softmax(fw.xp.where(visible, wide(fw, s), hidden)).astype(s.dtype)


CASES = (
    OpCase("usual", "two earlier keys", change=cases.times(s=0.75)),
    OpCase("square", "no cache", USUAL._replace(past=0), cases.times(s=0.75)),
    OpCase("one_token", "p = 1, ds = 0", ONE_TOKEN),
    OpCase("equal", "equal scores: uniform over visible keys", change=cases.put(s=1.0)),
    OpCase("large", "scores of hundreds: one key takes all",
           change=cases.times(s=128.0), dtypes=cases.WIDE),
    OpCase("tiny", "scores of 1e-4", change=cases.times(s=2.0**-13), dtypes=cases.NO_HALF),
)  # fmt: skip

ROW = OpSpec(
    name="causal_softmax",
    forward=ops.causal_softmax,
    backward=ops.causal_softmax_bwd,
    activations=("s",),
    constants=("first",),
    optional=("first",),
    sample=sample,
    reduction_length=lambda z: z.t + z.past,
    equation=equation,
    magnitude=magnitude,
    golden=Golden(
        cases=CASES,
        roundings={"y": 3, "ds": 4},
        forward_length=lambda z: z.t + z.past,
        output_magnitude=output_magnitude,
        torch=torch_twin,
        functional=functional_twin,
    ),
)

"""cross_entropy: mean negative log-likelihood of the rows that count."""

from typing import Any

import numpy as np

from mesp_ref import ops
from mesp_ref.ops import IGNORED, Array
from mesp_ref.registry import cases
from mesp_ref.registry.absolute import carried
from mesp_ref.registry.cases import ONE_TOKEN, OpCase
from mesp_ref.registry.draw import labels as draw_labels
from mesp_ref.registry.draw import normal
from mesp_ref.registry.exact import array, exp, log, total
from mesp_ref.registry.row import Golden, OpSpec
from mesp_ref.registry.sizes import Args, Sizes
from mesp_ref.registry.twins import Namespace, torch_wide, wide


def sample(rng: np.random.Generator, z: Sizes, dtype: Any) -> Args:
    rows = z.n * z.t
    return {"logits": normal(rng, dtype, rows, z.v), "labels": draw_labels(rng, z, rows)}


def equation(logits: Array, labels: Array) -> Array:
    """−(1/count)·Σ_counted log(exp(z_label)/Σ exp(z))"""
    counted = [row for row in range(len(labels)) if labels[row] != -100]

    def negative_log_likelihood(row: int) -> Any:
        return -log(exp(logits[row, labels[row]]) / total(exp(z) for z in logits[row]))

    losses = [negative_log_likelihood(row) for row in counted]
    return array((), lambda: total(losses) / max(1, len(counted)))


def dlogits(logits: Array, labels: Array, mag_logits: Array | None = None) -> Array:
    """(softmax + onehot)/count on counted rows; `mag_logits` where the logits are sums."""
    counted = np.flatnonzero(labels != IGNORED)
    z, mag = logits[counted], np.zeros_like(logits)
    distance = z.max(axis=1, keepdims=True, initial=-np.inf) - z
    p = np.exp(-distance)
    p /= p.sum(axis=1, keepdims=True)
    mag_p = carried(p, distance if mag_logits is None else distance + mag_logits[counted])
    mag_p[np.arange(len(counted)), labels[counted]] += 1
    mag[counted] = mag_p / max(1, len(counted))
    return mag


def by_lse(logits: Array, labels: Array) -> Array:
    """|lse|·p/(4·count): softmax formed as exp(z − lse) with a rounded lse (Unsloth, FLA).

    lse is off by |lse|·u, and so is the exponential; four roundings are counted, of which it is one.
    """
    counted = (labels != IGNORED)[:, None]
    top = logits.max(axis=1, keepdims=True)
    e = np.exp(logits - top)
    total = e.sum(axis=1, keepdims=True)
    lse = np.abs(np.log(total) + top)
    found: Array = lse * e / total * counted / (4 * max(1, int(counted.sum())))
    return found


def gradient_magnitudes(dy: Array, args: Args) -> dict[str, Array]:
    """As `magnitude`, for a backend that keeps each row's lse."""
    more = np.abs(dy) * by_lse(args["logits"], args["labels"])
    return {"logits": ROW.magnitudes(dy, args)["logits"] + more}


def magnitude(dloss: Any, res: Any) -> Array:
    return abs(dloss) * dlogits(res.logits, res.labels)


def output_magnitude(logits: Array, labels: Array, mag_logits: Array | None = None) -> Array:
    """Per counted row log Σ exp z and the label's logit, and p·mag of the logits.

    In absolute values as the equation has them: a backend may form log Σ exp z in full.
    """
    counted = np.flatnonzero(labels != IGNORED)
    z = logits[counted]
    mag = np.zeros_like(z) if mag_logits is None else mag_logits[counted]
    distance = z.max(axis=1, keepdims=True, initial=-np.inf) - z
    sums = np.exp(-distance).sum(axis=1)
    p, at = np.exp(-distance) / sums[:, None], (np.arange(len(z)), labels[counted])
    peak = np.abs(z).max(axis=1, initial=0)
    rows = 1 + peak + np.log(sums) + np.abs(z[at]) + mag[at] + (p * (mag + distance)).sum(axis=1)
    return np.asarray(rows.sum() / max(1, len(z)))


def torch_twin(torch: Any, logits: Any, labels: Any) -> Any:
    z = torch_wide(torch, logits)
    sums = torch.nn.functional.cross_entropy(z, labels, reduction="sum", ignore_index=-100)
    return sums / max(1, int((labels != -100).sum()))


def functional_twin(fw: Namespace, logits: Any, labels: Any) -> Any:
    z, counted = wide(fw, logits), labels != -100
    safe = fw.xp.where(counted, labels, 0)[:, None]
    losses = fw.logsumexp(z) - fw.xp.take_along_axis(z, safe, axis=1)[:, 0]
    return fw.xp.where(counted, losses, 0.0 * losses).sum() / max(1, int(counted.sum()))


CASES = (
    OpCase("usual", "every third label ignored"),
    OpCase("none_ignored", "every row counts", change=cases.every("labels")),
    OpCase("all_ignored", "loss 0, gradient exactly 0", change=cases.put(labels=IGNORED)),
    OpCase("one_row", "one token", ONE_TOKEN, cases.every("labels")),
    OpCase("label_0_counts", "token id 0 is no padding", change=cases.put(labels=0)),
    OpCase("confident", "logits of hundreds: softmax − onehot cancels",
           change=cases.times(logits=64.0), dtypes=cases.WIDE),
    OpCase("offset", "logits around 1000: the maximum must be subtracted",
           change=lambda args: args | {"logits": np.round(args["logits"]) * 8 + 1000},
           dtypes=cases.WIDE),
    OpCase("uniform", "equal logits: loss log V", change=cases.put(logits=0.5)),
)  # fmt: skip

ROW = OpSpec(
    name="cross_entropy",
    forward=ops.cross_entropy,
    backward=ops.cross_entropy_bwd,
    activations=("logits",),
    constants=("labels",),
    sample=sample,
    reduction_length=lambda z: z.v,
    equation=equation,
    magnitude=magnitude,
    golden=Golden(
        cases=CASES,
        roundings={"y": 3, "dlogits": 4},
        forward_length=lambda z: z.v + z.n * z.t,
        output_magnitude=output_magnitude,
        gradient_magnitudes=gradient_magnitudes,
        torch=torch_twin,
        functional=functional_twin,
    ),
)

"""Gradients as sums of terms: which of them a wrong one lacks, or has with another factor.

Each op's output and gradients are written as Σ c·term with the terms people mix up beside the right
ones. A wrong tensor is fitted by least squares with few of them; a fit that leaves rounding only says
which factor differs.
"""

from itertools import combinations
from typing import NamedTuple

import numpy as np

from mesp_ref.golden.answer import Answer, left
from mesp_ref.golden.plain import flat
from mesp_ref.ops import IGNORED, Array

Terms = dict[str, tuple[Array, float]]  # by name: the term, and the factor that is right


class Fit(NamedTuple):
    """A sum of terms, and the sentence that tells its factors from the right ones."""

    left: float
    text: str
    factors: dict[str, float]


def fit(answer: Answer, name: str, terms: Terms, most: int = 3) -> Fit | None:
    """The fit with the fewest terms that explains a tensor; None where none does."""
    names = [n for n, (term, _) in terms.items() if term.any()]
    got = answer.got[name]
    for count in range(1, min(most, len(names)) + 1):
        found = []
        for chosen in combinations(names, count):
            columns = np.stack([terms[n][0].reshape(-1) for n in chosen], axis=1)
            if got.size < 3 * count or np.linalg.matrix_rank(columns) < count:
                continue
            factors = np.linalg.lstsq(columns, got.reshape(-1), rcond=None)[0]
            rest = left(answer, name, (columns @ factors).reshape(got.shape))
            if rest < np.inf:
                found.append((rest, dict(zip(chosen, map(float, factors), strict=True))))
        if len(found) == 1:
            return Fit(found[0][0], _sentence(name, terms, found[0][1], answer), found[0][1])
        if found:  # several pairs of terms do it as well
            return None
    return None


def _sentence(name: str, terms: Terms, factors: dict[str, float], answer: Answer) -> str:
    said = []
    for term, (_, right) in terms.items():
        found = factors.get(term, 0.0)
        if abs(found - right) <= 1e-3 * max(1.0, abs(right)):
            continue
        if right and not found:
            said.append(f"the term {term} is missing")
        elif right and abs(found + right) <= 1e-3 * abs(right):
            said.append(f"the term {term} has the wrong sign")
        elif right:
            said.append(
                f"the term {term} is × {found / right:.4g}{constant(answer, found / right)}"
            )
        else:
            said.append(
                f"has {found:.4g}·{term}, which does not belong there{constant(answer, found)}"
            )
    return f"{name}: {', '.join(said)}"


def constant(answer: Answer, factor: float) -> str:
    """What a factor equals, among the numbers of a case: " (= 1/rank)"; "" for none."""
    close = 0.01 if answer.narrow else 1e-4
    names = [n for n, value in numbers(answer).items() if abs(factor / value - 1) < close]
    return f" (= {' = '.join(names[:4])})" if names else ""


def numbers(answer: Answer) -> dict[str, float]:
    """Sizes and scales of a case with their inverses, roots and squares, none of them 1."""
    found: dict[str, float] = {"−1": -1.0, "2": 2.0, "1/2": 0.5}
    for name, value in _sizes(answer).items():
        for text, number in (
            (name, value),
            (f"1/{name}", 1 / value),
            (f"√{name}", value**0.5),
            (f"1/√{name}", value**-0.5),
            (f"{name}²", value**2),
        ):
            found[text] = number
    return {n: v for n, v in found.items() if abs(v - 1) > 1e-6 and v}


def _sizes(answer: Answer) -> dict[str, float]:
    at, v, found = answer.attributes, answer.inputs, dict[str, float]()
    for key in ("rank", "alpha", "s", "lr"):
        if at.get(key):
            found[key] = float(at[key])
    if "A" in v:
        found["rank"] = len(v["A"])
    config = at.get("config") or {}
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads:
        found |= {
            "H/G": heads / groups,
            "D": config["head_dim"],
            "H": heads,
            "C": config["hidden_size"],
        }
    if "q" in v:
        found |= {
            "H/G": v["q"].shape[2] / v["k"].shape[2],
            "D": v["q"].shape[3],
            "H": v["q"].shape[2],
        }
    main = v.get("x", v.get("q", v.get("gate", v.get("s", v.get("input_ids", v.get("ids"))))))
    if main is not None and main.ndim > 1:
        found |= {"N (the batch)": len(main), "T (the tokens)": main.shape[1]}
        found["N·T (all rows)"] = float(main.shape[0] * main.shape[1])
    if "x" in v:
        found["C"] = v["x"].shape[-1]
    if "w" in v and "labels" in v:
        found["V"] = len(v["w"])
    if "logits" in v:
        found |= {"rows": len(v["logits"]), "V": v["logits"].shape[-1]}
    if "labels" in v:
        targets = v["labels"][:, 1:] if "input_ids" in v else v["labels"]
        found["labels that count"] = float((targets != IGNORED).sum())
    if "dy" in v and v["dy"].ndim == 0:
        found["dloss"] = float(v["dy"])
    return {name: float(value) for name, value in found.items() if value}


def terms_of(answer: Answer, name: str) -> Terms:
    """The terms of a tensor of an op case; none where the op is no sum of them."""
    found = _OF.get(answer.attributes.get("op", ""), _nothing)(answer, name)
    return {n: (t, c) for n, (t, c) in found.items() if t.shape == answer.got[name].shape}


def _nothing(answer: Answer, name: str) -> Terms:
    return {}


def _mean(x: Array) -> Array:
    found: Array = x.mean(axis=-1, keepdims=True)
    return found


def _rmsnorm(answer: Answer, name: str) -> Terms:
    x, w, dy = (answer.inputs[n] for n in ("x", "w", "dy"))
    r = 1 / np.sqrt(_mean(x * x) + answer.attributes["eps"])
    u = dy * w
    if name == "y":
        return {
            "w⊙x/n": (w * x * r, 1),
            "x/n": (x * r, 0),
            "w⊙mean(x)/n": (w * _mean(x) * r, 0),
            "w⊙x": (w * x, 0),
            "x": (x, 0),
        }
    if name == "dw":
        return {
            "Σ dy⊙x/n": (flat(dy * x * r).sum(0), 1),
            "Σ dy": (flat(dy).sum(0), 0),
            "Σ dy⊙x": (flat(dy * x).sum(0), 0),
        }
    return {
        "u/n": (u * r, 1),
        "x·mean(u⊙x)/n³": (x * _mean(u * x) * r**3, -1),
        "mean(u)/n (LayerNorm's mean term)": (np.broadcast_to(_mean(u) * r, x.shape), 0),
        "x·mean(u⊙x)/n⁴ (n⁴ for n³)": (x * _mean(u * x) * r**4, 0),
        "x·mean(u⊙x)/n² (n² for n³)": (x * _mean(u * x) * r**2, 0),
        "x·mean(dy⊙x)/n³ (without the weight)": (x * _mean(dy * x) * r**3, 0),
        "dy/n (without the weight)": (dy * r, 0),
        "dy": (dy, 0),
        "u": (u, 0),
        "x": (x, 0),
    }


def _lora(answer: Answer, name: str) -> Terms:
    v = answer.inputs
    x, w, dy, s = v["x"], v["w"], v["dy"], answer.attributes.get("s", 1.0)
    found: Terms = {}
    branch = "A" in v
    if name == "y":
        found = {"x·Wᵀ": (x @ w.T, 1)}
        if branch:
            found["s·(x·Aᵀ)·Bᵀ (the adapter)"] = (s * (x @ v["A"].T @ v["B"].T), 1)
        if "b" in v:
            found["b (the bias)"] = (np.broadcast_to(v["b"], dy.shape), 1)
    if name == "dx":
        found = {"dy·W (the frozen weight)": (dy @ w, 1)}
        if branch:
            found["s·dy·B·A (the adapter)"] = (s * (dy @ v["B"] @ v["A"]), 1)
    if name == "dA":
        found = {"s·(dy·B)ᵀ·x": (s * flat(dy @ v["B"]).T @ flat(x), 1), "A": (v["A"], 0)}
    if name == "dB":
        found = {"s·dyᵀ·h": (s * flat(dy).T @ flat(x @ v["A"].T), 1), "B": (v["B"], 0)}
    if name == "dw":
        found = {"dyᵀ·x": (flat(dy).T @ flat(x), 1), "W": (w, 0)}
    if name == "db":
        found = {"Σ dy": (flat(dy).sum(0), 1)}
    return found


def _swiglu(answer: Answer, name: str) -> Terms:
    g, u, d = (answer.inputs[n] for n in ("gate", "up", "dy"))
    s = 1 / (1 + np.exp(-g))
    t = np.exp(-np.abs(g)) / (1 + np.exp(-np.abs(g))) ** 2  # σ·(1 − σ), without cancellation
    if name == "y":
        return {"silu(gate)⊙up": (g * s * u, 1), "silu(gate)": (g * s, 0), "gate⊙up": (g * u, 0)}
    if name == "dup":
        return {
            "dz⊙silu(gate)": (d * g * s, 1),
            "dz⊙σ": (d * s, 0),
            "dz⊙gate": (d * g, 0),
            "dz": (d, 0),
        }
    return {
        "dz⊙up⊙σ": (d * u * s, 1),
        "dz⊙up⊙gate·σ·(1 − σ)": (d * u * g * t, 1),
        "dz⊙up⊙gate·σ": (d * u * g * s, 0),
        "dz⊙up⊙gate·σ²": (d * u * g * s * s, 0),
        "dz⊙up⊙σ·(1 − σ)": (d * u * t, 0),
        "dz⊙up": (d * u, 0),
    }


def _softmax(answer: Answer, name: str) -> Terms:
    p, dp = answer.want["y"], answer.inputs["dy"]
    if name == "y":
        return {"p": (p, 1)}
    row = (dp * p).sum(axis=-1, keepdims=True)
    return {
        "p⊙dp": (p * dp, 1),
        "p·Σ p⊙dp": (p * row, -1),
        "p·Σ dp": (p * dp.sum(-1, keepdims=True), 0),
        "p²⊙dp": (p * p * dp, 0),
        "dp": (dp, 0),
        "Σ p⊙dp": (np.broadcast_to(row, p.shape), 0),
    }


def _cross_entropy(answer: Answer, name: str) -> Terms:
    if name != "dlogits":
        return {}
    z, y, dy = (answer.inputs[n] for n in ("logits", "labels", "dy"))
    counted = (y != IGNORED)[:, None]
    share = dy / max(1, int(counted.sum()))
    e = np.exp(z - z.max(-1, keepdims=True))
    p = e / e.sum(-1, keepdims=True)
    lse = np.log(e.sum(-1, keepdims=True)) + z.max(-1, keepdims=True)
    hot = np.eye(z.shape[1])[np.where(counted[:, 0], y, 0)] * counted
    return {
        "softmax/count": (share * p * counted, 1),
        "onehot/count": (share * hot, -1),
        "lse·softmax/count (a z-loss)": (share * lse * p * counted, 0),
        "1/V/count (label smoothing)": (share * counted / z.shape[1] * np.ones_like(z), 0),
        "softmax of ignored rows": (share * p * ~counted, 0),
    }


_OF = {
    "rmsnorm": _rmsnorm,
    "linear": _lora,
    "lora_linear": _lora,
    "swiglu": _swiglu,
    "causal_softmax": _softmax,
    "cross_entropy": _cross_entropy,
}

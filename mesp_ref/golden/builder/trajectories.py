"""traj/: ten steps of SGD, AdamW and MeZO on the LoRA matrices of e2e/tied."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mesp_ref.api import loss, loss_and_grads
from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.model import Model
from mesp_ref.golden.builder.draw import generator, representable, stored
from mesp_ref.golden.builder.emulate import gates
from mesp_ref.golden.builder.models import (
    SOURCE,
    Made,
    assert_agree,
)
from mesp_ref.golden.plain import Arrays, Plain
from mesp_ref.golden.simulate import trajectory
from mesp_ref.golden.suite import Case, Tensor, Vectors
from mesp_ref.ops import Array
from mesp_ref.train.optim import SGD, AdamW

STEPS, SHOWN = 10, (1, 10)
DTYPES = ("float64", "float32")
Optimise = Callable[[Arrays, Callable[[Arrays], tuple[float, Arrays]]], Iterator[float]]

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": (
        "u ← momentum·u + g + wd·w; w ← w − lr·u",
        {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01},
    ),
    "adamw": (
        "m, v with bias correction; w ← w − lr·wd·w − lr·m̂/(√v̂ + eps)",
        {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01},
    ),
    "mezo": (
        "g = (L(θ + eps·z) − L(θ − eps·z))/(2·eps) with z[step] given; θ ← θ − lr·g·z; the loss of "
        "a step is the mean of its two",
        {"lr": 0.001, "eps": 2.0**-7},
    ),
}


def _mezo(w: Arrays, value: Callable[[Arrays], float], z: Arrays, step: int, at: Any) -> float:
    """One MeZO step in place."""
    up, down = (
        value({n: w[n] + side * z[f"z/{n}"][step] for n in w}) for side in (at["eps"], -at["eps"])
    )
    g = (up - down) / (2 * at["eps"])
    for name in w:
        w[name] -= at["lr"] * g * z[f"z/{name}"][step]
    return (up + down) / 2


def _shown(name: str, step: int) -> str:
    return f"{name}.step_{step}"


def _engine(name: str, model: Model, start: Adapter, made: Made, z: Arrays) -> Arrays:
    """The trajectory by the engine and its optimisers."""
    adapter, at = start.astype(np.float64), SETTINGS[name][1]
    ids, labels = made.vectors.inputs["input_ids"], made.vectors.inputs["labels"]
    sgd = SGD(at.get("weight_decay", 0.0), at.get("momentum", 0.0))
    optimiser = AdamW(weight_decay=at["weight_decay"]) if name == "adamw" else sgd
    losses, shown = [], Arrays()

    def value(weights: Arrays) -> float:
        moved = Adapter(adapter.rank, adapter.alpha, adapter.targets, False, weights)
        return loss(model, moved, ids, labels)

    for step in range(STEPS):
        if name == "mezo":
            losses.append(_mezo(adapter.weights, value, z, step, at))
        else:
            found, grads = loss_and_grads(model, adapter, ids, labels)
            optimiser.step(adapter.weights, grads, at["lr"])
            losses.append(found)
        if step + 1 in SHOWN:
            shown |= {_shown(n, step + 1): a.copy() for n, a in adapter.weights.items()}
    return {"loss": np.array(losses)} | shown


def noise(name: str, adapter: Adapter) -> Arrays:
    """The directions of MeZO, one per step and tensor; none for the others."""
    rng = generator(f"traj/{name}")
    if name != "mezo":
        return {}
    return {
        f"z/{key}": representable(rng.standard_normal((STEPS, *array.shape)))
        for key, array in adapter.weights.items()
    }


def make_trajectory(name: str, model: Model, adapter: Adapter, tied: Made) -> Made:
    """Losses of ten steps, and the matrices after the first and the last."""
    z, (note, at) = noise(name, adapter), SETTINGS[name]
    at = at | {"optimizer": name, "steps": STEPS}
    want = _engine(name, model, adapter, tied, z)

    def run(plain: Plain) -> Arrays:
        return trajectory(plain, model, adapter, tied.vectors.inputs | z, at)

    assert_agree(want, run(Plain(tied.setting)), f"traj/{name}")
    drift = gates(want, tied.setting, run, generator(f"traj/{name}/drift"), DTYPES[1:], runs=4)
    tensors = tuple(
        Tensor(
            key, np.shape(value), "result", "forward" if key == "loss" else "backward",
            gates={dtype: float(f"{gate:.3e}") for dtype, gate in drift[key].items()},
        )
        for key, value in want.items()
    )  # fmt: skip
    shared = {key: tied.case.attributes[key] for key in ("config", "model", "adapter", "s")}
    inputs: dict[str, Array] = tied.vectors.inputs | {n: stored(a) for n, a in z.items()}
    case = Case(
        f"traj/{name}", "traj", f"traj/{name}.safetensors", f"ten steps: {note}", SOURCE, DTYPES,
        shared | at, tensors,
    )  # fmt: skip
    return Made(case, Vectors(inputs, want, {}), tied.setting, run)

"""mlp_lora, gelu_mlp_lora: gate, up, SwiGLU or GEGLU, and down, each projection with its adapter."""

from dataclasses import replace
from typing import Any

import numpy as np

from mesp_ref.ops import Array
from mesp_ref.registry import cases, geglu, linear, lora_linear, mlp, swiglu
from mesp_ref.registry.absolute import sigmoid
from mesp_ref.registry.cases import Change, OpCase
from mesp_ref.registry.row import Golden, OpSpec
from mesp_ref.registry.sizes import Args, Sizes
from mesp_ref.registry.twins import Namespace

SMALL = Sizes(n=2, t=3, c=5, f=4, r=2)


def sample(rng: np.random.Generator, z: Sizes, dtype: Any) -> Args:
    """Arguments of half the usual size: gates that a sigmoid does not saturate."""
    drawn = mlp.sample(rng, z, dtype)
    halved = {n: a * 0.5 for n, a in drawn.items() if n not in ("s", "width")}
    return halved | {"s": 0.75}


def _inner(args: Args) -> tuple[Array, Array, Array, Array, Array, Array]:
    """gate and up, their magnitudes, and those of what the gate becomes and of its slope."""
    s, x = args["s"], args["x"]
    (gate, up), (mag_gate, mag_up) = (
        [f(x, args[f"w{c}"], None, args[f"A{c}"], args[f"B{c}"], s) for c in "gu"]
        for f in (_value, lora_linear.output_magnitude)
    )
    if args.get("is_gelu"):
        once = np.ones_like(gate)
        act = geglu.output_magnitude(gate, once)
        slope = geglu.gradient_magnitudes(once, {"gate": gate, "up": once})["gate"]
    else:
        act = swiglu.output_magnitude(gate, np.ones_like(gate))
        slope = sigmoid(gate) * (1 + np.abs(gate)) * swiglu.argument(gate)
    return gate, up, mag_gate, mag_up, act, slope


def _value(x: Array, w: Array, b: None, A: Array, B: Array, s: float) -> Array:
    y: Array = x @ w.T + s * (x @ A.T @ B.T)
    return y


def output_magnitude(x: Array, *, s: float, **given: Any) -> Array:
    """Of down's terms, z with the rounding of gate and up."""
    _, _, mag_gate, mag_up, act, slope = _inner(given | {"x": x, "s": s})
    up = lora_linear.output_magnitude(x, given["wu"], None, given["Au"], given["Bu"], s)
    z = slope * mag_gate * up + act * mag_up
    return lora_linear.output_magnitude(z, given["wd"], None, given["Ad"], given["Bd"], s)


def gradient_magnitudes(dy: Array, args: Args) -> dict[str, Array]:
    """As the row's `magnitude`, with the activation and its slope as commonly computed.

    Both are sums that may cancel in the usual formula (see swiglu and geglu), which is no mistake.
    """
    given = {n: v for n, v in args.items() if n not in ("is_gelu", "width")}
    _, _, mag_gate, mag_up, act, slope = _inner(args)
    found, s = dict[str, Array](), args["s"]
    _, res = mlp.reference(**given, is_gelu=bool(args.get("is_gelu")))
    rg, ru, rz, rd = res
    _, true_slope, bend = mlp.activation(rz)
    dz = lora_linear.magnitude(np.abs(dy), rd, args["wd"], None, args["Ad"], args["Bd"], s=s)[0]
    z = np.maximum(slope, true_slope) * mag_gate * mag_up + act * mag_up
    dgate = dz * (np.maximum(slope, true_slope) * mag_up + bend * mag_gate * mag_up)
    dup = dz * (act + true_slope * mag_gate)
    found["x"] = np.zeros_like(args["x"])
    for c, d, r in (("g", dgate, rg), ("u", dup, ru), ("d", np.abs(dy), rd._replace(x=z))):
        w, A, B = (args[f"{kind}{c}"] for kind in "wAB")
        dx, found[f"A{c}"], found[f"B{c}"] = lora_linear.magnitude(d, r, w, None, A, B, s=s)
        found["x"] = found["x"] + (dx if c != "d" else 0)
        found[f"w{c}"] = linear.magnitude_params(d, r, w)[0]
    return {name: found[name] for name in ROW.differentiable}


def torch_twin(torch: Any, x: Any, *, s: float, is_gelu: bool = False, **given: Any) -> Any:
    def layer(x: Any, c: str) -> Any:
        return lora_linear.torch_twin(torch, x, given[f"w{c}"], given[f"A{c}"], given[f"B{c}"], s)

    gated = (geglu if is_gelu else swiglu).torch_twin(torch, layer(x, "g"), layer(x, "u"))
    return layer(gated, "d")


def functional_twin(fw: Namespace, x: Any, *, s: float, is_gelu: bool = False, **given: Any) -> Any:
    def layer(x: Any, c: str) -> Any:
        return lora_linear.functional_twin(fw, x, given[f"w{c}"], given[f"A{c}"], given[f"B{c}"], s)

    gated = (geglu if is_gelu else swiglu).functional_twin(fw, layer(x, "g"), layer(x, "u"))
    return layer(gated, "d")


def _gelu(change: Change) -> Change:
    """The case with GELU in the place of SiLU."""
    return lambda args: change(args) | {"is_gelu": True}


CASES = (
    OpCase("usual", "rank 2, s = 0.75", SMALL),
    OpCase("rank_1", "rank 1", SMALL._replace(n=1, r=1)),
    OpCase("fresh", "B = 0: the output is the base's, dA exactly 0", SMALL._replace(n=1),
           cases.put(Bg=0.0, Bu=0.0, Bd=0.0)),
    OpCase("one_token", "one row", SMALL._replace(n=1, t=1)),
)  # fmt: skip


def roundings(forward: int, backward: int, up: int) -> dict[str, int]:
    """Of every tensor as stored one after the other; those of the gate itself, dgate and dup are given.

    A layer rounds 5 times, its dx 5, dA and dB 3, dW once; gate and up enter each gradient rounded.
    """
    z, dgate, dup = 5 + forward, 5 + backward + 5, 5 + up + 5
    found = {"y": z + 5, "dx": dgate + 5 + 1}
    for c, before in (("g", dgate), ("u", dup), ("d", z)):
        found |= {f"dA{c}": before + 3, f"dB{c}": before + 3, f"dw{c}": before + 1}
    return found


def _row(name: str, gate: Golden, cases: tuple[OpCase, ...]) -> OpSpec:
    found = gate.roundings
    return replace(
        mlp.TILED,
        name=name,
        sample=sample,
        golden=Golden(
            cases=cases,
            roundings=roundings(found["y"], found["dgate"], found["dup"]),
            forward_length=lambda z: 2 * (z.c + 2 * z.r) + z.f,
            output_magnitude=output_magnitude,
            gradient_magnitudes=gradient_magnitudes,
            torch=torch_twin,
            functional=functional_twin,
        ),
    )


assert swiglu.ROW.golden
assert geglu.ROW.golden
ROW = _row("mlp_lora", swiglu.ROW.golden, CASES)
GELU = _row(
    "gelu_mlp_lora",
    geglu.ROW.golden,
    tuple(case._replace(change=_gelu(case.change)) for case in CASES),
)

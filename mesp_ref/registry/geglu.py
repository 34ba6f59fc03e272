"""geglu: z = gelu(gate)·up, GELU in its tanh form."""

from typing import Any

import numpy as np

from mesp_ref import ops
from mesp_ref.ops import Array
from mesp_ref.registry import cases, swiglu
from mesp_ref.registry.absolute import sigmoid
from mesp_ref.registry.cases import ONE_TOKEN, OpCase
from mesp_ref.registry.exact import array, pi, sqrt, tanh
from mesp_ref.registry.row import Golden, OpSpec
from mesp_ref.registry.sizes import Args
from mesp_ref.registry.twins import Namespace

_ROOT = (2 / np.pi) ** 0.5


def equation(gate: Array, up: Array) -> Array:
    """z = gate/2·(1 + tanh(√(2/π)·(gate + 0.044715·gate³)))·up"""

    def entry(*at: int) -> Any:
        g = gate[at]
        cube = 44715 * g * g * g / 1_000_000
        return g / 2 * (1 + tanh(sqrt(2 / pi()) * (g + cube))) * up[at]

    return array(gate.shape, entry)


def _turn(gate: Array) -> tuple[Array, Array]:
    """|2u| and 2u′."""
    square = 0.044715 * gate * gate
    return 2 * _ROOT * np.abs(gate) * (1 + square), 2 * _ROOT * (1 + 3 * square)


def magnitude(dz: Array, res: Any) -> tuple[Array, Array]:
    """σ(2u) has the relative rounding of 2u times |2u|·σ(−2u); its slope's that times |2u|."""
    gate, (turn, slope) = np.abs(res.gate), _turn(res.gate)
    signed = np.sign(res.gate) * turn
    sig, rest = sigmoid(signed), sigmoid(-signed)
    gelu = sig * (1 + turn * rest)
    return np.abs(dz * res.up) * (gelu + gate * sig * rest * slope * (1 + turn)), (
        np.abs(dz) * gate * gelu
    )


def output_magnitude(gate: Array, up: Array) -> Array:
    """Of (1 + tanh)/2, in which digits cancel where the gate is negative."""
    return np.abs(up) * _usual(gate)[0]


def _usual(gate: Array) -> tuple[Array, Array]:
    """mag of gelu, and of its slope, where tanh is formed and 1 added."""
    turn, slope = _turn(gate)
    t = np.abs(np.tanh(turn / 2))
    sech = 1 - t * t
    half = (1 + t + sech * turn / 2) / 2
    bend = np.abs(gate) * slope / 4 * (1 + t * t + t * sech * turn)
    return np.abs(gate) * half, half + bend


def gradient_magnitudes(dy: Array, args: Args) -> dict[str, Array]:
    """The slope as commonly computed, of (1 + tanh)/2 and 1 − tanh²."""
    gelu, slope = _usual(args["gate"])
    return {"gate": np.abs(dy * args["up"]) * slope, "up": np.abs(dy) * gelu}


def torch_twin(torch: Any, gate: Any, up: Any) -> Any:
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


def functional_twin(fw: Namespace, gate: Any, up: Any) -> Any:
    u = _ROOT * (gate + 0.044715 * gate * gate * gate)
    return 0.5 * gate * (1 + fw.xp.tanh(u)) * up


def _ramp(args: Args) -> Args:
    return args | {"gate": np.linspace(-20, 20, args["gate"].size).reshape(args["gate"].shape)}


CASES = (
    OpCase("usual", "ordinary gates"),
    OpCase("saturated", "gates from −20 to 20", change=_ramp, dtypes=cases.WIDE),
    OpCase("zero_gate", "gate = 0: z = 0, dgate = up/2", change=cases.put(gate=0.0)),
    OpCase("large", "gates of ±4", change=cases.times(gate=2.0)),
    OpCase("tiny", "gates of 1e-4", change=cases.times(gate=2.0**-13), dtypes=cases.NO_HALF),
    OpCase("one_token", "one row", ONE_TOKEN),
)

ROW = OpSpec(
    name="geglu",
    forward=ops.geglu,
    backward=ops.geglu_bwd,
    activations=("gate", "up"),
    droppable=("gelu",),
    sample=swiglu.sample,
    reduction_length=lambda z: 1,
    equation=equation,
    magnitude=magnitude,
    golden=Golden(
        cases=CASES,
        roundings={"y": 9, "dgate": 14, "dup": 9},
        forward_length=lambda z: 1,
        output_magnitude=output_magnitude,
        gradient_magnitudes=gradient_magnitudes,
        torch=torch_twin,
        functional=functional_twin,
    ),
)

"""swiglu: z = silu(gate)·up."""

from typing import Any

import numpy as np

from mesp_ref import ops
from mesp_ref.ops import Array
from mesp_ref.registry import cases
from mesp_ref.registry.absolute import sigmoid
from mesp_ref.registry.cases import ONE_TOKEN, OpCase
from mesp_ref.registry.draw import normal
from mesp_ref.registry.exact import array, exp
from mesp_ref.registry.row import Golden, OpSpec
from mesp_ref.registry.sizes import Args, Sizes
from mesp_ref.registry.twins import Namespace


def sample(rng: np.random.Generator, z: Sizes, dtype: Any) -> Args:
    gate = normal(rng, dtype, z.n, z.t, z.f)
    return {"gate": gate, "up": normal(rng, dtype, z.n, z.t, z.f)}


def equation(gate: Array, up: Array) -> Array:
    """z = gate/(1 + exp(−gate))·up"""
    return array(gate.shape, lambda *at: gate[at] / (1 + exp(-gate[at])) * up[at])


def magnitude(dz: Array, res: Any) -> tuple[Array, Array]:
    gate, sig = np.abs(res.gate), sigmoid(res.gate)
    slope = sig + gate * sig * sigmoid(-res.gate)
    return np.abs(dz * res.up) * slope, np.abs(dz) * gate * sig


def argument(gate: Array) -> Array:
    """1 + |gate|·σ(−gate)/3: a sigmoid whose exponential rounds its argument is off by |gate|·u.

    A product with log₂e in one float32 (MLX, tinygrad) does so. Three roundings are counted, of
    which this is one.
    """
    factor: Array = 1 + np.abs(gate) * sigmoid(-gate) / 3
    return factor


def output_magnitude(gate: Array, up: Array) -> Array:
    e = np.exp(-np.abs(gate))
    return np.abs(gate * up) * np.where(gate >= 0, 1, e) / (1 + e) * argument(gate)


def gradient_magnitudes(dy: Array, args: Args) -> dict[str, Array]:
    """silu's slope as commonly computed.

    Ours forms 1 − σ without cancellation; σ + gate·σ·(1 − σ) as written rounds like σ·(1 + |gate|),
    and that is no mistake.
    """
    gate = args["gate"]
    sig = 1 / (1 + np.exp(-gate))
    mag_gate = np.abs(dy * args["up"]) * sig * (1 + np.abs(gate)) * argument(gate)
    found = ROW.magnitudes(dy, args)
    return {"gate": mag_gate, "up": found["up"] * argument(gate)}


def torch_twin(torch: Any, gate: Any, up: Any) -> Any:
    return torch.nn.functional.silu(gate) * up


def functional_twin(fw: Namespace, gate: Any, up: Any) -> Any:
    return fw.silu(gate) * up


def _ramp(args: Args) -> Args:
    return args | {"gate": np.linspace(-80, 80, args["gate"].size).reshape(args["gate"].shape)}


CASES = (
    OpCase("usual", "ordinary gates"),
    OpCase("saturated", "gates from −80 to 80", change=_ramp, dtypes=cases.WIDE),
    OpCase("zero_gate", "gate = 0: z = 0, dgate = up/2", change=cases.put(gate=0.0)),
    OpCase("large", "gates of ±8", change=cases.times(gate=4.0)),
    OpCase("tiny", "gates of 1e-4", change=cases.times(gate=2.0**-13), dtypes=cases.NO_HALF),
    OpCase("one_token", "one row", ONE_TOKEN),
)

ROW = OpSpec(
    name="swiglu",
    forward=ops.swiglu,
    backward=ops.swiglu_bwd,
    activations=("gate", "up"),
    droppable=("silu",),
    sample=sample,
    reduction_length=lambda z: 1,
    equation=equation,
    magnitude=magnitude,
    golden=Golden(
        cases=CASES,
        roundings={"y": 3, "dgate": 6, "dup": 3},
        forward_length=lambda z: 1,
        output_magnitude=output_magnitude,
        gradient_magnitudes=gradient_magnitudes,
        torch=torch_twin,
        functional=functional_twin,
    ),
)

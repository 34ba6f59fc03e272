"""Whole steps as subjects: every method, place of checkpoints, number of workers and of tiles.

What they compute is known from elsewhere: the loss by the plain forward, alone and in one piece, and
its derivative by complex step of that forward. So a part that is lost in forward and backward alike
is seen, too.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from mesp_ref.ops import IGNORED, Array
from mesp_ref.registry import Args
from mesp_ref.verify.result import Finding, misfit, scalar
from mesp_ref.verify.samples import (
    FAMILY_SIZES,
    sample_adapter,
    sample_batch,
    sample_model,
    small_config,
)
from mesp_ref.verify.subject import Arrays, Subject
from mesp_ref.verify.whole_model import model_subject, run_step

GATE = 1e-13  # relative, of a whole model


@dataclass(frozen=True)
class Case:
    """A step: how it is run, what is changed of small_config, its batch and its adapter."""

    options: Args
    shape: tuple[int, int] = (2, 6)
    config: Args | None = None
    targets: Any = "all"  # None: no adapter
    ignored: bool = True  # a third of the labels


def _case(
    method: str, place: str = "ram", workers: int = 1, chunk: int | None = None, **changed: Any
) -> Case:
    options = {"method": method, "checkpoints": place, "workers": workers, "chunk": chunk}
    return Case(options, **changed)


# Axis lengths that no tile divides: tiles of queries have at most 64, of the MLP's columns 640 (384
# for several workers), of the vocabulary 1000 (parts of it share them, down to 256).
_TILES = {"vocab_size": 1003, "intermediate_size": 1301, "hidden_size": 3, "num_hidden_layers": 1}
_ONE_TILE = {**_TILES, "vocab_size": 601, "intermediate_size": 501}  # and not a full one
_HEADS = {**_TILES, "num_attention_heads": 6, "num_key_value_heads": 3}  # not to be halved
_UNTIED: Args = {"tie_word_embeddings": False}
_NARROW = _UNTIED | {"intermediate_size": 200}  # no group of 128 columns for each of three workers
_ROWS: Args = {  # 256 for each of two workers
    "shape": (3, 190), "ignored": False, "config": {"hidden_size": 3, "num_hidden_layers": 1},
}  # fmt: skip

CASES: dict[str, Case] = {
    "store_all": _case("store_all"),
    "store_all/untied": _case("store_all", config=_UNTIED),
    "mesp": _case("mesp"),
    "mesp/some_projections": _case("mesp", targets=("q_proj", "down_proj"), shape=(3, 5)),
    "mesp/two_workers": _case("mesp", workers=2, shape=(3, 7)),
    "mebp/disk": _case("mebp", "disk", config=_UNTIED),
    "mebp/no_adapter": _case("mebp", targets=None),
    "mesp_tiled": _case("mesp_tiled"),
    "mesp_tiled/disk": _case("mesp_tiled", "disk", config=_UNTIED),
    "mesp_tiled/offload": _case("mesp_tiled", "offload"),
    "mesp_tiled/some_projections": _case("mesp_tiled", targets=("gate_proj", "v_proj")),
    "mesp_tiled/no_adapter": _case("mesp_tiled", targets=None),
    "mesp_tiled/three_workers": _case("mesp_tiled", workers=3, config=_NARROW),
    "mesp_tiled/two_workers": _case(
        "mesp_tiled", "offload", 2, shape=(3, 5), config={"intermediate_size": 2}
    ),
    "tiles/one": _case("mesp_tiled", config=_ONE_TILE, shape=(1, 40)),
    "tiles/several": _case("mesp_tiled", config=_TILES, shape=(1, 70)),
    "tiles/two_workers": _case("mesp_tiled", "disk", 2, config=_HEADS, shape=(1, 70)),
    "mesp_streamed": _case("mesp_streamed", "ram"),
    "mesp_streamed/chunks": _case("mesp_streamed", "disk", chunk=4, config=_UNTIED),
    "mesp_streamed/sequences": _case("mesp_streamed", "ram", chunk=13, shape=(5, 6), targets=None),
    "mesp_streamed/keys": _case(
        "mesp_streamed", "disk", chunk=3, shape=(1, 8), targets=("q_proj", "up_proj")
    ),
    "mesp_streamed/one_label": _case("mesp_streamed", chunk=1, shape=(1, 2)),
    "mesp_streamed/two_workers": _case(
        "mesp_streamed", "disk", 2, chunk=5, shape=(2, 9), config={"num_key_value_heads": 2}
    ),
    "rows/mesp": _case("mesp", workers=2, **_ROWS),
    "rows/mesp_tiled": _case("mesp_tiled", "offload", 2, **_ROWS),
    "llama/mesp": _case("mesp", workers=2, config=FAMILY_SIZES["llama"]),
    "smollm3/mesp": _case("mesp", config=FAMILY_SIZES["smollm3"]),
    "qwen3/mesp": _case("mesp", config=FAMILY_SIZES["qwen3"]),
    "qwen3/two_workers": _case("mesp_tiled", "offload", 2, config=FAMILY_SIZES["qwen3"]),
    "gemma3/store_all": _case("store_all", config=FAMILY_SIZES["gemma3"] | _UNTIED),
    "gemma3/mesp": _case("mesp", config=FAMILY_SIZES["gemma3"]),
    "gemma3/mesp_tiled": _case("mesp_tiled", config=FAMILY_SIZES["gemma3"]),
    "gemma3/disk": _case("mesp_tiled", "disk", config=FAMILY_SIZES["gemma3"]),
    "gemma3/two_workers": _case("mesp_tiled", "offload", 2, config=FAMILY_SIZES["gemma3"]),
    "gemma3/chunks": _case(
        "mesp_streamed", "disk", chunk=3, shape=(1, 8), config=FAMILY_SIZES["gemma3"]
    ),
}


class Step:
    """A case with its subject: magnitudes are those of the right code, whatever is planted later."""

    def __init__(self, case: Case):
        rng = np.random.default_rng(7)
        config = small_config(**(case.config or {}))
        self.model = sample_model(rng, config)
        self.adapter = case.targets and sample_adapter(rng, config, targets=case.targets)
        self.ids, self.labels = sample_batch(rng, config, case.shape)
        if not case.ignored:
            self.labels = self.ids.copy()
            self.labels[0, 1:3] = IGNORED  # an odd number is left
        self.options = case.options
        given = self.model, self.adapter, self.ids, self.labels
        self.subject = measured(model_subject(*given, **case.options))

    def run(self) -> tuple[Any, dict[str, Array]]:
        """Loss and gradients; each block's parameters are overwritten once its own are there."""
        point = {name: self.subject.args[name].copy() for name in self.subject.differentiable}
        given = self.model, self.adapter, self.ids, self.labels
        return run_step(*given, point, overwrite=True, trainable="all", **self.options)


def measured(subject: Subject) -> Subject:
    """The subject with the magnitudes of the right code, whatever is planted later."""
    mags = subject.magnitude((np.ones(()),), subject.args)

    def magnitude(dys: Arrays, args: Args) -> dict[str, Array]:
        return {name: np.abs(dys[0]) * mag for name, mag in mags.items()}

    return replace(subject, magnitude=magnitude)


@cache
def step(name: str) -> Step:
    """The case of that name; made once, before anything is planted."""
    return Step(CASES[name])


def joint(subject: Subject, rng: np.random.Generator) -> Subject:
    """A subject along one random direction in all its arguments at once: a function of one number."""
    v = {name: rng.standard_normal(subject.args[name].shape) for name in subject.differentiable}

    def along(args: Args) -> Args:
        return subject.args | {name: subject.args[name] + args["t"] * v[name] for name in v}

    def forward(args: Args) -> Arrays:
        return subject.forward(along(args))

    def backward(dys: Arrays, args: Args) -> dict[str, Array]:
        grads = subject.backward(dys, along(args))
        for name in v:
            wrong = misfit(grads[name], subject.args[name])
            if wrong is not None:
                raise ValueError(f"{name}: {wrong}")
        return {"t": np.asarray(sum((grads[name] * v[name]).sum() for name in v))}

    def magnitude(dys: Arrays, args: Args) -> dict[str, Array]:
        mags = subject.magnitude(dys, along(args))
        return {"t": np.asarray(sum((mags[name] * np.abs(v[name])).sum() for name in v))}

    point: Args = {"t": np.zeros(())}
    return Subject(subject.name, point, ("t",), forward, backward, magnitude)


def value(name: str) -> Finding:
    """The loss that a step says, against that of the plain forward."""
    subject = step(name).subject
    (expected,) = subject.forward(subject.args)
    loss, _ = step(name).run()
    meaning = "Expected is the loss by the plain forward."
    return scalar(
        "value", name, "(the value)", loss, expected, GATE * abs(float(expected)), meaning
    )

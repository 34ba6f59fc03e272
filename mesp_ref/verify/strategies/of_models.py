"""Op cases, configurations, models, adapters and batches of mesp_ref."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from mesp_ref.engine.adapter import Adapter
from mesp_ref.engine.config import PROJECTIONS, Qwen2Config
from mesp_ref.engine.init import init_lora
from mesp_ref.engine.model import Model
from mesp_ref.ops import Array
from mesp_ref.registry import Args, OpSpec, Sizes
from mesp_ref.verify.samples import sample_model
from mesp_ref.verify.strategies.arrays import LARGE, ORDINARY, TINY, generators, labels, seeds


def sizes(largest: int = 4) -> st.SearchStrategy[Sizes]:
    """Axis lengths from 1: one head, one token, one channel, odd and even, with and without cache."""
    one = st.integers(1, largest)
    return st.builds(
        Sizes, n=st.integers(1, 2), t=st.integers(1, largest + 1), past=st.integers(0, 2), c=one,
        g=st.integers(1, 2), share=st.integers(1, 3), d=st.sampled_from([2, 4, 6]), f=one,
        v=st.integers(1, largest + 2), r=st.integers(1, 3),
    )  # fmt: skip


@st.composite
def op_cases(
    draw: st.DrawFn,
    spec: OpSpec,
    dtype: Any = "float64",
    scales: Sequence[float] = (ORDINARY, TINY, LARGE),
    largest: int = 4,
) -> Args:
    """Arguments of a registry row: drawn shapes, activations of a drawn scale, optional ones gone."""
    args = spec.sample(draw(generators()), draw(sizes(largest)), dtype)
    scale = np.dtype(dtype).type(draw(st.sampled_from(list(scales))))
    args |= {name: args[name] * scale for name in spec.activations}
    for name in spec.optional:
        if draw(st.booleans()):
            args[name] = None
    return args


@st.composite
def configs(draw: st.DrawFn, layers: int = 2) -> Qwen2Config:
    """Small models: one key/value head or several, H = G or not, tied or not, D apart from C/H."""
    groups = draw(st.integers(1, 2))
    return Qwen2Config(
        vocab_size=draw(st.integers(2, 9)),
        hidden_size=draw(st.integers(1, 7)),
        intermediate_size=draw(st.integers(1, 6)),
        num_hidden_layers=draw(st.integers(1, layers)),
        num_attention_heads=groups * draw(st.integers(1, 3)),
        num_key_value_heads=groups,
        head_dim=draw(st.sampled_from([2, 4])),
        rms_norm_eps=1e-2,
        rope_theta=100.0,
        tie_word_embeddings=draw(st.booleans()),
    )


@st.composite
def models(draw: st.DrawFn, layers: int = 2, dtype: Any = "float64") -> Model:
    """A model of a drawn configuration in which nothing is zero or one: norms and biases too."""
    return sample_model(draw(generators()), draw(configs(layers)), dtype)


@st.composite
def adapters(draw: st.DrawFn, config: Qwen2Config, dtype: Any = "float64") -> Adapter:
    """A LoRA adapter with B ≠ 0 of drawn rank, scale and targets."""
    targets = draw(st.lists(st.sampled_from(list(PROJECTIONS)), min_size=1, unique=True))
    return init_lora(
        config,
        rank=draw(st.integers(1, 3)),
        alpha=draw(st.sampled_from([1.0, 0.5])),
        targets=targets,
        seed=draw(seeds),
        b_std=0.2,
        use_rslora=draw(st.booleans()),
        dtype=dtype,
    )


@st.composite
def batches(draw: st.DrawFn, config: Qwen2Config, tokens: int = 5) -> tuple[Array, Array]:
    """Token ids [N, T] and labels with some, none or all ignored."""
    shape = draw(st.integers(1, 2)), draw(st.integers(1, tokens))
    ids = draw(generators()).integers(0, config.vocab_size, shape)
    return ids, draw(labels(shape, config.vocab_size))

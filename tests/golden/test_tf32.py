"""What an H200 gave in float32 where its products read TF32; nothing else is called so."""

from pathlib import Path

import numpy as np
import pytest

from mesp_ref.golden import Suite
from mesp_ref.golden.check import judge
from mesp_ref.golden.explain import explain
from mesp_ref.golden.plain import Plain
from mesp_ref.golden.simulate import simulator
from mesp_ref.golden.suite import read_tensors
from mesp_ref.golden.tf32 import cut, nearest
from mesp_ref.ops import Array

# Answers of NVIDIA H200s: flash_attn's and fla's kernels compiled by triton 3.6, torch 2.11 with
# allow_tf32, jax 0.11.2 as it comes; all tensors that they give.
HERE = Path(__file__).parent / "h200"
ANSWERS = {
    "triton_attention_one_pair": ("ops/attention/one_pair", "cut off"),
    "triton_masked_attention_documents": ("ops/masked_attention/documents", "cut off"),
    "torch_lora_linear_usual": ("ops/lora_linear/usual", "rounded"),
    "torch_block_usual": ("block/usual", "rounded"),
    "jax_block_llama": ("block/llama", "rounded"),
}


def said(suite: Suite, name: str, got: dict[str, Array]) -> list[str]:
    case, vectors = suite.cases[name], suite.read(suite.cases[name])
    given = [tensor for tensor in case.tensors if tensor.name in got]
    failed = [t for t in given if not judge(t, got[t.name], vectors, "float32").passed]
    assert failed
    return explain(suite, case, vectors, got, "float32", failed)


@pytest.mark.parametrize("file", ANSWERS)
def test_what_a_gpu_gave_is_named(file: str, suite: Suite) -> None:
    name, how = ANSWERS[file]
    (text,) = said(suite, name, read_tensors(HERE / f"{file}.safetensors"))
    assert text.startswith("like: products of matrices in TF32")
    assert how in text


class Halves(Plain):
    """A block that stores what it keeps in float16, which has as many digits as TF32."""

    def keep(self, name: str, value: Array) -> Array:
        return super().keep(name, value.astype(np.float16).astype(value.dtype))


def test_errors_as_large_are_something_else(suite: Suite) -> None:
    """Noise of 2^-11 on every tensor, and a block of float16 tensors."""
    case, vectors = suite.cases["block/usual"], suite.read(suite.cases["block/usual"])
    rng, run = np.random.default_rng(1), simulator(case, vectors.inputs, suite.root)
    assert run is not None
    noise = {t.name: 1 + rng.uniform(-1, 1, t.shape) / 2048 for t in case.tensors}
    for found in ({n: vectors.want[n] * by for n, by in noise.items()}, run(Halves)):
        got = {t.name: found[t.name].astype(np.float32) for t in case.tensors}
        assert not any("TF32" in text for text in said(suite, case.name, got))


def test_rounding_to_tf32() -> None:
    """Ties to even and the numbers beside them; cut goes toward 0. By the definition: steps of 2^-10."""
    step = 2.0**-10
    ties = np.array([1 + step / 2, 1 + 3 * step / 2, -1 - step / 2], np.float32)
    beside = np.array([1 + step / 2 + 2.0**-23, 1 + step / 2 - 2.0**-23, 2 - 2.0**-23], np.float32)
    assert nearest(ties).tolist() == [1, 1 + 2 * step, -1]
    assert nearest(beside).tolist() == [1 + step, 1, 2]
    assert cut(ties).tolist() == [1, 1 + step, -1]
    assert cut(beside).tolist() == [1, 1, 2 - step]
    assert (
        nearest(np.zeros(2, np.float32)).tolist() == cut(np.zeros(2, np.float32)).tolist() == [0, 0]
    )

"""The answers to the notebooks' questions, held against what they are about, not against themselves."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mesp_ref as mr
from mesp_ref import learn, ops
from mesp_ref.engine.block import block, block_bwd
from mesp_ref.engine.config import Qwen2Config
from mesp_ref.engine.positions import layers
from mesp_ref.lean.chunks import file_size
from mesp_ref.learn.exercises import QUESTIONS, wiring
from mesp_ref.memory import Shapes, peak
from mesp_ref.verify.bugs import BUGS
from mesp_ref.verify.planted import planted

F64 = np.dtype(np.float64)
RNG = np.random.default_rng(0)
QWEN = Qwen2Config(151936, 896, 4864, 24, 14, 2, 64)
SMALL = Qwen2Config(64, 24, 40, 3, 6, 2, 8)
SIZES = {"H": 14, "G": 2, "D": 64, "C": 896, "F": 4864}


def truth(name: str) -> Any:
    return learn.find(name).function


def complex_step(f: Any, x: Any, dy: Any) -> Any:
    """⟨dy, f⟩ derived by every entry of x."""
    x, found = np.asarray(x, complex), np.zeros(np.shape(x))
    for at in np.ndindex(x.shape):
        moved = x.copy()
        moved[at] += 1e-30j
        found[at] = np.sum(dy * f(moved)).imag / 1e-30
    return found


def test_one_derivative() -> None:
    for w, x in ((1.0, 2.0), (-0.3, 1.7)):
        expected = complex_step(lambda v, x=x: np.log(1 + np.exp(-v * x)), w, 1.0)
        assert truth("logistic_bwd")(w, x) == pytest.approx(float(expected), rel=1e-14)


def layernorm(x: Any, w: Any, eps: float) -> Any:
    c = x - x.mean(-1, keepdims=True)
    return w * c / np.sqrt((c * c).mean(-1, keepdims=True) + eps)


def outside(x: Any, w: Any, eps: float) -> Any:
    return w * x / (np.sqrt((x * x).mean(-1, keepdims=True)) + eps)


@pytest.mark.parametrize(
    ("name", "forward"), [("layernorm_bwd", layernorm), ("eps_outside_bwd", outside)]
)
def test_norms(name: str, forward: Any) -> None:
    dy, x = RNG.standard_normal((2, 3, 5))
    w = RNG.standard_normal(5)
    expected = complex_step(lambda x: forward(x, w, 0.3), x, dy)
    assert np.allclose(truth(name)(dy, x, w, eps=0.3), expected, rtol=1e-13, atol=1e-14)


def test_the_blind_spot() -> None:
    z, dy = RNG.standard_normal((2, 6))
    p = np.exp(z) / np.exp(z).sum()
    expected = complex_step(lambda z: np.exp(z) / np.exp(z).sum(), z, dy)
    assert truth("blind_spot")(dy, p) == pytest.approx(np.linalg.norm(expected), rel=1e-12)
    assert truth("blind_spot")(np.ones(6), p) < 1e-15


def test_where_eps_is_noticed() -> None:
    for rtol, eps in ((1e-4, 1e-6), (0.2, 1e-3)):
        size = truth("eps_noticed")(rtol, eps)
        off = [np.sqrt(s * s + eps) / s - 1 for s in (0.999 * size, 1.001 * size)]
        assert off[0] > rtol > off[1]


PLANTED = {
    "the residual path of the MLP": "block: MLP residual path dropped",
    "the residual path of attention": "block: attention residual path dropped",
    "the slope of silu": "swiglu: second term missing",
    "the row sum of softmax": "softmax: row sum missing",
    "dn of k_proj": "block: first of q, k, v only",
}


def block_grads(edited: dict[str, Any]) -> dict[str, Any]:
    rng = np.random.default_rng(4)
    model = mr.load_model(dtype="float64")
    layer = layers(model, mr.init_lora(model.config, rank=2, b_std=0.1, dtype="float64"), 0, 6)[1]
    _, res = block(rng.standard_normal((2, 6, model.config.hidden_size)), layer)
    with planted(edited):
        return block_bwd(rng.standard_normal((2, 6, model.config.hidden_size)), res, layer)[1]


def test_what_a_bug_touches() -> None:
    """Planted in the engine: the gradients that stay right are those that the answer names."""
    right = block_grads({})

    for place in wiring.PLACES:
        edited = BUGS[PLANTED[place]].functions() if place in PLANTED else _dq_kept()
        found = block_grads(edited)
        wrong = {n for n in right if not np.allclose(found[n], right[n], rtol=1e-9)}
        wrong = {part for n in wrong for part in n.split(".") if part.endswith("_proj")}
        assert set(wiring.PROJECTIONS) - wrong == truth("stays_right")(place), place


def _dq_kept() -> dict[str, Any]:
    """The kill table's bug of dk, of dq."""
    bug = BUGS["block: dk not rotated back"]
    ((path, old, new),) = bug.edits
    return bug._replace(edits=((path, old, new.replace('"q"', '"k"')),)).functions()


def test_biases() -> None:
    x = RNG.standard_normal((2, 5, 7))
    shapes = {"q": (6, 4), "k": (2, 4), "v": (2, 4)}
    w = {n: RNG.standard_normal((h * d, 7)) for n, (h, d) in shapes.items()}
    dy = {n: RNG.standard_normal((2, 5, h, d)) for n, (h, d) in shapes.items()}
    cos, sin = ops.rope_tables(0, 5, 4, 100.0, F64)
    found = truth("qkv_bias_bwd")(dy["q"], dy["k"], dy["v"], cos, sin)
    for (name, (heads, d)), got in zip(shapes.items(), found, strict=True):

        def forward(b: Any, name: str = name, heads: int = heads, d: int = d) -> Any:
            y = (x @ w[name].T + b).reshape(2, 5, heads, d)
            return y if name == "v" else ops.rope(y, cos, sin)[0]

        assert np.allclose(got, complex_step(forward, np.zeros(heads * d), dy[name]), rtol=1e-12)


def test_the_order_of_rope() -> None:
    for d in (2, 6, 64):
        x, (cos, sin) = RNG.standard_normal((1, 3, 2, d)), ops.rope_tables(0, 3, d, 1e4, F64)
        order = truth("rope_order")(d)
        even, odd = x[..., order][..., ::2], x[..., order][..., 1::2]
        c, s = cos[:, None], sin[:, None]
        beside = np.stack([even * c - odd * s, odd * c + even * s], -1).reshape(x.shape)
        assert np.array_equal(beside, ops.rope(x, cos, sin)[0][..., order])


def test_averaged_heads() -> None:
    right, found = block_grads({}), block_grads(BUGS["gqa: mean for sum"].functions())
    config = mr.load_model().config
    factors = truth("averaged_heads")(config.num_attention_heads, config.num_key_value_heads)
    assert factors["k_proj"] < 1
    for name, factor in factors.items():
        for n in (n for n in right if name in n):
            assert np.allclose(found[n], factor * right[n], rtol=1e-9), n


def test_counts_of_lora() -> None:
    shapes = Shapes(QWEN, tokens=100, rank=3, itemsize=2)
    h = 24 * shapes.h(shapes.targets)
    assert truth("rank_of_h")(h, 24, 100, 2) == pytest.approx(3)
    assert truth("block_grads")(3, **SIZES, itemsize=2) == shapes.lora(shapes.targets)
    names = [n for n in QWEN.weight_shapes() if ".0." in n and "_proj.weight" in n]
    whole = sum(np.prod(QWEN.weight_shapes()[n]) for n in names)
    per_rank = shapes._replace(rank=1, itemsize=1)
    assert len(names) == 7
    assert truth("equal_rank")(**SIZES) == pytest.approx(whole / per_rank.lora(shapes.targets))


def test_bytes_of_a_step() -> None:
    for config, tokens in ((QWEN, 256), (SMALL, 40)):
        layers, c = config.num_hidden_layers, config.hidden_size
        heads = {"H": config.num_attention_heads, "G": config.num_key_value_heads}
        expected = file_size(config, 1, 4)
        assert (
            truth("streamed_bytes")(layers, **heads, D=config.head_dim, C=c, itemsize=4) == expected
        )
        plain, disk = (
            peak("mesp_tiled", Shapes(config, tokens=tokens, disk=d)) for d in (False, True)
        )
        assert truth("checkpoint_bytes")(layers, 1, tokens, c, 4) == plain.total - disk.total
    t = truth("equal_length")(**SIZES)
    assert 14 * t * t == pytest.approx(2 * t * 4864)


def test_lora() -> None:
    x, dy = RNG.standard_normal((6, 7)), RNG.standard_normal((6, 9))
    w, A, B = RNG.standard_normal((9, 7)), RNG.standard_normal((3, 7)), RNG.standard_normal((9, 3))
    guess = truth("x_from_h")(x @ A.T, A)
    assert np.allclose(guess, np.linalg.lstsq(A, A @ x.T, rcond=None)[0].T)
    assert np.linalg.norm(guess - x) > 0.1 * np.linalg.norm(x)
    res = ops.LoraLinearRes(x, None)
    dx, dA, _ = ops.lora_linear_bwd(dy, res, w, None, A, B, s=1.3)
    late, _, _ = ops.lora_linear_bwd(dy, res, w, None, A - 0.2 * dA, B, s=1.3)
    assert np.allclose(truth("late_dx")(dy, x, A, B, s=1.3, lr=0.2), late - dx)
    y, _ = ops.lora_linear(x, w, None, A, B, s=1.3)
    assert np.allclose(x @ truth("merged_weight")(w, A, B, 1.3).T, y)


def test_the_best_epsilon() -> None:
    u, loss, third = 2.0**-24, 3.0, 0.7
    eps = np.logspace(-6, 0, 200001)
    error = eps**2 * third / 6 + u * loss / eps
    assert truth("best_eps")(u, loss, third) == pytest.approx(eps[error.argmin()], rel=1e-3)


def test_steps_of_mezo() -> None:
    """By trying: progress of the best rate, over many directions."""
    c = np.array([9.0, 3, 1, 0.4, 0.1, 0, 0])
    g = RNG.standard_normal(7) * (c > 0)
    z = RNG.standard_normal((400_000, 7))
    steps = z * (z @ g)[:, None]
    best = (steps @ g).mean() ** 2 / (2 * (steps**2 @ c).mean())
    exact = (g @ g) ** 2 / (2 * (g * g * c).sum())
    assert truth("mezo_steps")(g, c) == pytest.approx(exact / best, rel=0.03)


def test_forgetting() -> None:
    losses = [RNG.random((2, n)) for n in (3, 40, 11)]
    a, b = ([pair[i].mean() for pair in losses] for i in (0, 1))
    every = np.concatenate(losses, axis=1)
    found = truth("forgetting")(np.array(a), np.array(b), np.array([3, 40, 11]))
    assert found == pytest.approx(every[0].mean() - every[1].mean())


def test_the_best_pair_is_one() -> None:
    """In every case there is a single best pair, so that no right answer is called wrong."""
    exercise = learn.find("best_pair")
    for case in exercise.cases:
        marks = exercise.draw(case)["marks"]
        seen = {
            (i, j): sum(any(row[k] for k in (i, j)) for row in marks)
            for i, j in itertools.combinations(range(marks.shape[1]), 2)
        }
        best = [pair for pair, count in seen.items() if count == max(seen.values())]
        assert best == [exercise.function(marks)]


def test_bfloat16() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    bits = RNG.integers(0, 0x7F000000, 4000, dtype=np.uint32)
    bits[1::2] |= np.uint32(0x80000000)  # negative
    bits[::4] = (bits[::4] & np.uint32(0xFFFF0000)) | np.uint32(0x8000)  # ties
    x = bits.view(np.float32)
    expected = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert np.array_equal(truth("to_bfloat16")(x), expected)


def test_every_question_is_asked_in_a_notebook() -> None:
    folder = Path(__file__).parents[2] / "notebooks"
    text = "".join(
        "".join(cell["source"])
        for path in folder.glob("*.ipynb")
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
    )
    for row in (*QUESTIONS, learn.find("head_bwd"), learn.find("adamw_step")):
        assert f'"{row.name}"' in text, row.name

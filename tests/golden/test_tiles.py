"""The tile tier: planted kernels are rejected, right ones in tiles pass; inputs from the generator."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mesp_ref.golden import Suite
from mesp_ref.golden.check import judge
from mesp_ref.golden.explain import explain
from mesp_ref.golden.generate import hashes, made

Array = Any
Answers = dict[str, Array]


def inputs_of(suite: Suite, name: str) -> Answers:
    given = suite.read(suite.cases[name]).inputs
    return {n: a.astype(np.float64) if a.dtype.kind == "f" else a for n, a in given.items()}


def failed(suite: Suite, name: str, answer: Answers, dtype: Any = np.float32) -> list[str]:
    case, vectors = suite.cases[name], suite.read(suite.cases[name])
    got = {n: np.asarray(a).astype(dtype) for n, a in answer.items()}
    kind = np.dtype(dtype).name
    return [t.name for t in case.tensors if not judge(t, got[t.name], vectors, kind).passed]


# -- attention as a kernel computes it: tiles of keys forward, tiles of queries backward --------------


def attention(
    v: Answers, tile: int = 128, *, rescale_sum: bool = True, rescale_mix: bool = True,
    hidden: Callable[[Array, Array], Array] | None = None, add: str = "all", seen: int = 10**9,
    pad: bool = False, group: str = "sum", delta: bool = True,
) -> Answers:  # fmt: skip
    """One sequence; `add` says which tiles of queries reach dk and dv."""
    q, k, val, do = (v[n][0].swapaxes(0, 1) for n in ("q", "k", "v", "dy"))  # [H, T, D]
    heads, tq, d = q.shape
    groups, tk, _ = k.shape
    share, scale, late = heads // groups, d**-0.5, tk - tq
    if hidden is None:
        hidden = lambda i, j: j > i + late  # noqa: E731
    out, dq = np.zeros_like(q), np.zeros_like(q)
    dk_all = np.zeros((heads, tk, d))
    dv_all = np.zeros((heads, tk, d))
    i = np.arange(tq)[:, None]
    for h in range(heads):
        kh, vh = k[h // share], val[h // share]
        top, total, mix = np.full(tq, -1e30), np.zeros(tq), np.zeros((tq, d))
        for a in range(0, min(tk, seen), tile):
            j = np.arange(a, min(a + tile, tk, seen))
            s = np.where(hidden(i, j), -np.inf, q[h] @ kh[j].T * scale)
            if pad and len(j) < tile:
                s = np.concatenate([s, np.zeros((tq, tile - len(j)))], 1)
            new = np.maximum(top, s.max(1))
            e, shrink = np.exp(s - new[:, None]), np.exp(top - new)
            total = total * (shrink if rescale_sum else 1) + e.sum(1)
            mix = mix * (shrink[:, None] if rescale_mix else 1) + e[:, : len(j)] @ vh[j]
            top = new
        out[h] = mix / total[:, None]
        s = np.where(hidden(i, np.arange(tk)), -np.inf, q[h] @ kh.T * scale)
        p = np.exp(s - (top + np.log(total))[:, None])
        dp = do[h] @ vh.T
        ds = p * (dp - ((do[h] * out[h]).sum(1, keepdims=True) if delta else 0)) * scale
        dq[h] = ds @ kh
        last = (tq - 1) // tile
        rows = {"all": i[:, 0] >= 0, "last": i[:, 0] // tile == last, "first": i[:, 0] < tile,
                "whole": i[:, 0] < tq // tile * tile}[add]  # fmt: skip
        dk_all[h], dv_all[h] = ds[rows].T @ q[h][rows], p[rows].T @ do[h][rows]
    pick = {
        "sum": lambda a: a.reshape(groups, share, tk, d).sum(1),
        "last": lambda a: a[share - 1 :: share],
    }[group]
    back = {"y": out, "dq": dq, "dk": pick(dk_all), "dv": pick(dv_all)}
    return {n: a.swapaxes(0, 1)[None] for n, a in back.items()}


ATTENTION: dict[str, dict[str, Any]] = {
    "no rescale": {"rescale_sum": False, "rescale_mix": False},
    "no rescale of the sum": {"rescale_sum": False},
    "no rescale of the output": {"rescale_mix": False},
    "no rescale, tiles of 256": {"tile": 256, "rescale_sum": False, "rescale_mix": False},
    "dk and dv overwritten": {"add": "last"},
    "dk and dv of the first tile": {"add": "first"},
    "tail of queries lost": {"add": "whole"},
    "tail of keys lost": {"seen": 256},
    "padded keys are seen": {"pad": True},
    "last head of a group": {"group": "last"},
    "delta forgotten": {"delta": False},
    "mask per tile": {"hidden": lambda i, j: (j // 128) * 128 > i},
}  # fmt: skip


def test_a_right_attention_in_tiles_passes(suite: Suite) -> None:
    for name in ("tile/attention/usual", "tile/attention/cached"):
        for tile in (64, 128):
            answer = attention(inputs_of(suite, name), tile)
            assert not failed(suite, name, answer)
            assert not failed(suite, name, answer, ml_dtypes.bfloat16)


@pytest.mark.parametrize("name", ATTENTION)
def test_planted_attentions_are_rejected(name: str, suite: Suite) -> None:
    case = "tile/attention/usual"
    assert failed(suite, case, attention(inputs_of(suite, case), **ATTENTION[name]))


# -- the loss, and the others ------------------------------------------------------------------------


def entropy(v: Answers, tile: int = 8192, *, rescale: bool = True, extra: int = 0, seen: int = 10**9,
            base: int = 0, divisor: str = "labels") -> Answers:  # fmt: skip
    z, y = v["logits"], v["labels"]
    size, counted = z.shape[1], y >= 0
    top, total = np.full(len(z), -1e30), np.zeros(len(z))
    for a in range(0, min(size, seen), tile):
        part = z[:, a : min(a + tile, seen)]
        new = np.maximum(top, part.max(1))
        total = total * (np.exp(top - new) if rescale else 1) + np.exp(part - new[:, None]).sum(1)
        top = new
    total += extra * np.exp(-top)
    lse = np.log(total) + top
    n = {"labels": counted.sum(), "rows": len(z), "padded": 32}[divisor]
    rows = np.flatnonzero(counted)
    loss = (lse[rows] - z[rows, (y[rows] - base) % size]).sum() / n
    d = np.exp(z - lse[:, None]) * counted[:, None]
    d[rows, (y[rows] - base) % size] -= 1
    return {"y": np.asarray(loss), "dlogits": d * v["dy"] / n}


ENTROPY: dict[str, dict[str, Any]] = {
    "no rescale": {"rescale": False},
    "padded vocabulary": {"extra": -70_000 % 8192},
    "tail of the vocabulary lost": {"seen": 65_536},
    "labels of another tile": {"base": 8192},
    "mean over all rows": {"divisor": "rows"},
    "padded divisor": {"divisor": "padded"},
}


def test_a_right_cross_entropy_in_tiles_passes(suite: Suite) -> None:
    case = "tile/cross_entropy/usual"
    assert not failed(suite, case, entropy(inputs_of(suite, case)))


@pytest.mark.parametrize("name", ENTROPY)
def test_planted_cross_entropies_are_rejected(name: str, suite: Suite) -> None:
    case = "tile/cross_entropy/usual"
    assert failed(suite, case, entropy(inputs_of(suite, case), **ENTROPY[name]))


def norm(v: Answers, width: int = 10**9, divisor: int = 0, rows: int = 10**9) -> Answers:
    x, w, dy = v["x"], v["w"], v["dy"]
    r = 1 / np.sqrt((x[..., :width] ** 2).sum(-1, keepdims=True) / (divisor or x.shape[-1]) + 0.01)
    u, part = dy * w, (dy * x * r)[:, :rows]
    dx = u * r - x * (u * x)[..., :width].mean(-1, keepdims=True) * r**3
    return {"y": w * x * r, "dx": dx, "dw": part.reshape(-1, len(w)).sum(0)}


@pytest.mark.parametrize("how", [{"width": 512}, {"divisor": 1024}, {"rows": 256}, {"rows": 299}])
def test_planted_norms_are_rejected(how: dict[str, int], suite: Suite) -> None:
    given = inputs_of(suite, "tile/rmsnorm/usual")
    assert not failed(suite, "tile/rmsnorm/usual", norm(given))
    assert failed(suite, "tile/rmsnorm/usual", norm(given, **how))


@pytest.mark.parametrize("op", ["lora_linear", "linear"])
def test_planted_matmuls_are_rejected(op: str, suite: Suite) -> None:
    """The tail of a sum over 640, of the rank 17, and of 300 rows."""
    case = f"tile/{op}/usual"
    v = inputs_of(suite, case)
    A, B = v.get("A", np.zeros((17, 640))), v.get("B", np.zeros((1000, 17)))

    def layer(width: int = 640, rank: int = 17, rows: int = 300) -> Answers:
        x, dy, a, b = v["x"], v["dy"], A[:rank], B[:, :rank]
        found = {"y": x[..., :width] @ v["w"][:, :width].T + v["b"] + 0.75 * x @ a.T @ b.T,
                 "dx": dy @ v["w"] + 0.75 * dy @ b @ a, "dw": dy[0, :rows].T @ x[0, :rows],
                 "dA": 0.75 * (dy[0] @ B).T @ x[0], "dB": 0.75 * dy[0].T @ (x[0] @ A.T),
                 "db": dy[0, :rows].sum(0)}  # fmt: skip
        return {t.name: found[t.name] for t in suite.cases[case].tensors}

    assert not failed(suite, case, layer())
    assert failed(suite, case, layer(width=512))
    assert failed(suite, case, layer(rows=256))
    if op == "lora_linear":
        assert failed(suite, case, layer(rank=16))


# -- 16 bits -----------------------------------------------------------------------------------------


def narrow(x: Array) -> Array:
    return np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float64)


def test_a_sigmoid_rounded_to_bfloat16_is_rejected(suite: Suite) -> None:
    case = "tile/swiglu/one_gate_a_row"
    v = inputs_of(suite, case)
    g, u, d = v["gate"], v["up"], v["dy"]

    def swiglu(s: Array, eager: Callable[[Array], Array]) -> Answers:
        silu = eager(g * s)
        return {"y": silu * u, "dgate": eager(d * u) * s * (1 + g * (1 - s)), "dup": d * silu}

    right = 1 / (1 + np.exp(-g))
    for eager in (narrow, lambda x: x):
        assert not failed(suite, case, swiglu(right, eager), ml_dtypes.bfloat16)
    assert failed(suite, case, swiglu(narrow(right), lambda x: x), ml_dtypes.bfloat16) == ["dgate"]


def test_sums_and_factors_of_a_norm_in_bfloat16_are_rejected(suite: Suite) -> None:
    case = "tile/rmsnorm/rows_and_channels"
    v = inputs_of(suite, case)
    x, w, dy = v["x"], v["w"], v["dy"]
    square, total = (x * x).mean(-1, keepdims=True), np.zeros((1, 520))
    for i in range(640):
        total = narrow(total + narrow(x[..., i] ** 2))

    def norm_of(r: Array) -> Answers:
        u = dy * w
        return {"y": w * x * r, "dx": u * r - x * (u * x).mean(-1, keepdims=True) * r**3,
                "dw": (dy * x * r).reshape(-1, 640).sum(0)}  # fmt: skip

    right = 1 / np.sqrt(square + 0.01)
    assert not failed(suite, case, norm_of(right), ml_dtypes.bfloat16)
    for wrong in (narrow(right), 1 / np.sqrt(total[..., None] / 640 + 0.01)):
        assert {"y", "dx"} <= set(failed(suite, case, norm_of(wrong), ml_dtypes.bfloat16))


# -- the generator, and names ------------------------------------------------------------------------


def test_the_generator_is_what_its_docstring_says() -> None:
    def hashed(i: int, stream: int) -> int:  # Python's integers, modulo 2^32 by hand
        mask = 0xFFFFFFFF
        h = (i * 0x9E3779B9 + stream * 0x85EBCA6B) & mask
        h = ((h ^ (h >> 16)) * 0x85EBCA6B) & mask
        h = ((h ^ (h >> 13)) * 0xC2B2AE35) & mask
        return h ^ (h >> 16)

    assert [hashed(i, 1) for i in range(4)] == [3413276431, 38592188, 2897251479, 2882871877]
    assert hashes(np.arange(1000), 7).tolist() == [hashed(i, 7) for i in range(1000)]
    entry = {"kind": "numbers", "shape": [2, 3], "stream": 1, "scale": 0.5, "offset": 1.0}
    assert made(entry).reshape(-1).tolist() == [
        ((hashed(i, 1) >> 24) - 128) * 0.5 + 1 for i in range(6)
    ]


def test_a_planted_kernel_is_named(suite: Suite) -> None:
    name = "tile/attention/usual"
    case, vectors = suite.cases[name], suite.read(suite.cases[name])
    answer = attention(inputs_of(suite, name), add="last")
    got = {n: a.astype(np.float32) for n, a in answer.items()}
    wrong = [t for t in case.tensors if not judge(t, got[t.name], vectors, "float32").passed]
    (text,) = explain(suite, case, vectors, got, "float32", wrong)
    assert text.startswith("like: dk and dv of the last tile of queries only")
    assert "128" in text

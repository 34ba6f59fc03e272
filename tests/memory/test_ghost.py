"""Ghosts against arrays: the same shapes, strides, types, views and copies, and nothing is left."""

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mesp_ref import lean, ops
from mesp_ref.files.affine import Affine
from mesp_ref.files.quantized import Quantized
from mesp_ref.lean.shards import Cut, Window
from mesp_ref.memory import Store
from mesp_ref.memory.dry_run import GhostTable
from mesp_ref.memory.ghost import Ghost, Meter, born
from mesp_ref.registry import OPS, Sizes

F32 = np.dtype(np.float32)


def twins(*shape: int) -> tuple[Any, np.ndarray, Meter]:
    meter = Meter()
    return born(meter, shape, F32), np.zeros(shape, F32), meter


def walk(x: Any, rng: np.random.Generator) -> Any:
    """A chain of random views and reshapes of a [n, t, h, d] array, the same for the same generator."""
    for _ in range(4):
        kind = rng.integers(5)
        if kind == 0:
            x = x.transpose(*map(int, rng.permutation(len(x.shape))))
        elif kind == 1:
            axis = int(rng.integers(len(x.shape)))
            x = x.swapaxes(axis, -1)
        elif kind == 2:
            at = [slice(None)] * len(x.shape)
            axis = int(rng.integers(len(x.shape)))
            at[axis] = slice(int(rng.integers(2)), None)
            x = x[tuple(at)]
        elif kind == 3:
            axis = int(rng.integers(max(1, len(x.shape) - 1)))
            x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
        else:
            x = x[..., None] if len(x.shape) < 5 else x.reshape(-1, x.shape[-1])
    return x


def test_reshape_copies_where_numpy_does() -> None:
    """A view books nothing, a copy its size; 600 chains hold both, and end in the same strides."""
    copies = 0
    for seed in range(600):
        ghost, array, meter = twins(2, 3, 4, 6)
        owner = array
        held = meter.live
        ghost = walk(ghost, np.random.default_rng(seed))
        array = walk(array, np.random.default_rng(seed))
        assert ghost.shape == array.shape
        if array.size:
            assert ghost.form.flags.c_contiguous == array.flags.c_contiguous
        is_copy = not np.may_share_memory(array, owner)
        copies += is_copy
        assert meter.live == (array.nbytes if is_copy and array.base is None else meter.live)
        assert (ghost.buffer.nbytes == held) or is_copy
        del ghost
        assert meter.live == 0
    assert 50 < copies < 550


EXPRESSIONS: dict[str, Callable[[Any], Any]] = {
    "sum of a row": lambda x: x.sum(axis=-1, keepdims=True),
    "maximum": lambda x: x.max(axis=1),
    "scaled": lambda x: x * x.shape[-1] ** -0.5,
    "of two types": lambda x: x + np.ones(6),
    "compared": lambda x: x > 0,
    "finite": lambda x: ~np.isfinite(x),
    "product": lambda x: x @ x.swapaxes(1, 2),
    "broadcast": lambda x: x[:, None] - x[..., None, :],
    "chosen rows": lambda x: x[np.array([1, 0, 1])],
    "chosen elements": lambda x: x[np.array([1, 0]), np.array([2, 2])],
    "einsum": lambda x: np.einsum("...c,...c->...", x, x),
    "einsum of columns": lambda x: np.einsum("mc,mc->c", x[0], x[0]),
    "where": lambda x: np.where(x > 0, x, x.dtype.type(-np.inf)),
    "beside each other": lambda x: np.concatenate([x, x], axis=1),
    "zeros": lambda x: np.zeros((2, 5), np.float64, like=x),
    "full": lambda x: np.full(7, -np.inf, x.dtype, like=x),
    "triangle": lambda x: np.tri(4, 6, k=2, dtype=bool, like=x),
    "like": lambda x: np.zeros_like(x, np.complex128),
    "typed": lambda x: np.multiply(x, 2.0, dtype=x.dtype),
}


@pytest.mark.parametrize("expression", EXPRESSIONS.values(), ids=EXPRESSIONS)
def test_expressions(expression: Callable[[Any], Any]) -> None:
    """Shape, type and bytes of the result; at the end nothing is left."""
    ghost, array, meter = twins(2, 3, 6)
    found, expected = expression(ghost), expression(array)
    assert (found.shape, found.dtype, found.nbytes) == (
        expected.shape, expected.dtype, expected.nbytes,
    )  # fmt: skip
    assert meter.live == array.nbytes + expected.nbytes
    del ghost, found
    assert meter.live == 0


def test_out_makes_nothing_new() -> None:
    ghost, _, meter = twins(2, 3)
    ghost += ghost
    assert np.exp(ghost, out=ghost) is ghost
    assert np.matmul(ghost.T, ghost, out=ghost[:2, :2]).shape == (2, 2)
    assert meter.most == meter.live == 24


def test_what_ghosts_cannot_do_is_said() -> None:
    ghost, _, _ = twins(2, 3)
    with pytest.raises(TypeError, match=r"numpy\.linalg\.svd"):
        np.linalg.svd(ghost)


def test_scalars_and_choices() -> None:
    ghost, array, _ = twins(2, 3)
    assert type(ghost.sum()) is type(array.sum())
    assert np.result_type(ghost, np.float64) == np.float64
    assert not (~np.isfinite(ghost)).any()


def _as_ghosts(meter: Meter, value: Any) -> Any:
    is_float = isinstance(value, np.ndarray) and value.dtype.kind == "f"
    return born(meter, value.shape, value.dtype) if is_float else value


def shapes(value: Any) -> Any:
    """Shape and type of every array in a result."""
    if isinstance(value, tuple):
        return [shapes(item) for item in value]
    return None if value is None else (value.shape, value.dtype)


@pytest.mark.parametrize("name", [name for name in OPS if name != "cross_entropy"])
def test_every_op_runs_over_ghosts(name: str) -> None:
    """Whatever an op calls of NumPy, ghosts answer: forward and backward give the shapes of arrays."""
    row, meter = OPS[name], Meter()
    args = row.sample(np.random.default_rng(0), Sizes(), np.float32)
    ghosts = {key: _as_ghosts(meter, value) for key, value in args.items()}
    expected, res = row.forward(**args)
    found, kept = row.forward(**ghosts)
    assert shapes(found) == shapes(expected)
    assert shapes(kept) == shapes(res)
    dy = np.ones_like(expected)
    gradients = row.gradients(dy, res, args)
    ghostly = row.gradients(_as_ghosts(meter, dy) if dy.shape else dy, kept, ghosts)
    assert {n: shapes(g) for n, g in ghostly.items()} == {
        n: shapes(g) for n, g in gradients.items()
    }
    del ghosts, found, kept, ghostly
    gc.collect()
    assert meter.live == 0


@pytest.mark.parametrize(
    "index", [..., slice(3, 9), (slice(None), slice(5, 40)), (slice(2, 3), slice(0, 32))]
)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_weight_books_what_decoding_makes(index: Any, bits: int) -> None:
    """Columns come by whole groups: `base` of the real result is what was made for it."""
    rng, groups = np.random.default_rng(0), 3
    packed = rng.integers(0, 1 << 32, (12, groups * bits), np.uint32)
    scales = rng.random((12, groups)).astype(np.float16)
    real = Quantized(packed, scales, scales, bits, F32)
    assert real.group_size == 32
    meter = Meter()
    table = GhostTable(meter, real.shape, F32, Store("float16", Affine(bits, 32)))
    whole, ghost = real[index], table[index]
    assert ghost.shape == whole.shape
    made = whole if whole.base is None else whole.base
    assert meter.live == made.nbytes
    assert meter.most > meter.live  # scratch
    cut = Cut(1, 8, 72)
    assert Window(table, cut)[...].shape == Window(real, cut)[...].shape


def test_a_view_of_the_file_books_nothing() -> None:
    meter = Meter()
    table = GhostTable(meter, (8, 4), F32, Store("float32"))
    assert isinstance(table[2:4], Ghost)
    assert meter.most == 0
    assert table[np.array([1, 1, 5])].shape == (3, 4)  # rows by number are copied
    assert meter.most == 48


def test_both_packages_are_covered() -> None:
    """The ops that a ledger names are those of the registry, and the tables of angles."""
    from mesp_ref.memory.ledger import _OPS

    named = {
        f.__code__
        for row in OPS.values()
        for f in (row.forward, row.backward, row.backward_params)
        if f
    }
    rest = {
        f.__name__
        for package in (ops, lean)
        for f in vars(package).values()
        if getattr(f, "__code__", None) in _OPS - named
    }
    assert rest == {"rope_tables"} | {name for name in rest if name.endswith("_bwd_params")}

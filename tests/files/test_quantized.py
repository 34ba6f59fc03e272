"""4-bit and 8-bit tensors: decoded and encoded as MLX does, checked against scalar arithmetic.

The oracles are written from the description of the format with Python numbers, one weight at a
time. tests/parity/test_mlx.py compares with MLX itself; a few vectors from it stand here too.
"""

import gc
import json
import math
import struct
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mesp_ref as mr
from mesp_ref.files import quantize as encoder
from mesp_ref.files import quantized as decoder
from mesp_ref.files.affine import Affine
from mesp_ref.files.checkpoint import save_checkpoint
from mesp_ref.files.quantize import quantize_checkpoint
from mesp_ref.files.quantized import CHUNK, Quantized

TYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
EVERY = [(t, bits, g) for t in TYPES for bits in (4, 8) for g in (32, 64, 128)]


# ------------------------------------------------------------------------------------ the oracles


def rounded(x: float, kind: str) -> float:
    """A Python float rounded to the type, ties to even; too large is infinite."""
    if x == 0 or not math.isfinite(x):
        return x
    bits, least, top = {
        "float32": (24, -149, 2.0**128),
        "float16": (11, -24, 65536.0),
        "bfloat16": (8, -133, 2.0**128),
    }[kind]
    exponent = max(math.frexp(x)[1] - bits, least)
    y = math.ldexp(round(math.ldexp(x, -exponent)), exponent)
    return math.copysign(math.inf, x) if abs(y) >= top else y


def decoded(words: Any, scales: Any, biases: Any, bits: int, kind: str) -> list[list[float]]:
    """w = scale·q + bias, a weight at a time, rounded after the product and after the sum.

    A product of a 24-bit and an 8-bit number is exact in Python's float; a sum of two 24-bit
    numbers is rounded to more than 2·24 + 2 bits first, which changes nothing.
    """
    table = []
    for row_words, row_scales, row_biases in zip(words, scales, biases, strict=True):
        q = [int(w) >> shift & 2**bits - 1 for w in row_words for shift in range(0, 32, bits)]
        g = len(q) // len(row_scales)
        table.append([])
        for j, n in enumerate(q):
            product = rounded(float(row_scales[j // g]) * n, kind)
            table[-1].append(rounded(product + float(row_biases[j // g]), kind))
    return table


def encoded(group: list[np.float32], bits: int) -> tuple[list[int], np.float32, np.float32]:
    """Integers, scale and bias of one group, in float32 scalars."""
    low, high, top = min(group), max(group), np.float32(2**bits - 1)
    scale = max((high - low) / top, np.float32(1e-7))
    edge = low if abs(low) > abs(high) else high
    if not abs(low) > abs(high):
        scale = -scale
    n, bias = np.rint(edge / scale), np.float32(0)
    if n != 0:
        scale, bias = edge / n, edge
    q = [int(min(max(np.rint((w - bias) / scale), 0), top)) for w in group]
    return q, scale, bias


# ------------------------------------------------------------------------------------------ decode


def random_table(
    kind: str, bits: int, g: int, seed: int, size: float = 0.01, rows: int = 5, groups: int = 3
) -> Quantized:
    rng, dtype = np.random.default_rng(seed), TYPES[kind]
    words = rng.integers(0, 2**32, (rows, groups * g * bits // 32), dtype=np.uint32)
    with np.errstate(over="ignore"):
        scales = (rng.standard_normal((rows, groups)) * size).astype(dtype)
        biases = (rng.standard_normal((rows, groups)) * size * 8).astype(dtype)
    scales[0, 0] = biases[1, 0] = 0
    return Quantized(words, scales, biases, bits, np.dtype(np.float32))


@pytest.mark.parametrize("size", [0.01, 1e-7, 40.0, 3e4])
@pytest.mark.parametrize(("kind", "bits", "g"), EVERY)
def test_decode_is_the_scalar_arithmetic(kind: str, bits: int, g: int, size: float) -> None:
    """To the last bit, for ordinary scales, subnormal ones, and ones that overflow float16."""
    t = random_table(kind, bits, g, seed=bits * g, size=size)
    want = np.array(decoded(t.packed, t.scales, t.biases, bits, kind), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        got = t[...]
    assert got.dtype == np.float32
    assert got.shape == t.shape == want.shape
    assert np.array_equal(got, want, equal_nan=True)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_fast_rounding_meets_every_pair_of_significands(kind: str) -> None:
    """All 4-bit products of all significands, with biases that make ties and cancellations."""
    dtype, p = TYPES[kind], {"float16": 11, "bfloat16": 8}[kind]
    scales = (np.arange(2 ** (p - 1), 2**p) * 2.0**-16).astype(dtype)[:, None]
    words = np.tile(np.uint32([0x76543210, 0xFEDCBA98] * 2), (len(scales), 1))
    for bias in (0.0, -0.109375, 0.33203125, -7 * 2.0**-8, 2.0**-13):
        biases = np.full_like(scales, bias)
        got = Quantized(words, scales, biases, 4, np.dtype(np.float32))[...]
        q = np.tile(np.arange(16), 2).astype(dtype)
        want = (scales * q + biases).astype(np.float32)  # the type's own arithmetic
        assert np.array_equal(got, want)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_rounding_every_significand(kind: str) -> None:
    """All float32 numbers of one binade, in both signs: what the cast to the type gives."""
    x = (np.arange(2**23, dtype=np.uint32) | 127 << 23).view(np.float32)
    for signed in (x, -x):
        want = signed.astype(TYPES[kind]).astype(np.float32)
        decoder._round(signed, decoder._ROUNDING[TYPES[kind]][0], np.empty_like(signed))
        assert np.array_equal(signed, want)


@pytest.mark.parametrize(
    ("kind", "scale"),
    [("float16", 5e4), ("float16", 4500), ("bfloat16", 1e-38), ("bfloat16", 1e37)],
)
def test_values_at_the_ends_of_the_range(kind: str, scale: float) -> None:
    """Finite scales whose products overflow or, in bfloat16, whose sums are subnormal."""
    scales = np.array([[scale], [-scale], [scale * 0.7]]).astype(TYPES[kind])
    words = np.tile(np.uint32([0x76543210, 0xFEDCBA98] * 2), (3, 1))
    for biases in (-scales, np.zeros_like(scales), scales * np.asarray(-1.0859375, scales.dtype)):
        t = Quantized(words, scales, biases, 4, np.dtype(np.float32))
        want = np.array(decoded(words, scales, biases, 4, kind), np.float32)
        with np.errstate(over="ignore"):
            assert np.array_equal(t[...], want)


# From mlx 0.32.4 on x86-64: w[i] = ((7919·i mod 101) − 37)/64, one group of 32, mx.quantize and
# mx.dequantize. Words, scale, bias and the first values, as bit patterns.
FROM_MLX = {
    ("float32", 4): (
        [0x28E5B28F, 0xD4A18E5B, 0x907D4A17, 0x6C3906C3], 0xBDD55555, 0x3F700000,
        [0xBF200000, 0x3DD55558, 0x3F3AAAAB, 0xBE555550, 0x3ED55556, 0xBF055554],
    ),
    ("float16", 4): (
        [0x28E5B28F, 0xD4A18E5B, 0x907D4A17, 0x6C3906C3], 0xAEAB, 0x3B80,
        [0xB900, 0x2EA8, 0x39D5, 0xB2B0, 0x36AA, 0xB82C],
    ),
    ("bfloat16", 4): (
        [0x28E5B28F, 0xD4A18E5B, 0x907D4A17, 0x6C3906C3], 0xBDD5, 0x3F70,
        [0xBF20, 0x3DD8, 0x3F3B, 0xBE50, 0x3ED6, 0xBF04],
    ),
    ("float16", 8): (
        [0xC62893FF, 0x208CF85A, 0x84F052BE, 0xE84AB618, 0x42AE107C, 0xA60874E0, 0x6CD83A,
         0x64D0329E], 0x9E13, 0x3B80,
        [0xB89A, 0x2C30, 0x399A, 0xB398, 0x3676, 0xB844],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "bits"), FROM_MLX)
def test_vectors_from_mlx(kind: str, bits: int) -> None:
    words, scale, bias, values = FROM_MLX[kind, bits]
    dtype = TYPES[kind]
    pattern = np.dtype(f"u{dtype.itemsize}")
    w = np.array([[(i * 7919 % 101 - 37) / 64 for i in range(32)]]).astype(dtype)
    packed, scales, biases = encoder.quantize(w, Affine(bits, 32))
    assert packed[0].tolist() == words
    assert (scales.view(pattern).item(), biases.view(pattern).item()) == (scale, bias)
    got = Quantized(packed, scales, biases, bits, np.dtype(np.float32))[...]
    want = np.array(values, pattern).view(dtype).astype(np.float32)
    assert np.array_equal(got[0, : len(want)], want)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
@pytest.mark.parametrize(("kind", "bits", "g"), [("float16", 4, 64), ("float32", 8, 32)])
def test_every_index_decodes_its_part(kind: str, bits: int, g: int, dtype: Any) -> None:
    narrow = random_table(kind, bits, g, seed=2, rows=37, groups=5)
    t = Quantized(narrow.packed, narrow.scales, narrow.biases, bits, np.dtype(dtype))
    whole = narrow[...].astype(dtype)
    ids = np.array([[3, 0, 36], [3, 3, 7]])
    for index in (
        ..., slice(3, 9), slice(36, 99), slice(5, 5), slice(None, None, 2), ids, 7, -1, ids[:0],
        (slice(None), slice(0, g)), (slice(None), slice(g // 2, 3 * g + 1)),
        (slice(2, 4), slice(g - 1, g + 1)), (slice(None), slice(7, 7)),
        (slice(None), slice(g + 3, 2 * g + 5)), (ids, slice(1, None)),
    ):  # fmt: skip
        got, want = t[index], whole[index]
        assert got.dtype == dtype
        assert got.shape == want.shape
        assert np.array_equal(got, want)
    assert len(t) == 37


@pytest.mark.parametrize(("kind", "scratch"), [("float32", 3), ("float16", 5), ("bfloat16", 5)])
def test_decode_scratch_is_bounded(kind: str, scratch: int) -> None:
    """Beside the result, only `scratch` bytes for each of CHUNK weights and those of the scales."""
    t = random_table(kind, 4, 64, seed=3, rows=3 * CHUNK // 256, groups=4)
    t[:1]  # makes the table of nibbles
    tracemalloc.start()
    try:
        decoded = t[...]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak - decoded.nbytes <= (scratch + 8 * 5 / 64) * CHUNK + 10_000


# ------------------------------------------------------------------------------------------ encode


@pytest.mark.parametrize(("kind", "bits", "g"), EVERY)
def test_encode_is_the_scalar_arithmetic(kind: str, bits: int, g: int) -> None:
    """Random groups, then all zero, constant, of one sign, symmetric, and tiny ones."""
    rng, dtype = np.random.default_rng(g + bits), TYPES[kind]
    w = (rng.standard_normal((12, 2 * g)) * 0.02).astype(dtype)
    w[1], w[2], w[3] = 0, 0.37, -0.37
    w[4], w[5] = np.abs(w[4]), -np.abs(w[5])
    w[6, ::2] = -w[6, 1::2]
    w[7] = (w[7].astype(np.float32) * np.float32(1e-6)).astype(dtype)
    w[8, 0] = 30
    packed, scales, biases = encoder.quantize(w, Affine(bits, g))
    assert (packed.dtype, scales.dtype, biases.dtype) == (np.uint32, dtype, dtype)
    for r, row in enumerate(w.astype(np.float32)):
        for c in range(2):
            q, scale, bias = encoded(list(row[c * g : (c + 1) * g]), bits)
            found = packed[r, c * g * bits // 32 : (c + 1) * g * bits // 32]
            assert [int(n) >> s & 2**bits - 1 for n in found for s in range(0, 32, bits)] == q
            assert scales[r, c] == scale.astype(dtype)
            assert biases[r, c] == bias.astype(dtype)


# ------------------------------------------------------------------------------------- directories


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows groups of 32 fill; groups of 64 do not fill those of down_proj."""
    config = mr.Qwen2Config(
        vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    model = mr.random_model(config, seed=4, std=0.2)
    path = tmp_path_factory.mktemp("dense")
    save_checkpoint(config, {n: model.weights[n][...] for n in model.weights}, path, "bfloat16")
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture(scope="module")
def packed(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "model"
    quantize_checkpoint(dense, out, bits=4, group_size=32)
    return out


def tensors(path: Path) -> dict[str, np.ndarray]:
    return load_file(path / "model.safetensors")


@pytest.mark.parametrize(
    ("bits", "g", "dtype"), [(4, 32, None), (4, 64, "float16"), (8, 32, "float32")]
)
def test_quantized_directory(
    dense: Path, tmp_path: Path, bits: int, g: int, dtype: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Every tensor, cast and then quantised whole, is what was written a few rows at a time."""
    monkeypatch.setattr(encoder, "_CHUNK", 640)
    quantize_checkpoint(dense, tmp_path / "out", bits, g, dtype)
    stored, found = TYPES[dtype or "bfloat16"], tensors(tmp_path / "out")
    want = {}
    for name, w in tensors(dense).items():
        cast = w.astype(stored)
        if w.ndim == 2 and w.shape[1] % g == 0:
            parts = encoder.quantize(cast, Affine(bits, g))
            for part, array in zip(("weight", "scales", "biases"), parts, strict=True):
                want[name.removesuffix("weight") + part] = array
        else:
            want[name] = cast
    assert set(found) == set(want)
    for name, array in want.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"] == {"bits": bits, "group_size": g, "mode": "affine"}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    mr.load_model(tmp_path / "out")


def decoded_copy(path: Path, out: Path) -> Path:
    """The same model with its weights decoded and stored in float32."""
    model = mr.load_model(path)
    save_checkpoint(model.config, {n: model.weights[n][...] for n in model.weights}, out)
    return out


def test_everything_runs_as_on_the_decoded_weights(packed: Path, tmp_path: Path) -> None:
    """logits, loss, generate and every method: bit for bit those of the decoded checkpoint."""
    model, plain = mr.load_model(packed), mr.load_model(decoded_copy(packed, tmp_path))
    adapter = mr.init_lora(model.config, rank=2, b_std=0.1)
    ids = np.random.default_rng(0).integers(0, 99, (2, 9))
    assert np.array_equal(mr.logits(model, ids, adapter), mr.logits(plain, ids, adapter))
    assert mr.loss(model, adapter, ids, ids) == mr.loss(plain, adapter, ids, ids)
    assert mr.generate(model, [[1, 2, 3]], max_new_tokens=9) == mr.generate(
        plain, [[1, 2, 3]], max_new_tokens=9
    )
    for method in mr.METHODS:
        for trainable in ("lora", "all") if method != "mezo" else ("lora",):
            (got_loss, got), (loss, want) = (
                # a copy: mezo restores what it perturbs up to rounding
                mr.loss_and_grads(
                    m, adapter.astype("float32"), ids, ids, method=method, trainable=trainable
                )
                for m in (model, plain)
            )
            assert got_loss == loss
            assert set(got) == set(want)
            assert all(np.array_equal(got[name], want[name]) for name in want), method


def test_merging_into_packed_weights_gives_dense_ones(packed: Path, tmp_path: Path) -> None:
    model = mr.load_model(packed)
    adapter = mr.init_lora(model.config, rank=2, b_std=0.1)
    mr.merge(model, adapter, tmp_path / "merged")
    ids = [[5, 4, 3]]
    got = mr.logits(mr.load_model(tmp_path / "merged"), ids)
    want = mr.logits(model, ids, adapter)
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """The number of decoded arrays that are still referred to; `most` counts them at each read."""
    references: list[weakref.ref] = []

    def count() -> int:
        return sum(r() is not None for r in references)

    read, count.most = Quantized.__getitem__, 0  # type: ignore[attr-defined]

    def spy(self: Quantized, index: Any) -> Any:
        count.most = max(count.most, count())  # type: ignore[attr-defined]
        array = read(self, index)
        if not isinstance(index, np.ndarray):  # rows picked by token ids are activations
            references.append(weakref.ref(array if array.base is None else array.base))
        return array

    monkeypatch.setattr(Quantized, "__getitem__", spy)
    gc.disable()  # dead means that nothing refers to it, not that a cycle waits to be found
    yield count
    gc.enable()


@pytest.mark.parametrize("method", mr.METHODS)
def test_no_decoded_weight_outlives_its_op(packed: Path, method: str, alive: Any) -> None:
    """When a weight is decoded no other is there; tiled ops hold the tiles of one op."""
    model = mr.load_model(packed)
    adapter = mr.init_lora(model.config, rank=2, b_std=0.1)
    ids = [[1, 2, 3, 4, 5]]
    mr.loss_and_grads(model, adapter, ids, ids, method=method)
    assert alive() == 0
    assert alive.most <= (2 if method in ("mesp_tiled", "mesp_streamed") else 0)


# --------------------------------------------------------------------------------------- bad input

UP = "model.layers.1.mlp.up_proj"


def broken(packed: Path, out: Path, change: Callable[[dict, dict], object]) -> Path:
    """A copy of the packed model after `change(config, tensors)`."""
    config, arrays = json.loads((packed / "config.json").read_text()), tensors(packed)
    change(config, arrays)
    out.mkdir()
    save_file(arrays, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config))
    return out


def cut(name: str, to: Any) -> Callable[[dict, dict], object]:
    return lambda c, t: t.update({name: np.ascontiguousarray(t[name][to])})


BROKEN: dict[str, tuple[Callable[[dict, dict], object], str]] = {
    "bits": (lambda c, t: c["quantization"].update(bits=3), "bits: found 3, expected one of 4, 8"),
    "group": (lambda c, t: c["quantization"].update(group_size=48), "group_size: found 48"),
    "type": (lambda c, t: c["quantization"].update(group_size="64"), "group_size: found '64'"),
    "fill": (lambda c, t: c["quantization"].update(group_size=128), "expected a divisor of 64"),
    "mode": (lambda c, t: c["quantization"].update(mode="mxfp4"), "found 'mxfp4', expected"),
    "none": (lambda c, t: c.pop("quantization"), "found None, expected group_size, bits"),
    "dense": (lambda c, t: c["quantization"].update({UP: False}), f"{UP}: found False, expected"),
    "eight": (lambda c, t: c["quantization"].update(bits=8), "expected [99, 16] for 8 bits"),
    "gptq": (
        lambda c, t: c.update(quantization=None, quantization_config={"quant_method": "gptq"}),
        "quantization_config: found 'gptq'",
    ),
    "no scales": (lambda c, t: t.pop(f"{UP}.scales"), f"{UP}.scales: missing, expected beside"),
    "no biases": (lambda c, t: t.pop(f"{UP}.biases"), f"{UP}.biases: missing, expected beside"),
    "no weight": (lambda c, t: t.pop(f"{UP}.weight"), f"{UP}.weight: missing, expected [96, 64]"),
    "short": (cut(f"{UP}.weight", np.s_[:, :7]), "shape: found [96, 7], expected [96, 8]"),
    "rows": (cut(f"{UP}.scales", np.s_[:95]), "shape: found [95, 2], expected [96, 2]"),
    "scales": (
        lambda c, t: t.update({f"{UP}.scales": t[f"{UP}.scales"].astype(np.float64)}),
        "dtype: found float64, expected one of float16, bfloat16, float32",
    ),
    "two types": (
        lambda c, t: t.update({f"{UP}.scales": t[f"{UP}.scales"].astype(np.float32)}),
        "found scales in float32 and biases in bfloat16",
    ),
    "words": (
        lambda c, t: t.update({f"{UP}.weight": t[f"{UP}.weight"].view(np.int32)}),
        "dtype: found int32, expected one of uint32",
    ),
    "stray": (lambda c, t: t.update({"model.norm.scales": t["model.norm.weight"]}), "no such"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_bad_packed_checkpoints_are_named(packed: Path, tmp_path: Path, case: str) -> None:
    change, message = BROKEN[case]
    path = broken(packed, tmp_path / "broken", change)
    with pytest.raises(mr.MespRefError) as caught:
        mr.load_model(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_layers_of_their_own_bits(dense: Path, packed: Path, tmp_path: Path) -> None:
    """mlx-lm names layers that differ from the default in the `quantization` field."""

    def embedding_in_8_bits(config: dict, arrays: dict) -> None:
        config["quantization"]["model.embed_tokens"] = {"bits": 8, "group_size": 64}
        w = tensors(dense)["model.embed_tokens.weight"]
        parts = encoder.quantize(w, Affine(8, 64))
        for part, array in zip(("weight", "scales", "biases"), parts, strict=True):
            arrays[f"model.embed_tokens.{part}"] = array

    model = mr.load_model(broken(packed, tmp_path / "mixed", embedding_in_8_bits))
    table = model.weights["model.embed_tokens.weight"]
    assert (table.bits, table.group_size) == (8, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 2}, "bits: found 2"),
        ({"group_size": 16}, "group_size: found 16"),
        ({"dtype": "float64"}, "dtype: found float64"),
        ({"dtype": "int4"}, "dtype: found int4"),
        ({"group_size": 128}, "group_size: found 128, expected a divisor"),
    ],
)
def test_bad_quantize_options(
    dense: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(mr.MespRefError, match=message):
        quantize_checkpoint(dense, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_quantised(dense: Path, packed: Path, tmp_path: Path) -> None:
    """Packed already, not finite in the stored type, or in the way: nothing is left behind."""

    def spoil(config: dict, arrays: dict) -> None:
        arrays["model.layers.0.mlp.up_proj.weight"][3, 5] = 1e30

    huge = broken(dense, tmp_path / "huge", spoil)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for path, out, message in (
        (packed, "out", "is quantised already"),
        (huge, "out", "up_proj.weight: found NaN or infinity in float16"),
        (dense, "full", "exists and is not empty"),
    ):
        with pytest.raises(mr.MespRefError, match=message):
            quantize_checkpoint(path, tmp_path / out, dtype="float16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "huge"]


def test_struct_agrees_with_the_oracle_about_halves() -> None:
    """`rounded` itself, against Python's own float16."""
    for x in (
        np.random.default_rng(1).standard_normal(2000) * 10.0 ** np.arange(-8, 4).repeat(167)[:2000]
    ):
        assert rounded(float(x), "float16") == struct.unpack("<e", struct.pack("<e", x))[0]

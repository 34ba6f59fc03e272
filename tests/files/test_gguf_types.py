"""Every block type that is read, and models split over several files.

Blocks are random bytes, so that every bit of them occurs. The oracles are written from ggml's
structs, one weight at a time; types without one here are held against the gguf package alone.
"""

import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

gguf = pytest.importorskip("gguf")

from test_convert import gguf_name, interleaved, write_gguf  # noqa: E402

import mesp_ref as mr  # noqa: E402
from mesp_ref.engine.init import random_arrays  # noqa: E402
from mesp_ref.files import from_gguf  # noqa: E402
from mesp_ref.files.from_gguf import convert_gguf  # noqa: E402

Type = gguf.GGMLQuantizationType
KINDS = ("Q4_K", "Q5_K", "Q6_K", "Q5_0", "BF16", "Q2_K", "Q3_K", "Q4_0", "Q5_1", "Q4_1", "Q8_0")


def q5_0(block: bytes) -> list[float]:
    """w = d·(q − 16); the fifth bits of all 32 lie together."""
    d, high = struct.unpack("<eI", block[:6])
    low = [b & 15 for b in block[6:]] + [b >> 4 for b in block[6:]]
    return [d * ((q | (high >> i & 1) << 4) - 16) for i, q in enumerate(low)]


def scale_and_minimum(j: int, packed: bytes) -> tuple[int, int]:
    """Sub-block j's six-bit scale and minimum out of twelve bytes (get_scale_min_k4)."""
    if j < 4:
        return packed[j] & 63, packed[j + 4] & 63
    return (
        packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4
    )  # fmt: skip


def q4_k(block: bytes, fifth: bytes = bytes(32), body: int = 16) -> list[float]:
    """w = d·s·q − m·n, a scale s and a minimum n for each 32 of 256."""
    (d, m), found = struct.unpack("<ee", block[:4]), list[float]()
    for j in range(8):
        scale, minimum = scale_and_minimum(j, block[4:16])
        for i in range(32):
            byte = block[body + j // 2 * 32 + i]
            q = (byte >> 4 if j % 2 else byte & 15) + 16 * (fifth[i] >> j & 1)
            found.append(d * scale * q - m * minimum)
    return found


def q5_k(block: bytes) -> list[float]:
    """As Q4_K, the fifth bits of 32 places in 32 bytes, a bit for each of the eight sub-blocks."""
    return q4_k(block, block[16:48], 48)


def q6_k(block: bytes) -> list[float]:
    """w = d·s·(q − 32), a signed scale s for each 16 of 256."""
    [d] = struct.unpack("<e", block[208:210])
    scales = struct.unpack("<16b", block[192:208])
    found = []
    for at in range(256):
        half, quarter, i = at // 128, at % 128 // 32, at % 32
        byte = block[64 * half + i + 32 * (quarter % 2)]
        low = byte >> 4 if quarter > 1 else byte & 15
        high = block[128 + 32 * half + i] >> 2 * quarter & 3
        found.append(d * scales[at // 16] * ((low | high << 4) - 32))
    return found


def bf16(block: bytes) -> list[float]:
    return list(struct.unpack("<f", b"\0\0" + block))


ORACLES = {"Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k, "Q5_0": q5_0, "BF16": bf16}
HALVES = {  # where float16 numbers lie in a block: as bits they would be NaN now and then
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q5_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_0": (0,), "Q5_1": (0, 2), "Q4_1": (0, 2), "Q8_0": (0,),
}  # fmt: skip


def random_blocks(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Rows of blocks, uint8 [rows, bytes]."""
    weights, size = gguf.GGML_QUANT_SIZES[Type[kind]]
    if kind == "BF16":
        bits = rng.standard_normal(shape).astype("<f4").view("<u4") >> 16
        return bits.astype("<u2").view(np.uint8)
    blocks = rng.integers(0, 256, (shape[0], shape[1] // weights, size), dtype=np.uint8)
    for at in HALVES[kind]:
        halves = (rng.standard_normal(blocks.shape[:2]) * 0.01).astype("<f2")
        blocks[..., at : at + 2] = halves[..., None].view(np.uint8)
    return blocks.reshape(shape[0], -1)


def by_hand(blocks: np.ndarray, kind: str) -> np.ndarray:
    _, size = gguf.GGML_QUANT_SIZES[Type[kind]]
    rows = blocks.reshape(len(blocks), -1, size)
    return np.array(
        [[w for block in row for w in ORACLES[kind](block.tobytes())] for row in rows], np.float32
    )


@pytest.fixture(scope="module")
def config(tokenizer: Tokenizer) -> mr.Qwen2Config:
    return mr.Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=256, intermediate_size=512,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        eos_token_id=2,
    )  # fmt: skip


def test_the_gguf_package_decodes_as_the_structs_say() -> None:
    """The oracles against the package: two independent readings of ggml."""
    rng = np.random.default_rng(1)
    for kind in ORACLES:
        blocks = random_blocks(kind, (6, 512), rng)
        assert np.array_equal(gguf.dequantize(blocks, Type[kind]), by_hand(blocks, kind)), kind


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_every_type(
    config: mr.Qwen2Config, tokenizer: Tokenizer, tmp_path: Path, architecture: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(from_gguf, "_CHUNK", 1700)  # some rows at a time
    rng, shapes = np.random.default_rng(2), config.weight_shapes()
    matrices = {
        name: (KINDS[i % len(KINDS)], random_blocks(KINDS[i % len(KINDS)], shape, rng))
        for i, (name, shape) in enumerate((n, s) for n, s in shapes.items() if len(s) == 2)
    }
    assert {kind for kind, _ in matrices.values()} == set(KINDS)

    def add(writer: Any) -> None:
        for name, (kind, rows) in matrices.items():
            heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
            mixed = interleaved(rows, heads) if heads and architecture == "llama" else rows
            writer.add_tensor(gguf_name(name), mixed, raw_dtype=Type[kind])

    vectors = {n: w for n, w in random_arrays(config).items() if w.ndim == 1}
    file = write_gguf(tmp_path / "m.gguf", config, vectors, tokenizer, architecture, edit=add)
    convert_gguf(file, tmp_path / "out")
    weights = mr.load_model(tmp_path / "out").weights
    for name, (kind, rows) in matrices.items():
        decode = by_hand if kind in ORACLES else lambda b, k: gguf.dequantize(b, Type[k])
        assert np.array_equal(weights[name][...], decode(rows, kind)), (name, kind)


def test_vectors_in_bf16(config: mr.Qwen2Config, tokenizer: Tokenizer, tmp_path: Path) -> None:
    arrays = random_arrays(config, std=0.1)
    bits = random_blocks("BF16", (1, 256), np.random.default_rng(3))

    def add(writer: Any) -> None:
        writer.add_tensor("output_norm.weight", bits.reshape(-1), raw_dtype=Type.BF16)

    del arrays["model.norm.weight"]
    file = write_gguf(tmp_path / "m.gguf", config, arrays, tokenizer, edit=add)
    convert_gguf(file, tmp_path / "out")
    got = mr.load_model(tmp_path / "out").weights["model.norm.weight"][...]
    assert np.array_equal(got, by_hand(bits, "BF16")[0])


# ----------------------------------------------------------------------------------------- split


@pytest.fixture
def parts(config: mr.Qwen2Config, tokenizer: Tokenizer, tmp_path: Path) -> list[Path]:
    """A model in files of nine tensors each, as the gguf package splits it."""
    folder = tmp_path / "split"
    folder.mkdir()
    write_gguf(folder / "m.gguf", config, random_arrays(config, seed=4), tokenizer, split=9)
    found = sorted(folder.iterdir())
    assert [p.name for p in found] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    return found


def test_split_models(
    config: mr.Qwen2Config, tokenizer: Tokenizer, parts: list[Path], tmp_path: Path
) -> None:
    whole = write_gguf(tmp_path / "m.gguf", config, random_arrays(config, seed=4), tokenizer)
    for file, out in ((whole, "a"), (parts[0], "b")):
        convert_gguf(file, tmp_path / out)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_parts_that_do_not_belong_together(
    config: mr.Qwen2Config, tokenizer: Tokenizer, parts: list[Path], tmp_path: Path
) -> None:
    def refused(message: str, file: Path = parts[0]) -> None:
        with pytest.raises(mr.MespRefError, match=message):
            convert_gguf(file, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused("split.no: found 1 of 3 in this file, expected the first part", parts[1])
    shutil.copyfile(parts[0], tmp_path / "renamed.gguf")
    refused("expected the first part, called NAME-00001-of-00003.gguf", tmp_path / "renamed.gguf")
    second = parts[1].read_bytes()
    shutil.copyfile(parts[2], parts[1])
    refused(r"m-00002-of-00003.gguf: split.no: found 2, expected 1")
    write_gguf(tmp_path / "o.gguf", config, random_arrays(config), tokenizer, split=14)
    shutil.copyfile(tmp_path / "o-00002-of-00002.gguf", parts[1])
    refused(r"m-00002-of-00003.gguf: split.count: found 2, expected 3")
    parts[1].write_bytes(second[:-40])
    refused("m-00002-of-00003.gguf: .*truncated or damaged")
    parts[1].unlink()
    refused("m-00002-of-00003.gguf: not found")
    (tmp_path / "elsewhere").write_bytes(second)
    parts[1].symlink_to(tmp_path / "elsewhere")
    refused("m-00002-of-00003.gguf: found a link to")
    parts[1].unlink()
    parts[1].write_bytes(second)
    convert_gguf(parts[0], tmp_path / "out")


def test_a_tensor_twice_or_lost(
    config: mr.Qwen2Config, tokenizer: Tokenizer, parts: list[Path], tmp_path: Path
) -> None:
    content = parts[2].read_bytes()
    twice = content.replace(b"output_norm.weight", b"blk.0.ffn_k.weight")  # a name of no tensor
    assert twice != content
    parts[2].write_bytes(twice)
    with pytest.raises(mr.MespRefError, match="found, expected no such tensor"):
        convert_gguf(parts[0], tmp_path / "out")
    parts[2].write_bytes(content.replace(b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight"))
    with pytest.raises(
        mr.MespRefError, match=r"blk\.0\.ffn_up\.weight: found twice, expected once"
    ):
        convert_gguf(parts[0], tmp_path / "out")
    count = b"split.tensors.count" + struct.pack("<I", 5)
    first = parts[0].read_bytes()
    at = first.index(count) + len(count)
    parts[0].write_bytes(first[:at] + struct.pack("<i", 24) + first[at + 4 :])
    with pytest.raises(mr.MespRefError, match=r"split\.tensors\.count: found 24, expected 2"):
        convert_gguf(parts[0], tmp_path / "out")

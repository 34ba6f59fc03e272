"""Where the tensors of a GGUF file lie: offsets that lead elsewhere, parts of a split model."""

import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mesp_ref as mr

gguf = pytest.importorskip("gguf")

from test_convert import write_gguf  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from mesp_ref.engine.init import random_arrays  # noqa: E402
from mesp_ref.files import from_gguf  # noqa: E402
from mesp_ref.files.from_gguf import convert_gguf  # noqa: E402
from mesp_ref.files.gguf import Gguf  # noqa: E402
from mesp_ref.files.gguf_layout import check_layout  # noqa: E402

NAMES = ("a.weight", "b.weight", "c.weight")


def small_file(path: Path, alignment: int = 32, kind: Any = None) -> bytes:
    """Three float32 tensors of 8, 12 and 4 numbers, or of 32 in a packed type."""
    writer = gguf.GGUFWriter(path, "llama")
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    writer.add_string("general.name", "x")
    for name, size in zip(NAMES, (8, 12, 4), strict=True):
        w = np.arange(size if kind is None else 32, dtype=np.float32)
        packed = w if kind is None else gguf.quantize(w, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def offset_place(content: bytes, name: str) -> int:
    """Where the eight bytes of a tensor's offset lie: after name, one dimension and type."""
    at = content.index(name.encode()) + len(name)
    [axes] = struct.unpack_from("<I", content, at)
    return at + 4 + 8 * axes + 4


def moved(content: bytes, name: str, offset: int) -> bytes:
    at = offset_place(content, name)
    return content[:at] + struct.pack("<Q", offset % 2**64) + content[at + 8 :]


@pytest.mark.parametrize("alignment", [8, 32, 64, 4096])
def test_what_the_package_writes_is_in_order(tmp_path: Path, alignment: int) -> None:
    small_file(tmp_path / "a.gguf", alignment)
    check_layout(tmp_path / "a.gguf")
    small_file(tmp_path / "b.gguf", alignment, gguf.GGMLQuantizationType.Q8_0)
    check_layout(tmp_path / "b.gguf")


@pytest.mark.parametrize(
    ("name", "offset", "message"),
    [
        ("c.weight", 2**40, "c.weight': ends at data byte 1099511627792, expected at most"),
        ("c.weight", 128, "c.weight': ends at data byte 144, expected at most 128"),
        ("a.weight", -64, "a.weight': ends at data byte 18446744073709551584, expected at"),
        ("b.weight", 0, "begins at data byte 0, expected 32"),
        ("b.weight", 33, "b.weight': offset 33, no multiple of the alignment 32"),
        ("b.weight", 36, "offset 36, no multiple"),
        ("c.weight", 64, "c.weight': begins at data byte 64, expected 96"),
    ],
)
def test_offsets_that_lead_elsewhere(tmp_path: Path, name: str, offset: int, message: str) -> None:
    """Beyond the data, before it, into another tensor, off the alignment, behind a gap."""
    file = tmp_path / "a.gguf"
    file.write_bytes(moved(small_file(tmp_path / "whole.gguf"), name, offset))
    with pytest.raises(mr.MespRefError) as error:
        check_layout(file)
    assert message in str(error.value)
    assert str(file) in str(error.value)


def test_every_offset_but_the_right_one_is_refused(tmp_path: Path) -> None:
    """All multiples of four up to twice the file, and those around 2^63 and 2^64."""
    content, file = small_file(tmp_path / "whole.gguf"), tmp_path / "a.gguf"
    right = {"a.weight": 0, "b.weight": 32, "c.weight": 96}
    offsets = [
        *range(0, 2 * len(content), 4),
        *range(2**63 - 64, 2**63 + 64, 32),
        *range(-96, 0, 32),
    ]
    for name, place in right.items():
        for offset in offsets:
            file.write_bytes(moved(content, name, offset))
            if offset == place:
                check_layout(file)
                continue
            with pytest.raises(
                mr.MespRefError, match=r"begins at data byte|ends at data byte|offset"
            ):
                check_layout(file)


def test_tensors_may_lie_in_any_order(tmp_path: Path) -> None:
    content = small_file(tmp_path / "a.gguf", kind=gguf.GGMLQuantizationType.F16)
    swapped = moved(moved(content, "a.weight", 64), "b.weight", 0)
    (tmp_path / "a.gguf").write_bytes(swapped)
    check_layout(tmp_path / "a.gguf")


@pytest.mark.parametrize("alignment", [0, 1, 7, 24, 48, 2**31])
def test_alignments_that_are_none(tmp_path: Path, alignment: int) -> None:
    content = small_file(tmp_path / "a.gguf", 64)
    at = content.index(b"general.alignment") + len("general.alignment") + 4
    (tmp_path / "a.gguf").write_bytes(
        content[:at] + struct.pack("<I", alignment) + content[at + 4 :]
    )
    with pytest.raises(mr.MespRefError, match=f"found general.alignment {alignment} of type 4"):
        check_layout(tmp_path / "a.gguf")


def test_unknown_types_and_keys_twice(tmp_path: Path) -> None:
    content, file = small_file(tmp_path / "a.gguf"), tmp_path / "a.gguf"
    at = offset_place(content, "a.weight") - 4
    file.write_bytes(content[:at] + struct.pack("<I", 77) + content[at + 4 :])
    with pytest.raises(mr.MespRefError, match=r"'a\.weight': type 77"):
        check_layout(file)
    name = struct.pack("<Q", 12) + b"general.name"
    file.write_bytes(content.replace(name, name + struct.pack("<IQ", 8, 1) + b"y" + name).replace(
        struct.pack("<QQ", 3, 2), struct.pack("<QQ", 3, 3)))  # fmt: skip
    with pytest.raises(mr.MespRefError, match=r"found 'general\.name' twice"):
        check_layout(file)


# ------------------------------------------------------------------------------- whole models


@pytest.fixture(scope="module")
def config(tokenizer: Tokenizer) -> mr.Qwen2Config:
    return mr.Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        rms_norm_eps=1e-5, rope_theta=5000.0, max_position_embeddings=128, eos_token_id=2,
    )  # fmt: skip


def refused(file: Path, message: str) -> None:
    with pytest.raises(mr.MespRefError) as error:
        convert_gguf(file, file.parent / "out")
    assert message in str(error.value)
    assert str(file) in str(error.value)
    assert not (file.parent / "out").exists()


def test_a_part_of_a_split_model(
    config: mr.Qwen2Config, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    def split(count: int) -> Any:
        def edit(writer: Any) -> None:
            writer.add_uint16("split.no", 0)
            writer.add_uint16("split.count", count)
            writer.add_int32("split.tensors.count", 40)

        return edit

    arrays = random_arrays(config)
    some = dict(list(arrays.items())[:4])
    file = write_gguf(tmp_path / "m-00001-of-00003.gguf", config, some, tokenizer, edit=split(3))
    with pytest.raises(
        mr.MespRefError, match=r"m-00002-of-00003\.gguf: not found, expected a GGUF"
    ):
        convert_gguf(file, tmp_path / "out")
    convert_gguf(
        write_gguf(tmp_path / "one.gguf", config, arrays, tokenizer, edit=split(1)),
        tmp_path / "out",
    )


UNKNOWN: dict[str, tuple[Any, str]] = {
    "partial rotary": (
        lambda w: w.add_rope_dimension_count(8),
        "qwen2.rope.dimension_count: found 8, expected 16",
    ),
    "values": (lambda w: w.add_value_length(8), "qwen2.attention.value_length: found 8"),
    "window": (lambda w: w.add_sliding_window(4), "qwen2.attention.sliding_window': found 4"),
    "soft cap": (
        lambda w: w.add_attn_logit_softcapping(50.0),
        "qwen2.attn_logit_softcapping': found 50.0, expected no such key",
    ),
    "experts": (lambda w: w.add_expert_count(8), "qwen2.expert_count': found 8"),
    "scale": (lambda w: w.add_float32("qwen2.attention.scale", 0.5), "attention.scale': found 0.5"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_keys_that_change_the_numbers(
    config: mr.Qwen2Config, tokenizer: Tokenizer, tmp_path: Path, case: str
) -> None:
    edit, message = UNKNOWN[case]
    file = write_gguf(tmp_path / "m.gguf", config, random_arrays(config), tokenizer, edit=edit)
    refused(file, message)


def test_keys_that_say_what_is_computed(
    config: mr.Qwen2Config, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    def edit(writer: Any) -> None:
        writer.add_rope_dimension_count(16)
        writer.add_key_length(16)
        writer.add_value_length(16)
        writer.add_vocab_size(config.vocab_size)
        writer.add_file_type(0)

    file = write_gguf(tmp_path / "m.gguf", config, random_arrays(config), tokenizer, edit=edit)
    assert convert_gguf(file, tmp_path / "out").head_dim == 16


@pytest.mark.parametrize(("number", "dtype"), [(np.nan, "float32"), (1e30, "float16")])
def test_weights_that_are_not_finite(
    config: mr.Qwen2Config, tokenizer: Tokenizer, tmp_path: Path, number: float, dtype: str
) -> None:
    arrays = random_arrays(config)
    arrays["model.layers.0.mlp.up_proj.weight"][1, 2] = number
    file = write_gguf(tmp_path / "m.gguf", config, arrays, tokenizer)
    with pytest.raises(mr.MespRefError, match=f"up_proj.weight: found NaN or infinity in {dtype}"):
        convert_gguf(file, tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_packed_scales_that_are_not_finite(
    config: mr.Qwen2Config, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    file = write_gguf(tmp_path / "m.gguf", config, random_arrays(config), tokenizer,
                      kinds=lambda name: kind)  # fmt: skip
    content = bytearray(file.read_bytes())
    [tensor] = [t for t in gguf.GGUFReader(file).tensors if t.name == "blk.0.ffn_up.weight"]
    content[tensor.data_offset : tensor.data_offset + 2] = np.float16(np.inf).tobytes()
    file.write_bytes(content)
    for packed in (False, True):
        with warnings.catch_warnings(action="ignore"), pytest.raises(
            mr.MespRefError, match=r"up_proj\.weight: found NaN"
        ):  # fmt: skip
            convert_gguf(file, tmp_path / "out", packed=packed)


def test_a_file_that_changes_while_it_is_converted(
    config: mr.Qwen2Config, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tmp_path / "m.gguf", config, random_arrays(config), tokenizer)
    tokenize = from_gguf.write_tokenizer

    def disturbed(opened: Gguf, folder: Path) -> None:
        tokenize(opened, folder)
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content)

    monkeypatch.setattr(from_gguf, "write_tokenizer", disturbed)
    refused(file, "changed while in use")

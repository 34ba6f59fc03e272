"""GGUF files to Qwen2 directories: made here with the gguf package, read back weight by weight.

The oracles of block types are written from their layout with struct, one weight at a time.
"""

import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

import mesp_ref as mr
from mesp_ref.cli import main
from mesp_ref.engine.config import FAMILIES
from mesp_ref.engine.init import random_arrays
from mesp_ref.files import from_gguf as directory
from mesp_ref.files.config import config_fields
from mesp_ref.files.from_gguf import convert_gguf
from mesp_ref.files.gguf import halves_from_interleaved
from mesp_ref.files.gguf_repack import repack
from mesp_ref.files.quantized import Quantized

gguf = pytest.importorskip("gguf")

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
Type = gguf.GGMLQuantizationType


def gguf_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if not module.startswith("model.layers."):
        return f"{NAMES[module]}.{kind}"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.{kind}"


def interleaved(w: np.ndarray, heads: int) -> np.ndarray:
    """How llama.cpp's converter permutes q and k: component j + D/2 goes behind component j."""
    order = [
        head * (len(w) // heads) + j + half
        for head in range(heads)
        for j in range(len(w) // heads // 2)
        for half in (0, len(w) // heads // 2)
    ]
    return w[order]


@pytest.fixture(scope="module")
def config(tokenizer: Tokenizer) -> mr.Qwen2Config:
    return mr.Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=64, intermediate_size=96,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        rms_norm_eps=1e-5, rope_theta=5000.0, max_position_embeddings=128, eos_token_id=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def arrays(config: mr.Qwen2Config) -> dict[str, np.ndarray]:
    found = random_arrays(config, seed=5, std=0.1)
    rng = np.random.default_rng(6)
    return {
        n: rng.standard_normal(w.shape).astype("f4") if w.ndim == 1 else w for n, w in found.items()
    }


def write_gguf(
    path: Path,
    config: mr.Qwen2Config,
    arrays: dict[str, np.ndarray],
    tokenizer: Tokenizer,
    architecture: str = "qwen2",
    pre: str = "qwen2",
    kinds: Callable[[str], Any] = lambda name: Type.F32,
    edit: Callable[[Any], object] = lambda writer: None,
    split: int = 0,
) -> Path:
    """A GGUF file of `arrays`, q and k interleaved and without biases when it is a llama.

    With `split` it is several files of so many tensors each, beside `path`.
    """
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    parts = json.loads(tokenizer.to_str())
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if t.startswith("<|") else 1 for t in vocabulary])
    writer.add_token_merges([" ".join(m) for m in parts["model"]["merges"]])
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, w in arrays.items():
        if architecture == "llama":
            if name.endswith(".bias"):
                continue
            if name.split(".")[-2] in heads:
                w = interleaved(w, heads[name.split(".")[-2]])
        kind = kinds(name) if w.ndim == 2 else Type.F32
        writer.add_tensor(gguf_name(name), gguf.quantize(w, kind), raw_dtype=kind)
    edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def q4_1(block: bytes) -> list[np.float32]:
    """w = d·q + m; low nibbles first, then high ones; product exact, sum rounded to float32."""
    d, m = struct.unpack("<ee", block[:4])
    nibbles = [b & 15 for b in block[4:]] + [b >> 4 for b in block[4:]]
    return [np.float32(d * q + m) for q in nibbles]


def q8_0(block: bytes) -> list[np.float32]:
    """w = d·q with q a signed byte."""
    d, *q = struct.unpack("<e32b", block)
    return [np.float32(d * n) for n in q]


BLOCKS = {"Q4_1": (20, q4_1), "Q8_0": (34, q8_0)}


def mixed(name: str) -> Any:
    """All four types in one file."""
    if "embed" in name or "v_proj" in name:
        return Type.Q8_0
    return {"o_proj": Type.F16, "k_proj": Type.F32}.get(name.split(".")[-2], Type.Q4_1)


def stored_values(w: np.ndarray, kind: Any) -> np.ndarray:
    """What a matrix is once it has been stored as `kind`, by the scalar oracles."""
    if kind.name not in BLOCKS:
        return w.astype(np.float16 if kind.name == "F16" else np.float32).astype(np.float32)
    size, decode = BLOCKS[kind.name]
    rows = gguf.quantize(w, kind)
    blocks = rows.reshape(-1, size)
    return np.array([decode(b.tobytes()) for b in blocks], np.float32).reshape(w.shape)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("architecture", "pre"), [("qwen2", "qwen2"), ("llama", "smollm")])
def test_every_weight_arrives(
    config: mr.Qwen2Config, arrays: dict, tokenizer: Tokenizer, tmp_path: Path,
    architecture: str, pre: str, packed: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """F32, F16, Q8_0 and Q4_1, rows of q and k in order, a llama as what it is: to the last bit."""
    monkeypatch.setattr(directory, "_CHUNK", 640)  # a few rows at a time
    file = write_gguf(tmp_path / "m.gguf", config, arrays, tokenizer, architecture, pre, mixed)
    convert_gguf(file, tmp_path / "out", packed=packed)
    model = mr.load_model(tmp_path / "out")
    want = dataclasses.replace(config, traits=FAMILIES[architecture])
    assert config_fields(model.config) == config_fields(want)
    for name, w in arrays.items():
        expected = stored_values(w, mixed(name)) if w.ndim == 2 else w
        if architecture == "llama" and name.endswith(".bias"):
            assert name not in model.weights
            continue
        assert np.array_equal(model.weights[name][...], expected), name
        table = model.weights[name]
        assert isinstance(table, Quantized) == (
            packed and w.ndim == 2 and mixed(name).name in BLOCKS
        )


def test_packed_and_dequantised_give_the_same_logits(
    config: mr.Qwen2Config, arrays: dict, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    file = write_gguf(tmp_path / "m.gguf", config, arrays, tokenizer, kinds=mixed)
    convert_gguf(file, tmp_path / "dense")
    convert_gguf(file, tmp_path / "packed", packed=True)
    convert_gguf(file, tmp_path / "half", packed=True, dense_embedding=True)
    ids = [[1, 2, 3, 4, 5, 6]]
    want = mr.logits(mr.load_model(tmp_path / "dense"), ids)
    for name in ("packed", "half"):
        assert np.array_equal(mr.logits(mr.load_model(tmp_path / name), ids), want)
    assert "model.embed_tokens.scales" in load_file(tmp_path / "packed" / "model.safetensors")
    assert "model.embed_tokens.scales" not in load_file(tmp_path / "half" / "model.safetensors")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dense_types(
    config: mr.Qwen2Config, arrays: dict, tokenizer: Tokenizer, tmp_path: Path, dtype: str
) -> None:
    file = write_gguf(tmp_path / "m.gguf", config, arrays, tokenizer)
    convert_gguf(file, tmp_path / "out", dtype)
    for name, w in load_file(tmp_path / "out" / "model.safetensors").items():
        assert w.dtype.name == dtype
        assert np.array_equal(w, arrays[name].astype(w.dtype))


def test_untied_head(
    config: mr.Qwen2Config, arrays: dict, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    head = {"lm_head.weight": arrays["model.embed_tokens.weight"][::-1].copy()}
    file = write_gguf(tmp_path / "m.gguf", config, arrays | head, tokenizer)
    assert not convert_gguf(file, tmp_path / "out").tie_word_embeddings
    model = mr.load_model(tmp_path / "out")
    assert np.array_equal(model.weights["lm_head.weight"][...], head["lm_head.weight"])


@pytest.mark.parametrize("kind", BLOCKS)
def test_repacking_changes_no_weight(kind: str) -> None:
    """Random bytes as blocks, so that every nibble and sign occurs, with scales of both signs."""
    size, decode = BLOCKS[kind]
    rng = np.random.default_rng(8)
    blocks = rng.integers(0, 256, (7, 3, size), dtype=np.uint8)
    for at in (0, 2)[: 2 if kind == "Q4_1" else 1]:
        values = (rng.standard_normal((7, 3, 1)) * 0.1).astype("<f2")
        blocks[..., at : at + 2] = values.view(np.uint8)
    packed, scales, biases = repack(blocks.reshape(7, -1), kind)
    assert scales.dtype == biases.dtype == np.float32
    bits = 4 if kind == "Q4_1" else 8
    got = Quantized(packed, scales, biases, bits, np.dtype(np.float32))[...]
    want = [[decode(block.tobytes()) for block in row] for row in blocks]
    assert np.array_equal(got, np.array(want, np.float32).reshape(7, 96))


def test_halves_from_interleaved_undoes_the_permutation() -> None:
    w = np.arange(24 * 5).reshape(24, 5)
    assert np.array_equal(halves_from_interleaved(interleaved(w, 3), 3), w)
    assert not np.array_equal(interleaved(w, 3), w)


@pytest.mark.parametrize("pre", ["qwen2", "smollm"])
def test_tokenizer(
    config: mr.Qwen2Config, arrays: dict, tokenizer: Tokenizer, tmp_path: Path, pre: str
) -> None:
    """The text comes back, special tokens are single ids, and qwen2's ids are the original's."""
    file = write_gguf(tmp_path / "m.gguf", config, arrays, tokenizer, pre=pre)
    convert_gguf(file, tmp_path / "out")
    built = mr.load_tokenizer(tmp_path / "out")
    for text in ("The sea isn't dark at 7:45.\n\n  A ship!", "naïve 日本語 🙂", "a  b\t\n c 1234"):
        ids = built.encode(text).ids
        assert built.decode(ids) == text
        if pre == "qwen2":
            assert ids == tokenizer.encode(text).ids
    assert built.encode("<|im_end|>").ids == [2]
    assert built.decode([2]) == ""  # special: not part of a text
    if pre == "qwen2":  # canonical composition and no more
        assert built.decode(built.encode("e\u0301 \ufb01").ids) == "\u00e9 \ufb01"
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|im_end|>"
    assert settings["chat_template"] == "{{ messages[0].content }}"
    assert "bos_token" not in settings


# --------------------------------------------------------------------------------------- bad input


def refused(file: Path, out: Path, message: str, **options: Any) -> None:
    with pytest.raises(mr.MespRefError) as caught:
        convert_gguf(file, out, **options)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    assert not [p for p in out.parent.iterdir() if p.name.startswith(".")]


def test_truncated_anywhere(
    config: mr.Qwen2Config, arrays: dict, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    whole = write_gguf(tmp_path / "m.gguf", config, arrays, tokenizer, kinds=mixed).read_bytes()
    file = tmp_path / "cut.gguf"
    for size in (0, 3, 4, 8, 20, 24, 100, 1000, len(whole) // 2, len(whole) - 200, len(whole) - 1):
        file.write_bytes(whole[:size])
        message = "expected a GGUF file" if size < 4 else "truncated or damaged"
        refused(file, tmp_path / "out", message)


def test_damaged_metadata(
    config: mr.Qwen2Config, arrays: dict, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Single values overwritten: an absurd number of blocks, no UTF-8, merges of no tokens."""
    whole = write_gguf(tmp_path / "m.gguf", config, arrays, tokenizer).read_bytes()
    merge = " ".join(json.loads(tokenizer.to_str())["model"]["merges"][0]).encode()
    key, count = b"qwen2.block_count", struct.pack("<II", 4, 2)  # type uint32, value
    for old, new, message in (
        (key + count, key + struct.pack("<II", 4, 2**31), "qwen2.block_count: found 2147483648"),
        (key + count, key + struct.pack("<II", 5, 0), "qwen2.block_count: found 0"),
        (b"<|im_end|>", b"<|im_\xff\xff\xff|>", "tokenizer.ggml.tokens: not readable"),
        (merge, b"\x01" * (len(merge) - 2) + b" ?", "tokenizer.ggml.merges: "),
    ):
        assert len(old) == len(new)
        assert old in whole
        (tmp_path / "bad.gguf").write_bytes(whole.replace(old, new, 1))
        refused(tmp_path / "bad.gguf", tmp_path / "out", message)


def test_not_gguf(tmp_path: Path) -> None:
    refused(tmp_path / "none.gguf", tmp_path / "out", "not found, expected a GGUF file")
    (tmp_path / "x.gguf").write_text('{"a": 1}')
    refused(tmp_path / "x.gguf", tmp_path / "out", "expected a GGUF file (b'GGUF')")


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architecture": "gemma"}, "general.architecture: found 'gemma', expected"),
    "tokenizer": ({"pre": "llama-bpe"}, "tokenizer.ggml.pre: found 'llama-bpe'"),
    "type": (
        {"edit": lambda w: setattr(w.tensors[0]["blk.0.ffn_up.weight"], "dtype", Type.I32)},
        "blk.0.ffn_up.weight: type: found I32, expected F32, F16, BF16, Q4_0",
    ),
    "tensor": (
        {"edit": lambda w: w.add_tensor("blk.0.attn_q_norm.weight", np.ones(16, np.float32))},
        "blk.0.attn_q_norm.weight: found, expected no such tensor",
    ),
    "rope": (
        {"edit": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN)},
        "qwen2.rope.scaling.type: found 'yarn', expected 'none'",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_files_are_named(
    config: mr.Qwen2Config, arrays: dict, tokenizer: Tokenizer, tmp_path: Path, case: str
) -> None:
    options, message = UNSUPPORTED[case]
    file = write_gguf(tmp_path / "m.gguf", config, arrays, tokenizer, **options)
    refused(file, tmp_path / "out", message)


def test_incomplete_files_are_named(
    config: mr.Qwen2Config, arrays: dict, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    for name, change, message in (
        ("model.layers.1.mlp.up_proj.weight", None, "up_proj.weight: missing, expected [96, 64]"),
        ("model.layers.1.self_attn.q_proj.bias", None, "q_proj.bias: missing, expected [64]"),
        ("model.norm.weight", np.ones(7, np.float32), "shape: found [7], expected [64]"),
    ):
        some = {n: w for n, w in arrays.items() if n != name}
        some |= {} if change is None else {name: change}
        file = write_gguf(tmp_path / "m.gguf", config, some, tokenizer)
        refused(file, tmp_path / "out", message)


def test_nothing_to_keep_packed(
    config: mr.Qwen2Config, arrays: dict, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    file = write_gguf(tmp_path / "m.gguf", config, arrays, tokenizer)
    refused(file, tmp_path / "out", "found no matrix in Q4_1 or Q8_0", packed=True)


# ------------------------------------------------------------------------------------ command line


def test_commands(
    config: mr.Qwen2Config, arrays: dict, tokenizer: Tokenizer, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = str(write_gguf(tmp_path / "m.gguf", config, arrays, tokenizer, kinds=mixed))
    out = str(tmp_path / "out")
    assert main(["convert", "gguf", file, out, "--packed", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["config"]["vocab_size"] == config.vocab_size
    assert main(["convert", "gguf", file, out]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert main(["convert", "gguf", file, out, "--overwrite"]) == 0
    assert main(["quantize", out, out + "4", "--group-size", "32", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["bytes"] < 0.3 * (tmp_path / "out" / "model.safetensors").stat().st_size
    assert main(["quantize", out + "4", out + "8", "--bits", "8"]) == 2
    assert main(["convert"]) == 2
    assert main(["generate", "--model", out + "4", "--prompt", "The", "--max-new-tokens", "3"]) == 0

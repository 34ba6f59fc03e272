"""Checkpoints and adapters as GGUF files, read with the gguf package and converted back.

What llama.cpp makes of them is tests/parity/test_gguf.py's.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import CHATML, GPT2, QWEN, STOP, byte_level_tokenizer
from safetensors.numpy import load_file
from tokenizers import processors

gguf = pytest.importorskip("gguf")

import mesp_ref as mr  # noqa: E402
from mesp_ref.cli import main  # noqa: E402
from mesp_ref.engine.init import init_lora, random_arrays  # noqa: E402
from mesp_ref.files import gguf_writer, to_gguf  # noqa: E402
from mesp_ref.files.checkpoint import save_checkpoint  # noqa: E402
from mesp_ref.files.config import config_fields  # noqa: E402
from mesp_ref.files.default import default_checkpoint  # noqa: E402
from mesp_ref.files.from_gguf import convert_gguf  # noqa: E402
from mesp_ref.files.peft import save_adapter  # noqa: E402
from mesp_ref.files.quantize import quantize_checkpoint  # noqa: E402
from mesp_ref.files.to_gguf import write_gguf_adapter, write_gguf_model  # noqa: E402

TEXTS = ("The sea isn't dark at 7:45.\n\n  A ship!", "naïve 日本語 🙂", f"a  b\t\n c{STOP}1234")


def make_model(path: Path, pattern: str = QWEN, dtype: str = "float32", **changes: Any) -> Path:
    """A random model with biases, more rows than tokens, and rows of 80 that no blocks of 32 fill."""
    tokenizer = byte_level_tokenizer(pattern)
    sizes: dict[str, Any] = {
        "vocab_size": 320, "hidden_size": 80, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 20, "rms_norm_eps": 1e-5,
        "rope_theta": 5000.0, "max_position_embeddings": 256, "eos_token_id": (0, 2),
    }  # fmt: skip
    config = mr.Qwen2Config(**(sizes | changes))
    rng = np.random.default_rng(11)
    arrays = {
        n: w + rng.standard_normal(w.shape).astype("f4") * 0.3 if w.ndim == 1 else w
        for n, w in random_arrays(config, seed=12, std=0.2).items()
    }
    path.mkdir()
    save_checkpoint(config, arrays, path, dtype)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"chat_template": CHATML, "eos_token": STOP}
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


def tensors_of(file: Path) -> dict[str, Any]:
    return {t.name: t for t in gguf.GGUFReader(file).tensors}


def value(file: Path, key: str) -> Any:
    field = gguf.GGUFReader(file).get_field(key)
    return None if field is None else field.contents()


def same_bytes(a: Path, b: Path) -> None:
    left, right = (load_file(p / "model.safetensors") for p in (a, b))
    assert left.keys() == right.keys()
    for name, w in left.items():
        assert w.dtype == right[name].dtype, name
        assert w.tobytes() == right[name].tobytes(), name


# ------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("name", ["story", "gpt-2", "qwen2", "untied"])
def test_there_and_back(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes of every tensor, the same config, the same tokens of a text."""
    monkeypatch.setattr(gguf_writer, "_CHUNK", 700)  # a few rows at a time
    source = default_checkpoint()
    if name != "story":
        pattern = GPT2 if name == "gpt-2" else QWEN
        source = make_model(tmp_path / "model", pattern, tie_word_embeddings=name != "untied")
    file, back = tmp_path / "m.gguf", tmp_path / "back"
    written = write_gguf_model(source, file)
    assert (written.kind, written.tensors) == ("f32", len(load_file(source / "model.safetensors")))
    convert_gguf(file, back)
    same_bytes(source, back)
    old, new = (config_fields(mr.load_model(p).config) for p in (source, back))
    if name != "story":  # the tokenizer's own end comes first; llama.cpp must have a beginning
        assert old.pop("eos_token_id") == [0, 2]
        assert new.pop("eos_token_id") == [2, 0]
        assert old.pop("bos_token_id") is None
        assert new.pop("bos_token_id") == 2
    assert old == new
    given, got = mr.load_tokenizer(source), mr.load_tokenizer(back)
    assert got.get_vocab() == given.get_vocab()
    for text in TEXTS:
        assert got.encode(text).ids == given.encode(text).ids
        assert got.decode(got.encode(text).ids) == given.decode(given.encode(text).ids)
    settings = [json.loads((p / "tokenizer_config.json").read_text()) for p in (source, back)]
    assert settings[0]["chat_template"] == settings[1]["chat_template"]
    assert settings[0]["eos_token"] == settings[1]["eos_token"]


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", "bf16"), ("float16", "f16")])
def test_sixteen_bits_there_and_back(dtype: str, kind: str, tmp_path: Path) -> None:
    """Without --type every weight is kept, in no more than its own bits."""
    source, file = make_model(tmp_path / "model", dtype=dtype), tmp_path / "m.gguf"
    assert write_gguf_model(source, file).kind == kind
    convert_gguf(file, tmp_path / "back", dtype)
    same_bytes(source, tmp_path / "back")


def test_packed_models_keep_every_weight(tmp_path: Path) -> None:
    source, file = tmp_path / "packed", tmp_path / "m.gguf"
    quantize_checkpoint(default_checkpoint(), source, dtype="float16")
    assert write_gguf_model(source, file).kind == "f16"
    convert_gguf(file, tmp_path / "back")
    want, got = (mr.load_model(p).weights for p in (source, tmp_path / "back"))
    assert all(np.array_equal(want[name][...], got[name][...]) for name in want)


# --------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_types(model: Path, tmp_path: Path, kind: str) -> None:
    file, weights = tmp_path / "m.gguf", load_file(model / "model.safetensors")
    write_gguf_model(model, file, kind)
    found = tensors_of(file)
    for name, part in (("token_embd.weight", "embed_tokens.weight"), ("blk.1.ffn_down.weight",
                       "layers.1.mlp.down_proj.weight")):  # fmt: skip
        w, stored = weights[f"model.{part}"], found[name]
        fits = kind != "q8_0" or w.shape[1] % 32 == 0
        assert stored.tensor_type.name.lower() == (kind if fits else "f16")
        want: Any = {
            "f32": lambda w: w, "f16": lambda w: w.astype(np.float16),
            "bf16": lambda w: w.astype(ml_dtypes.bfloat16),
            "q8_0": lambda w: gguf.quantize(w, gguf.GGMLQuantizationType.Q8_0),
        }[kind if fits else "f16"](w)  # fmt: skip
        assert stored.data.tobytes() == want.tobytes()
    for name in ("output_norm.weight", "blk.0.attn_k.bias"):
        assert found[name].tensor_type.name == "F32"
    assert value(file, "general.file_type") == {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}[kind]


def test_metadata(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    write_gguf_model(model, file)
    for key, want in {
        "general.architecture": "qwen2", "general.type": "model", "general.name": "model",
        "qwen2.context_length": 256, "qwen2.embedding_length": 80, "qwen2.block_count": 2,
        "qwen2.feed_forward_length": 96, "qwen2.attention.head_count": 4,
        "qwen2.attention.head_count_kv": 2, "qwen2.rope.freq_base": 5000.0,
        "qwen2.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 0,
        "tokenizer.ggml.add_bos_token": False, "tokenizer.chat_template": CHATML,
    }.items():  # fmt: skip
        assert value(file, key) == want, key
    tokens, kinds = value(file, "tokenizer.ggml.tokens"), value(file, "tokenizer.ggml.token_type")
    assert len(tokens) == len(kinds) == 320
    assert tokens[300:302] == ["[PAD300]", "[PAD301]"]
    assert kinds[:4] == [3, 3, 3, 1]
    assert kinds[299:301] == [1, 5]


def test_a_text_that_begins_with_a_token(model: Path, tmp_path: Path) -> None:
    tokenizer, file = mr.load_tokenizer(model), tmp_path / "m.gguf"
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save(str(model / "tokenizer.json"))
    write_gguf_model(model, file)
    assert value(file, "tokenizer.ggml.add_bos_token") is True
    assert value(file, "tokenizer.ggml.bos_token_id") == 0
    convert_gguf(file, tmp_path / "back")
    assert mr.load_tokenizer(tmp_path / "back").encode("a").ids == tokenizer.encode("a").ids


@pytest.mark.parametrize("rslora", [False, True])
def test_adapters(model: Path, tmp_path: Path, rslora: bool) -> None:
    config = mr.load_model(model).config
    adapter = init_lora(
        config, rank=4, alpha=6.0, targets="q_proj,down_proj", seed=3, b_std=0.1, use_rslora=rslora
    )
    save_adapter(adapter, tmp_path / "peft")
    written = write_gguf_adapter(tmp_path / "peft", model, tmp_path / "a.gguf")
    found = tensors_of(written.file)
    assert len(found) == written.tensors == 8
    for gguf_name, name in (
        ("blk.1.attn_q.weight", "model.layers.1.self_attn.q_proj"),
        ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj"),
    ):
        pair = adapter.pair(name)
        assert pair is not None
        for matrix, w in zip("ab", pair, strict=True):
            got = found[f"{gguf_name}.lora_{matrix}"]
            assert np.array_equal(got.data, w)
            assert list(reversed(got.shape)) == list(w.shape)
    assert value(written.file, "adapter.lora.alpha") / 4 == pytest.approx(
        6 / 2 if rslora else 6 / 4, rel=2**-23
    )
    assert value(written.file, "general.type") == "adapter"
    assert value(written.file, "adapter.type") == "lora"
    assert value(written.file, "general.architecture") == "qwen2"


# -------------------------------------------------------------------------------------- bad input


def edited(model: Path, edit: Callable[[dict[str, Any]], object], name: str) -> None:
    values = json.loads((model / name).read_text(encoding="utf-8"))
    edit(values)
    (model / name).write_text(json.dumps(values), encoding="utf-8")


def refused(message: str, model: Path, out: Path, *options: str, capsys: Any) -> None:
    before = sorted(p.name for p in out.parent.iterdir())
    assert main(["convert", "gguf-model", str(model), str(out), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(p.name for p in out.parent.iterdir()) == before


def added(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda t: t["added_tokens"][1].update(changes)


TOKENIZERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "regex": (
        lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\p{L}+|\s"),
        "expected the one of gpt-2, smollm, qwen2; llama.cpp would cut text otherwise",
    ),
    "no pre-tokeniser": (lambda t: t.update(pre_tokenizer=None), "pre_tokenizer: found None"),
    "normaliser": (
        lambda t: t.update(normalizer={"type": "Lowercase"}), "normalizer: found 'Lowercase'",
    ),
    "merges ignored": (
        lambda t: t["model"].update(ignore_merges=True), "model.ignore_merges: found True",
    ),
    "dropout": (lambda t: t["model"].update(dropout=0.1), "model.dropout: found 0.1"),
    "blanks": (added(lstrip=True), "added_tokens: '<|im_start|>': lstrip: found True"),
    "no merges": (lambda t: t["model"].update(merges=[]), "model.merges: found none"),
    "frame": (
        lambda t: t.update(post_processor={
            "type": "TemplateProcessing", "pair": [],
            "single": [{"Sequence": {"id": "A", "type_id": 0}},
                       {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}],
            "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1],
                                                "tokens": ["<|im_start|>"]}},
        }),
        "post_processor: found tokens [] before and [1] behind a text",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizers_that_llama_cpp_has_not(
    case: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit, message = TOKENIZERS[case]
    edited(model, edit, "tokenizer.json")
    refused(message, model, tmp_path / "m.gguf", capsys=capsys)


def test_models_that_llama_cpp_has_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(message: str, **changes: Any) -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        refused(message, make_model(folder, **changes), tmp_path / "m.gguf", capsys=capsys)

    refuse("head_dim: found 16, expected hidden_size / num_attention_heads = 80 / 4", head_dim=16)
    refuse("eos_token_id: found 4 end tokens, expected at most 3", eos_token_id=(0, 2, 5, 6))
    refuse("found id 299, expected below 299, the vocab_size of config.json", vocab_size=299)
    bare = make_model(tmp_path / "bare", eos_token_id=None)
    edited(bare, lambda s: s.pop("eos_token"), "tokenizer_config.json")
    refused("llama.cpp would take token 11 for it", bare, tmp_path / "m.gguf", capsys=capsys)


@pytest.mark.parametrize(
    ("number", "kind"),
    [(np.nan, "f32"), (np.inf, "q8_0"), (1e5, "f16"), (3.4e38, "bf16"), (1e7, "q8_0")],
)
def test_what_is_not_finite(
    number: float, kind: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][5, 7] = number
    save_checkpoint(mr.load_model(model).config, weights, model)
    message = "model.layers.1.mlp.down_proj.weight: found NaN or infinity in"
    refused(message, model, tmp_path / "m.gguf", "--type", kind, capsys=capsys)


def test_places(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, beside = tmp_path / "m.gguf", tmp_path / "m.Modelfile"
    refused("expected a name that ends in .gguf", model, tmp_path / "m.bin", capsys=capsys)
    beside.write_text("mine")
    refused("m.Modelfile: exists", model, out, capsys=capsys)
    assert beside.read_text() == "mine"
    assert main(["convert", "gguf-model", str(model), str(out), "--overwrite", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bytes"] == out.stat().st_size
    assert facts["modelfile"] == str(beside)
    refused("m.gguf: exists", model, out, capsys=capsys)
    inside = model / "x.gguf"
    inside.write_bytes(b"")
    refused("is, or lies in,", model, inside, "--overwrite", capsys=capsys)
    assert inside.read_bytes() == b""


def test_a_model_that_changes_meanwhile(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(*arguments: Any) -> str:
        (model / "model.safetensors").touch()
        return ""

    monkeypatch.setattr(to_gguf, "modelfile", change)
    with pytest.raises(mr.MespRefError, match="changed while in use"):
        write_gguf_model(model, tmp_path / "m.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_adapters_that_do_not_fit(model: Path, tmp_path: Path) -> None:
    config, out = mr.load_model(model).config, tmp_path / "a.gguf"
    save_adapter(init_lora(config, rank=2, alpha=0.0, b_std=0.1), tmp_path / "none")
    with pytest.raises(mr.MespRefError, match=r"lora_alpha: found 0\.0, expected"):
        write_gguf_adapter(tmp_path / "none", model, out)
    wide = replace(config, intermediate_size=128)
    save_adapter(init_lora(wide, rank=2, b_std=0.1), tmp_path / "wide")
    with pytest.raises(mr.MespRefError, match="the adapter belongs to another model"):
        write_gguf_adapter(tmp_path / "wide", model, out)
    assert not out.exists()


def test_without_the_package(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused("pip install 'mesp-ref[convert]'", model, tmp_path / "m.gguf", capsys=capsys)


def test_commands(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_adapter(init_lora(mr.load_model(model).config, b_std=0.1), tmp_path / "peft")
    out = str(tmp_path / "a.gguf")
    command = ["convert", "gguf-adapter", str(tmp_path / "peft"), out, "--base", str(model)]
    assert main(command) == 0
    assert "28 tensors, f32" in capsys.readouterr().out
    assert main(command) == 2
    assert main([*command, "--overwrite", "--json"]) == 0

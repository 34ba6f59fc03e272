"""Checkpoint directories: what is read, mapped and decoded, and every way they can be broken."""

import json
import struct
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mesp_ref as mr
from mesp_ref.files.checkpoint import save_checkpoint
from mesp_ref.files.config import config_fields
from mesp_ref.files.safetensors import MappedFile, Stored
from mesp_ref.verify.samples import sample_batch, sample_model, small_config

NORM, TABLE = "model.norm.weight", "model.embed_tokens.weight"


@pytest.fixture
def model() -> mr.Model:
    return sample_model(np.random.default_rng(0), small_config(), "float32")


@pytest.fixture
def directory(model: mr.Model, tmp_path: Path) -> Path:
    save_checkpoint(model.config, model.weights, tmp_path, "float32")
    return tmp_path


def edit_config(directory: Path, **changed: Any) -> None:
    values = json.loads((directory / "config.json").read_text())
    values = {k: v for k, v in (values | changed).items() if v != "absent"}
    (directory / "config.json").write_text(json.dumps(values))


def edit_tensors(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = dict(load_file(directory / "model.safetensors"))
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def shard(directory: Path, prefix: str = "") -> Path:
    """Split model.safetensors in two files with an index; returns the index."""
    tensors = load_file(directory / "model.safetensors")
    names = list(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, prefix + file)
    (directory / "model.safetensors").unlink()
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def refused(directory: Path, message: str) -> None:
    """Loading fails with one line that says so and names something inside the directory."""
    with pytest.raises(mr.MespRefError, match=message) as error:
        mr.load_model(directory)
    assert "\n" not in str(error.value)
    assert str(directory) in str(error.value)


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("compute", ["float32", "float64", "complex128"])
def test_storage_is_decoded_to_the_compute_dtype(
    model: mr.Model, tmp_path: Path, stored: str, compute: str
) -> None:
    save_checkpoint(model.config, model.weights, tmp_path, stored)
    loaded = mr.load_model(tmp_path, compute)
    assert config_fields(loaded.config) == config_fields(model.config)
    kind = ml_dtypes.bfloat16 if stored == "bfloat16" else stored
    for name, array in model.weights.items():
        expected = array.astype(kind).astype(compute)
        found = loaded.weights[name][...]
        assert found.dtype == compute
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(loaded.weights[name][1:3], expected[1:3])
    np.testing.assert_array_equal(loaded.weights[TABLE][2:5], loaded.weights[TABLE][...][2:5])
    np.testing.assert_array_equal(loaded.weights[TABLE][:, 1:4], loaded.weights[TABLE][...][:, 1:4])


def test_shards_are_one_model(directory: Path) -> None:
    ids, labels = sample_batch(np.random.default_rng(1), small_config())
    whole = mr.loss(mr.load_model(directory), None, ids, labels)
    shard(directory)
    assert mr.loss(mr.load_model(directory), None, ids, labels) == whole


def test_same_dtype_is_a_read_only_view_of_the_file(directory: Path) -> None:
    found = mr.load_model(directory).weights[TABLE][...]
    assert not found.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        found[0, 0] = 1


def test_no_decoded_weight_outlives_its_op(
    model: mr.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bfloat16 model decodes each projection at use; when the next one starts it is gone."""
    save_checkpoint(model.config, model.weights, tmp_path, "bfloat16")
    decoded: list[weakref.ref[Any]] = []
    alive: list[int] = []
    real = Stored.__getitem__

    def watched(table: Stored, index: Any) -> Any:
        found = real(table, index)
        if index is ... and found.ndim == 2:  # a whole matrix
            alive.append(sum(ref() is not None for ref in decoded))
            decoded.append(weakref.ref(found))
        return found

    monkeypatch.setattr(Stored, "__getitem__", watched)
    adapter = mr.init_lora(model.config, rank=2)
    batch = sample_batch(np.random.default_rng(2), model.config)
    mr.loss_and_grads(mr.load_model(tmp_path), adapter, *batch)
    assert len(alive) > 14 * 2
    assert set(alive) == {0}


def test_read_into_memory_is_a_writable_copy(directory: Path) -> None:
    mapped = mr.load_model(directory)
    copy = mr.read_into_memory(mapped)
    copy.weights[TABLE][...] = 0
    assert mapped.weights[TABLE][...].any()
    assert copy.path == directory


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma2"}, "model_type: found 'gemma2', expected 'qwen2' or 'llama'"),
        ({"model_type": "absent"}, "model_type: found None"),
        ({"hidden_act": "gelu"}, "hidden_act: found 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window: found True"),
        ({"attention_dropout": 0.1}, "attention_dropout: found 0.1"),
        ({"layer_types": ["sliding_attention"]}, "layer_types: found 'sliding_attention'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling.rope_type: found 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.rope_type: found 'linear'"),
        ({"rope_parameters": [1]}, "rope_parameters: found"),
        ({"vocab_size": "absent"}, "vocab_size: missing"),
        ({"hidden_size": 7.5}, "hidden_size: found 7.5, expected a positive integer"),
        ({"hidden_size": True}, "hidden_size: found True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: found 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: found 3, expected a divisor"),
        ({"head_dim": 5}, "head_dim: found 5, expected an even number"),
        ({"head_dim": "absent"}, "num_attention_heads: found 4, expected a divisor"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps: found -1.0"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps: found '1e-6'"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta: found 0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: found 'yes'"),
    ],
)
def test_config_that_cannot_be_computed(
    directory: Path, change: dict[str, Any], message: str
) -> None:
    edit_config(directory, **change)
    refused(directory, message)


@pytest.mark.parametrize("text", ["{", "[]", "3", '"qwen2"', ""])
def test_config_that_is_not_an_object(directory: Path, text: str) -> None:
    (directory / "config.json").write_text(text)
    refused(directory, "config.json")


def test_missing_files(directory: Path, tmp_path: Path) -> None:
    (directory / "model.safetensors").rename(directory / "weights.bin")
    refused(directory, "model.safetensors: not found")
    (directory / "config.json").unlink()
    refused(directory, "config.json: not found")


def test_old_and_new_config_fields_mean_the_same(directory: Path) -> None:
    """Published Qwen2.5 files have rope_theta on top, no head_dim; transformers 5 nests the angle."""
    expected = mr.load_model(directory).config.rope_theta
    edit_config(directory, rope_parameters="absent", layer_types="absent")
    assert mr.load_model(directory).config.rope_theta == expected == 100.0
    edit_config(directory, rope_theta="absent", rope_parameters={"rope_theta": 500.0})
    assert mr.load_model(directory).config.rope_theta == 500.0
    edit_config(directory, eos_token_id=[3, 4])
    assert mr.load_model(directory).config.eos_token_ids == (3, 4)


def pop_norm(tensors: dict[str, Any]) -> None:
    del tensors[NORM]


def widen_norm(tensors: dict[str, Any]) -> None:
    tensors[NORM] = np.ones(8, np.float32)


def integer_norm(tensors: dict[str, Any]) -> None:
    tensors[NORM] = np.ones(7, np.int32)


def add_tensor(tensors: dict[str, Any]) -> None:
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(7, np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pop_norm, f"{NORM}: missing"),
        (widen_norm, rf"{NORM}: shape: found \[8\], expected \[7\]"),
        (integer_norm, f"{NORM}: dtype: found int32"),
        (add_tensor, "q_norm.weight: found, expected no such tensor"),
    ],
)
def test_wrong_tensors(
    directory: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit_tensors(directory, change)
    refused(directory, message)


def test_harmless_extra_tensors_are_ignored(directory: Path) -> None:
    edit_tensors(
        directory,
        lambda t: t.update(
            {
                "lm_head.weight": t[TABLE],
                "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32),
            }
        ),
    )
    assert mr.load_model(directory).head == TABLE


def with_header(header: Any, data: bytes = b"\0" * 32) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(**changed: Any) -> dict[str, Any]:
    return {NORM: {"dtype": "F32", "shape": [7], "data_offsets": [0, 28]} | changed}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be mapped"),
        (b"\1\0\0", "header length: found 0"),
        (struct.pack("<Q", 10**12), "header length: found 1000000000000"),
        (struct.pack("<Q", 2**63) + b"{}", "header length"),
        (with_header(b"{nope}"), "header: not JSON"),
        (with_header(b"\xff\xfe{}"), "header: not JSON"),
        (with_header([1]), "header: found no object"),
        (with_header({NORM: 3}), f"{NORM}: expected dtype, shape and data_offsets"),
        (with_header({NORM: {"dtype": "F32", "shape": [7]}}), f"{NORM}: expected dtype"),
        (with_header(entry(dtype="F8_E4M3")), "dtype: found 'F8_E4M3'"),
        (with_header(entry(dtype=["F32"])), NORM),
        (with_header(entry(shape=[-7])), "expected dtype, shape and data_offsets"),
        (with_header(entry(shape=[7.0])), "expected dtype, shape and data_offsets"),
        (with_header(entry(data_offsets=[0, 64])), "ends at data byte 64, expected at most 32"),
        (with_header(entry(data_offsets=[28, 0])), NORM),
        (with_header(entry(data_offsets=[0, 24])), "found 24 bytes, expected 28"),
        (with_header(entry(shape=[2**62, 4])), "bytes, expected"),
    ],
)  # fmt: skip
def test_malformed_safetensors(directory: Path, content: bytes, message: str) -> None:
    (directory / "model.safetensors").write_bytes(content)
    refused(directory, message)


def test_truncated_file(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    refused(directory, "the file is truncated")


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}']
)
def test_malformed_index(directory: Path, text: str) -> None:
    (directory / "model.safetensors.index.json").write_text(text)
    refused(directory, r"index\.json")


@pytest.mark.parametrize("prefix", ["../", "/", "deep/", "..\\"])
def test_index_may_not_leave_the_directory(directory: Path, prefix: str) -> None:
    shard(directory, prefix)
    refused(directory, "expected a file name inside the folder")


def test_index_that_names_what_is_not_there(directory: Path) -> None:
    index = shard(directory)
    values = json.loads(index.read_text())
    first, second = sorted(set(values["weight_map"].values()))
    moved = dict.fromkeys(values["weight_map"], first)
    index.write_text(json.dumps({"weight_map": moved}))
    refused(directory, f"{second}: found beside {first}, expected one set of weights")
    (directory / second).rename(directory / "kept")
    refused(directory, "missing, expected by model.safetensors.index.json")
    (directory / "kept").rename(directory / second)
    index.write_text(json.dumps(values))
    (directory / second).unlink()
    refused(directory, f"{second}: not found")


@pytest.mark.parametrize("dtype", ["float16", "int32", "no such type", None, 3])
def test_compute_dtypes(directory: Path, dtype: Any) -> None:
    if dtype is None:  # NumPy reads None as float64
        assert mr.load_model(directory, dtype).dtype == np.float64
        return
    with pytest.raises(mr.MespRefError, match="expected one of float32, float64, complex128"):
        mr.load_model(directory, dtype)


def test_failed_save_leaves_nothing(model: mr.Model, tmp_path: Path) -> None:
    arrays = dict(model.weights)
    del arrays[NORM]
    with pytest.raises((KeyError, mr.MespRefError)):
        save_checkpoint(model.config, arrays, tmp_path / "out", "float32")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_random_model_is_seeded_and_starts_as_training_does() -> None:
    config = small_config(tied=False)
    first, same, other = (mr.random_model(config, seed=seed) for seed in (1, 1, 2))
    for name in first.weights:
        np.testing.assert_array_equal(first.weights[name][...], same.weights[name][...])
    assert (first.weights[NORM][...] == 1).all()
    assert not first.weights["model.layers.0.self_attn.q_proj.bias"][...].any()
    assert (first.weights[TABLE][...] != other.weights[TABLE][...]).any()
    assert np.std(first.weights[TABLE][...]) == pytest.approx(0.02, rel=0.3)


def test_metadata_may_be_null_as_mlx_writes_it(tmp_path):
    header = {"__metadata__": None, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    values = np.array([1.5, -2.0], "<f4")
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + values.tobytes())
    opened = MappedFile(file)
    assert opened.metadata == {}
    np.testing.assert_array_equal(opened.raw("a"), values)

"""What lies in a model's folder: which files are opened, what must agree, what survives a change."""

import json
import os
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from helpers import words
from profiles import TIMES
from safetensors.numpy import load as load_bytes
from safetensors.numpy import load_file, save_file

import mesp_ref as mr
from mesp_ref.cli import main
from mesp_ref.errors import MespRefError
from mesp_ref.files import quantize as encoder
from mesp_ref.files.checkpoint import save_checkpoint, weight_files
from mesp_ref.files.config import read_config
from mesp_ref.files.quantize import quantize_checkpoint
from mesp_ref.files.safetensors import MappedFile
from mesp_ref.job.state import model_fingerprint
from mesp_ref.verify.samples import small_config

TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def model_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def edit_config(path: Path, **fields: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_tensors(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = dict(load_file(path / WEIGHTS))
    change(tensors)
    save_file(tensors, path / WEIGHTS)


# ------------------------------------------------------------------------------------- tied heads


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (lambda w: w.copy(), None),
        (
            lambda w: np.where(np.arange(w.size).reshape(w.shape) == w.size - 1, 0, w),
            "other numbers",
        ),
        (lambda w: w.astype(np.float16), "other numbers"),
        (lambda w: w[:-1].copy(), "other numbers"),
        (lambda w: -w, "other numbers"),
    ],
)
def test_a_tied_head_that_is_stored_too(
    model_dir: Path, head: Callable[[Any], Any], message: str | None, tmp_path: Path
) -> None:
    """One that differs is refused by everything that reads the model."""
    edit_tensors(model_dir, lambda t: t.update({HEAD: head(t[TABLE]).astype(head(t[TABLE]).dtype)}))
    out = tmp_path / "out"
    if message is None:
        assert mr.load_model(model_dir).head == TABLE
        return
    for read in (
        lambda: mr.load_model(model_dir),
        lambda: quantize_checkpoint(model_dir, out, group_size=32),
    ):
        with pytest.raises(MespRefError, match=f"{HEAD}: found {message}"):
            read()
    assert not out.exists()
    edit_config(model_dir, tie_word_embeddings=False)
    if head(np.ones((9, 2), np.float32)).shape == (9, 2):
        assert mr.load_model(model_dir).head == HEAD


def test_a_tied_head_packed_twice(tmp_path: Path) -> None:
    """mlx-lm packs embedding and head alike; a head packed otherwise is another matrix."""
    config = small_config(hidden_size=32, intermediate_size=32)
    save_checkpoint(config, mr.random_model(config).weights, tmp_path / "dense")
    quantize_checkpoint(tmp_path / "dense", tmp_path / "packed", group_size=32)
    parts = ("weight", "scales", "biases")

    def copy(tensors: dict[str, Any]) -> None:
        for part in parts:
            tensors[f"lm_head.{part}"] = tensors[f"model.embed_tokens.{part}"].copy()

    edit_tensors(tmp_path / "packed", copy)
    mr.load_model(tmp_path / "packed")
    edit_tensors(tmp_path / "packed", lambda t: t["lm_head.scales"].__imul__(2))
    with pytest.raises(MespRefError, match=r"lm_head\.scales: found other numbers"):
        mr.load_model(tmp_path / "packed")
    edit_tensors(tmp_path / "dense", lambda t: t.update({"lm_head.scales": t[TABLE].copy()}))
    with pytest.raises(MespRefError, match=r"lm_head\.scales: found without model\.embed_tokens"):
        mr.load_model(tmp_path / "dense")


# ----------------------------------------------------------------------------------- which files


def index_of(path: Path, **files: str) -> None:
    names = load_file(path / WEIGHTS)
    (path / INDEX).write_text(json.dumps({"weight_map": {n: files.get(n, WEIGHTS) for n in names}}))


def test_an_index_of_one_file_is_read(model_dir: Path) -> None:
    """mlx-lm writes an index even for one file."""
    index_of(model_dir)
    assert [p.name for p in weight_files(model_dir)] == [WEIGHTS]
    mr.load_model(model_dir)


def test_a_stale_index_is_refused(model_dir: Path) -> None:
    """transformers would take model.safetensors, mlx-lm all of them."""
    tensors = load_file(model_dir / WEIGHTS)
    shard = "model-00001-of-00001.safetensors"
    save_file({name: 2 * w for name, w in tensors.items()}, model_dir / shard)
    (model_dir / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard)}))
    with pytest.raises(MespRefError, match=f"{WEIGHTS}: found beside {shard}, expected one set"):
        mr.load_model(model_dir)
    (model_dir / INDEX).unlink()
    with pytest.raises(MespRefError, match=f"{shard}: found beside {WEIGHTS}, expected one set"):
        mr.load_model(model_dir)
    (model_dir / shard).unlink()
    mr.load_model(model_dir)


def test_what_is_there_is_named(model_dir: Path, tmp_path: Path) -> None:
    edit_tensors(model_dir, lambda t: t.update({"model.layers.0.mlp.up.weight": t.pop(
        "model.layers.0.mlp.up_proj.weight")}))  # fmt: skip
    near = r"\[28, 20\]; the nearest of 26 names there is model\.layers\.0\.mlp\.up\.weight"
    with pytest.raises(MespRefError, match=f"up_proj.weight: missing, expected {near}"):
        mr.load_model(model_dir)
    (model_dir / WEIGHTS).rename(model_dir / "pytorch_model.bin")
    with pytest.raises(MespRefError, match=r"not found, .* the folder holds pytorch_model\.bin"):
        mr.load_model(model_dir)
    mr.save_adapter(mr.init_lora(small_config(), rank=1), tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(MespRefError, match=r"holds adapter_config\.json, adapter_model\.bin"):
        mr.load_adapter(tmp_path / "a")


@pytest.mark.parametrize("kind", ["pipe", "device", "link", "folder"])
def test_strangers_in_the_folder_are_not_opened(model_dir: Path, tmp_path: Path, kind: str) -> None:
    """Each is named zz.safetensors, and would block, never end, or be a file of someone else."""
    other = model_dir / "zz.safetensors"
    before = model_fingerprint(mr.load_model(model_dir))
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret" * 100)
    make = {
        "pipe": lambda: os.mkfifo(other),
        "device": lambda: other.symlink_to("/dev/zero"),
        "link": lambda: other.symlink_to(secret),
        "folder": other.mkdir,
    }
    make[kind]()
    opened: list[str] = []
    sys.addaudithook(lambda event, args: event == "open" and opened.append(str(args[0])))
    program = threading.Thread(
        target=lambda: opened.append(model_fingerprint(mr.load_model(model_dir)))
    )
    program.start()
    program.join(20)
    assert not program.is_alive(), "a pipe blocks the run"
    assert opened[-1] == before
    assert not [name for name in opened if "zz." in name or "secret" in name]
    assert main(["info", str(model_dir)]) == 0


@pytest.mark.parametrize("name", [WEIGHTS, INDEX, "config.json"])
def test_a_pipe_in_the_place_of_a_file_is_refused(model_dir: Path, name: str) -> None:
    (model_dir / name).unlink(missing_ok=True)
    os.mkfifo(model_dir / name)
    with pytest.raises(MespRefError, match="not a regular file"):
        mr.load_model(model_dir)


def test_the_fingerprint_covers_what_is_mapped(model_dir: Path) -> None:
    """A changed weight shows; a file beside that no one maps does not."""
    before = model_fingerprint(mr.load_model(model_dir))
    shutil.copy(model_dir / WEIGHTS, model_dir / "beside.safetensors")
    assert model_fingerprint(mr.load_model(model_dir)) == before
    edit_tensors(model_dir, lambda t: t[TABLE].__imul__(2))
    assert model_fingerprint(mr.load_model(model_dir)) != before


# ------------------------------------------------------------------------------------ safetensors


def laid_out(places: list[tuple[int, int]], held: int, shape: bool = True) -> bytes:
    """A file of float32 tensors at these data offsets, with `held` bytes of data."""
    header = {
        f"t{i}": {"dtype": "F32", "shape": [(stop - start) // 4], "data_offsets": [start, stop]}
        for i, (start, stop) in enumerate(places)
    }
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(held)


@pytest.mark.parametrize(
    ("places", "held", "message"),
    [
        ([(0, 8), (8, 12)], 12, None),
        ([(8, 12), (0, 8)], 12, None),
        ([(0, 0), (0, 8)], 8, None),
        ([(0, 8), (12, 16)], 16, "t1: begins at data byte 12, expected 8, the end of t0"),
        ([(4, 8)], 8, "t0: begins at data byte 4, expected 0, the end of the header"),
        ([(0, 8), (4, 12)], 12, "t1: begins at data byte 4, expected 8"),
        ([(0, 8), (0, 8)], 8, "begins at data byte 0, expected 8"),
        ([(0, 8)], 9, "found 1 bytes after the last tensor, expected none"),
        ([(0, 8), (12, 12)], 12, "t1: begins at data byte 12, expected 8"),
        ([], 4, "found 4 bytes after the last tensor"),
    ],
)
def test_gaps_and_trailing_bytes(
    places: list[tuple[int, int]], held: int, message: str | None, tmp_path: Path
) -> None:
    content, file = laid_out(places, held), tmp_path / "a.safetensors"
    file.write_bytes(content)
    if message is None:
        assert set(MappedFile(file)) == set(load_bytes(content))
        return
    with pytest.raises(MespRefError, match=message):
        MappedFile(file)
    with pytest.raises(safetensors.SafetensorError):
        load_bytes(content)


def test_layouts_are_judged_as_the_safetensors_package_does(tmp_path: Path) -> None:
    """Drawn layouts: gaps, overlaps, orders, empty tensors, bytes too few and too many."""
    rng, agreed, file = np.random.default_rng(3), [0, 0], tmp_path / "a.safetensors"
    for _ in range(300 * TIMES):
        sizes = 4 * rng.integers(0, 4, rng.integers(0, 5))
        starts = np.cumsum([0, *sizes])[:-1] if len(sizes) else np.zeros(0, int)
        if rng.random() < 0.5 and len(starts):
            starts[rng.integers(len(starts))] += 4 * rng.integers(-1, 3)
        places = [
            (max(0, int(a)), max(0, int(a)) + int(n)) for a, n in zip(starts, sizes, strict=True)
        ]
        rng.shuffle(places)
        held = max(0, int(sizes.sum() + (rng.integers(-4, 5) if rng.random() < 0.2 else 0)))
        content = laid_out([(int(a), int(b)) for a, b in places], held)
        file.write_bytes(content)
        try:
            theirs: Any = load_bytes(content)
        except (safetensors.SafetensorError, ValueError):
            theirs = None
        try:
            ours: Any = set(MappedFile(file))
        except MespRefError:
            ours = None
        assert ours == (None if theirs is None else set(theirs)), f"{places} of {held}"
        agreed[ours is not None] += 1
    assert min(agreed) > 30 * TIMES


# ------------------------------------------------------------------- files that change meanwhile


@pytest.mark.parametrize("change", ["written", "truncated", "replaced", "removed"])
@pytest.mark.parametrize("last", [False, True])
def test_a_model_that_changes_while_it_is_quantised(
    model_dir: Path, tmp_path: Path, change: str, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two models are never mixed: not even when the last tensor was read before."""
    config = small_config(hidden_size=32, intermediate_size=32)
    save_checkpoint(config, mr.random_model(config).weights, model_dir)
    file, touched = model_dir / WEIGHTS, []

    def disturb() -> None:
        touched.append(True)
        content = file.read_bytes()
        if change == "written":
            file.write_bytes(bytes(content[:-4]) + b"\0\0\1\0")
            os.utime(file, ns=(1, 1))
        elif change == "truncated":
            os.truncate(file, 4096)
        else:
            file.unlink()
            if change == "replaced":
                file.write_bytes(content)

    if last:
        copy = encoder.copy_companions
        monkeypatch.setattr(encoder, "copy_companions", lambda *a: (disturb(), copy(*a)))
    else:
        quantise = encoder.quantize

        def disturbed(w: Any, affine: Any) -> Any:
            if not touched:
                disturb()
            return quantise(w, affine)

        monkeypatch.setattr(encoder, "quantize", disturbed)
    with pytest.raises(MespRefError, match="changed while in use"):
        quantize_checkpoint(model_dir, tmp_path / "out", group_size=32)
    assert touched
    assert not (tmp_path / "out").exists()


def test_a_model_that_changes_while_it_is_merged(model_dir: Path, tmp_path: Path) -> None:
    model = mr.load_model(model_dir)
    adapter = mr.init_lora(model.config, rank=1, b_std=1.0)
    names = list(model.weights)
    read = model.weights[names[-1]]

    class Last:
        """The last tensor, after which the file is written over."""

        shape, dtype, guard = read.shape, read.dtype, read.guard

        def __getitem__(self, index: Any) -> Any:
            found = np.array(read[index])
            os.utime(model_dir / WEIGHTS, ns=(1, 1))
            return found

    model.weights[names[-1]] = Last()
    with pytest.raises(MespRefError, match="changed while in use"):
        mr.merge(model, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------- what is written

OTHERS = {
    "pad_token_id": 7,
    "dual_chunk_attention_config": {"chunk_size": 262144, "local_size": 8192},
    "sliding_window": 32768,
    "max_window_layers": 21,
    "initializer_range": 0.01,
    "transformers_version": "4.43.1",
    "unsloth_version": "2025.1",
    "use_cache": False,
    "attention_bias": True,
}


@pytest.mark.parametrize("command", ["merge", "quantize"])
def test_what_is_not_changed_stays(model_dir: Path, tmp_path: Path, command: str) -> None:
    config = small_config(hidden_size=32, intermediate_size=32, eos_token_id=(3, 4))
    save_checkpoint(config, mr.random_model(config).weights, model_dir, "bfloat16")
    edit_config(model_dir, **OTHERS)
    before, out = json.loads((model_dir / "config.json").read_text()), tmp_path / "out"
    if command == "merge":
        model = mr.load_model(model_dir)
        mr.merge(model, mr.init_lora(model.config, rank=1, b_std=1.0), out, dtype="bfloat16")
    else:
        quantize_checkpoint(model_dir, out, group_size=32)
    after = json.loads((out / "config.json").read_text())
    packed = {"quantization": {"bits": 4, "group_size": 32, "mode": "affine"}}
    assert after == before | (packed if command == "quantize" else {})


def test_a_merged_model_is_no_longer_packed(tmp_path: Path) -> None:
    config = small_config(hidden_size=32, intermediate_size=32)
    save_checkpoint(config, mr.random_model(config).weights, tmp_path / "dense")
    quantize_checkpoint(tmp_path / "dense", tmp_path / "packed", group_size=32)
    edit_config(tmp_path / "packed", quantization_config=json.loads(
        (tmp_path / "packed" / "config.json").read_text())["quantization"])  # fmt: skip
    model = mr.load_model(tmp_path / "packed")
    mr.merge(model, mr.init_lora(config, rank=1), tmp_path / "merged")
    values = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert not [name for name in values if name.startswith("quantization")]
    assert read_config(tmp_path / "merged").rope_theta == config.rope_theta


def test_what_mlx_lm_would_read_otherwise_is_written_out(model_dir: Path, tmp_path: Path) -> None:
    """Without rope_theta it takes 1e6, without tie_word_embeddings true: both are stated."""
    values = json.loads((model_dir / "config.json").read_text())
    theta = values.pop("rope_theta")
    values["rope_parameters"] = {"rope_theta": theta, "rope_type": "default"}
    (model_dir / "config.json").write_text(json.dumps(values))
    config = read_config(model_dir)
    save_checkpoint(config, mr.random_model(config).weights, tmp_path / "m", kept=values)
    after = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (after["rope_theta"], after["tie_word_embeddings"]) == (theta, True)


# -------------------------------------------------------------------------------------- finiteness


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_merge_that_overflows_is_refused(model_dir: Path, tmp_path: Path, dtype: str) -> None:
    """B of 3e6 fits float32 and not float16."""
    model = mr.load_model(model_dir)
    adapter = mr.init_lora(model.config, rank=1, targets="q_proj")
    for name, w in adapter.weights.items():
        w[...] = 3e6 if "lora_B" in name else 1
    if dtype == "float32":
        mr.merge(model, adapter, tmp_path / "out", dtype=dtype)
        return
    with pytest.raises(
        MespRefError, match=r"q_proj\.weight, merged: found NaN or infinity in float16"
    ):
        mr.merge(model, adapter, tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_base_that_is_not_finite(
    model_dir: Path, tmp_path: Path, number: float, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(model_dir, lambda t: t[name].__setitem__((3, 4), number))
    (tmp_path / "a.txt").write_text(words(300))
    mr.save_adapter(mr.init_lora(mr.load_model(model_dir).config, rank=1), tmp_path / "a")
    model, out = str(model_dir), str(tmp_path / "out")
    for command in (
        ["eval", "--model", model, "--data", str(tmp_path / "a.txt"), "--seq-len", "32"],
        ["eval", "--model", model, "--data", str(tmp_path / "a.txt"), "--seq-len", "32", "--json"],
        ["merge", "--model", model, "--adapter", str(tmp_path / "a"), "--out", out],
    ):
        assert main(command) == 2, command
        shown = capsys.readouterr()
        assert shown.out == ""
        assert "Traceback" not in shown.err
        told = shown.err.splitlines()  # eval's data table, then the one line of the error
        assert [name in line for line in told] == [False] * (len(told) - 1) + [True]
        assert not Path(out).exists()


# ------------------------------------------------------------------------------------------ prompts


@pytest.mark.parametrize("way", ["file", "stdin"])
def test_a_byte_order_mark_is_no_part_of_a_prompt(
    model_dir: Path, tmp_path: Path, way: str
) -> None:
    text = "Wo wäre das Schiff?"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8-sig")
    source = ["--prompt-file", str(tmp_path / "a.txt")] if way == "file" else ["--prompt", "-"]
    done = subprocess.run(
        [sys.executable, "-m", "mesp_ref", "generate", "--model", str(model_dir), *source,
         "--max-new-tokens", "1", "--json"],
        input=(tmp_path / "a.txt").read_bytes(), capture_output=True, check=True,
        env=os.environ | {"PYTHONUTF8": "1"},
    )  # fmt: skip
    assert json.loads(done.stdout)["prompt"] == text

"""Sketches: right gradients agree, wrong ones do not, and 64 projections measure the error."""

import json
from pathlib import Path

import numpy as np
import pytest

import mesp_ref as mr
from mesp_ref.cli import main
from mesp_ref.golden import SHIPPED
from mesp_ref.golden.builder.write import write_tensors
from mesp_ref.golden.sketch import check_sketch, load_sketch, project
from mesp_ref.ops import Array

MODEL, ADAPTER = str(SHIPPED / "e2e/tied/model"), str(SHIPPED / "e2e/tied/adapter")
IDS = [[1, 5, 2, 5, 0, 7]]


@pytest.fixture
def sketch(tmp_path: Path) -> Path:
    batch, out = tmp_path / "batch.json", tmp_path / "sketch.json"
    batch.write_text(json.dumps({"input_ids": IDS, "labels": IDS}))
    command = ["golden", "sketch", "--model", MODEL, "--adapter", ADAPTER]
    assert main([*command, "--batch", str(batch), "--out", str(out)]) == 0
    return out


def gradients(tmp_path: Path, dtype: object = np.float32, **changed: Array) -> Path:
    model = mr.load_model(MODEL)
    _, grads = mr.loss_and_grads(model, mr.load_adapter(ADAPTER), IDS, IDS, method="mebp")
    file = tmp_path / "gradients.safetensors"
    write_tensors(file, {n: g.astype(dtype) for n, g in (grads | changed).items()})
    return file


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_right_gradients_agree(dtype: str, sketch: Path, tmp_path: Path) -> None:
    file, loss = gradients(tmp_path, dtype), load_sketch(sketch)["loss"]
    options = [str(sketch), str(file), "--loss", f"{loss:.9g}", "--dtype", dtype]
    assert main(["golden", "compare", *options]) == 0


def test_wrong_gradients_differ(
    sketch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = next(iter(load_sketch(sketch)["tensors"]))
    shape = load_sketch(sketch)["tensors"][name]["shape"]
    command = ["golden", "compare", str(sketch)]
    file = gradients(tmp_path, **{name: np.ones(shape)})
    assert main([*command, str(file), "--json"]) == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["name"] for row in found["tensors"] if row["problem"]] == [name]
    assert main([*command, str(gradients(tmp_path)), "--loss", "99"]) == 1
    assert main([*command, str(gradients(tmp_path, **{name: np.ones(3)}))]) == 1
    assert main([*command, str(gradients(tmp_path, **{name: np.full(shape, np.nan)}))]) == 1


def test_the_estimated_error_is_the_error(sketch: Path, tmp_path: Path) -> None:
    entries = load_sketch(sketch)["tensors"]
    rng = np.random.default_rng(0)
    _, grads = mr.loss_and_grads(mr.load_model(MODEL), mr.load_adapter(ADAPTER), IDS, IDS)
    noisy = {n: g * (1 + 0.1 * rng.standard_normal(g.shape)) for n, g in grads.items()}
    write_tensors(tmp_path / "noisy.safetensors", noisy)
    rows = check_sketch({"tensors": entries}, tmp_path / "noisy.safetensors")
    for row in rows:
        g = grads[row["name"]]
        true = np.linalg.norm(noisy[row["name"]] - g) / np.linalg.norm(g)
        assert row["error"] == pytest.approx(true, rel=0.4)


def test_projections_belong_to_a_name_and_are_linear() -> None:
    g = np.random.default_rng(0).standard_normal(500)
    assert project("a", g) == project("a", g)
    assert project("a", g) != project("b", g)
    assert np.allclose(np.array(project("a", 3 * g)), 3 * np.array(project("a", g)))


def test_bad_input_is_one_line(
    sketch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "foreign.safetensors"
    write_tensors(foreign, {"x": np.zeros(3)})
    other = tmp_path / "other.json"
    other.write_text('{"format": "other"}')
    for arguments, message in (
        ([str(sketch), str(foreign)], "found none of the sketch's tensors"),
        ([str(sketch), str(tmp_path / "none")], "not found"),
        ([str(other), str(foreign)], "format: found 'other'"),
        ([str(foreign), str(foreign)], "not readable as JSON"),
    ):
        assert main(["golden", "compare", *arguments]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]

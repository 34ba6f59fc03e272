"""The shipped suite: whole, small, well-formed; its inputs, its wrong answers, the engine on it."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import mesp_ref as mr
from mesp_ref.golden import SHIPPED, Suite
from mesp_ref.golden.backends import engine
from mesp_ref.golden.check import judge
from mesp_ref.golden.rows import ROWS

SUITE = Suite()
ALL = list(SUITE.cases)


def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHIPPED, tmp_path / "suite"))


def test_every_file_is_listed_and_hashed(suite: Suite) -> None:
    files = [p for p in SHIPPED.rglob("*") if p.is_file()]
    assert suite.verify_all() == len(files) - 1  # all but SHA256SUMS
    assert sum(p.stat().st_size for p in files) <= 8_000_000


def test_the_manifest_follows_its_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((SHIPPED / "manifest.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads((SHIPPED / "manifest.json").read_text("utf-8")), schema)


def test_every_op_has_cases(suite: Suite) -> None:
    plain = {name for name, row in ROWS.items() if row.golden}
    covered = {c.attributes["op"] for c in suite.cases.values() if c.kind == "op"}
    assert covered == plain
    for op in plain:
        assert sum(name.startswith(f"ops/{op}/") for name in suite.cases) >= 4


@pytest.mark.parametrize("name", ALL)
def test_inputs_are_exact_in_16_bits_and_values_finite(name: str, suite: Suite) -> None:
    case = suite.cases[name]
    vectors = suite.read(case)
    for key, array in vectors.inputs.items():
        assert array.dtype in (np.float32, np.int32, np.uint32), key
        if array.dtype == np.float32 and not (case.kind == "quant" and key in ("scales", "biases")):
            for narrow in (np.float16, ml_dtypes.bfloat16):
                assert np.array_equal(array, array.astype(narrow).astype(np.float32)), key
    assert {t.name for t in case.tensors} == set(vectors.want)
    for tensor in case.tensors:
        want = vectors.want[tensor.name]
        assert want.dtype == np.float64
        assert want.shape == ((tensor.samples,) if tensor.samples else tensor.shape)
        assert np.isfinite(want).all()
        if not tensor.gates:
            mag = vectors.mag[tensor.name]
            assert (np.abs(want) <= 4 * mag * (1 + 1e-6)).all(), tensor.name
            assert not want[mag == 0].any(), tensor.name


def test_wrong_answers_are_refused_in_the_dtypes_they_name(suite: Suite) -> None:
    assert len(suite.wrong) > 80
    for wrong in suite.wrong:
        case = suite.cases[wrong.of]
        vectors, arrays = suite.read(case), suite.read_wrong(wrong)
        given = [t for t in case.tensors if t.name in arrays]
        assert wrong.dtypes
        for dtype in case.dtypes:
            passed = all(judge(t, arrays[t.name], vectors, dtype).passed for t in given)
            assert passed == (dtype not in wrong.dtypes), (wrong.name, dtype)


@pytest.mark.parametrize("name", [n for n in ALL if not n.startswith("traj")])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_engine_agrees(name: str, dtype: str, suite: Suite) -> None:
    case = suite.cases[name]
    vectors = suite.read(case)
    found = engine.compute(case, vectors.inputs, suite.root, dtype)
    for tensor in case.tensors:
        verdict = judge(tensor, found[tensor.name], vectors, dtype)
        assert verdict.passed, (tensor.name, verdict)


@pytest.mark.parametrize("name", ["e2e/tied", "e2e/untied"])
def test_model_gradients_agree_with_complex_step(name: str, suite: Suite) -> None:
    """A second oracle without torch: ⟨gradient, v⟩ against Im L(θ + i·h·v)/h in random directions."""
    case = suite.cases[name]
    vectors, at = suite.read(case), case.attributes
    model = mr.load_model(suite.root / at["model"], dtype="complex128")
    adapter = mr.load_adapter(suite.root / at["adapter"], dtype="complex128")
    batch = vectors.inputs["input_ids"], vectors.inputs["labels"]
    rng = np.random.default_rng(1)
    for target, array in adapter.weights.items():
        v, h = rng.standard_normal(array.shape), 1e-30
        moved = mr.Adapter(adapter.rank, adapter.alpha, adapter.targets, False,
                           adapter.weights | {target: array + 1j * h * v})  # fmt: skip
        z = mr.logits(model, batch[0], moved)[:, :-1]
        labels = batch[1][:, 1:]
        total = np.log(np.exp(z - z.real.max(-1, keepdims=True)).sum(-1)) + z.real.max(-1)
        picked = np.take_along_axis(z, np.where(labels < 0, 0, labels)[..., None], 2)[..., 0]
        loss = ((total - picked) * (labels >= 0)).sum() / (labels >= 0).sum()
        want = vectors.want[f"{target}.grad"]
        assert loss.imag / h == pytest.approx((want * v).sum(), abs=1e-13 * np.abs(want).sum())


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    root = copy(tmp_path)
    file = root / "ops/rmsnorm/usual.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    suite = Suite(root)
    with pytest.raises(mr.MespRefError, match=r"usual\.safetensors: SHA-256 found"):
        suite.read(suite.cases["ops/rmsnorm/usual"])
    file.unlink()
    with pytest.raises(mr.MespRefError, match="missing, but listed"):
        suite.verify_all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"version": 1}, "version 1, expected 'mesp-ref golden suite' version 2"),
        (lambda m: m | {"format": "other"}, "found 'other'"),
        (lambda m: m | {"cases": []}, "manifest.json: SHA-256"),
        (lambda m: [], "found list, expected a JSON object"),
    ],
)
def test_a_foreign_manifest_is_refused(change: object, message: str, tmp_path: Path) -> None:
    root = copy(tmp_path)
    manifest = json.loads((root / "manifest.json").read_text("utf-8"))
    (root / "manifest.json").write_text(json.dumps(change(manifest)))  # type: ignore[operator]
    with pytest.raises(mr.MespRefError, match=message):
        Suite(root)


def test_a_directory_that_is_no_suite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(mr.MespRefError, match="expected a golden suite"):
        Suite(tmp_path)


def test_float32_may_err_more_than_float64(suite: Suite) -> None:
    for case in suite.cases.values():
        vectors = suite.read(case)
        for tensor in case.tensors:
            wide, narrow = (tensor.tolerance(vectors, d) for d in ("float64", "float32"))
            assert (wide <= narrow).all(), tensor.name

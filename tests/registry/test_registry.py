"""One file and one row are enough: an op in a temporary module is covered by everything."""

import importlib.util
import inspect
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy_framework import NumPy
from profiles import examples

from mesp_ref.errors import MespRefError
from mesp_ref.golden import Suite, check
from mesp_ref.golden.backends import functional, run
from mesp_ref.golden.builder.ops import make_op
from mesp_ref.golden.builder.write import write_case, write_manifest
from mesp_ref.golden.check import judge
from mesp_ref.registry import OPS, Golden, OpSpec, register
from mesp_ref.verify import oracles, strategies
from mesp_ref.verify.automatic import equivalent, mutants, reachable, survives
from mesp_ref.verify.planted import original, planted
from mesp_ref.verify.properties import check_properties
from mesp_ref.verify.result import require
from mesp_ref.verify.subject import op_subject
from mesp_ref.verify.suite import ORACLES, killed

FILE, NAME = Path(__file__).with_name("tanh_gate.py"), "tanh_gate_of_a_test"


@pytest.fixture(scope="module")
def row(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpSpec]:
    """The op, as a file anywhere that is imported and registered: nothing else knows of it."""
    file = shutil.copy(FILE, tmp_path_factory.mktemp("own") / f"{NAME}.py")
    spec = importlib.util.spec_from_file_location(NAME, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[NAME] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: OpSpec = module.ROW
    register(found)
    yield found
    del OPS[found.name], sys.modules[NAME]


@pytest.fixture(scope="module")
def own_suite(row: OpSpec, tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """Golden vectors of the op, as the builder makes them."""
    root = tmp_path_factory.mktemp("suite")
    assert row.golden is not None
    made = [make_op(row, case) for case in row.golden.cases]
    for case, vectors in made:
        write_case(root, case, vectors)
    write_manifest(root, [case for case, _ in made], [])
    return Suite(root)


@pytest.mark.parametrize("oracle", ORACLES)
def test_every_oracle_looks_at_a_new_op(oracle: str, row: OpSpec) -> None:
    findings = ORACLES[oracle](row.name)
    require(findings)
    if oracle != "hessian":  # which names all arguments at once
        assert {"x", "w"} <= {finding.argument for finding in findings}


def test_what_holds_for_every_op_is_asked_of_a_new_one(row: OpSpec) -> None:
    asked = {item.name for item, _ in check_properties([row.name])}
    wanted = ("scaling", "additivity", "saturation", "dropping")
    assert asked == {f"tanh_gate_{what}" for what in wanted}


@given(data=st.data(), rng=strategies.generators())
@examples(30)
def test_a_new_op_has_a_strategy_and_a_rounding_bound(
    row: OpSpec, data: st.DataObject, rng: np.random.Generator
) -> None:
    require(oracles.complex_step(op_subject(row, data.draw(strategies.op_cases(row))), rng))
    sizes = data.draw(strategies.sizes())
    subject = op_subject(row, row.sample(rng, sizes, np.float32))
    require(oracles.float32(subject, rng, row.reduction_length(sizes)))


def test_every_mutant_of_its_functions_is_killed(row: OpSpec) -> None:
    subjects = {path: found for path, found in reachable().items() if path.startswith(NAME)}
    assert subjects == {
        f"{NAME}:tanh_gate{end}": (row.name,) for end in ("", "_bwd", "_bwd_params")
    }
    found = [mutant for path in subjects for mutant in mutants(path)]
    assert len(found) >= 40
    doomed = [m for m in found if equivalent(m) is None]
    assert not [m.change for m in doomed if survives(m, subjects[m.path])]


def test_a_wrong_forward_is_seen_at_fifty_digits_only(row: OpSpec) -> None:
    """y = x·tanh(x·(w + 1)) with its own right backward."""
    names = [f"{NAME}:tanh_gate{end}" for end in ("", "_bwd", "_bwd_params")]
    forward, backward, backward_params = map(original, names)
    wrong = (
        lambda x, w, **options: forward(x, w + 1, **options),
        lambda dy, res, w: backward(dy, res, w + 1),
        lambda dy, res, w: backward_params(dy, res, w + 1),
    )
    with planted(dict(zip(names, wrong, strict=True))):
        assert killed("precision", row.name)
        assert not killed("richardson", row.name)
    assert not killed("precision", row.name)


CASES = ["ops/tanh_gate/usual", "ops/tanh_gate/saturated"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_golden_vectors_are_built_and_checked(dtype: str, own_suite: Suite, tmp_path: Path) -> None:
    assert list(own_suite.cases) == CASES
    run("engine", tmp_path / "out", own_suite, dtype=dtype)
    report = check(tmp_path / "out", own_suite, dtype=dtype)
    assert {case.case: case.passed for case in report.cases} == dict.fromkeys(CASES, True)


@pytest.mark.parametrize("name", CASES)
def test_the_functional_twin_passes_and_a_wrong_one_does_not(name: str, own_suite: Suite) -> None:
    case = own_suite.cases[name]
    vectors = own_suite.read(case)
    right = functional.compute(NumPy(), case, vectors.inputs, own_suite.root, "float64")
    wrong = right | {"dx": right["dx"] * (1 + 1e-9)}
    for got, failed in ((right, set()), (wrong, {"dx"})):
        verdicts = [judge(t, got[t.name], vectors, "float64") for t in case.tensors]
        assert {verdict.tensor for verdict in verdicts if not verdict.passed} == failed


def test_the_torch_twin_is_found_where_torch_is_installed(own_suite: Suite, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    run("torch", tmp_path / "out", own_suite, dtype="bfloat16")
    assert check(tmp_path / "out", own_suite, dtype="bfloat16").passed


PROJECTION = "self_attn.o_proj.weight"


def test_a_row_may_take_a_layers_tensors_by_their_names() -> None:
    """Functions of **tensors: names with dots are arguments like any other."""
    plain = OPS["linear"]

    def renamed(function: Any, first: int) -> Any:
        """The same function of positional arguments and of W under its name in a checkpoint."""
        if first == 1:
            return lambda x, **tensors: function(x, tensors[PROJECTION])
        return lambda dy, res, **tensors: function(dy, res, tensors[PROJECTION])

    def sample(rng: np.random.Generator, sizes: Any, dtype: Any) -> dict[str, Any]:
        args = plain.sample(rng, sizes, dtype)
        return {"x": args["x"], PROJECTION: args["w"]}

    row = OpSpec(
        name="half", forward=renamed(plain.forward, 1), sample=sample, golden=None,
        reduction_length=plain.reduction_length, equation=renamed(plain.equation, 1),
        activations=("x",), parameters=(PROJECTION,), backward=renamed(plain.backward, 2),
        backward_params=lambda dy, res, **t: plain.backward_params(dy, res, t[PROJECTION])[0],  # type: ignore[misc]
        magnitude=renamed(plain.magnitude, 2),
        magnitude_params=lambda dy, res, **t: plain.magnitude_params(dy, res, t[PROJECTION])[0],  # type: ignore[misc]
    )  # fmt: skip
    register(row)
    try:
        for oracle in ("precision", "complex step", "adjoint", "richardson"):
            findings = ORACLES[oracle]("half")
            require(findings)
            assert {"x", PROJECTION} <= {finding.argument for finding in findings}
    finally:
        del OPS["half"]


Change = Callable[[OpSpec], OpSpec]


def of_row(**changed: Any) -> Change:
    return lambda row: replace(row, **changed)


def of_golden(**changed: Any) -> Change:
    return lambda row: replace(row, golden=replace(row.golden or Golden(), **changed))


FAULTS: list[tuple[str, Change]] = [
    ("forward", of_row(forward=None)),
    ("equation", of_row(equation=lambda x: x)),
    ("equation", of_row(equation=lambda x, w, slope: x)),
    ("backward", of_row(backward=lambda dy: dy)),
    ("backward", of_row(backward=lambda dy, res, slope: dy)),
    ("backward_params", of_row(backward_params=None)),
    ("magnitude", of_row(magnitude=None)),
    ("magnitude_params", of_row(magnitude_params=None)),
    ("backward_params", of_row(parameters=(), constants=("w",))),
    ("arguments", of_row(constants=("w",))),
    ("arguments", of_row(attributes=("eps",))),
    ("optional", of_row(optional=("b",))),
    ("droppable", of_row(droppable=("h",))),
    ("sample", of_row(sample=lambda rng, z, dtype: {"x": np.zeros(3)})),
    ("golden.roundings", of_golden(roundings={"y": 1, "dx": 1})),
    ("golden.cases", of_golden(cases=())),
    ("golden.torch", of_golden(torch=lambda torch, x: x)),
    ("golden.functional", of_golden(functional=None)),
    ("golden.output_magnitude", of_golden(output_magnitude=lambda x: x)),
]


@pytest.mark.parametrize(("field", "change"), FAULTS)
def test_a_row_that_is_not_whole_is_refused_by_name_and_field(
    field: str, change: Change, row: OpSpec
) -> None:
    with pytest.raises(MespRefError) as error:
        register(replace(change(row), name="another"))
    text = str(error.value)
    assert text.startswith(f"registry row 'another': {field}: found ")
    assert ", expected " in text
    assert "\n" not in text
    assert "another" not in OPS


@pytest.mark.parametrize(
    "field", ["forward", "sample", "reduction_length", "equation", "magnitude", "golden"]
)
def test_a_field_that_is_not_given_is_named(field: str, row: OpSpec) -> None:
    given = {f.name: getattr(row, f.name) for f in fields(row)} | {"name": "another"}
    del given[field]
    with pytest.raises(MespRefError, match=f"'another': {field}: found (nothing|None)"):
        register(OpSpec(**given))


def test_a_name_is_registered_once(row: OpSpec) -> None:
    with pytest.raises(MespRefError, match="'tanh_gate': name: found twice"):
        register(row)


def reached(function: Any, seen: dict[int, Any]) -> list[Any]:
    """The functions and modules that a function names, and those that they name."""
    closure = inspect.getclosurevars(function)
    for value in {**closure.globals, **closure.nonlocals}.values():
        if id(value) not in seen and (inspect.isfunction(value) or inspect.ismodule(value)):
            seen[id(value)] = value
            if inspect.isfunction(value):
                reached(value, seen)
    return list(seen.values())


def home(value: Any) -> str:
    name: str = value.__name__ if inspect.ismodule(value) else value.__module__
    return name


@pytest.mark.parametrize("name", OPS)
def test_equations_and_twins_share_nothing_with_the_ops(name: str) -> None:
    spec = OPS[name]
    independent = [spec.equation]
    if spec.golden is not None:
        independent += [spec.golden.torch, spec.golden.functional]
    for function in independent:
        used = {home(value) for value in reached(function, {})}
        assert not {m for m in used if m.startswith(("mesp_ref.ops", "mesp_ref.lean"))}
    assert "mesp_ref.ops" in {home(value) for value in reached(OPS["rope"].sample, {})}


def test_the_registry_needs_no_framework_and_no_mpmath() -> None:
    code = (
        "import sys, mesp_ref.registry\n"
        "print({'mpmath', 'hypothesis', 'torch', 'jax', 'mlx'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"

"""Adapters of kernels that no one here wrote: each on a few cases, where its package is installed.

The whole of the suite, and what came out: docs/scoreboard.md.
"""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mesp_ref.errors import MespRefError
from mesp_ref.golden import Suite, check
from mesp_ref.golden.backends import BACKENDS, NotCovered, computed, load, run

ADAPTERS = [  # backend, the packages it needs, cases, precisions
    (
        "ggml",
        ["ggml"],
        ("ops/attention/usual", "ops/rmsnorm/usual", "positions/linear"),
        ["float32"],
    ),
    ("tinygrad", ["tinygrad"], ("ops/rmsnorm/usual", "ops/cross_entropy/usual"), ["float32"]),
    ("liger", ["triton", "liger_kernel"], ("ops/*/usual",), ["float32", "bfloat16"]),
    ("fla", ["triton", "fla"], ("ops/*/usual", "ops/attention/square"), ["float32", "bfloat16"]),
    ("unsloth", ["triton", "unsloth_zoo"], ("ops/*/usual",), ["float32", "bfloat16"]),
    ("flash_attn", ["triton", "flash_attn"], ("ops/*/usual",), ["float32", "bfloat16"]),
    ("cut_cross_entropy", ["triton", "cut_cross_entropy"], ("ops/lm_loss",), ["bfloat16"]),
]
MODELS = ("ops", "positions", "block", "e2e/untied")


def failed(name: str, dtype: str, only: tuple[str, ...], out: Path) -> list[str]:
    """The cases of a backend that do not agree, gradients of its base aside.

    Each in a process of its own: libraries of kernels change torch for their purposes.
    """
    patterns = [word for pattern in only for word in ("--only", pattern)]
    command = ["golden", "run", name, "--dtype", dtype, "--out", str(out), *patterns]
    done = subprocess.run(
        [sys.executable, "-m", "mesp_ref", *command], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = check(out, Suite(), dtype=dtype, only=only, roles=["result"], present=True)
    return [case.case for case in report.cases if not case.passed]


@pytest.mark.parametrize(
    ("name", "needs", "only", "dtype"), [(n, p, o, d) for n, p, o, ds in ADAPTERS for d in ds]
)
def test_kernels_of_others_agree(
    name: str, needs: list[str], only: tuple[str, ...], dtype: str, tmp_path: Path
) -> None:
    if missing := [package for package in needs if find_spec(package) is None]:
        pytest.skip(f"{', '.join(missing)}: not installed")
    assert failed(name, dtype, only, tmp_path / "out") == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_transformers_and_peft_agree(dtype: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    only = MODELS if dtype == "float32" else ("ops", "block", "e2e/untied")
    assert failed("transformers", dtype, only, tmp_path / "out") == []


def test_an_adapter_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way from a kernel to a verdict: with one gradient doubled, its case does not agree."""
    backend = load("engine")
    plain = backend.compute

    def doubled(*args: Any) -> dict[str, Any]:
        found: dict[str, Any] = plain(*args)
        return found | {"dx": 2 * found["dx"]}

    monkeypatch.setattr(backend, "compute", doubled)
    done = run("engine", tmp_path / "out", only=["ops/rmsnorm/usual"])
    report = check(tmp_path / "out", Suite(), only=done)
    assert [verdict.tensor for verdict in report.cases[0].verdicts if not verdict.passed] == ["dx"]


@pytest.mark.parametrize("name", ["ggml", "tinygrad", "autograd", "mlx", "jax"])
def test_what_is_not_installed_is_said_with_what_to_install(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, {"mlx": "mlx.core"}.get(name, name), None)
    monkeypatch.delitem(sys.modules, f"mesp_ref.golden.backends.{name}", raising=False)
    with pytest.raises(MespRefError) as caught:
        load(name)
    assert f"pip install {BACKENDS[name]}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_backend_that_raises_is_one_line(suite: Suite) -> None:
    class Broken:
        def compute(self, *args: Any) -> Any:
            raise ZeroDivisionError("division by zero\n\x1b[31mno")

    case = suite.cases["ops/rmsnorm/usual"]
    with pytest.raises(MespRefError, match="raised ZeroDivisionError") as caught:
        computed(Broken(), "broken", case, {}, suite.root, "float32")
    assert str(caught.value).isprintable()


def test_what_a_backend_does_not_cover_stays_not_covered(suite: Suite) -> None:
    class Empty:
        def compute(self, *args: Any) -> Any:
            raise NotCovered

    with pytest.raises(NotCovered):
        computed(Empty(), "empty", suite.cases["ops/rope/usual"], {}, suite.root, "float32")


def test_the_interpreter_rounds_bfloat16_as_hardware_does() -> None:
    """In a process of its own: triton reads at import whether it is to interpret."""
    if find_spec("triton") is None or find_spec("torch") is None:
        pytest.skip("triton, torch: not installed")
    program = Path(__file__).parent / "interpreted.py"
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_torch_computes_on_its_default_device(suite: Suite) -> None:
    """On one that only knows shapes: an operation with a tensor left on the CPU would raise."""
    torch = pytest.importorskip("torch")
    client = load("torch")
    kinds = {"op": client.compute_op, "block": client.compute_block}
    with torch.device("meta"):
        for case in suite.cases.values():
            inputs = suite.read(case).inputs if case.kind in kinds else {}
            if inputs and "labels" not in inputs:  # a count of labels is a number, not a shape
                given = {n: client.to_torch(array, torch.float32) for n, array in inputs.items()}
                found = kinds[case.kind](case, given)
                assert {tensor.device.type for tensor in found.values()} == {"meta"}, case.name


def test_options_of_another_compiler_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from mesp_ref.golden.backends import kernels

    class Kernel:
        def run(self, *args: Any, **options: Any) -> Any:
            return args, options

    monkeypatch.setitem(sys.modules, "triton.runtime.jit", SimpleNamespace(JITFunction=Kernel))
    kernels.drop_options("waves_per_eu")
    assert Kernel().run(1, grid=2, waves_per_eu=1) == ((1,), {"grid": 2})

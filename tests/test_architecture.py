"""The house rules: imports run downwards, the reading path is short, every backward is registered."""

import ast
import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import mesp_ref
from mesp_ref import lean, ops
from mesp_ref.registry import OPS

ROOT = Path(mesp_ref.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# Lower layers first: a module may import its own layer and those above it in this list.
LAYERS = (
    ("errors",),
    ("ops",),
    ("engine",),
    ("lean",),
    ("registry",),
    ("memory", "files"),
    ("api",),
    ("stories", "train"),
    ("job",),
    ("spread",),
    ("verify",),
    ("golden",),
    ("learn",),
    ("cli", "__main__"),
)
FRAMEWORKS = {"torch", "jax", "mlx", "transformers", "peft", "tensorflow"}
MAY_USE_FRAMEWORKS = ("verify/adapters/", "golden/backends/")


def part(file: Path) -> str:
    """The first name below mesp_ref that a file belongs to."""
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(file: Path) -> Iterator[str]:
    """Dotted names that a file imports, lazily or not; relative imports would be refused."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            module = node.module or ""
            if module == "mesp_ref":
                yield from (f"mesp_ref.{a.name}" for a in node.names if not a.name.startswith("__"))
            else:
                yield module
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant))


def layer(name: str) -> int:
    found = [i for i, names in enumerate(LAYERS) if name in names]
    assert found, f"mesp_ref.{name} has no layer: add it to LAYERS"
    return found[0]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_run_downwards(file: Path) -> None:
    if file == ROOT / "__init__.py":
        return  # the front door names what is behind it
    for module in imported(file):
        names = module.split(".")
        if names[0] == "mesp_ref" and len(names) > 1:
            assert layer(names[1]) <= layer(part(file)), f"{module} lies above {part(file)}"


def closure(start: Path, *, aside: tuple[str, ...] = ()) -> set[Path]:
    """A module and all of mesp_ref that it imports, down to the last; `aside` names parts left out."""
    seen: set[Path] = set()
    todo = [start]
    while todo:
        file = todo.pop()
        if file in seen or part(file) in aside:
            continue
        seen.add(file)
        for module in imported(file):
            names = module.split(".")[1:] if module.startswith("mesp_ref.") else []
            for place in (ROOT.joinpath(*names), ROOT.joinpath(*names[:-1])):
                files = place.with_suffix(".py"), place / "__init__.py"
                todo += [f for f in files if f.exists() and f != ROOT / "__init__.py"]
    return seen


def length(files: Iterable[Path]) -> int:
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def test_the_reading_path_is_short() -> None:
    """All that a reader of the methods needs, down to the last import: 1,600 lines for Qwen2.5, and
    120 for what Llama, Qwen3 and Gemma 3 have otherwise."""
    needed = closure(ROOT / "engine" / "methods.py", aside=("files", "memory", "errors"))
    assert {part(file) for file in needed} == {"ops", "engine"}
    assert length(needed) <= 1720, sorted((length([f]), f.name) for f in needed)


def test_a_block_is_short() -> None:
    names = "block.py", "attention_half.py", "mlp_half.py"
    assert length(ROOT / "engine" / name for name in names) <= 330


@pytest.mark.parametrize("file", sorted(ROOT.glob("engine/*.py")), ids=lambda f: f.stem)
def test_the_engine_knows_nothing_of_what_is_around_it(file: Path) -> None:
    """How work is shared out, cut up or stored is wrapped around the engine."""
    text = file.read_text(encoding="utf-8").lower()
    for word in ("thread", "worker", "tile", "disk", "offload", "json"):
        assert word not in text, word


@pytest.mark.parametrize("file", sorted(ROOT.glob("ops/**/*.py")), ids=lambda f: f.stem)
def test_an_op_fits_on_two_screens(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_a_function_fits_on_a_screen(file: Path) -> None:
    """At most 40 lines of code; the docstring, which is the derivation's home, not counted."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body
            documented = ast.get_docstring(node) is not None
            doc = (body[0].end_lineno or 0) - body[0].lineno + 1 if documented else 0
            length = (node.end_lineno or 0) - node.lineno + 1 - doc
            assert length <= 40, f"{file.name}: {node.name} has {length} lines"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_frameworks_stay_in_adapters_and_backends(file: Path) -> None:
    if not str(file.relative_to(ROOT)).startswith(MAY_USE_FRAMEWORKS):
        assert not FRAMEWORKS & {module.split(".")[0] for module in imported(file)}


def test_every_backward_is_registered() -> None:
    registered = {f for row in OPS.values() for f in (row.backward, row.backward_params)}
    for module in (ops, lean):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if name.endswith(("_bwd", "_bwd_params")):
                assert function in registered, (
                    f"{module.__name__}.{name} has no row in registry.OPS"
                )


def test_ops_import_numpy_and_siblings_only() -> None:
    for file in ROOT.glob("ops/**/*.py"):
        for module in imported(file):
            top = module.split(".")[0]
            assert top in {"numpy", "typing", "collections", "functools", "mesp_ref"}, (
                f"{file.name}: {module}"
            )
            assert top != "mesp_ref" or module.startswith("mesp_ref.ops"), f"{file.name}: {module}"

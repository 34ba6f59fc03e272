"""The Rust and C++ clients, built with the compilers at hand: they pass, and they can fail."""

import shutil
import subprocess
from pathlib import Path

import pytest
from test_c_client import fuzz, lay, small_suite, start

from mesp_ref.golden import SHIPPED

EXAMPLES = Path(__file__).parents[2] / "examples"
RUST = ("rust/golden.rs", "rustc", ["--edition", "2021", "-D", "warnings", "-C", "overflow-checks"])
STRICT = ["-std=c++17", "-pedantic", "-Wall", "-Wextra", "-Wshadow", "-Werror"]
CPP = ("cpp/golden.cpp", "c++", STRICT)
SANITISED = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
Client = tuple[str, str, list[str]]


def build(client: Client, folder: Path, change: tuple[str, str] = ("", ""), *flags: str) -> Path:
    """A client's program; with its one `change[0]` replaced by `change[1]`."""
    source, compiler, options = client
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    text = (EXAMPLES / source).read_text(encoding="utf-8")
    assert not change[0] or text.count(change[0]) == 1
    file, program = folder / Path(source).name, folder / "golden"
    file.write_text(text.replace(*change) if change[0] else text, encoding="utf-8")
    subprocess.run([compiler, *options, *flags, "-o", program, file], check=True)
    return program


@pytest.mark.parametrize(("client", "count"), [(RUST, 48), (CPP, 40)], ids=["rust", "cpp"])
def test_it_agrees_with_the_suite(client: Client, count: int, tmp_path: Path) -> None:
    program = build(client, tmp_path)
    done = start(program, SHIPPED)
    assert done.returncode == 0, done.stdout
    assert f"{count} of {count} tensors agree" in done.stdout
    done = start(program, tmp_path)  # no suite
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("client", "change", "named"),
    [
        (RUST, ("- row[i] * along", "- 0.0 * along"), "FAIL ops/rmsnorm/usual"),
        (CPP, ("p[j] * (dp[j] - along)", "p[j] * (dp[j] - 0 * along)"), "FAIL ops/attention/usual"),
    ],
    ids=["rust", "cpp"],
)
def test_a_mistake_in_it_fails(
    client: Client, change: tuple[str, str], named: str, tmp_path: Path
) -> None:
    done = start(build(client, tmp_path, change), SHIPPED)
    assert done.returncode == 1
    assert named in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("client", "op"), [(RUST, "swiglu"), (CPP, "attention")], ids=["rust", "cpp"]
)
def test_hostile_suites_are_refused_or_computed(client: Client, op: str, tmp_path: Path) -> None:
    """No panic, no read out of bounds, nothing a terminal obeys."""
    program = build(client, tmp_path, ("", ""), *(SANITISED if client is CPP else []))
    cases = ("ops/rmsnorm/usual", f"ops/{op}/usual")
    data, names = small_suite(cases)
    lay(data, names, tmp_path / "suite")
    assert start(program, tmp_path / "suite").returncode == 0
    found = fuzz(program, tmp_path / "suite", 1000, 0, cases)
    assert found[0] > 0
    assert found[2] > 0

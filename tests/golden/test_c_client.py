"""The C client, built with the system's compiler: it passes, and it can fail."""

import shutil
import subprocess
from pathlib import Path

import pytest

from mesp_ref.golden import SHIPPED

SOURCE = Path(__file__).parents[2] / "examples" / "c" / "golden.c"
CC = shutil.which("cc")
pytestmark = pytest.mark.skipif(CC is None, reason="no C compiler")


def run(source: str, suite: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Build a source and run it on a suite."""
    file, program = tmp_path / "golden.c", tmp_path / "golden"
    file.write_text(source, encoding="utf-8")
    flags = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([str(CC), *flags, "-o", program, file, "-lm"], check=True)
    return subprocess.run([program, suite], capture_output=True, text=True, timeout=60)


def test_it_agrees_with_the_suite(tmp_path: Path) -> None:
    done = run(SOURCE.read_text(encoding="utf-8"), SHIPPED, tmp_path)
    assert done.returncode == 0, done.stdout
    for op in ("rmsnorm", "rope", "lora_linear"):
        assert f"ok   ops/{op}/usual" in done.stdout
    assert "88 of 88 tensors agree" in done.stdout


@pytest.mark.parametrize(
    ("right", "wrong", "named"),
    [
        ("turn(dy, c, s, -1,", "turn(dy, c, s, 1,", "FAIL ops/rope/usual"),
        ("- xm[i] * along", "- 0 * along", "FAIL ops/rmsnorm/usual"),
        ("dB[j * r + k] += s *", "dB[j * r + k] += 1 *", "FAIL ops/lora_linear/usual"),
    ],
)
def test_a_mistake_in_it_fails(right: str, wrong: str, named: str, tmp_path: Path) -> None:
    source = SOURCE.read_text(encoding="utf-8")
    assert source.count(right) == 1
    done = run(source.replace(right, wrong), SHIPPED, tmp_path)
    assert done.returncode == 1
    assert named in done.stdout


def test_no_suite_is_misuse(tmp_path: Path) -> None:
    done = run(SOURCE.read_text(encoding="utf-8"), tmp_path, tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1

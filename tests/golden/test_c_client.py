"""The C client, built with the system's compiler: it passes, it can fail, no suite leads it astray.

python tests/golden/test_c_client.py --runs 20000     many hostile suites for the sanitised program
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "fuzz")]

from mutate import SEPARATOR, mutate
from profiles import TIMES

from mesp_ref.golden import SHIPPED

SOURCE = Path(__file__).parents[2] / "examples" / "c" / "golden.c"
CC = shutil.which("cc")
SANITISED = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
SMALL = ("ops/rmsnorm/usual", "ops/rope/usual", "ops/lora_linear/usual")  # a suite for fuzzing
pytestmark = pytest.mark.skipif(CC is None, reason="no C compiler")


def build(source: str, folder: Path, flags: Sequence[str] = ("-O2",)) -> Path:
    file, program = folder / "golden.c", folder / "golden"
    file.write_text(source, encoding="utf-8")
    strict = ["-std=c11", "-pedantic", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([str(CC), *strict, *flags, "-o", program, file, "-lm"], check=True)
    return program


def start(program: Path, suite: Path) -> subprocess.CompletedProcess[str]:
    command = [program, suite]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, errors="replace")


def run(source: str, suite: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Build a source and run it on a suite."""
    return start(build(source, tmp_path), suite)


def sanitised(folder: Path) -> Path:
    """The program with its address and undefined behaviour sanitisers; skips where they are not."""
    try:
        build("int main(void) { return 0; }\n", folder, SANITISED)
    except subprocess.CalledProcessError:
        pytest.skip("no sanitisers in this compiler")
    return build(SOURCE.read_text(encoding="utf-8"), folder, SANITISED)


def small_suite(names: Sequence[str] = SMALL) -> tuple[bytes, list[str]]:
    """A manifest of a few cases and their files, as one input for `mutate`, and the files' names."""
    manifest = json.loads((SHIPPED / "manifest.json").read_text(encoding="utf-8"))
    cases = [case for case in manifest["cases"] if case["name"] in names]
    kept = {name: manifest[name] for name in ("format", "version", "units")} | {"cases": cases}
    files = [case["file"] for case in cases]
    parts = [json.dumps(kept).encode(), *((SHIPPED / file).read_bytes() for file in files)]
    return SEPARATOR.join(parts), ["manifest.json", *files]


def lay(data: bytes, names: Sequence[str], folder: Path) -> None:
    """The parts of an input as the files of a suite."""
    for name, part in zip(names, data.split(SEPARATOR), strict=False):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(part)


def fuzz(
    program: Path, folder: Path, runs: int, seed: int, cases: Sequence[str] = SMALL
) -> Counter[int]:
    """How often each exit code came; AssertionError with the input's seed for any but 0, 1 and 2."""
    (data, names), found = small_suite(cases), Counter[int]()
    for i in range(runs):
        lay(data, names, folder)
        lay(mutate(data, random.Random(f"{seed}/{i}")), names, folder)
        done = start(program, folder)
        assert done.returncode in (0, 1, 2), (seed, i, done.stderr[-3000:])
        for finding in (
            "Sanitizer",
            "runtime error",
            "panicked",
        ):  # which end with exit code 1, too
            assert finding not in done.stderr, (seed, i, done.stderr[-3000:])
        said = (done.stdout + done.stderr).replace("\n", "")
        assert said.isprintable(), (seed, i, said)
        assert said.isascii(), (seed, i, said)
        found[done.returncode] += 1
    return found


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


def test_hostile_suites_are_refused_or_computed(tmp_path: Path) -> None:
    """No read or write out of bounds, no undefined behaviour, no leak, nothing a terminal obeys."""
    program = sanitised(tmp_path)
    assert start(program, SHIPPED).returncode == 0
    found = fuzz(program, tmp_path / "suite", 80 * TIMES, 0)
    assert found[0] > 0
    assert found[2] > found.total() / 4


def test_the_sanitisers_see_a_read_beyond_the_end(tmp_path: Path) -> None:
    """The fuzzer can fail: without one check of shapes it does, within the inputs of the test."""
    source = SOURCE.read_text(encoding="utf-8")
    check = 'same(up.size, shape.size, "rmsnorm");'
    assert source.count(check) == 1
    sanitised(tmp_path)
    program = build(source.replace(check, ""), tmp_path, SANITISED)
    (data, names), root = small_suite(), tmp_path / "suite"
    parts = data.split(SEPARATOR)
    at = names.index("ops/rmsnorm/usual.safetensors")
    length = int.from_bytes(parts[at][:8], "little")
    header = json.loads(parts[at][8 : 8 + length])
    header["in/dy"] = {"dtype": "F32", "shape": [1, 1, 1], "data_offsets": [0, 4]}
    text = json.dumps(header).encode()
    parts[at] = len(text).to_bytes(8, "little") + text + parts[at][8 + length :]
    lay(SEPARATOR.join(parts), names, root)
    assert "heap-buffer-overflow" in start(program, root).stderr
    assert start(sanitised(tmp_path), root).returncode == 2


def main() -> int:
    parser = argparse.ArgumentParser(description="hostile suites for the sanitised C client")
    parser.add_argument("--runs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(
        dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    ) as at:
        found = fuzz(sanitised(Path(at)), Path(at) / "suite", args.runs, args.seed)
    print(
        f"{found.total()} suites: " + ", ".join(f"exit {c}: {n}" for c, n in sorted(found.items()))
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

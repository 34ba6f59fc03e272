"""Nothing that a stranger wrote reaches the terminal: names of tensors, cases, files and tokens."""

import ast
import hashlib
import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import words

import mesp_ref as mr
from mesp_ref.cli import main
from mesp_ref.golden import SHIPPED, Suite
from mesp_ref.golden.builder.write import write_tensors

CLI = Path(mr.__file__).parent / "cli"
NORM = "ops/rmsnorm/usual"
FORGED = "x\n60 of 60 cases and 900 of 900 tensors agree\n\x1b[2J\x1b]0;done\x07\u202e\r"
HOSTILE = (
    FORGED,
    "\x9b2J",
    "dx: ok" + " " * 200 + "ok    all",
    "y" * 1_000_000,
    "\x00" * 1_000_000,
)
Run = Callable[..., list[str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command and returns its lines, each of them harmless and short."""

    def start(*command: object, code: int = 0) -> list[str]:
        assert main([str(part) for part in command]) == code
        out, err = capsys.readouterr()
        for c in (out + err).replace("\n", ""):
            assert unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp"), hex(ord(c))
        assert "--json" in command or all(len(line) < 2000 for line in (out + err).split("\n"))
        return (out + err).rstrip("\n").split("\n")

    return start


def answer(root: Path, **changed: np.ndarray | None) -> Path:
    """The right answer to one case, with some tensors changed, or (None) left out."""
    suite = Suite()
    case = suite.cases[NORM]
    arrays = {n: a for n, a in (suite.read(case).want | changed).items() if a is not None}
    write_tensors(root / case.file, arrays)
    return root


@pytest.fixture
def model(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A checkpoint in a folder whose name would forge lines."""
    place = tmp_path / FORGED.replace("/", "-")
    shutil.copytree(tiny_model_dir, place)
    return place


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / ("notes" + FORGED + ".txt")
    file.write_text(words(900), encoding="utf-8")
    return file


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: repr(name[:8]))
def test_tensors_of_an_answer_cannot_forge_a_verdict(name: str, run: Run, tmp_path: Path) -> None:
    root = answer(tmp_path / "actual", **{name: np.zeros(1)})
    lines = run("golden", "check", root, "--only", NORM, code=1)
    assert len(lines) == 3  # the case, its tensor, the sum
    assert lines[0].startswith("FAIL")
    assert lines[-1].startswith("0 of 1 cases and 3 of 4")
    assert not any("ok    " in line for line in lines)
    [text] = run("golden", "check", root, "--only", NORM, "--json", code=1)
    assert name in [t["name"] for t in json.loads(text)["cases"][0]["tensors"]]
    page = tmp_path / "page.html"
    run("golden", "check", root, "--only", NORM, "--html", page, code=1)
    told = page.read_text(encoding="utf-8")
    assert len(told) < 20_000
    assert all(c.isprintable() or c == "\n" for c in told)


def test_a_suite_cannot_forge_a_verdict(run: Run, tmp_path: Path) -> None:
    """Names of cases and of mistakes come from the suite."""
    suite = tmp_path / "suite"
    manifest = json.loads((SHIPPED / "manifest.json").read_text(encoding="utf-8"))
    manifest["cases"] = [case for case in manifest["cases"] if case["name"] == NORM]
    manifest["wrong"] = [wrong for wrong in manifest["wrong"] if wrong["of"] == NORM]
    for wrong in manifest["wrong"]:
        wrong |= {"of": FORGED, "bug": FORGED}
    manifest["cases"][0]["name"] = FORGED
    files = [entry["file"] for entry in manifest["cases"] + manifest["wrong"]]
    for file in files:
        (suite / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(SHIPPED / file, suite / file)
    (suite / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (suite / "SHA256SUMS").write_text(
        "".join(
            f"{hashlib.sha256((suite / file).read_bytes()).hexdigest()}  {file}\n"
            for file in ("manifest.json", *files)
        )
    )
    wrong = np.zeros((2, 4, 6))
    for changed, code, start in (
        ({}, 0, "ok "),
        ({"dx": wrong}, 1, "FAIL"),
        ({"dx": None}, 1, "FAIL"),
    ):
        lines = run(
            "golden", "check", answer(tmp_path / "actual", **changed), "--suite", suite, code=code
        )
        assert lines[0].startswith(start)
        assert lines[-1].startswith(f"{1 - code} of 1 cases")


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: repr(name[:8]))
def test_a_sketch_cannot_forge_a_verdict(name: str, run: Run, tmp_path: Path) -> None:
    entry = {"shape": [3] * 5000, "norm": 1.0, "drift": 1e-7, "projections": [1.0] * 64}
    sketch = {"format": "mesp-ref gradient sketch 1", "loss": 1.0, "loss_drift": 1e-7}
    file, gradients = tmp_path / "sketch.json", tmp_path / "gradients.safetensors"
    other = entry | {"shape": [2]}
    file.write_text(json.dumps(sketch | {"tensors": {name: entry, "g": other}}), encoding="utf-8")
    write_tensors(gradients, {"g": np.full(2, 1e300), name: np.zeros(2)})
    lines = run("golden", "compare", file, gradients, "--loss", "nan", code=1)
    assert [line[:4] for line in lines] == ["FAIL"] * 3 + ["0 of"]
    assert not any("nan" in line or "inf" in line for line in lines)


def test_folders_and_files_cannot_forge_lines(
    model: Path, data: Path, run: Run, tmp_path: Path
) -> None:
    adapter, out = tmp_path / f"adapter{FORGED}", tmp_path / f"out{FORGED}"
    mr.save_adapter(mr.init_lora(mr.load_model(model).config, rank=2, seed=1, b_std=0.1), adapter)
    assert len(run("info", model)) == 10
    assert len(run("memory", model, "--method", "mesp", "--seq-len", "8")) > 3
    assert len(run("convert", "adapter", adapter, out / "mlx", "--to", "mlx")) == 1
    argv = ("eval", "--model", model, "--data", data, "--seq-len", "16", "--rows", "2")
    assert len(run(*argv)) == 7  # the result, and six lines of what the data comes to
    assert len(run("merge", "--model", model, "--adapter", adapter, "--out", out / "merged")) == 1
    lines = run("finetune", "--model", model, "--data", data, "--steps", "1", "--seq-len", "16",
                "--sample-tokens", "2", "--out", out / "run")  # fmt: skip
    assert not any(line.startswith("60 of 60") for line in lines)
    sketch = out / "sketch.json"
    assert len(run("golden", "sketch", "--model", model, "--adapter", adapter, "--text", "the sea",
                   "--out", sketch)) == 1  # fmt: skip
    assert len(run("info", tmp_path / FORGED / "nothing", code=2)) == 1


def test_a_model_writes_no_terminal_codes(
    tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random weights write random bytes: some are codes, and line ends stay what they are."""
    command = ["generate", "--model", str(tiny_model_dir), "--prompt", "the", "--max-new-tokens",
               "300", "--temperature", "3"]  # fmt: skip
    assert main([*command, "--json"]) == 0
    printed = capsys.readouterr().out
    raw = json.loads(printed)["text"]
    assert printed[:-1].isprintable()
    assert "\x1b" in raw or any(unicodedata.category(c) == "Cc" for c in raw.replace("\n", ""))
    assert main(command) == 0
    text = capsys.readouterr().out
    assert {c for c in text if unicodedata.category(c) == "Cc"} <= {"\n", "\t"}
    assert text.count("\n") == raw.count("\n") + 1


def test_every_command_prints_through_one_function() -> None:
    """`print` is called where texts are escaped first, and nowhere else."""
    callers = set()
    for file in CLI.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
                callers.add(file.stem)
    assert callers <= {"__init__", "options", "generate"}

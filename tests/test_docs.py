"""Every command and snippet of the documents is run: here, or where the table says."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from readme_tables import README, ROOT

from mesp_ref.cli import main

DOCUMENTS = [
    README, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md")),
]  # fmt: skip

# A command's beginning, and what runs it. Commands of the story model run here.
ELSEWHERE = {
    "make": "tests/test_readme.py knows every target; .ci/run and CONTRIBUTING.md say which run when",
    "pip install": "the extras are installed by the Makefile's targets",
    "pytest": "test_named_tests_exist",
    "bible": "of Debian's package bible-kjv",
    "python benchmarks/": "tests/test_benchmarks.py and test_benchmarks_zeroth_order.py, on tiny shapes",
    "python tests/spread/kills.py": "tests/spread/test_ranks.py runs it once",
    "python tests/spread/hosts.py": "needs root and Linux; `make parity` runs the same on loopback",
    "python -O": "tests/test_robust.py",
    "python tests/golden/test_c_client.py": "the file itself runs some",
    "python tests/replacing.py": "tests/files/test_output.py runs a sample",
    "python tests/faults.py": "tests/job/test_faults.py runs it with fewer kills",
    "python tests/readme_tables.py": "tests/test_readme.py compares what it would write",
    "mkdir": "test_the_report_of_the_on_device_backward",
    "mesp-ref finetune": "make demo; tests/cli/test_cli.py with fewer steps",
    "mesp-ref data": "tests/cli/test_data_command.py",
    "mesp-ref golden": "tests/golden; test_the_report_of_the_on_device_backward",
    "mesp-ref mutants": "tests/verify/test_mutants.py, and docs/kill-table.md is its output",
    "mesp-ref finetune --model": "test_commands_on_a_model_of_ones_own",
    "mesp-ref generate --model": "test_commands_on_a_model_of_ones_own",
    "mesp-ref generate --adapter": "tests/files/test_hub.py, tests/cli/test_cli.py",
    "mesp-ref finetune --memory-limit": "tests/memory/test_memory_dial.py and test_trainer.py",
    "mesp-ref push": "tests/files/test_hub.py, against a hub of our own",
    "mesp-ref learn": "tests/learn/test_student_files.py and test_page.py",
    "mesp-ref merge": "tests/files/test_merge.py, tests/parity/test_gguf.py",
    "mesp-ref convert": "tests/files/test_convert.py, test_to_gguf.py and tests/parity/test_gguf.py",
    "mesp-ref memory": "test_memory_commands; --measure and --plot in tests/cli/test_memory_command.py",
}


def commands(document: Path) -> Iterator[str]:
    """Lines of fenced blocks without a language, continuations joined, and code between backticks."""
    text = document.read_text(encoding="utf-8")
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if not language:
            yield from (line.split("  #")[0].strip() for line in block.splitlines())
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    yield from re.findall(r"`([^`\n]+)`", prose)


def is_command(line: str) -> bool:
    first = line.split(" ")[0] if line else ""
    return first in ("mesp-ref", "make", "pip", "pytest", "python", "git", "bible", "mkdir") and (
        " " in line
    )


ALL = sorted({line for document in DOCUMENTS for line in commands(document) if is_command(line)})


@pytest.mark.parametrize("command", ALL)
def test_every_command_is_run_somewhere(command: str) -> None:
    assert command.startswith(tuple(ELSEWHERE)), "add what runs it to ELSEWHERE"


@pytest.mark.parametrize("beginning", ELSEWHERE)
def test_the_table_holds_nothing_else(beginning: str) -> None:
    assert any(command.startswith(beginning) for command in ALL)


@pytest.mark.parametrize("command", [c for c in ALL if c.startswith("mesp-ref ")])
def test_options_exist(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` of the command names every option that a document gives it."""
    words = shlex.split(command.replace("…", ""))[1:]
    path = [word for word in words[:2] if re.fullmatch("[a-z][a-z-]+", word)]
    path = path if path[0] in ("golden", "convert") else path[:1]
    with pytest.raises(SystemExit) as stop:
        main([*path, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in words if word.startswith("--"))


@pytest.mark.parametrize(
    "command", [c for c in ALL if c.startswith("mesp-ref memory ") and "--plot" not in c]
)
def test_memory_commands(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As written, but predicted only: measuring takes a checkpoint of 2 GB."""
    assert main([word for word in shlex.split(command)[1:] if word != "--measure"]) == 0
    assert "MB" in capsys.readouterr().out


def test_commands_on_a_model_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fine-tuning and generating as docs/smollm2.md has it, the story model in SmolLM2's place."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").symlink_to(ROOT / "weights")
    (tmp_path / "proverbs.txt").write_text("Hear, my son.\n" * 400, encoding="utf-8")
    written = list(commands(ROOT / "docs" / "smollm2.md"))
    for line in (c for c in written if c.startswith(("mesp-ref finetune", "mesp-ref generate"))):
        cheap = line.replace("--steps 30", "--steps 1 --seq-len 32 --sample-tokens 4 --eval-rows 2")
        assert main(shlex.split(cheap)[1:]) == 0, line
    assert capsys.readouterr().out
    assert (tmp_path / "runs/proverbs/adapter/adapter_config.json").exists()


def test_the_report_of_the_on_device_backward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands that docs/on-device-backward.md ends with, and the report that it begins with."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "on-device-backward.md").read_text(encoding="utf-8")
    shown, block = re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    [script] = re.findall(r"<<'EOF'\n(.*?)^EOF$", block, re.DOTALL | re.MULTILINE)
    export, *_, check = (line for line in block.splitlines() if line.startswith("mesp-ref"))
    assert main(shlex.split(export)[1:]) == 0
    (tmp_path / "out/block").mkdir(parents=True)
    exec(compile(script, "docs/on-device-backward.md", "exec"), {})
    capsys.readouterr()
    assert main(shlex.split(check)[1:]) == 1
    printed = capsys.readouterr().out
    for line in shown.splitlines():
        assert line.split("…")[0].strip() in printed, line
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize("command", [c for c in ALL if c.startswith("pytest ")])
def test_named_tests_exist(command: str) -> None:
    words = shlex.split(command)[1:]
    for path in (ROOT / word for word in words if word.startswith("tests")):
        assert path.exists()
        if "-k" in words and path.is_file():
            names = words[words.index("-k") + 1].split(" or ")
            assert all(f"{name}" in path.read_text(encoding="utf-8") for name in names)

"""What surrounds a run cannot end it: streams, logs, locales, matplotlib, signals, no home."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers import words

Shell = Callable[..., "subprocess.CompletedProcess[str]"]
RUN = (
    "finetune --model model --data notes.txt --out {} --steps 24 --accumulate 1 --seq-len 16 "
    "--eval-rows 2 --sample-tokens 2 --save-every 100"
)


@pytest.fixture
def shell(tmp_path: Path, tiny_model_dir: Path) -> Shell:
    """Runs a line of bash in a user's directory; `M` in it is mesp-ref."""
    (tmp_path / "model").symlink_to(tiny_model_dir, target_is_directory=True)
    (tmp_path / "notes.txt").write_text(words(900), encoding="utf-8")
    place = tmp_path

    def run(line: str, **environment: str | None) -> "subprocess.CompletedProcess[str]":
        known: dict[str, str | None] = {**os.environ, "OPENBLAS_NUM_THREADS": "1", **environment}
        kept = {name: value for name, value in known.items() if value is not None}
        module = shlex.join([sys.executable, "-m", "mesp_ref"])
        line = re.sub(r"\bM ", lambda _: module + " ", line)
        command = ["bash", "-o", "pipefail", "-c", line]
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", cwd=place, env=kept
        )

    return run


def complete(folder: Path) -> dict[str, Any]:
    """The summary of a run that trained all its steps, saved, and drew its curve."""
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [e["step"] for e in map(json.loads, lines) if e["event"] == "step"] == [*range(1, 25)]
    assert summary["steps"] == 24
    assert (folder / "loss.png").stat().st_size > 1000
    return summary


NOBODY_LISTENS = {
    "head": ("2>&1 | head -6", 0),
    "a full log": ("2> /dev/full", 0),
    "a full result": ("2> log > /dev/full", 2),
    "both full": ("2> /dev/full > /dev/full", 2),
    "closed": ("<&- >&- 2>&-", 0),
    "only errors closed": ("2>&-", 0),
}


@pytest.mark.parametrize("how", NOBODY_LISTENS)
def test_a_run_goes_on_when_nobody_listens(how: str, shell: Shell, tmp_path: Path) -> None:
    """EPIPE, ENOSPC and closed handles: trained, saved, complete; a result that is lost is code 2."""
    tail, code = NOBODY_LISTENS[how]
    done = shell(f"M {RUN.format('run')} {tail}")
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr + done.stdout
    summary = complete(tmp_path / "run")
    assert len(summary["warnings"]) == (how in ("head", "a full log", "both full"))
    assert done.stdout.count("warning") == (how == "a full log")


SETTINGS: dict[str, Mapping[str, str | None]] = {
    "matplotlibrc": {"MATPLOTLIBRC": "matplotlibrc", "MPLBACKEND": "module://nobody"},
    "no home": {"HOME": None, "XDG_CACHE_HOME": None, "XDG_CONFIG_HOME": None},
    "ascii": {"PYTHONIOENCODING": "ascii:strict"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_users_settings_change_nothing(name: str, shell: Shell, tmp_path: Path) -> None:
    """Nor do two dollar signs and letters from everywhere in the name of the run."""
    rc = "text.usetex: True\nfont.size: 9000\nfigure.max_open_warning: -1\n"
    (tmp_path / "matplotlibrc").write_text(rc)
    line = RUN.format("'r$x^$_é漢'") + " --prompt 'é — 漢字'"
    done = shell(f"M {line}", **SETTINGS[name])
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    summary = complete(tmp_path / "r$x^$_é漢")
    assert summary["prompt"] == "é — 漢字"
    assert not summary["warnings"]


TALK = {
    "generate json": "generate --model model --prompt 'é 漢字' --max-new-tokens 3 --json",
    "standard input": "generate --model model --prompt - --max-new-tokens 3 --json < prompt.txt",
    "eval": "eval --model model --data é.txt --rows 2 --seq-len 16",
    "info": "info é --json",
    "missing": "info 漢",
    "memory": "memory model --seq-len 16",
}


@pytest.mark.parametrize("name", ["ascii", "C"])
def test_every_encoding_takes_what_is_said(name: str, shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "é").symlink_to(tmp_path / "model")
    (tmp_path / "é.txt").write_text(words(200) + "漢字", encoding="utf-8")
    (tmp_path / "prompt.txt").write_text("\ufeffé 漢字", encoding="utf-8")
    for what, line in TALK.items():
        done = shell(f"M {line}", **SETTINGS[name])
        assert done.returncode == 2 * (what == "missing"), (what, done)
        assert "Traceback" not in done.stderr
        if "json" in line and what != "info":
            assert json.loads(done.stdout)["prompt"] == "é 漢字"


def test_too_few_file_handles_are_one_line(shell: Shell) -> None:
    for limit in (4, 8, 12, 16):
        done = shell(f"ulimit -n {limit}; M {RUN.format('run')} 2>&1 | tail -1")
        assert "Traceback" not in done.stdout + done.stderr, (limit, done)


def wait_for(file: Path, text: str) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if file.is_file() and text in file.read_text(encoding="utf-8"):
            return
        time.sleep(0.01)
    pytest.fail(f"{text} never came")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_signals_finish_the_step_save_and_can_be_resumed(
    name: str, shell: Shell, tmp_path: Path
) -> None:
    number = getattr(signal, name)
    command = [sys.executable, "-m", "mesp_ref", *RUN.format("run").split()]
    command[command.index("--steps") + 1] = "100000"
    run = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "run" / "metrics.jsonl", '"step": 5,')
    run.send_signal(number)
    if number != signal.SIGINT:  # a terminal that closes may tell twice
        run.send_signal(number)
    error = run.communicate(timeout=60)[1]
    assert run.returncode == 128 + number
    found = re.search(r"adapter and state as of step (\d+) are in run: .*--resume", error)
    assert found, error
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[-1])["step"] == int(found[1])  # not one step lost
    assert "Traceback" not in error


def test_ctrl_c_while_importing_is_one_line(tmp_path: Path) -> None:
    """The interrupt comes from NumPy's first line, where a user's would find the program."""
    (tmp_path / "numpy.py").write_text("raise KeyboardInterrupt\n")
    for module in ("mesp_ref", "mesp_ref.__main__"):
        done = subprocess.run(
            [sys.executable, "-m", module, "info"], capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (130, "")
        assert done.stderr.strip() == "mesp-ref: interrupted"

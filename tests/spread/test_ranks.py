"""Ranks as processes under mpiexec: same bytes, same start, one line for what goes wrong."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import steps
from ranks_at_hand import ENVIRONMENT, MPIEXEC, needs_mpi, ranks

pytestmark = needs_mpi
HERE = Path(__file__).parent


def done(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """A command that has ended, within two minutes."""
    return subprocess.run(
        command, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def options(tiny_model_dir: Path, text_file: Path) -> list[str]:
    return [
        "-m", "mesp_ref", "finetune", "--model", str(tiny_model_dir), "--data", str(text_file),
        "--seq-len", "32", "--eval-rows", "3", "--sample-tokens", "4", "--schedule", "constant",
    ]  # fmt: skip


def adapter(out: Path) -> bytes:
    return (out / "adapter/adapter_model.safetensors").read_bytes()


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("mesp-ref: error: ")]


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow), 4])
def test_ranks_leave_the_bytes_of_one_process(size: int) -> None:
    """mesp, mesp_tiled and mezo, RAM and disk, one and two batches a rank; an evaluation too."""
    spread = done(ranks(size, str(HERE / "steps.py")))
    assert spread.returncode == 0, spread.stderr
    assert not spread.stderr
    one = [steps.run(method, place, a * size) for method, place, a in steps.CASES]
    assert json.loads(spread.stdout) == one
    assert one[0] == one[1]  # disk changes nothing
    assert len(set(one)) == 5  # but methods and batches do


def test_the_command_on_ranks_and_resumed_on_another_number(
    options: list[str], tmp_path: Path
) -> None:
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    one = done([sys.executable, *options, "--accumulate", "4", "--steps", "6", "--out", str(alone)])
    assert one.returncode == 0, one.stderr
    mpi = [*options, "--mpi", "--out", str(spread)]
    two = done(ranks(2, *mpi, "--accumulate", "2", "--steps", "3"))
    assert (two.returncode, errors(two.stderr)) == (0, [])
    assert two.stdout.count("adapter in ") == 1  # rank 0 alone prints
    assert two.stderr.count("step 3/3") == 1
    four = done(ranks(4, *mpi, "--steps", "6", "--resume"))  # with 4 batches a step, as it had
    assert (four.returncode, errors(four.stderr)) == (0, [])
    assert adapter(spread) == adapter(alone)
    summaries = [json.loads((out / "summary.json").read_text()) for out in (alone, spread)]
    for side in ("before", "after"):
        assert summaries[0][side] == summaries[1][side]


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGUSR1", marks=pytest.mark.slow)])
def test_a_signal_saves(name: str, options: list[str], tmp_path: Path) -> None:
    """SIGTERM, and SIGUSR1, after which Open MPI's launcher leaves its ranks the time to save."""
    out = tmp_path / "run"
    command = ranks(2, *options, "--mpi", "--steps", "100000", "--out", str(out))
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as run:
        metrics = out / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while not (metrics.exists() and '"step", "step": 3' in metrics.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(run.pid, getattr(signal, name))
        _, text = run.communicate(timeout=60)
    assert "interrupted at step" in text
    assert "adapter and state as of step" in text
    assert not errors(text)


def test_a_difference_is_one_line(options: list[str], tmp_path: Path) -> None:
    """Of options and of the kernel that BLAS takes, which is no mistake with --inexact."""
    assert MPIEXEC is not None
    one = ["-n", "1", sys.executable, *options, "--mpi", "--steps", "1"]
    out = [str(tmp_path / name) for name in ("a", "b")]
    lr = done([MPIEXEC, *one, "--out", out[0], ":", *one, "--lr", "3", "--out", out[0]])
    assert lr.returncode == 2
    [line] = errors(lr.stderr)
    assert "error: rank 1 on " in line
    assert ": --lr: found 3.0, expected None as on rank 0" in line
    assert not Path(out[0]).exists()
    threads = ["-n", "1", "-env", "OPENBLAS_NUM_THREADS", "2", *one[2:]]
    if platform.machine() in ("x86_64", "AMD64"):  # a kernel that every such processor has
        kernel = ["-n", "1", "-env", "OPENBLAS_CORETYPE", "Prescott", *one[2:]]
        [line] = errors(done([MPIEXEC, *one, ":", *kernel]).stderr)
        assert ": blas kernel: found " in line
    [line] = errors(done([MPIEXEC, *one, ":", *threads]).stderr)
    assert ": threads: found 2, expected 1 as on rank 0 for the same bits" in line
    inexact = [*one, "--inexact", "--out", out[1]], [*threads, "--inexact", "--out", out[1]]
    allowed = done([MPIEXEC, *inexact[0], ":", *inexact[1]])
    assert (allowed.returncode, errors(allowed.stderr)) == (0, [])


def test_a_mistake_is_told_once(options: list[str], tmp_path: Path) -> None:
    """What all ranks would find, and what rank 0 finds alone; the others end with it."""
    wrong = done(ranks(2, *options, "--mpi", "--perturbations", "7"))
    assert wrong.returncode == 2
    assert len(errors(wrong.stderr)) == 1, wrong.stderr
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    taken = done(ranks(2, *options, "--mpi", "--out", str(tmp_path / "taken")))
    assert taken.returncode == 2
    assert "exists and is not empty" in errors(taken.stderr)[0]


FULL = "OSError(28, 'No space left on device', '/scratch')"


@pytest.mark.parametrize(
    ("rank", "error", "told"),
    [
        (1, FULL, "/scratch: No space left on device"),
        (1, "MemoryError()", "out of memory"),
        pytest.param(0, "MemoryError()", "out of memory", marks=pytest.mark.slow),
    ],
)
def test_an_error_is_told_once_with_its_rank(
    rank: int, error: str, told: str, options: list[str], tmp_path: Path
) -> None:
    """One rank's checkpoints find no place, on disk or in memory."""
    assert MPIEXEC is not None
    command = [*options, "--mpi", "--checkpoints", "disk", "--out", str(tmp_path / "run")]
    program = (
        "import sys, mesp_ref.lean.activations as a, mesp_ref.cli\n"
        f"def full(*_, **__): raise {error}\n"
        "a.DiskCheckpoints.push = full\n"
        "sys.exit(mesp_ref.cli.main())"
    )
    both = [["-n", "1", sys.executable, *command] for _ in range(2)]
    both[rank][3:5] = ["-c", program]
    ended = done([MPIEXEC, *both[0], ":", *both[1]])
    [line] = errors(ended.stderr)
    assert ended.returncode != 0
    assert f"error: rank {rank} on " in line
    assert told in line
    assert "Traceback" not in ended.stderr


def test_a_killed_rank_is_named_and_the_run_goes_on() -> None:
    """Once here; `python tests/spread/kills.py --times 30` for the number in SECURITY.md."""
    ended = done([sys.executable, str(HERE / "kills.py"), "--times", "1"])
    found = json.loads(ended.stdout)
    assert (found["ended_well"], found["same_bytes"]) == (1, True), found


@pytest.mark.slow
def test_a_stopped_rank_is_named(options: list[str], tmp_path: Path) -> None:
    from kills import processes

    out = tmp_path / "run"
    command = ranks(2, *options, "--mpi", "--steps", "100000", "--out", str(out))
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as run:
        while not (out / "state.safetensors").exists():
            assert run.poll() is None
            time.sleep(0.05)
        os.kill(processes(run.pid)[1], signal.SIGSTOP)
        _, text = run.communicate(timeout=60)
    [line] = errors(text)
    assert "error: rank 1 on " in line
    assert "not heard of for 12 s" in line

"""Threads, forks, copies and `python -O`: what holds in a process of one thread holds in all."""

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import mesp_ref as mr
from mesp_ref.engine.inputs import NotFinite
from mesp_ref.job.finetune import FinetuneOptions, finetune
from mesp_ref.job.lock import DirectoryLock
from mesp_ref.lean.workers import blas_threads, hire
from mesp_ref.train.trainer import NonFinite, TrainConfig
from mesp_ref.verify.samples import small_config


def described(error: BaseException) -> tuple[type, tuple[Any, ...], dict[str, Any]]:
    return type(error), error.args, vars(error)


@pytest.mark.parametrize(
    "error",
    [
        mr.MespRefError("plain"),
        mr.MespRefError("line\n" * 199),  # longer once it is escaped
        mr.MespRefError("x" * 5000),
        NonFinite("step 3: loss", torn=True),
        NotFinite("block 2"),
    ],
    ids=lambda error: type(error).__name__ + str(len(str(error))),
)
def test_errors_can_be_copied_and_sent(error: mr.MespRefError) -> None:
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert described(twin) == described(error)


def test_an_error_crosses_a_process_pool() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool, pytest.raises(NonFinite) as caught:
        pool.apply(_fail)
    assert caught.value.torn


def _fail() -> None:
    raise NonFinite("step 1: loss", torn=True)


def test_blas_has_its_threads_back_after_workers_of_several_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two that overlap: the second finds one thread, and must not leave it at that."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=2, user_api="blas"):
        if blas_threads() < 2:
            pytest.skip("a BLAS of one thread")
        first_in, second_in = threading.Event(), threading.Event()

        def first() -> None:
            with hire(2):
                first_in.set()
                second_in.wait(10)

        thread = threading.Thread(target=first)
        thread.start()
        first_in.wait(10)
        with hire(2):
            second_in.set()
            thread.join(10)
            assert blas_threads() == 1  # still inside
        assert blas_threads() == 2
        config = small_config()
        model, adapter = mr.random_model(config), mr.init_lora(config, rank=2)
        ids = [[1, 2, 3, 4]]

        def step(_: int) -> float:
            return mr.loss_and_grads(model, adapter, ids, ids, workers=2)[0]

        with ThreadPoolExecutor(4) as pool:
            assert len(set(pool.map(step, range(20)))) == 1
        assert blas_threads() == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_fork_takes_no_lock_along(tmp_path: Path) -> None:
    """A child that lives on holds nothing, and its end removes nothing of the parent's."""
    lock = DirectoryLock(tmp_path)
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        os.close(writes)
        os.read(reads, 1)  # until the parent says so
        lock.release()
        with hire(2) as workers:
            os._exit(workers.size)
    os.close(reads)
    with pytest.raises(mr.MespRefError, match=f"in use by process {os.getpid()} since"):
        DirectoryLock(tmp_path)
    lock.release()
    again = DirectoryLock(tmp_path)  # though the child lives
    os.write(writes, b".")
    os.close(writes)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert (tmp_path / ".lock").exists()
    again.release()


@pytest.mark.filterwarnings("ignore:progress is not complete:RuntimeWarning")
def test_a_report_that_raises_ends_nothing(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    train = TrainConfig(steps=3, seq_len=16, accumulate=1)
    options = FinetuneOptions(model=str(tiny_model_dir), data=str(text_file), train=train,
                              out=str(tmp_path / "run"), rank=2, sample_tokens=0)  # fmt: skip
    calls = []

    def report(event: Any) -> None:
        calls.append(event["event"])
        raise ZeroDivisionError("a mistake\nof two lines")

    summary = finetune(options, report)
    assert summary["steps"] == calls.count("step") == 3
    assert summary["warnings"] == [
        "progress is not complete: ZeroDivisionError: a mistake of two lines"
    ]

    def stop(event: Any) -> None:
        if event.get("step") == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="adapter and state as of step 2"):
        finetune(options.__class__(**vars(options) | {"out": str(tmp_path / "two")}), stop)


def test_checks_are_made_under_python_o() -> None:
    """`require` fails what is wrong, and what is nothing, when assert statements are dropped."""
    code = """
from mesp_ref.verify import Finding, require
assert False, "this is not python -O"
wrong = Finding("oracle", "op", "x", error=1.0, gate=0.5, meaning="")
undecided = Finding("oracle", "op", "x", error=float("nan"), gate=0.5, meaning="")
require([Finding("oracle", "op", "x", error=0.0, gate=0.5, meaning="")])
for findings in ([], [wrong], [undecided]):
    try:
        require(findings)
    except AssertionError:
        continue
    raise SystemExit(f"passed: {findings}")
"""
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")

"""Freed memory is kept where it can be: arrays made again cost no page faults."""

import os
import subprocess
import sys

import pytest

_PROGRAM = """
import resource, sys
import numpy as np
from mesp_ref.lean.allocator import keep_freed_memory

taken = keep_freed_memory() if sys.argv[1] == "keep" else None
for _ in range(2):
    np.ones(10_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    np.ones(10_000_000)  # 80 MB: more than glibc ever keeps by itself
print(taken, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _run(word):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    command = [sys.executable, "-c", _PROGRAM, word]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    taken, faults = done.stdout.split()
    return taken, int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc on Linux")
def test_arrays_made_again_cost_no_page_faults():
    taken, faults = _run("keep")
    if taken == "False":
        pytest.skip("this C library has no mallopt")
    _, default = _run("default")
    assert faults * 10 < default


def test_nothing_happens_elsewhere(monkeypatch):
    from mesp_ref.lean.allocator import keep_freed_memory

    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False


_RETURN = """
import numpy as np, psutil
from mesp_ref.lean.allocator import keep_freed_memory, return_freed_memory

keep_freed_memory()
np.ones(10_000_000)
before = psutil.Process().memory_info().rss
print(return_freed_memory(), before - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_returned() -> None:
    """80 MB that were kept for the next array are the kernel's again."""
    done = subprocess.run(
        [sys.executable, "-c", _RETURN], capture_output=True, text=True, check=True
    )
    asked, returned = done.stdout.split()
    if asked == "False":
        pytest.skip("another C library")
    assert int(returned) > 70_000_000

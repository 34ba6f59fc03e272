"""The suite verifies under other BLAS kernels and without AVX-512; the page looks right in a browser."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import Answer

from mesp_ref.cli import main

KERNELS = {
    "Haswell": {"OPENBLAS_CORETYPE": "Haswell"},
    "Sandybridge": {"OPENBLAS_CORETYPE": "Sandybridge"},
    "no AVX-512": {"NPY_DISABLE_CPU_FEATURES": ""},
}


@pytest.mark.parametrize(
    "kernel",
    ["Haswell", pytest.param("Sandybridge", marks=pytest.mark.slow), "no AVX-512"],
)
def test_the_engine_agrees_under_other_kernels(kernel: str, tmp_path: Path) -> None:
    settings = KERNELS[kernel]
    if "NPY_DISABLE_CPU_FEATURES" in settings:
        dispatched = np._core._multiarray_umath.__cpu_dispatch__
        wide = [name for name in dispatched if "AVX512" in name or name == "X86_V4"]
        if not wide:
            pytest.skip("this NumPy dispatches to no AVX-512")
        settings = {"NPY_DISABLE_CPU_FEATURES": " ".join(wide)}
    environment = os.environ | settings | {"PYTHONWARNINGS": "ignore"}
    for command in (["run", "engine", "--out", "out"], ["check", "out"]):
        done = subprocess.run(
            [sys.executable, "-m", "mesp_ref", "golden", *command],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "154 of 154 cases" in done.stdout


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


@pytest.mark.skipif(not BROWSER, reason="no Chromium")
def test_the_page_in_a_browser(answer: Answer, tmp_path: Path) -> None:
    root = answer("e2e/tied", **{"model.layers.1.mlp.up_proj": np.zeros((2, 7, 20))})
    page, picture = tmp_path / "report.html", tmp_path / "report.png"
    main(["golden", "check", str(root), "--only", "e2e/tied", "--html", str(page)])
    subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--screenshot={picture}",
         "--window-size=1200,1600", page.as_uri()],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    assert picture.stat().st_size > 20_000

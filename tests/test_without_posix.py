"""Nothing that Windows lacks is needed at import or in an ordinary run: it is hidden, and all works."""

import gzip
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import words

from mesp_ref.lean.pread import read_at, write_at

RUNS = (
    "finetune --model model --data notes.csv.gz --steps 2 --seq-len 16 --checkpoints disk --out run",
    "finetune --resume run --steps 3 --quiet",
    "generate --adapter run --prompt the --max-new-tokens 3",
    "eval --adapter run --data notes.csv.gz --seq-len 16 --rows 2",
    "merge --adapter run --out merged",
    "merge --adapter run --out merged --overwrite",
    "convert adapter run/adapter mlx --to mlx",
    "compare --model model --data notes.csv.gz --steps 1 --seq-len 16 --quiet",
    "compare --model model --data notes.csv.gz --steps 1 --seq-len 16 --quiet --overwrite",
    "memory model --seq-len 8 --method mesp --plot memory.html",
    "golden export suite",
    "info merged",
)


def test_every_command_runs_where_there_is_no_posix(tmp_path: Path, tiny_model_dir: Path) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    rows = "text,n\n" + "".join(f'"{words(20, i)}",{i}\n' for i in range(60))
    (tmp_path / "notes.csv.gz").write_bytes(gzip.compress(rows.encode()))
    script = Path(__file__).with_name("without_posix.py")
    found = subprocess.run(
        [sys.executable, str(script), *RUNS],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    assert "Traceback" not in found.stderr
    assert (tmp_path / "merged/model.safetensors").is_file()
    assert not list(tmp_path.rglob(".*mesp-ref-*")), "something was left aside"


@pytest.mark.parametrize("hidden", [False, True])
def test_bytes_at_a_place(hidden: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if hidden:
        monkeypatch.delattr(os, "pread", raising=False)
        monkeypatch.delattr(os, "pwrite", raising=False)
    data = np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint8)
    with (tmp_path / "file").open("w+b") as file:
        for start in (600, 0, 300):
            assert write_at(file.fileno(), data[start : start + 300].data, start) == 300
        assert read_at(file.fileno(), 400, 250) == data[250:650].tobytes()
        assert read_at(file.fileno(), 10, 5000) == b""

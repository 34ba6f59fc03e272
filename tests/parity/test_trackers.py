"""--report-to with the real packages: what they stored is what metrics.jsonl says."""

import json
import os
from pathlib import Path

import pytest

from mesp_ref.cli import main


@pytest.fixture(scope="module", autouse=True)
def trackio_dir(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Read when the package is imported."""
    os.environ["TRACKIO_DIR"] = str(tmp_path_factory.mktemp("trackio"))


@pytest.fixture
def steps(tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs four steps, logged to a package; the losses as metrics.jsonl has them."""
    monkeypatch.chdir(tmp_path)

    def run(name: str) -> dict[int, float]:
        begin = ["finetune", "--model", str(tiny_model_dir), "--data", str(text_file), "--quiet"]
        assert main([*begin, "--steps", "4", "--seq-len", "16", "--report-to", name]) == 0
        lines = Path("runs/001/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        events = [json.loads(line) for line in lines]
        return {e["step"]: e["loss"] for e in events if e["event"] == "step"}

    return run


def test_tensorboard(steps) -> None:
    pytest.importorskip("tensorboard.summary")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    want = steps("tensorboard")
    stored = EventAccumulator("runs/tensorboard/001").Reload()
    rows = stored.Tensors("train/loss")
    found = {row.step: row.tensor_proto.float_val[0] for row in rows}
    assert found == pytest.approx(want, rel=1e-7)  # float32 there


def test_trackio(steps) -> None:
    package = pytest.importorskip("trackio")
    want = steps("trackio")
    rows = [row for row in package.SQLiteStorage.get_logs("mesp-ref", "001") if "train/loss" in row]
    assert {row["step"]: row["train/loss"] for row in rows} == want

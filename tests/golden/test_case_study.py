"""docs/on-device-backward.md says what is so: its numbers, computed again."""

import re
from pathlib import Path

import numpy as np
import pytest

from mesp_ref.golden import check
from mesp_ref.golden.builder.models import BLOCKS, MODELS, make_block, make_model
from mesp_ref.golden.builder.write import write_tensors
from mesp_ref.golden.mistakes import OnDevice, title

TEXT = (Path(__file__).parents[2] / "docs" / "on-device-backward.md").read_text(encoding="utf-8")
ROWS = re.findall(r"\| `(\S+)` \| (\S+) \| (\S+) \|", TEXT)


def test_the_table() -> None:
    made = make_block(BLOCKS[0])
    trace, want = made.run(OnDevice(made.setting)), made.vectors.want
    assert len(ROWS) == 8
    for name, cosine, size in ROWS:
        a, b = trace[name].ravel(), want[name].ravel()
        norms = np.linalg.norm(a), np.linalg.norm(b)
        assert norms[0] / norms[1] == pytest.approx(float(size), abs=1e-3), name
        if cosine == "–":  # nothing but rounding, whose direction each processor makes its own
            assert norms[0] < 1e-12 * norms[1], name
            continue
        assert a @ b / (norms[0] * norms[1]) == pytest.approx(float(cosine), abs=1e-3), name


def test_the_report(tmp_path: Path) -> None:
    made = make_block(BLOCKS[0])
    trace = made.run(OnDevice(made.setting))
    arrays = {name: np.asarray(trace[name], np.float32) for name in made.vectors.want}
    write_tensors(tmp_path / made.case.file, arrays)
    case = check(tmp_path, only=[made.case.name]).cases[0]
    wrong = [v.tensor for v in case.verdicts if not v.passed]
    assert f"{len(wrong)} of {len(case.verdicts)} tensors" in TEXT
    assert case.first("forward") is None
    assert case.first("backward").tensor == "self_attn.q_rope.grad"
    assert "self_attn.v_proj.grad" not in wrong
    assert case.like == [f"like: {title(OnDevice)}"]
    assert f"looks like: {title(OnDevice)}" in TEXT


def test_every_projection_of_the_lower_block_is_wrong(tmp_path: Path) -> None:
    made = make_model(MODELS[0], tmp_path)
    trace = made.run(OnDevice(made.setting))
    for tensor in made.case.tensors:
        if "layers.0." in tensor.name and ".lora_" in tensor.name:
            error = np.abs(trace[tensor.name] - made.vectors.want[tensor.name]).max()
            assert error > tensor.gates["float32"], tensor.name

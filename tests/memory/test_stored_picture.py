"""The picture on the front page, and the numbers beside it, against what today's engine needs."""

import re
from pathlib import Path

import pytest

from mesp_ref.engine.config import PROJECTIONS
from mesp_ref.files.models import SHAPES
from mesp_ref.memory import Base, Shapes, peak

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "docs" / "pictures" / "memory_timeline.png"
METHODS = ("store_all", "mebp", "mesp", "mesp_tiled")


def megabytes(method: str) -> float:
    """Of one step of Qwen2.5-0.5B on 256 tokens, from the shapes alone."""
    config, streamed = SHAPES["qwen2.5-0.5b"], method == "mesp_streamed"  # which lives in a file
    shapes = Shapes(
        config, 1, 256, 8, tuple(PROJECTIONS), base=Base.uniform(config, "float32", None),
        disk=streamed,
    )  # fmt: skip
    return peak(method, shapes).total / 1e6


def test_the_picture_is_todays() -> None:
    """Its peaks lie in its metadata; redraw it with `mesp-ref memory qwen2.5-0.5b --plot`."""
    image = pytest.importorskip("PIL.Image").open(PICTURE)
    assert image.text["Title"] == "qwen2.5-0.5b: batch 1, 256 tokens, rank 8, checkpoints in RAM"
    found = dict(re.findall(r"(\w+): peak ([\d.,]+) MB", image.text["Description"]))
    assert tuple(found) == METHODS
    for method, drawn in found.items():
        # docs/methods.md: predicted and measured lie 0.02 to 0.15 MB apart
        assert float(drawn) == pytest.approx(megabytes(method), abs=0.15)


def test_the_numbers_beside_it_are_todays() -> None:
    """To the megabyte, in the README's picture and table and in the table of docs/methods.md."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    alt = re.search(r"!\[(.*?)\]\(docs/pictures/memory_timeline", readme)
    assert alt is not None
    rows = list(zip(METHODS, re.findall(r"(\d+) MB", alt[1]), strict=True))
    rows += re.findall(r"^\| `(\w+)` \|.*\| (\d+)(?: or \d+)? \| exact \|$", readme, re.MULTILINE)
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    found = re.findall(
        r"^\| `(\w+)`(?:, RAM)? \|.*\| ([\d.]+) \| [\d.]+ \| exact \|$", text, re.MULTILINE
    )
    rows += found
    every = [*METHODS, "mesp_streamed"]
    assert [method for method, _ in rows] == [*METHODS, *every, *every]
    for method, written in rows:
        assert abs(float(written) - megabytes(method)) < 1, method

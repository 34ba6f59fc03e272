"""Stored pictures and numbers of docs/benchmarks against what today's code draws and predicts."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mesp_ref.engine.config import PROJECTIONS
from mesp_ref.files.models import SHAPES
from mesp_ref.memory import Base, Shapes, peak

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "benchmarks"
sys.path.append(str(ROOT / "benchmarks"))
common = pytest.importorskip("common")
length = pytest.importorskip("length")
pictures = pytest.importorskip("pictures")
zeroth_order_page = pytest.importorskip("zeroth_order_page")
zeroth_order_pictures = pytest.importorskip("zeroth_order_pictures")
from zeroth_order_page import load  # noqa: E402

# Measured, and drawn before pictures held what they show; whoever measures again draws them so.
OLDER = {
    "frameworks-1024", "frameworks-256", "frameworks-process", "papers-memory", "papers-ratios",
    "papers-waterfall", "scaling-memory", "scaling-time",
}  # fmt: skip


def shown(path: Path) -> list[dict[str, Any]] | None:
    """What a stored picture says that it shows."""
    image = pytest.importorskip("PIL.Image").open(path)
    found = image.text.get("Description")
    return None if found is None else json.loads(found)


def redrawn(draw: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What would be drawn now, by the name of the file, without drawing it."""
    found: dict[str, Any] = {}

    def note(figure: Any, path: Path) -> None:
        found[Path(path).name] = json.loads(common.drawn(figure))

    for module in (pictures, length, zeroth_order_pictures):
        monkeypatch.setattr(module, "save_figure", note)
    draw()
    return found


def test_every_picture_holds_what_it_shows() -> None:
    for path in sorted(FOLDER.rglob("*.png")):
        panels = shown(path)
        assert panels or path.stem in OLDER, f"{path.name}: draw it anew with save_figure"
        assert not panels or any(p["lines"] or p["bars"] or p["marks"] for p in panels)


def test_the_picture_of_predictions_is_todays() -> None:
    """Its lines at the shortest length, and one's at another; `pytest -m slow` compares all of it.

    Redraw with `python benchmarks/length.py report`.
    """
    panels = shown(FOLDER / "length-memory.png")
    assert panels
    lines = {label: dict(zip(x, y, strict=True)) for label, x, y in panels[0]["lines"]}
    for method, disk in length.WAYS:
        drawn = lines[f"{method}, file" if disk else method]
        for tokens in ("256", "1024") if method == "mesp" else ("256",):
            shapes = Shapes(SHAPES[length.SHAPE], 1, int(tokens), length.RANK, disk=disk)
            assert drawn[tokens] == f"{peak(method, shapes).total / 1e6:.5g}"


@pytest.mark.slow
def test_all_of_the_picture_of_predictions_is_todays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redraw with `python benchmarks/length.py report`."""
    [(name, panels)] = redrawn(
        lambda: length.draw(FOLDER / "length-memory.png"), monkeypatch
    ).items()
    assert shown(FOLDER / name) == panels


def test_pictures_of_measurements_are_of_their_stored_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redraw with `python benchmarks/zeroth_order.py --redraw`."""
    results = load(FOLDER / "zeroth_order.json")
    found = redrawn(lambda: zeroth_order_page.draw(results, FOLDER), monkeypatch)
    assert len(found) == 5
    for name, panels in found.items():
        assert shown(FOLDER / name) == panels, name


def test_a_stale_picture_is_found(tmp_path: Path) -> None:
    """A number that changes by a thousandth, a bar, a word: each is another picture."""
    figures = pytest.importorskip("matplotlib.figure")

    def drawn(y: float, bar: float, word: str) -> list[dict[str, Any]] | None:
        figure = figures.Figure()
        axes = figure.subplots()
        axes.plot([1, 2], [3, y], label="mesp")
        axes.barh(["a"], [bar])
        axes.text(1, 1, word)
        axes.scatter([1, 2], [5, y])
        common.save_figure(figure, tmp_path / "x.png")
        return shown(tmp_path / "x.png")

    first = drawn(4, 1, "a")
    assert first == drawn(4, 1, "a")
    assert first != drawn(4.004, 1, "a")
    assert first != drawn(4, 1.001, "a")
    assert first != drawn(4, 1, "b")


def megabytes(method: str, **changed: int) -> float:
    sizes = {"tokens": 256, "rank": 8} | changed
    config = SHAPES["qwen2.5-0.5b"]
    base = Base.uniform(config, "float32", None)
    name, _, disk = method.partition(", ")
    shapes = Shapes(
        config, 1, sizes["tokens"], sizes["rank"], tuple(PROJECTIONS), base=base, disk=bool(disk)
    )
    return peak(name, shapes).total / 1e6


def peaks_in(page: str, heading: str) -> dict[str, dict[str, float]]:
    """Peaks of a page's table under a heading, by method and by the column's name."""
    text = (FOLDER / page).read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    _, *columns = (cell.strip() for cell in lines[0].strip("|").split("|"))
    found = {}
    for line in lines[2:]:
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if not name.startswith("`"):
            break
        numbers = [re.match(r"\*?([\d.]+)", cell) for cell in cells]
        found[name.strip("`")] = {
            column: float(number[1])
            for column, number in zip(columns, numbers, strict=True)
            if number
        }
    return found


@pytest.mark.parametrize(
    ("page", "heading", "size", "columns"),
    [
        ("papers.md", "Table 1: three shapes", "", ["0.5B"]),
        ("scaling.md", "Rank", "rank", ["8", "128"]),
    ],
)
def test_stored_peaks_are_todays(page: str, heading: str, size: str, columns: list[str]) -> None:
    """Measured, they lie at most 0.21 MB above the closed form, as papers.md says."""
    found = peaks_in(page, heading)
    assert len(found) >= 6
    for method in ("mebp", "mesp", "mesp_tiled", "mezo", "mesp_tiled, disk"):
        for column in columns:
            today = megabytes(method, **({size: int(column)} if size else {}))
            assert -0.01 <= found[method][column] - today <= 0.22, (method, column)


def test_a_stale_number_is_found() -> None:
    assert abs(peaks_in("papers.md", "Table 1: three shapes")["mebp"]["0.5B"] - 72.5) > 0.22
    assert np.isfinite(megabytes("mesp"))

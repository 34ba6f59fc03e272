"""Stored pictures and numbers of docs/benchmarks against what today's code draws and predicts."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
stored = pytest.importorskip("stored")
zeroth_order_page = pytest.importorskip("zeroth_order_page")
zeroth_order_pictures = pytest.importorskip("zeroth_order_pictures")
from zeroth_order_page import load  # noqa: E402


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
        assert panels, f"{path.name}: draw it anew with save_figure"
        assert any(p["lines"] or p["bars"] or p["marks"] for p in panels)


def test_the_picture_of_predictions_is_todays() -> None:
    """Its lines at the shortest length; `pytest -m slow` compares all of it.

    Redraw with `python benchmarks/length.py report`.
    """
    panels = shown(FOLDER / "length-memory.png")
    assert panels
    lines = {label: dict(zip(x, y, strict=True)) for label, x, y in panels[0]["lines"]}
    for method, disk in length.WAYS:
        drawn = lines[f"{method}, file" if disk else method]
        shapes = Shapes(SHAPES[length.SHAPE], 1, 256, length.RANK, disk=disk)
        assert drawn["256"] == f"{peak(method, shapes).total / 1e6:.5g}"


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


def test_pictures_of_pages_say_what_their_tables_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redraw with `python benchmarks/stored.py`."""
    found = redrawn(lambda: stored.draw(FOLDER), monkeypatch)
    assert len(found) == 5
    for name, panels in found.items():
        assert shown(FOLDER / name) == panels, name


def test_a_number_on_a_page_is_in_its_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that changes makes the stored picture stale."""
    for name in ("papers.md", "scaling.md"):
        text = (FOLDER / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(text.replace("| 60.41 ", "| 61.41 "), encoding="utf-8")
    for name in ("draw_ratios", "draw_waterfall", "draw_curves"):
        monkeypatch.setattr(stored, name, lambda *given: None)
    found = redrawn(lambda: stored.draw(tmp_path), monkeypatch)
    assert found["papers-memory.png"] != shown(FOLDER / "papers-memory.png")


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


@pytest.mark.parametrize(
    ("page", "heading", "size", "columns"),
    [
        ("papers.md", "peak MB (÷ MeBP), shape", "", ["0.5B"]),
        ("scaling.md", "peak MB, rank", "rank", ["128"]),
    ],
)
def test_stored_peaks_are_todays(page: str, heading: str, size: str, columns: list[str]) -> None:
    """Measured, they lie at most 0.21 MB above the closed form, as papers.md says."""
    table = next(table for table in stored.tables(FOLDER / page) if table.head == heading)
    assert len(table.rows) >= 6
    for method in ("mebp", "mesp_tiled", "mesp_tiled, disk"):
        for column in columns:
            today = megabytes(method, **({size: int(column)} if size else {}))
            assert -0.01 <= table.numbers(method)[column] - today <= 0.22, (method, column)

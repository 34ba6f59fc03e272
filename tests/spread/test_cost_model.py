"""The cost model of docs/spread.md, against counts by hand."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def spread() -> Any:
    """benchmarks/spread.py, whose neighbours it imports by name."""
    sys.path.append(str(BENCHMARKS))
    found = importlib.util.spec_from_file_location("spread_benchmark", BENCHMARKS / "spread.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["spread_benchmark"] = module  # dataclasses look their module up
    found.loader.exec_module(module)
    return module


def test_sending_counts_messages_and_bytes(spread: Any) -> None:
    """3 ranks, 2 blocks of 600 bytes: 2·2 messages of 200 bytes and 2·2 of barriers, a block."""
    work = spread.Work(1.0, 2.0, 0.0, gradient=1200.0, blocks=2, tokens=8, row=0.0)
    assert spread.sending(work, spread.Network("", 0.0, 100.0, 0.0), 3) == 2 * 4 * 2.0
    assert spread.sending(work, spread.Network("", 1.0, 1e18, 0.0), 3) == pytest.approx(2 * (4 + 4))
    assert spread.sending(work, spread.Network("", 0.0, 1e18, 7.0), 3) == pytest.approx(2 * 2 * 7)
    assert spread.sending(work, spread.Network("", 1.0, 1.0, 0.0), 1) == 0


def test_gradients_travel_beside_the_backward(spread: Any) -> None:
    """The slower of computing and sending counts, and one block's share of the other."""
    work = spread.Work(1.0, 2.0, 0.5, gradient=1200.0, blocks=2, tokens=8, row=0.0)
    quick, slow = spread.Network("", 0.0, 1600.0, 0.0), spread.Network("", 0.0, 16.0, 0.0)
    assert spread.sending(work, quick, 3) == 1.0
    assert spread.step_seconds(work, quick, 3) == 1.0 + (2.0 + 0.5) + 0.5
    assert spread.step_seconds(work, slow, 3) == 1.0 + (1.0 + 100.0) + 0.5


def test_stragglers_only_cost(spread: Any) -> None:
    work = spread.Work(1.0, 2.0, 0.5, gradient=1200.0, blocks=2, tokens=8, row=0.0)
    even = spread.step_seconds(work, spread.FAST, 64)
    calm = spread.simulated(work, spread.FAST, 64, jitter=0.0, pauses=0.0, steps=3)
    assert calm == pytest.approx(even, rel=1e-12)
    assert spread.simulated(work, spread.FAST, 64, jitter=0.05, pauses=0.0, steps=20) > even
    pausing = spread.simulated(work, spread.FAST, 64, jitter=0.0, pauses=1.0, steps=3)
    assert pausing == pytest.approx(even + 5.0)


def test_the_prediction_is_a_table(spread: Any) -> None:
    work = spread.Work(1.0, 2.0, 0.5, gradient=1.76e7, blocks=24, tokens=8)
    lines = spread.prediction(replace(work, row=0.0)).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [f"{n:,}" for n in spread.SIZES]


def test_the_page_shows_what_the_command_prints(
    spread: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["spread.py"])
    spread.main()
    page = (BENCHMARKS.parent / "docs/spread.md").read_text(encoding="utf-8")
    tables = [part for part in capsys.readouterr().out.split("\n\n") if part.startswith("|")]
    assert len(tables) == 2
    assert all(table.strip() in page for table in tables)


def test_the_gradient_of_the_small_qwen_is_as_large_as_said(spread: Any) -> None:
    _, adapter = spread.model_of(spread.config(24))
    assert sum(array.nbytes for array in adapter.weights.values()) / 1e6 == pytest.approx(
        17.6, abs=0.05
    )

"""The page of a block: its data against the ledger and the engine, and the page itself in a browser."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mesp_ref.cli import main
from mesp_ref.engine.block import MESP, block, block_bwd
from mesp_ref.learn import page
from mesp_ref.learn.exercises.block import BLOCK, _named
from mesp_ref.memory.dry_run import dry_run
from mesp_ref.memory.shapes import Shapes
from mesp_ref.verify.bugs import BUGS
from mesp_ref.verify.planted import planted


@pytest.fixture(scope="module")
def data() -> Any:
    return json.loads(json.dumps(page.data()))


def spans(data: Any, method: str, edge: str) -> list[list[int]]:
    return data["methods"][method]["spans"].get(edge, [])


@pytest.mark.parametrize("method", page.METHODS)
def test_memory_is_the_ledgers(data: Any, method: str) -> None:
    ledger = dry_run(method, Shapes(page.CONFIG, tokens=page.TOKENS, rank=page.RANK)).ledger
    found = data["methods"][method]
    assert max(found["total"]) == ledger.peak
    assert found["total"] == [m.held + m.added for m in ledger.moments]
    kinds = np.sum(list(found["kinds"].values()), axis=0)
    assert kinds.tolist() == found["total"]
    for number, moment in enumerate(ledger.moments):  # no buffer counts twice
        here = sum(s[2] for e in found["spans"].values() for s in e if s[0] <= number <= s[1])
        assert here <= moment.held


def test_every_line_of_the_picture_is_a_tensor_of_the_step(data: Any) -> None:
    for method, missing in (("store_all", set()), ("mebp", set()), ("mesp", {"h", "silu"})):
        assert {e.name for e in page.EDGES} - set(data["methods"][method]["spans"]) == missing
        nodes = set(data["methods"][method]["nodes"]) - {""}
        assert nodes == {node.op for node in page.NODES}


def test_lifetimes_are_those_of_the_methods(data: Any) -> None:
    """store_all keeps q once, mebp makes it again, mesp a third time in its backward."""
    assert [len(spans(data, m, "q_rope")) for m in page.METHODS] == [1, 2, 3]
    assert [len(spans(data, m, "x")) for m in page.METHODS] == [1, 1, 1]
    (whole,) = spans(data, "store_all", "q_rope")
    assert data["methods"]["store_all"]["ops"][whole[1]] == "attention_bwd"
    c = page.CONFIG
    assert whole[2] == page.TOKENS * c.num_attention_heads * c.head_dim * 4


@pytest.mark.parametrize(
    ("key", "bug"),
    [
        ("norm.cross_missing", "rmsnorm: cross term missing"),
        ("no_mlp_residual", "block: MLP residual path dropped"),
        ("attention.no_row_sum", "softmax: row sum missing"),
        ("swiglu.no_second", "swiglu: second term missing"),
        ("lora.no_base", "lora: dx without the base"),
        ("rebuilt_without_rope", "rebuild: q and k without RoPE"),
    ],
)
def test_cosines_are_those_of_the_seeded_bug(data: Any, key: str, bug: str) -> None:
    """The engine with the bug of the kill table in it, against what the page says."""
    row = next(row for row in data["mistakes"] if row["key"] == key)
    args = BLOCK.draw(BLOCK.cases[1])
    if key.startswith("rebuilt"):  # the same block, from what MeSP keeps
        args["res"] = block(args["res"].attention.x, args["layer"], drop=MESP)[1]
    truth = BLOCK.truth(BLOCK.cases[1])
    with planted(BUGS[bug].functions()):
        found = _named(block_bwd(**args))
    for name, right in truth.items():
        a, b = found[name].ravel(), right.ravel()
        cos = float(a @ b) / float(np.linalg.norm(a) * np.linalg.norm(b))
        assert row["cosines"][name] == pytest.approx(cos, abs=2e-4), name
        assert (row["cosines"][name] == 1) == np.allclose(a, b, rtol=1e-9)


def test_the_page_needs_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "block.html"
    assert main(["learn", "--page", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=|https?:|@import|url\(", text)
    assert "NaN" not in text
    assert len(text) < 150_000
    assert main(["learn", "--page", str(out)]) == 2  # nothing is written over
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("width", [1400, 400])
def test_clicking_through_it(tmp_path: Path, width: int) -> None:
    """In headless Chromium, where one and playwright are installed."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    out = tmp_path / "block.html"
    out.write_text(page.page(), encoding="utf-8")
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": width, "height": 900})
        errors: list[str] = []
        view.on("pageerror", lambda error: errors.append(str(error)))
        view.goto(out.as_uri())
        for method in page.METHODS:
            view.click(f"button[data-method={method}]")
            view.evaluate("go(0)")
            for _ in range(3):
                view.click("#forth")
            assert view.inner_text("#now").startswith("4/")
        for edge in view.locator(".edge").all():
            edge.focus()
            assert (edge.get_attribute("data-edge") or "?") in view.inner_text("#info")
        for number in (0, 30):
            view.select_option("#mistake", str(number))
            assert view.locator("#cosines .wrong").count() > 0
        view.click("#right")
        assert view.locator("#cosines .wrong").count() == 0
        assert view.evaluate("document.documentElement.scrollWidth") <= width
        assert not errors
        browser.close()

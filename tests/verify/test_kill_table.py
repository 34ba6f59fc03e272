"""The stored kill table can be read, also from a wheel, and holds what the page says."""

from pathlib import Path

import pytest

from mesp_ref.errors import MespRefError
from mesp_ref.verify import kill_table as module
from mesp_ref.verify.bugs import BUGS
from mesp_ref.verify.kill_table import kill_table


def test_its_rows_are_bugs_with_their_marks() -> None:
    rows = kill_table()
    assert len({row.bug for row in rows}) == len(rows) >= 150
    text = (Path(__file__).parents[2] / "docs" / "kill-table.md").read_text(encoding="utf-8")
    for row in rows:
        assert BUGS[row.bug].kind == row.kind
        [line] = [line for line in text.splitlines() if line.startswith(f"| {row.bug} |")]
        assert line.count("killed") == sum(row.killed.values())
    assert not next(row for row in rows if row.bug == "rmsnorm: no eps").killed["adjoint"]


def test_a_missing_table_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PLACES", (tmp_path / "kill-table.md",))
    with pytest.raises(MespRefError, match="not found, expected the kill table"):
        kill_table()

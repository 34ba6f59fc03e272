"""docs/teaching.md: its snippets run and print what stands there."""

import re
from pathlib import Path

import pytest

from mesp_ref import learn

PAGE = Path(__file__).parents[2] / "docs" / "teaching.md"


def test_snippets_print_what_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    snippets = re.findall(
        r"^```python\n(.*?)^```\n+```text\n(.*?)^```", text, re.DOTALL | re.MULTILINE
    )
    assert len(snippets) == 2
    try:
        for code, shown in snippets:
            exec(compile(code, str(PAGE), "exec"), {})
            printed = capsys.readouterr().out
            for line in shown.splitlines():
                assert line.split("…")[0].strip() in printed, line
    finally:
        learn.EXERCISES.pop("softplus_bwd", None)


def test_every_exercise_has_a_lesson() -> None:
    text = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)`", text))
    assert set(learn.EXERCISES) <= named

"""How texts of strangers are quoted: one short line that no terminal obeys."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples

from mesp_ref.errors import MespRefError, escaped, named, prose, shown

CODES = {
    "\x1b[2J": r"\x1b[2J",  # clears the screen
    "\x9b31m": r"\x9b31m",  # the same in one byte
    "\x1b]0;title\x07": r"\x1b]0;title\x07",
    "a\rb": r"a\rb",
    "a\nok    all agree": r"a\nok    all agree",
    "a\x08b": r"a\x08b",
    "a\u2028b": r"a\u2028b",
    "a\u202eb": r"a\u202eb",  # turns the direction of writing
    "a\ud800b": r"a\ud800b",
    "a\U000e0001b": r"a\U000e0001b",
    "a\x7fb\x00": r"a\x7fb\x00",
}


@pytest.mark.parametrize(("text", "quoted"), CODES.items())
def test_what_a_terminal_would_obey_is_shown(text: str, quoted: str) -> None:
    assert escaped(text) == str(MespRefError(text)) == quoted
    assert named(text) == quoted.replace(" ", r"\x20")


def test_what_is_harmless_stays() -> None:
    for text in ("model.layers.0.mlp", "größe", "模型", "α ≤ 1e-7 …", "a\\nb"):
        assert escaped(text) == text
    assert named("dx: ok, 3 of 3 agree") == r"dx:\x20ok,\x203\x20of\x203\x20agree"


def test_a_long_text_loses_its_middle() -> None:
    message = "file: " + "x" * 1_000_000 + ": missing, expected beside y"
    assert str(MespRefError(message)).endswith("x: missing, expected beside y")
    assert len(str(MespRefError(message))) == 1001
    assert len(named("\x00" * 1_000_000)) <= 4 * 120 + 1
    assert len(shown({"a" * 10_000: ["b" * 10_000] * 10_000})) < 500


def test_prose_keeps_its_lines_and_scripts() -> None:
    kept = "one\n\ttwo\u00a0three\u200d\u200c\u3000\ufeff 👩\u200d👧 \u200fשלום\u00ad"
    assert prose(kept) == kept
    assert prose("a\x1b[2Jb\rc\x9bd\u202ee\ud800\x00") == r"a\x1b[2Jb\rc\x9bd\u202ee\ud800\x00"
    assert len(prose("x" * 100_000)) == 100_000


@given(st.text(alphabet=st.characters(), max_size=60))
@examples(300)
def test_any_text_becomes_one_line(text: str) -> None:
    """What Unicode calls control, surrogate, format or separator never comes out, but the space."""
    for quoted in (escaped(text), named(text)):
        assert {unicodedata.category(c) for c in quoted.replace(" ", "")}.isdisjoint(
            {"Cc", "Cf", "Cs", "Co", "Zl", "Zp", "Zs"}
        )
        assert len(quoted.splitlines()) <= 1
    assert " " not in named(text)
    assert {c for c in prose(text) if unicodedata.category(c) == "Cc"} <= {"\n", "\t"}

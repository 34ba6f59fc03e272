"""The page of a timeline: what is put into it stays text, and its numbers are the timeline's."""

import re
from html.parser import HTMLParser

import numpy as np

from mesp_ref.memory.page import page
from mesp_ref.memory.timeline import COLOURS, Timeline

HOSTILE = "<script>alert(1)</script>\"><img src=x onerror='x'>\x1b[2J\n\u202e&amp;"
TAGS = {"html", "meta", "title", "style", "h1", "p", "ul", "li", "i", "section", "h2", "svg", "line",
        "text", "g", "input", "label", "path", "rect", "table", "tr", "th", "td"}  # fmt: skip


class Reader(HTMLParser):
    """Tags, attributes and texts as a browser would find them."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.names: set[str] = set()
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.names |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def line(op: str) -> Timeline:
    kinds = {name: np.array([1.0, i + 2.5, 0.5]) for i, name in enumerate(list(COLOURS)[:3])}
    return Timeline(["embedding", op, "lm_loss"], kinds, sum(kinds.values()), 2)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    return reader


def test_the_page_says_what_lives_at_the_peak() -> None:
    reader = read(page({"mesp": line("attention_bwd")}, "a model"))
    assert reader.tags == TAGS
    for text in ("alive at the peak, in attention_bwd", "2.500", "3.500", "4.500", "10.500",
                 "peak 10.50 MB in attention_bwd", "mesp",
                 "attention_bwd: 10.50 MB\n4.50 {2}\n3.50 {1}\n2.50 {0}".format(*COLOURS),
                 *list(COLOURS)[:3]):  # fmt: skip
        assert text in reader.texts, text
    assert list(COLOURS)[3] not in reader.texts


def test_names_stay_text() -> None:
    right = read(page({"mesp": line("attention_bwd")}, "a model"))
    text = page({HOSTILE: line(HOSTILE)}, HOSTILE)
    hostile = read(text)
    assert (hostile.tags, hostile.names) == (right.tags, right.names)
    assert "<script" not in text
    assert "<img" not in text
    assert r"<script>alert(1)</script>" in "".join(hostile.texts)
    assert any(r"\x1b[2J\n\u202e" in text for text in hostile.texts)  # the title, from a path


def test_one_scale_for_all_and_one_for_each() -> None:
    """The axis of a small method ends, on the shared scale, where that of the largest ends."""
    small, large = line("rope"), line("rope")
    large = large._replace(
        kinds={name: 10 * y for name, y in large.kinds.items()}, total=10 * large.total
    )
    text = page({"small": small, "large": large}, "a model")
    first, second = text.split("<section")[1:]

    def ticks(section: str, scale: str) -> list[str]:
        drawn = section.split(f'<g class="{scale}">')[1].split("</g>")[0]
        return re.findall(r">([\d.]+)</text>", drawn)

    assert ticks(first, "shared") == ticks(second, "shared") == ticks(second, "own")
    assert float(ticks(first, "own")[-1]) <= 1.12 * small.total.max()
    assert "--share: 0.10000" in first
    assert "--share: 1.00000" in second

"""Paragraphs of a report, filled again after figures were put into them."""

import textwrap

WIDTH = 100


def tidy(text: str) -> str:
    """Fill paragraphs and list items to WIDTH columns; headings, tables, pictures stay as they are."""
    return "\n\n".join(_block(block) for block in text.strip().split("\n\n"))


def _block(block: str) -> str:
    if block.startswith(("#", "|", "!")):
        return block
    if not block.startswith("- "):
        return _fill(block, "")
    items = block.removeprefix("- ").split("\n- ")
    return "\n".join(_fill(f"- {item}", "  ") for item in items)


def _fill(text: str, indent: str) -> str:
    return textwrap.fill(
        " ".join(text.split()), WIDTH, subsequent_indent=indent,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip

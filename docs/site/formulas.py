"""LaTeX between dollars as MathML, made when the site is built: no script runs to show a formula."""

import re
from collections.abc import Callable
from xml.etree import ElementTree

_SPACE = "http://www.w3.org/1998/Math/MathML"

_CODE = re.compile(r"(^```.*?^```[ \t]*$|`[^`\n]+`|<pre.*?</pre>)", re.DOTALL | re.MULTILINE)
_MATH = re.compile(r"\$\$(.+?)\$\$|(?<![\\$\w])\$(?=\S)([^$\n]+?)(?<=\S)\$(?![\d$])", re.DOTALL)


def with_formulas(text: str, convert: Callable[..., str]) -> str:
    """Markdown whose formulas, outside of code, are MathML.

    convert     latex2mathml.converter.convert, or what takes its place: (latex, display=) -> MathML
    """

    def one(found: re.Match[str]) -> str:
        block, inline = found.groups()
        made = convert((block or inline).strip(), display="block" if block else "inline")
        made = _underlined(made)
        for character in "*_`[":  # nothing that Markdown would take for its own
            made = made.replace(character, f"&#{ord(character)};")
        # A line that began with <math> would be taken for a block.
        return f"\n\n{made}\n\n" if block else f"<span>{made}</span>"

    return outside_code(text, lambda part: _MATH.sub(one, part))


def _underlined(made: str) -> str:
    """A brace below as a line below: few fonts that readers have can stretch a brace."""
    ElementTree.register_namespace("", _SPACE)
    root = ElementTree.fromstring(made)
    for under in root.iter(f"{{{_SPACE}}}munder"):
        for inner in list(under):
            parts = list(inner)
            if inner.tag == under.tag and len(parts) == 2 and parts[1].text == "\u23df":
                parts[0].set("class", "under")
                under.remove(inner)
                under.insert(0, parts[0])
    return ElementTree.tostring(root, encoding="unicode")


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """Markdown whose parts between pieces of code are changed."""
    parts = _CODE.split(text)
    return "".join(part if i % 2 else change(part) for i, part in enumerate(parts))

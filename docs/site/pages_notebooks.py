"""Notebooks as pages: their text, their code, and the outputs that are stored in them."""

import base64
import json
import re
from pathlib import Path
from typing import Any

_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def notebook_page(file: Path) -> tuple[str, dict[str, bytes]]:
    """Markdown of a notebook, and its pictures by file name."""
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    lines: list[str] = []
    pictures: dict[str, bytes] = {}
    for number, cell in enumerate(cells):
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            lines += [text, ""]
            continue
        folded = "solution" in cell.get("metadata", {}).get("tags", ())
        lines += _fold(text) if folded else []
        if text.strip():
            lines += ["```python", text, "```", ""]
        for place, output in enumerate(cell["outputs"]):
            name = f"{file.stem}-{number}-{place}.png"
            shown, picture = _output(output, name)
            lines += [shown, ""]
            pictures |= {name: picture} if picture else {}
        lines += ["</details>", ""] if folded else []
    return "\n".join(lines), pictures


def _fold(text: str) -> list[str]:
    """The beginning of a solution, closed until somebody opens it, as in the notebook."""
    first, *more = re.findall(r"^# Solution (\d+)", text, re.MULTILINE) or [""]
    name = f"Solutions {first} to {more[-1]}" if more else f"Solution {first}".strip()
    return ['<details class="solution" markdown="1">', f"<summary>{name}</summary>", ""]


def _output(output: dict[str, Any], name: str) -> tuple[str, bytes | None]:
    data = output.get("data", {})
    if "image/png" in data:
        what = "".join(data.get("text/plain", "")).strip("<>") or "figure"
        return f"![{what}]({name})", base64.b64decode("".join(data["image/png"]))
    if "text/markdown" in data:
        return "".join(data["text/markdown"]), None
    text = "".join(output.get("text", data.get("text/plain", "")))
    return (
        f"```text {{ .output }}\n{_ANSI.sub('', text).rstrip()}\n```" if text.strip() else "",
        None,
    )

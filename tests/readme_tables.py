"""The tables of the documents that can be computed: files to read, and where each equation stands.

`python tests/readme_tables.py` writes them anew; test_readme.py compares.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"

READING = {
    "ops/rmsnorm.py": "the one pattern: an op and its backward",
    "ops/linear.py": "y = x·Wᵀ + b",
    "ops/lora_linear.py": "the frozen layer with its adapter",
    "ops/rope.py": "positions as rotations",
    "ops/softmax.py": "causal softmax",
    "ops/attention.py": "grouped-query attention",
    "ops/swiglu.py": "the gate of the MLP",
    "ops/geglu.py": "the gate of Gemma's",
    "ops/embedding.py": "the lookup",
    "ops/cross_entropy.py": "the loss",
    "ops/lm_loss.py": "head and loss together",
    "engine/layer.py": "what a block computes with",
    "engine/half.py": "norm, sum and projections",
    "engine/attention_half.py": "attention, forward and back",
    "engine/mlp_half.py": "the MLP, forward and back",
    "engine/block.py": "the two halves",
    "engine/model.py": "embedding, blocks, head",
    "engine/methods.py": "store_all, mebp, mesp",
}

# What it is, the file, and the words of the line that states it.
EQUATIONS = (
    ("LoRA: dA, dB and dx", "ops/lora_linear.py", "Backward  dh = s·dy·B"),
    ("h = xA rebuilt (Park et al., the core of MeSP)", "ops/lora_linear.py", "if res.h is None"),
    ("RMSNorm: dx", "ops/rmsnorm.py", "Backward  u = dy ⊙ w"),
    ("softmax: dS", "ops/softmax.py", "Backward  ds = p ⊙"),
    ("attention: dV, dP, dQ, dK", "ops/attention.py", "Backward  dv = pᵀ·do"),
    ("grouped queries: the sum over a group", "ops/attention.py", "The rows of a group"),
    ("RoPE: the inverse rotation of dQ and dK", "ops/rope.py", "Backward  the transpose"),
    ("SwiGLU: dgate, dup", "ops/swiglu.py", "Backward  dup = dz ⊙ silu"),
    ("GeGLU: dgate, dup", "ops/geglu.py", "Backward  dup = dz ⊙ gelu"),
    ("cross entropy: dlogits", "ops/cross_entropy.py", "Backward  dlogits = "),
    ("what MeSP drops and rebuilds", "engine/block.py", "^MESP = "),
    ("MeBP: re-run a block, keep all (Song & Tang)", "engine/methods.py", "^def mebp"),
    ("MeSP: re-run a block, keep eight (Park et al.)", "engine/methods.py", "^def mesp\\("),
    ("MeZO: two forwards on seeded noise (Malladi et al.)", "engine/mezo.py", "^def mezo"),
)


def lines(file: str) -> list[str]:
    return (ROOT / "mesp_ref" / file).read_text(encoding="utf-8").splitlines()


def reading_order() -> str:
    """Files of the reading path with their number of lines."""
    rows = [
        f"- [{file}](mesp_ref/{file}) ({len(lines(file))} lines): {what}"
        for file, what in READING.items()
    ]
    return "\n".join(rows)


def equation_table() -> str:
    """Each equation with a link to the line that states it."""
    rows = []
    for what, file, words in EQUATIONS:
        found = [n for n, line in enumerate(lines(file), 1) if re.search(words, line)]
        assert len(found) == 1, f"{file}: {words!r} stands on lines {found}, expected one"
        rows.append(f"| {what} | [{file}:{found[0]}](../mesp_ref/{file}#L{found[0]}) |")
    return "\n".join(["| equation | where |", "| --- | --- |", *rows])


PLACES = {
    README: ("reading order", reading_order),
    ROOT / "docs" / "equations.md": ("equations", equation_table),
}


def renewed(document: Path) -> str:
    """A document of PLACES with its table written anew, between its pair of comments."""
    name, table = PLACES[document]
    between = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
    text, count = re.subn(
        between, rf"\g<1>{table()}\n\g<2>", document.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    assert count == 1, f"{document.name} has no place for the table: {name}"
    return text


if __name__ == "__main__":
    for place in PLACES:
        place.write_text(renewed(place), encoding="utf-8")

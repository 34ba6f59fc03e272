"""The tables of README.md that can be computed: files to read, and where each equation stands.

`python tests/readme_tables.py` writes them anew; test_readme.py compares.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"

READING = {
    "ops/rmsnorm.py": "the one pattern: `op(x, w) -> y, residual` and `op_bwd(dy, residual, w) -> dx`",
    "ops/linear.py": "y = x·Wᵀ + b",
    "ops/lora_linear.py": "the frozen layer with its adapter; `h` kept or rebuilt",
    "ops/rope.py": "positions as rotations, and the inverse rotation on the way back",
    "ops/softmax.py": "causal softmax",
    "ops/attention.py": "grouped-query attention: the three gradients, and the sum over a group",
    "ops/swiglu.py": "the gate of the MLP",
    "ops/embedding.py": "the lookup",
    "ops/cross_entropy.py": "the loss",
    "ops/lm_loss.py": "head and loss together, a tile of the vocabulary at a time",
    "engine/block.py": "the ops in order, then in reverse, with what is dropped and rebuilt",
    "engine/model.py": "embedding, blocks, norm and head",
    "engine/methods.py": "the methods, each a short function over `block` and `block_bwd`",
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
    ("cross entropy: dlogits", "ops/cross_entropy.py", "Backward  dlogits = "),
    ("what MeSP drops and rebuilds", "engine/block.py", "^MESP = "),
    ("MeBP: re-run a block, keep all (Song & Tang)", "engine/methods.py", "^def mebp"),
    ("MeSP: re-run a block, keep eight (Park et al.)", "engine/methods.py", "^def mesp\\("),
    ("MeZO: two forwards on seeded noise (Malladi et al.)", "engine/methods.py", "^def mezo"),
)


def lines(file: str) -> list[str]:
    return (ROOT / "mesp_ref" / file).read_text(encoding="utf-8").splitlines()


def reading_order() -> str:
    """Files of the reading path with their number of lines."""
    rows = [
        f"| [{file}](mesp_ref/{file}) | {len(lines(file))} | {what} |"
        for file, what in READING.items()
    ]
    return "\n".join(["| file | lines | what it is |", "| --- | ---: | --- |", *rows])


def equation_table() -> str:
    """Each equation with a link to the line that states it."""
    rows = []
    for what, file, words in EQUATIONS:
        found = [n for n, line in enumerate(lines(file), 1) if re.search(words, line)]
        assert len(found) == 1, f"{file}: {words!r} stands on lines {found}, expected one"
        rows.append(f"| {what} | [{file}:{found[0]}](mesp_ref/{file}#L{found[0]}) |")
    return "\n".join(["| equation | where |", "| --- | --- |", *rows])


def renewed(text: str) -> str:
    """README with its two tables written anew, each between its pair of comments."""
    for name, table in (("reading order", reading_order()), ("equations", equation_table())):
        between = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(between, rf"\g<1>{table}\n\g<2>", text, flags=re.DOTALL)
        assert count == 1, f"README.md has no place for the table: {name}"
    return text


if __name__ == "__main__":
    README.write_text(renewed(README.read_text(encoding="utf-8")), encoding="utf-8")

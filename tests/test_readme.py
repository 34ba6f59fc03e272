"""README: its Python prints what it shows, its tables are today's, its links and targets exist."""

import contextlib
import io
import re
import runpy

import numpy as np
import pytest
from readme_tables import PLACES, READING, README, ROOT, renewed
from scipy.special import ndtr

DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXT = README.read_text(encoding="utf-8")


def test_the_python_prints_what_the_readme_shows():
    [(code, shown)] = re.findall(r"```python\n(.*?)```\n+```text\n(.*?)```", TEXT, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 12
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue() == shown


def test_the_check_of_an_own_op_runs_as_written(tmp_path):
    """The gelu of docs/verify.md is the reader's: a right one passes, a wrong backward does not."""
    file = tmp_path / "test_my_op.py"
    text = (ROOT / "docs" / "verify.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(from hypothesis.*?)```", text, re.DOTALL)
    file.write_text(code, encoding="utf-8")

    def gelu(x):
        return x * ndtr(x)

    def gelu_bwd(dy, x):
        return dy * (ndtr(x) + x * np.exp(-(x**2) / 2) * (2 * np.pi) ** -0.5)

    def wrong_bwd(dy, x):
        return dy * ndtr(x)

    for backward, right in ((gelu_bwd, True), (wrong_bwd, False)):
        names = runpy.run_path(str(file), {"gelu": gelu, "gelu_bwd": backward})
        with contextlib.nullcontext() if right else pytest.raises(AssertionError):
            names["test_my_op"]()


@pytest.mark.parametrize("document", PLACES, ids=lambda path: path.name)
def test_the_tables_are_of_todays_code(document):
    text = document.read_text(encoding="utf-8")
    assert renewed(document) == text, "python tests/readme_tables.py writes them anew"


def test_the_reading_order_is_the_whole_reading_path():
    files = [*(ROOT / "mesp_ref" / "ops").glob("*.py")]
    path = {f"ops/{f.name}" for f in files if f.name[0] != "_"}
    names = ["layer", "half", "attention_half", "mlp_half", "block", "model", "methods"]
    assert set(READING) == path | {f"engine/{name}.py" for name in names}


def test_the_front_page_is_short():
    assert len(TEXT.split()) <= 900


def test_every_make_target_named_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for document in DOCUMENTS:
        for target in re.findall(r"^make ([a-z-]+)", document.read_text("utf-8"), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), (document.name, target)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target

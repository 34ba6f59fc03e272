"""The site: every public name has its page, formulas and links are made whole, and the check of the
built pages can fail. The pages themselves are built and checked by `make site`."""

import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from build import ROOT, place_of, relinked, sources

import mesp_ref
from check import problems
from formulas import with_formulas
from pages_api import HOME, SOURCE, api_pages, page_of
from pages_notebooks import notebook_page

NOT_HERE = (  # frameworks or MPI may be missing
    "mesp_ref.cli", "mesp_ref.spread", "mesp_ref.verify.adapters", "mesp_ref.golden.backends",
)  # fmt: skip


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return api_pages()


def public() -> Iterator[tuple[str, str]]:
    """Module and name of every function and class that Python itself finds."""
    for found in pkgutil.walk_packages(mesp_ref.__path__, "mesp_ref."):
        own = found.name.split(".")
        if found.name.startswith(NOT_HERE) or any(part.startswith("_") for part in own):
            continue
        module = importlib.import_module(found.name)
        for name, value in vars(module).items():
            if name.startswith("_") or not (inspect.isfunction(value) or inspect.isclass(value)):
                continue
            if value.__module__ == found.name and value.__name__ == name:
                yield found.name, name


def test_every_public_name_has_its_place(pages: dict[str, str]) -> None:
    names = list(public())
    assert len(names) > 400
    missing = [
        f"{module}.{name}" for module, name in names
        if f"{{ #{name} }}" not in pages.get(page_of(module), "")
    ]  # fmt: skip
    assert not missing
    front = pages["api/index.md"]
    for name in mesp_ref.__all__:
        [page] = re.findall(rf"\[{name}\]\((\S+)#{name}\)", front.partition("\n## ")[0])
        assert f"{{ #{name} }}" in pages[f"api/{page}"]


def test_docstrings_are_shown_as_they_stand(pages: dict[str, str]) -> None:
    from mesp_ref.ops.rmsnorm import rmsnorm_bwd

    page = pages[page_of("mesp_ref.ops.rmsnorm")].replace("&#8203;", "").replace("&lt;", "<")
    assert inspect.getdoc(rmsnorm_bwd) in page.replace("&gt;", ">").replace("&amp;", "&")
    assert "rmsnorm_bwd(dy: Array, res: RmsNormRes, w: Table, *, eps: float) -> Array" in page


def test_every_document_is_in_the_navigation() -> None:
    text = (ROOT / "docs/site/mkdocs.yml").read_text(encoding="utf-8")
    for file in sources():
        assert f"{place_of(file).as_posix()}\n" in text, f"{file}: add it to nav"


def test_links_of_documents_become_links_of_pages(pages: dict[str, str]) -> None:
    source = ROOT / "docs" / "methods.md"
    text = relinked(
        "[a](notes.md#x) [b](../notebooks/04_what_is_in_memory.ipynb) [c](../Makefile) "
        "[d](../mesp_ref/ops/rope.py#L3) `[e](no.md)` [f](https://x.y)",
        source, set(pages),
    )  # fmt: skip
    assert text.split("] ")[0]
    assert re.findall(r"\]\((.*?)\)", text) == [
        "notes.md#x", "../notebooks/04_what_is_in_memory.md",
        "https://github.com/mesp-ref/mesp-ref/blob/main/Makefile", "../api/mesp_ref/ops/rope.md",
        "no.md", "https://x.y",
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="leads nowhere"):
        relinked("[a](nowhere.md)", source, set(pages))


def test_addresses_of_the_project_become_links_of_pages(pages: dict[str, str]) -> None:
    """What a notebook says in full, so that it can be copied, is a link between pages on the site."""
    source = ROOT / "notebooks" / "00_the_chain_rule_by_hand.ipynb"
    text = (
        f"[a]({HOME}/docs/kill-table/#x) [b]({HOME}/notebooks/04_what_is_in_memory/) "
        f"[c]({SOURCE}/Makefile)"
    )
    assert re.findall(r"\]\((.*?)\)", relinked(text, source, set(pages))) == [
        "../docs/kill-table.md#x", "04_what_is_in_memory.md", f"{SOURCE}/Makefile",
    ]  # fmt: skip
    for address in (f"{HOME}/docs/nowhere/", f"{SOURCE}/nowhere.py"):
        with pytest.raises(SystemExit, match="leads nowhere"):
            relinked(f"[a]({address})", source, set(pages))


def test_formulas_are_made_outside_of_code_only() -> None:
    def convert(latex: str, display: str) -> str:
        return (
            f'<math xmlns="http://www.w3.org/1998/Math/MathML"><mi>{display}: {latex}</mi></math>'
        )

    text = "costs $5 and $6\n`$a$`\n```\n$$b$$\n```\n$x_1$ then $$ y*z $$ end"
    made = with_formulas(text, convert)
    assert made.count("<math") == 2
    assert "inline: x&#95;1" in made
    assert "block: y&#42;z" in made
    assert "costs $5 and $6\n`$a$`\n```\n$$b$$\n```" in made


def test_a_notebook_is_its_text_code_and_outputs(tmp_path: Path) -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {"cell_type": "code", "source": ["1 + 1"], "outputs": [
            {"output_type": "execute_result", "data": {"text/plain": ["2"]}},
            {"output_type": "display_data", "data": {"image/png": "iVBORw==", "text/plain": ["<F>"]}},
        ]},
        {"cell_type": "code", "source": ["# Solution 2: so\n", "2"], "outputs": [],
         "metadata": {"tags": ["solution"]}},
    ]  # fmt: skip
    (tmp_path / "n.ipynb").write_text(json.dumps({"cells": cells}), encoding="utf-8")
    text, pictures = notebook_page(tmp_path / "n.ipynb")
    assert "# Title\ntext" in text
    assert "```python\n1 + 1\n```" in text
    assert "```text { .output }\n2\n```" in text
    assert "![F](n-1-1.png)" in text
    assert pictures == {"n-1-1.png": b"\x89PNG"}
    folded = text.partition("<details")[2].partition("</details>")[0]
    assert "<summary>Solution 2</summary>" in folded
    assert "```python\n# Solution 2: so\n2\n```" in folded


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ('<a href="other/">x</a> <a href="other/#here">x</a> <a href="https://x.y">x</a>', None),
        ("<p><code>$$ x $$</code></p>", None),
        ('<a href="nowhere/">x</a>', "nowhere/ leads nowhere"),
        ('<a href="other/#gone">x</a>', "no such anchor"),
        ('<img src="p.png" alt="p">', "p.png leads nowhere"),
        ('<img src="other/index.html">', "says nothing"),
        ('<script src="https://x.y/z.js"></script>', "from elsewhere"),
        ('<link rel="stylesheet" href="//x.y/z.css">', "from elsewhere"),
        ('<a data-md-component="source" href="https://x.y">x</a>', "how many stars"),
        (r"<p>\frac{a}{b}</p>", "formula was left"),
    ],
)
def test_the_check_of_the_pages_can_fail(body: str, found: str | None, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/index.html").write_text('<h2 id="here">x</h2>', encoding="utf-8")
    (tmp_path / "index.html").write_text(f"<body>{body}</body>", encoding="utf-8")
    lines = list(problems(tmp_path))
    assert len(lines) == (0 if found is None else 1), lines
    assert found is None or found in lines[0]


def test_an_empty_site_is_a_problem(tmp_path: Path) -> None:
    assert list(problems(tmp_path))

"""`make site`: the pages from docs, notebooks, docstrings and --help, built and checked.

build/pages gets the Markdown, site the result. Nothing is fetched, neither here nor by a reader.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from check import problems
from formulas import outside_code, with_formulas
from pages_api import HOME, ROOT, SOURCE, api_pages, page_of
from pages_notebooks import notebook_page

HERE, PAGES, SITE = Path(__file__).parent, ROOT / "build" / "pages", ROOT / "site"
_BLOCK = "block.html"  # the interactive page of a block
_TOP = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
_OWN = re.compile(rf"(?<=\]\()({re.escape(HOME)}|{re.escape(SOURCE)})/([^)\s#]*)(#[^)\s]*)?(?=\))")
_LINK = re.compile(r"(?<=\]\()(?!https?:|#|mailto:|data:)([^)\s]+)(?=\))")


def sources() -> list[Path]:
    """Documents of the repository that become pages."""
    found = [f for f in sorted((ROOT / "docs").rglob("*.md")) if HERE not in f.parents]
    return [*found, *(ROOT / name for name in _TOP), *sorted((ROOT / "notebooks").glob("*.ipynb"))]


def place_of(file: Path) -> Path:
    """Where a file of the repository lies among the pages: a notebook and a module have a page."""
    path = file.relative_to(ROOT)
    if HERE in file.parents:
        return file.relative_to(HERE)
    if path.suffix == ".ipynb":
        return path.with_suffix(".md")
    return path


def at_home(text: str, source: Path) -> str:
    """Addresses of the project's own pages and files as links within the repository.

    A notebook that is copied elsewhere needs whole addresses; here they are held against what there is.
    """
    pages = {place_of(file).with_suffix("").as_posix(): file for file in sources()}

    def one(found: re.Match[str]) -> str:
        file = pages.get(found[2].strip("/")) if found[1] == HOME else ROOT / found[2]
        if file is None or not file.exists():
            raise SystemExit(f"{source.relative_to(ROOT)}: {found[0]}: leads nowhere")
        return Path(os.path.relpath(file, source.parent)).as_posix() + (found[3] or "")

    return _OWN.sub(one, text)


def relinked(text: str, source: Path, api: set[str], made: Iterable[str] = ()) -> str:
    """Links of a document in the repository as links of its page: to pages, else to the sources."""
    here = place_of(source).parent
    pages = {place_of(file).as_posix() for file in [*sources(), *HERE.glob("*.md")]}

    def one(found: re.Match[str]) -> str:
        path, _, fragment = found[1].partition("#")
        if path in made:
            return found[0]
        target = Path(os.path.normpath(source.parent / path))
        if not target.exists():
            raise SystemExit(f"{source.relative_to(ROOT)}: {found[1]}: leads nowhere")
        place = place_of(target).as_posix()
        if place == "mesp_ref":
            place = "api/index.md"
        if place.endswith(".py"):
            place = page_of(place.removesuffix(".py").replace("/", "."))
            fragment = "" if place in api else fragment
        if place in pages | api or (target.suffix in (".png", ".json") and "docs" in target.parts):
            return os.path.relpath(place, here) + (f"#{fragment}" if fragment else "")
        kind = "tree" if target.is_dir() else "blob"
        address = SOURCE.replace("/blob/", f"/{kind}/")
        return f"{address}/{target.relative_to(ROOT).as_posix()}" + (
            f"#{fragment}" if fragment else ""
        )

    return outside_code(text, lambda part: _LINK.sub(one, at_home(part, source)))


def commands() -> str:
    """The page of all commands: what each says under --help."""
    from mesp_ref.cli import build_parser

    os.environ["COLUMNS"] = "100"
    lines = ["# Commands", "", "Each command explains itself; this is what it says.", ""]

    def add(parser: argparse.ArgumentParser, depth: int) -> None:
        name = parser.prog
        lines.extend(
            ["#" * depth + f" {name}", "", "```text", parser.format_help().rstrip(), "```", ""]
        )
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for child in action.choices.values():
                    add(child, min(depth + 1, 4))

    add(build_parser(), 2)
    return "\n".join(lines)


def stage() -> None:
    """All pages as Markdown in build/pages."""
    from latex2mathml.converter import convert

    from mesp_ref.cli import main as mesp_ref

    shutil.rmtree(PAGES, ignore_errors=True)
    api = api_pages()
    for name, text in {**api, "commands.md": commands()}.items():
        (PAGES / name).parent.mkdir(parents=True, exist_ok=True)
        (PAGES / name).write_text(text, encoding="utf-8")
    for file in [*sources(), *sorted(HERE.glob("*.md"))]:
        target = PAGES / place_of(file)
        target.parent.mkdir(parents=True, exist_ok=True)
        text, made = file.read_text(encoding="utf-8"), set[str]()
        if file.suffix == ".ipynb":
            text, pictures = notebook_page(file)
            made = set(pictures)
            for name, data in pictures.items():
                (target.parent / name).write_bytes(data)
        text = relinked(text, file, set(api), made)
        target.write_text(with_formulas(text, convert), encoding="utf-8")
    for file in [*(ROOT / "docs").rglob("*.png"), *(ROOT / "docs").rglob("*.json")]:
        target = PAGES / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    shutil.copyfile(HERE / "extra.css", PAGES / "extra.css")
    if mesp_ref(["learn", "--page", str(PAGES / _BLOCK)]):
        raise SystemExit(f"{_BLOCK}: was not written")


def main() -> int:
    """Stage, build, check. 1 where something is broken."""
    stage()
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--clean",
        "-q",
    ]  # -q: but warnings
    command += ["-f", str(HERE / "mkdocs.yml"), "-d", str(SITE)]
    code = subprocess.run(
        command, check=False, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    ).returncode
    if code:
        return code
    found = list(problems(SITE))
    pages = sum(1 for _ in SITE.rglob("index.html"))
    print("\n".join(found) or f"site: {pages} pages; every link, picture and formula is whole")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())

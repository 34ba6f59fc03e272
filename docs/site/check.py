"""Every page that was built: links and anchors lead somewhere, pictures are there and say what they
show, no formula is left as LaTeX, and no script, style, font or picture comes from elsewhere."""

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_LATEX = re.compile(r"\$\$|\\(?:frac|sqrt|sum|odot|text|operatorname|partial|top)\b")
_OWN = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}


class _Page(HTMLParser):
    """What a page holds: its anchors, what it points to, its text outside of code."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors: set[str] = set()
        self.components: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.unnamed: list[str] = []
        self.text: list[str] = []
        self._code = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.components.add(found.get("data-md-component") or "")
        self._code += tag in ("pre", "code", "script", "style")
        if name := found.get("id"):
            self.anchors.add(name)
        if tag == "a" and found.get("href"):
            self.links.append(found["href"] or "")
        if tag == "img" and not (found.get("alt") or "").strip():
            self.unnamed.append(found.get("src") or "")
        loaded = found.get(_OWN.get(tag, ""))
        if loaded and not (
            tag == "link" and found.get("rel") in ("canonical", "next", "prev", "edit")
        ):
            self.loaded.append(loaded)

    def handle_endtag(self, tag: str) -> None:
        self._code -= tag in ("pre", "code", "script", "style")

    def handle_data(self, data: str) -> None:
        if not self._code:
            self.text.append(data)


def problems(site: Path, base: str = "/mesp-ref/") -> Iterator[str]:
    """What is wrong, a line each: "page: what". `base` is the path under which the site is served."""
    pages = {file: _Page(file.read_text(encoding="utf-8")) for file in sorted(site.rglob("*.html"))}
    if not pages:
        yield f"{site}: found no page, expected some"
    for file, page in pages.items():
        where = file.relative_to(site)
        for link in (*page.links, *page.loaded):
            parts = urlsplit(link)
            if parts.scheme in ("http", "https", "mailto", "data") or parts.netloc:
                if link in page.loaded and parts.scheme != "data":
                    yield f"{where}: loads {link} from elsewhere"
                continue
            target = _target(site, file, unquote(parts.path), base)
            if not target.is_file():
                yield f"{where}: {link} leads nowhere"
            elif parts.fragment and target in pages:
                anchor = unquote(parts.fragment)
                if anchor not in pages[target].anchors and not anchor.startswith("__"):
                    yield f"{where}: {link}: no such anchor"
        yield from (f"{where}: picture {name} says nothing" for name in page.unnamed)
        if "source" in page.components:  # of Material, where a repo_url is set
            yield f"{where}: asks the repository's host how many stars it has"
        if found := _LATEX.search(" ".join(page.text)):
            yield f"{where}: a formula was left: {found[0]}"
    for file in site.rglob("*.css"):
        for address in re.findall(
            r"url\(['\"]?(https?:[^)'\"]+)", file.read_text(encoding="utf-8")
        ):
            yield f"{file.relative_to(site)}: loads {address} from elsewhere"


def _target(site: Path, file: Path, path: str, base: str) -> Path:
    if path.startswith("/"):  # of the page 404, which is shown at any depth
        place = site / path.removeprefix(base).lstrip("/")
    else:
        place = file.parent / path if path else file
    return (place / "index.html" if place.is_dir() else place).resolve()


if __name__ == "__main__":
    found = list(problems(Path(sys.argv[1]).resolve()))
    print("\n".join(found) or "every link, picture and formula is whole")
    sys.exit(bool(found))

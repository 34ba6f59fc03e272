"""API pages: every public name of the package with its signature and its docstring, letter by letter.

Sources are parsed, not imported, so that no framework need be installed. A docstring is the home of
its derivation and is laid out in columns: it is shown as it stands.
"""

import ast
import html
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
HOME = "https://mesp-ref.github.io/mesp-ref"
SOURCE = "https://github.com/mesp-ref/mesp-ref/blob/main"
_WIDE = "---\nhide: [navigation]\n---\n"  # lines of a hundred characters
NOT_API = ("cli", "__main__")  # commands have a page of their own
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
# What each part is, in the order in which one part may import another.
PARTS = {
    "api": "the front door", "errors": "what a user can cause", "ops": "one operation a file",
    "engine": "the reading path", "lean": "in less memory, on more cores", "registry": "a row an op",
    "memory": "predicted, counted, drawn", "files": "what others wrote and what we write",
    "stories": "the grammar of the story model", "train": "from data to steps",
    "job": "a run and its directory", "spread": "several machines", "verify": "checks of gradients",
    "golden": "vectors for backends",
}  # fmt: skip


class Name(NamedTuple):
    """A public name: where it is defined, what it looks like, what it says."""

    name: str
    line: int
    kind: str
    signature: str
    doc: str
    members: tuple["Name", ...] = ()


def modules() -> Iterator[tuple[str, Path]]:
    """Dotted name and file of every module that a program may import."""
    for file in sorted((ROOT / "mesp_ref").rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        if parts[1] in NOT_API or any(p.startswith("_") and p != "__init__" for p in parts):
            continue
        yield ".".join(p for p in parts if p != "__init__"), file


def public_names(file: Path) -> tuple[str, list[Name]]:
    """A module's docstring and what it defines for others, in its order."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return ast.get_docstring(tree) or "", list(_names(tree.body))


def _names(body: list[ast.stmt]) -> Iterator[Name]:
    for node in body:
        if isinstance(node, ast.If):
            yield from _names(node.body)
        elif isinstance(node, Definition) and not node.name.startswith("_"):
            yield _definition(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Name) and not target.id.startswith("_"):
                    value = ast.unparse(node.value)
                    shown = value if len(value) <= 200 else value[:200] + "…"
                    yield Name(target.id, node.lineno, "value", f"{target.id} = {shown}", "")


def _definition(node: Definition) -> Name:
    doc = ast.get_docstring(node) or ""
    if not isinstance(node, ast.ClassDef):
        return Name(node.name, node.lineno, "function", _signature(node), doc)
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    fields = [
        f"    {ast.unparse(child)}" for child in node.body
        if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name)
        and not child.target.id.startswith("_")
    ]  # fmt: skip
    head = f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    members = tuple(
        _definition(child) for child in node.body
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        and (not child.name.startswith("_") or child.name == "__init__")
    )  # fmt: skip
    return Name(node.name, node.lineno, "class", "\n".join([head, *fields]), doc, members)


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """As it would be written: on one line where it fits, else a parameter a line."""
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    one = f"{node.name}({ast.unparse(node.args)}){returns}"
    if len(one) <= 88:
        return one
    plain, keys = node.args.posonlyargs + node.args.args, node.args.kwonlyargs
    defaults = [None] * (len(plain) - len(node.args.defaults)) + list(node.args.defaults)
    rows = [_parameter(a, d) for a, d in zip(plain, defaults, strict=True)]
    if node.args.vararg:
        rows.append(f"*{ast.unparse(node.args.vararg)}")
    elif keys:
        rows.append("*")
    rows += [_parameter(a, d) for a, d in zip(keys, node.args.kw_defaults, strict=True)]
    if node.args.kwarg:
        rows.append(f"**{ast.unparse(node.args.kwarg)}")
    inside = "".join(f"    {row},\n" for row in rows)
    return f"{node.name}(\n{inside}){returns}"


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    text = ast.unparse(argument)
    if default is None:
        return text
    return (
        f"{text} = {ast.unparse(default)}"
        if argument.annotation
        else f"{text}={ast.unparse(default)}"
    )


def page_of(module: str) -> str:
    """The page of a module, from the root of the pages."""
    return f"api/{module.replace('.', '/')}.md"


def api_pages() -> dict[str, str]:
    """File name and Markdown of every page; modules without a public name have none."""
    pages: dict[str, str] = {}
    index: dict[str, list[str]] = {}
    for module, file in modules():
        doc, names = public_names(file)
        if not names:
            continue
        path = file.relative_to(ROOT).as_posix()
        lines = [_WIDE, f"# {module}", "", _pre(doc), f"[{path}]({SOURCE}/{path}){{ .source }}", ""]
        for name in names:
            lines += _entry(name, path, "")
        pages[page_of(module)] = "\n".join(lines)
        part = module.split(".")[1] if "." in module else "api"
        linked = ", ".join(
            f"[{n.name}]({page_of(module).removeprefix('api/')}#{n.name})" for n in names[:12]
        )
        more = ", …" * (len(names) > 12)
        index.setdefault(part, []).append(
            f"- [{module}]({page_of(module).removeprefix('api/')}): {linked}{more}"
        )
    pages["api/index.md"] = _index(index, _front_door(pages))
    return pages


def _front_door(pages: dict[str, str]) -> str:
    """The names of `import mesp_ref as mr`, each linked to where it is defined."""
    text = (ROOT / "mesp_ref" / "__init__.py").read_text(encoding="utf-8")
    [names] = [
        ast.literal_eval(node.value)
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    homes = {
        n: next(p for p, t in pages.items() if f"## {_escaped(n)} {{ #{n} }}" in t) for n in names
    }
    return ", ".join(f"[{n}]({page.removeprefix('api/')}#{n})" for n, page in homes.items())


def _index(index: dict[str, list[str]], front: str) -> str:
    lines = [
        "# API", "",
        "Every public name, with its docstring as it stands.", "`import mesp_ref as mr` gives",
        f"{front};", "the search above finds the others.", "",
    ]  # fmt: skip
    for part, what in PARTS.items():
        if part in index:
            lines += [f"## {part}: {what}", "", *index[part], ""]
    return "\n".join(lines)


def _entry(name: Name, path: str, within: str) -> list[str]:
    """A heading, the signature, the docstring."""
    anchor = f"{within}.{name.name}" if within else name.name
    depth = "###" if within else "##"
    link = f"[source]({SOURCE}/{path}#L{name.line}){{ .source }}"
    lines = [
        f"{depth} {_escaped(anchor)} {{ #{anchor} }}",
        "",
        "```python",
        name.signature,
        "```",
        "",
    ]
    lines += [_pre(name.doc), link, ""]
    for member in name.members:
        if member.doc or member.name == "__init__":
            lines += _entry(member, path, name.name)
    return lines


def _escaped(text: str) -> str:
    return text.replace("_", r"\_").replace("*", r"\*")


def _pre(doc: str) -> str:
    """A docstring as it stands; its blank lines would end the block."""
    if not doc:
        return ""
    text = html.escape(doc, quote=False).replace("\n\n", "\n&#8203;\n")
    return f'<pre class="docstring">{text}</pre>\n'

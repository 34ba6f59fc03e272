"""The notebooks as they are stored: run in order, without errors, and not stale.

They are executed by `make notebooks`; `make notebooks-refresh` stores what that gives.
"""

import copy
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import mesp_ref
from mesp_ref import learn, ops
from mesp_ref.engine import block, methods, model
from mesp_ref.learn import drawing

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
REFRESH = "run make notebooks-refresh"
MACHINE = re.compile(r"/(home|root|tmp|work|Users|var|opt|usr|private)/|site-packages|[A-Z]:\\\\")


def load(name: str) -> ModuleType:
    """A script that lies beside the notebooks."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


refresh = load("refresh")


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def is_solution(cell: dict[str, Any]) -> bool:
    """Hidden from who reads down to the exercises: a folded cell, or folded Markdown."""
    hidden = bool(cell["metadata"].get("jupyter", {}).get("source_hidden"))
    return hidden or "<details>" in "".join(cell["source"])


def stale_sources(cell: dict[str, Any]) -> list[str]:
    """What a cell shows of the package and is no longer so."""
    found = []
    for output in cell["outputs"]:
        shown = output.get("metadata", {}).get("mesp_ref")
        if shown is None:
            continue
        stored, places = "".join(output["data"]["text/markdown"]), shown["places"]
        try:
            today = drawing.RENDERERS[shown["shows"]](places)
        except ModuleNotFoundError as missing:
            if not missing.name or missing.name.startswith("mesp_ref"):
                raise
            continue  # shown from a module that needs an extra, such as torch
        if stored != today:
            found.append(f"stored source of {', '.join(places)} is not today's: {REFRESH}")
    return found


def problems(notebook: dict[str, Any]) -> list[str]:
    """Everything that is wrong with a stored notebook, a line each."""
    found, cells = [], code_cells(notebook)
    counts = [cell["execution_count"] for cell in cells]
    if counts != list(range(1, len(cells) + 1)):
        found.append(f"cells did not run in order from 1: {counts}")
    outputs = [output for cell in cells for output in cell["outputs"]]
    if any(output["output_type"] == "error" for output in outputs):
        found.append("a cell raised an error")
    if any(output.get("name") == "stderr" for output in outputs):
        found.append("a cell wrote to standard error: a warning?")
    if not any("image/png" in output.get("data", {}) for output in outputs):
        found.append("no picture")
    for name, value in refresh.stamp(notebook).items():
        stored = notebook["metadata"].get("mesp_ref", {}).get(name)
        if stored != value:
            found.append(f"{name} of the stored outputs: found {stored}, now {value}: {REFRESH}")
    if f"mesp_ref {mesp_ref.__version__}" not in printed(cells[0]):
        found.append("the first cell does not print today's version")
    found += [line for cell in cells for line in stale_sources(cell)]
    for cell in notebook["cells"]:
        if place := MACHINE.search(without_pictures(cell)):
            found.append(f"the path of a machine: …{place[0]}…")
    return found


def printed(cell: dict[str, Any]) -> str:
    return "".join("".join(output.get("text", "")) for output in cell["outputs"])


def without_pictures(cell: dict[str, Any]) -> str:
    bare = copy.deepcopy(cell)
    for output in bare.get("outputs", []):
        output.get("data", {}).pop("image/png", None)
    return json.dumps(bare, ensure_ascii=False)


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> dict[str, Any]:
    return json.loads(request.param.read_text(encoding="utf-8"))


def test_there_are_notebooks() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{i:02d}" for i in range(len(NOTEBOOKS))]
    assert len(NOTEBOOKS) >= 10


def test_stored_outputs_are_todays(notebook: dict[str, Any]) -> None:
    assert not problems(notebook)


def test_each_exercise_has_a_hidden_solution(notebook: dict[str, Any]) -> None:
    text = "\n".join("".join(c["source"]) for c in notebook["cells"] if not is_solution(c))
    asked = len(re.findall(r"^\*\*Exercise \d", text, re.MULTILINE))
    hidden = [cell for cell in notebook["cells"] if is_solution(cell)]
    answered = sum("".join(cell["source"]).count("Solution ") for cell in hidden)
    assert asked >= 2
    assert answered == asked


def test_the_package_is_imported_and_not_pasted(notebook: dict[str, Any]) -> None:
    """No function of the engine is defined again in a cell, and some source is shown."""
    engine = (ops, block, methods, model)
    names = {n for m in engine for n, _ in inspect.getmembers(m, inspect.isfunction)}
    defined = {
        name
        for cell in code_cells(notebook)
        for name in re.findall(r"^def (\w+)", "".join(cell["source"]), re.MULTILINE)
    }
    assert not defined & names
    assert any(
        "mesp_ref" in output.get("metadata", {})
        for cell in code_cells(notebook)
        for output in cell["outputs"]
    )


def test_links_are_whole_addresses(notebook: dict[str, Any]) -> None:
    """None that breaks where a notebook is copied alone; where they lead, tests/test_site.py says."""
    text = "\n".join(
        "".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "markdown"
    )
    links = re.findall(r"\]\(([^)]+)|(?:href|src)=[\"']([^\"']+)", text)
    assert links
    for link in ("".join(found) for found in links):
        assert link.startswith(("https://", "#")), link


def test_pictures_have_a_white_ground(notebook: dict[str, Any]) -> None:
    """A transparent figure with dark text cannot be read on a dark page."""
    from base64 import b64decode
    from io import BytesIO

    from matplotlib.image import imread

    for cell in code_cells(notebook):
        for output in cell["outputs"]:
            if png := output.get("data", {}).get("image/png"):
                corner = imread(BytesIO(b64decode("".join(png))))[0, 0]
                assert (corner == 1).all()  # white, and opaque where there is an alpha channel


def _edit(notebook: dict[str, Any], how: str) -> None:
    """One way in which a stored notebook goes bad."""
    cells = code_cells(notebook)
    shown = [o for c in cells for o in c["outputs"] if "mesp_ref" in o.get("metadata", {})]
    if how == "older version":
        notebook["metadata"]["mesp_ref"]["version"] = "0.0.1"
    elif how == "never stamped":
        del notebook["metadata"]["mesp_ref"]
    elif how == "another checkpoint":
        notebook["metadata"]["mesp_ref"]["checkpoint_sha256"] = "0" * 64
    elif how == "edited cell":
        cells[1]["source"] = [*cells[1]["source"], "\n# one more line"]
    elif how == "changed source":
        text = "".join(shown[0]["data"]["text/markdown"])
        shown[0]["data"]["text/markdown"] = text.replace("return", "return -", 1)
    elif how == "run twice":
        cells[-1]["execution_count"] += 1
    elif how == "cleared":
        for cell in cells:
            cell |= {"execution_count": None, "outputs": []}
    elif how == "error":
        cells[1]["outputs"].append({"output_type": "error", "ename": "E", "evalue": ""})
    elif how == "machine path":
        cells[1]["outputs"].append(
            {"output_type": "stream", "name": "stdout", "text": ["/home/ada/x.py"]}
        )


@pytest.mark.parametrize(
    "how",
    ["older version", "never stamped", "another checkpoint", "edited cell", "changed source",
     "run twice", "cleared", "error", "machine path"],
)  # fmt: skip
def test_a_stale_notebook_is_found(how: str) -> None:
    notebook = json.loads(NOTEBOOKS[0].read_text(encoding="utf-8"))
    before = problems(notebook)
    _edit(notebook, how)
    assert set(problems(notebook)) - set(before)


def test_every_exercise_has_a_cell_and_a_check_by_the_tutor(notebook: dict[str, Any]) -> None:
    """Empty cells and solutions, each judged: as many as there are exercises."""
    open_cells = ["".join(c["source"]) for c in code_cells(notebook) if not is_solution(c)]
    solutions = "\n".join("".join(c["source"]) for c in code_cells(notebook) if is_solution(c))
    text = "\n".join("".join(c["source"]) for c in notebook["cells"])
    asked = len(re.findall(r"^\*\*Exercise \d", text, re.MULTILINE))
    assert sum("# your code" in cell for cell in open_cells) == asked
    judged = re.findall(r"(?:learn\.check|take)\(\"(\w+)\"", "\n".join(open_cells))
    assert len(set(judged)) == len(judged) == asked
    for name in judged:
        assert learn.find(name).name == name
        assert re.search(rf"(my|solved)_{name}\b", solutions), name


def test_a_notebook_can_be_copied_elsewhere(notebook: dict[str, Any]) -> None:
    """It imports what is installed and reads nothing beside it."""
    text = "\n".join("".join(c["source"]) for c in code_cells(notebook))
    beside = {path.stem for path in FOLDER.glob("*.py")}
    for module in re.findall(r"^\s*(?:from|import) (\w+)", text, re.MULTILINE):
        assert module not in beside
    assert not re.findall(r"""(?:open|Path|load\w*|read\w*)\(["'][^"'/]*\.""", text)
    assert "../" not in text


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_alone(path: Path) -> None:
    """In an empty folder, as `make notebooks` runs it, too."""
    notebook = refresh.run(path)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


_WITHOUT = """
import importlib.abc, json, sys

class Nothing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tokenizers", "psutil"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Nothing())
import matplotlib
matplotlib.use("Agg")
space = {"__name__": "__main__"}
for cell in json.load(open(sys.argv[1], encoding="utf-8"))["cells"]:
    if cell["cell_type"] == "code":
        exec("".join(cell["source"]), space)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 7])
def test_two_need_nothing_that_a_browser_lacks(number: int) -> None:
    """Pyodide has neither tokenizers nor psutil; NumPy, SciPy, matplotlib and safetensors it has."""
    command = [sys.executable, "-c", _WITHOUT, str(NOTEBOOKS[number])]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-2000:]

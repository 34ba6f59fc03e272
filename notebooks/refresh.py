"""Run the notebooks from clean kernels: to check them, or to store their outputs and stamp them.

python notebooks/refresh.py [NOTEBOOK ...]            run in place; `make notebooks-refresh`
python notebooks/refresh.py --check [NOTEBOOK ...]    run and change nothing; `make notebooks`

The stamp says what the stored outputs came from: the version of mesp_ref, the code cells and the
default checkpoint. tests/test_notebooks.py refuses a notebook whose stamp is not today's.
"""

import argparse
import hashlib
import importlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mesp_ref
from mesp_ref.files.default import default_checkpoint

FOLDER = Path(__file__).parent
LIMIT = 300  # seconds a cell may take on a slow machine; a notebook takes less than 45 on two cores


def stamp(notebook: dict[str, Any]) -> dict[str, str]:
    """What the outputs of a notebook depend on, run now."""
    code = hashlib.sha256()
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            code.update("".join(cell["source"]).encode() + b"\0")
    weights = (default_checkpoint() / "model.safetensors").read_bytes()
    return {
        "version": mesp_ref.__version__,
        "code_sha256": code.hexdigest(),
        "checkpoint_sha256": hashlib.sha256(weights).hexdigest(),
    }


def run(path: Path) -> Any:
    """The notebook after a run from a clean kernel, in an empty folder, as if copied there alone.

    Raises nbclient's CellExecutionError for the first cell that raises, AssertionError for files that
    it leaves in the folder.
    """
    nbformat, nbclient = map(importlib.import_module, ("nbformat", "nbclient"))  # untyped
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        nbclient.NotebookClient(
            notebook, timeout=LIMIT, kernel_name="python3", store_widget_state=False,
            record_timing=False, coalesce_streams=True,  # how output came in pieces is chance
            resources={"metadata": {"path": folder}},
        ).execute()  # fmt: skip
        own = ".hypothesis"  # Hypothesis's cache of the constants in what it tests
        left = [file.name for file in Path(folder).iterdir() if file.name != own]
        assert not left, f"{path.name} leaves {', '.join(left)} behind"
    return notebook


def save(notebook: Any, path: Path) -> None:
    """Write a notebook with its stamp and nothing that differs from machine to machine."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "mesp_ref": stamp(notebook),
    }
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02d}"
    importlib.import_module("nbformat").write(notebook, path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the notebooks from clean kernels.")
    parser.add_argument("--check", action="store_true", help="run them, but change no file")
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of them")
    args = parser.parse_args(arguments)
    for path in args.notebooks or sorted(FOLDER.glob("*.ipynb")):
        begin = time.perf_counter()
        notebook = run(path.resolve())
        print(f"{path.name}: {time.perf_counter() - begin:.0f} s", flush=True)
        if not args.check:
            save(notebook, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the notebooks share: the look of their pictures, and how they show the package's source.

Nothing here computes. A source is shown as Markdown with the name of what was shown beside it, so
that a test can hold the stored output against the source of today.
"""

import ast
import difflib
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from mesp_ref.files.figure import METHOD_COLOURS  # noqa: F401  # for the notebooks

# Paul Tol's "bright" and "light" schemes, which colour-blind readers can tell apart.
BLUE, CYAN, GREEN, YELLOW = "#4477AA", "#66CCEE", "#228833", "#CCBB44"
RED, PURPLE, GREY, DARK = "#EE6677", "#AA3377", "#BBBBBB", "#222222"


def style() -> None:
    """White figures with dark, large enough text: legible on a dark page and on paper."""
    import matplotlib as mpl
    from matplotlib.rcsetup import cycler

    mpl.rcParams.update(
        {
            "figure.facecolor": "white", "savefig.facecolor": "white", "figure.dpi": 110,
            "figure.constrained_layout.use": True, "text.color": DARK, "axes.labelcolor": DARK,
            "axes.edgecolor": "#666666", "xtick.color": DARK, "ytick.color": DARK,
            "font.size": 10, "axes.titlesize": 11, "axes.grid": True, "grid.color": "#E6E6E6",
            "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
            "legend.frameon": False, "lines.linewidth": 1.8, "svg.hashsalt": "mesp_ref",
            "axes.prop_cycle": cycler(color=[BLUE, RED, GREEN, YELLOW, PURPLE, CYAN]),
        }
    )  # fmt: skip


def place(target: Any) -> str:
    """ "mesp_ref.ops.rmsnorm:rmsnorm" for a function or class of the package."""
    return f"{target.__module__}:{target.__qualname__}"


def named(where: str) -> Any:
    """What `place` names."""
    module, _, name = where.partition(":")
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def source_text(places: Sequence[str]) -> str:
    """Markdown with the source of each place under the name of its file."""
    texts = []
    for where in places:
        file = where.partition(":")[0].replace(".", "/") + ".py"
        texts.append(f"`{file}`\n```python\n{inspect.getsource(named(where))}```")
    return "\n\n".join(texts)


def diff_text(places: Sequence[str]) -> str:
    """Markdown with the difference between the code of two places, docstrings left out."""
    old, new = (_code(named(where)) for where in places)
    names = [where.partition(":")[2] for where in places]
    lines = difflib.unified_diff(old, new, names[0], names[1], n=20)
    body = "\n".join(line.rstrip("\n") for line in lines if not line.startswith("@@"))
    return f"```diff\n{body}\n```"


def _code(target: Any) -> list[str]:
    """The lines of a function without its docstring."""
    lines = inspect.getsource(target).splitlines()
    function: Any = ast.parse("\n".join(lines)).body[0]
    if ast.get_docstring(function) is not None:
        doc = function.body[0]
        del lines[doc.lineno - 1 : doc.end_lineno]
    return lines


RENDERERS: dict[str, Callable[[Sequence[str]], str]] = {"source": source_text, "diff": diff_text}


def _display(renderer: str, targets: Sequence[Any]) -> None:
    display = importlib.import_module("IPython.display").display  # untyped
    places = [place(target) for target in targets]
    shown = {"shows": renderer, "places": places}
    text = {"text/markdown": RENDERERS[renderer](places)}
    display(text, raw=True, metadata={"mesp_ref": shown})


def show(*targets: Any) -> None:
    """Show the source of functions as it is installed now (inspect.getsource)."""
    _display("source", targets)


def show_diff(old: Any, new: Any) -> None:
    """Show what must change in the code of one function to get the other."""
    _display("diff", (old, new))


def box(
    axes: Any, x: float, y: float, text: str, colour: str, width: float = 2.0, height: float = 0.6
) -> None:
    """A box of a diagram around (x, y)."""
    from matplotlib.patches import FancyBboxPatch

    corner = (x - width / 2, y - height / 2)
    axes.add_patch(
        FancyBboxPatch(
            corner, width, height, boxstyle="round,pad=0.02,rounding_size=0.1",
            facecolor=colour + "33", edgecolor=colour, linewidth=1.4,
        )
    )  # fmt: skip
    axes.text(x, y, text, ha="center", va="center", fontsize=9)


def arrow(
    axes: Any, start: tuple[float, float], end: tuple[float, float], colour: str, bend: float = 0.0
) -> None:
    """An arrow of a diagram."""
    axes.annotate(
        "", end, start,
        arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.4, "shrinkA": 0, "shrinkB": 0,
                    "connectionstyle": f"arc3,rad={bend}"},
    )  # fmt: skip

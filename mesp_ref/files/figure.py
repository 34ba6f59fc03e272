"""Pictures as this package means them, whatever the user's matplotlib is set to."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# The methods in every picture: of Paul Tol's schemes, which colour-blind readers can tell apart.
METHOD_COLOURS = {
    "store_all": "#999999", "mebp": "#4477aa", "mesp": "#228833", "mesp_tiled": "#cc3311",
    "mesp_streamed": "#aa3377", "mezo": "#ccbb44",
}  # fmt: skip


@contextmanager
def new_figure(**settings: Any) -> Iterator[Any]:
    """A matplotlib Figure without a window; drawn and saved within the `with`.

    matplotlib's own defaults hold, not those of a matplotlibrc: one with text.usetex would call
    TeX. Text is no formula: a path may have two dollar signs.
    """
    import matplotlib as mpl  # half a second to import
    from matplotlib.figure import Figure

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams["text.parse_math"] = False
        yield Figure(**settings)

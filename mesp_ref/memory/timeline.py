"""A ledger as a picture: bytes alive over the ops of a step."""

import base64
import html
import io
from pathlib import Path

from mesp_ref.memory.ledger import Ledger
from mesp_ref.weights import write_aside


def plot_timeline(ledger: Ledger, path: str | Path, title: str) -> None:
    """Write held bytes, and on top what each op adds, as .png or as one self-contained .html page.

    Raises MespRefError when the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # matplotlib takes a second
    from matplotlib.figure import Figure

    held = [moment.held / 1e6 for moment in ledger.moments]
    most = [(moment.held + moment.added) / 1e6 for moment in ledger.moments]
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.fill_between(range(len(held)), held, step="post", label="alive between ops")
    axes.fill_between(
        range(len(held)), held, most, step="post", alpha=0.5, label="results and scratch of the op"
    )
    top = max(range(len(most)), key=most.__getitem__)
    axes.annotate(f"{ledger.moments[top].op}: {most[top]:.2f} MB", (top, most[top]))
    axes.set(title=title, xlabel="op", ylabel="MB", xlim=(0, len(held)), ylim=(0, None))
    axes.legend()
    image = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(image, format="png")
    with write_aside(path) as aside:
        if Path(path).suffix == ".png":
            aside.write_bytes(image.getvalue())
        else:
            aside.write_text(_page(ledger, title, image.getvalue()), encoding="utf-8")


def _page(ledger: Ledger, title: str, image: bytes) -> str:
    """The picture and a table of what lives at the peak, in one file."""
    top = max(ledger.moments, key=lambda moment: moment.held + moment.added)
    parts = [*top.parts().most_common(), (f"{top.op}: results and scratch", top.added)]
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td align=right>{size:,}</td></tr>"
        for name, size in parts
    )
    data = base64.b64encode(image).decode("ascii")
    name = html.escape(title)
    return (
        f"<!doctype html><meta charset=utf-8><title>{name}</title>"
        f"<body style='font-family:sans-serif;max-width:64em;margin:auto'><h1>{name}</h1>"
        f"<img alt='bytes alive over the ops of a step' src='data:image/png;base64,{data}'>"
        f"<h2>Alive at the peak, in bytes</h2><table>{rows}</table>\n"
    )

"""The first rows of a data file as a person reads them, and the page that shows them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mesp_ref.errors import escaped, prose
from mesp_ref.files.html import html_template
from mesp_ref.ops import IGNORED
from mesp_ref.train.contents import table
from mesp_ref.train.rows import Row

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Piece(NamedTuple):
    """A stretch of a row's text: whether it is learned, and whether another document begins here."""

    text: str
    learned: bool
    begins: bool


def pieces(row: Row, tokenizer: "Tokenizer | None") -> list[Piece]:
    """A row decoded, special tokens shown, cut where learning begins and ends and between documents.

    The first token of a document is shown with what follows: it is in sight, and nobody's to foresee.
    Without a tokenizer the numbers of the tokens stand for the text.
    """
    learned = row.labels != IGNORED
    learned[:1] = False
    begins = np.zeros(len(learned), bool)
    if row.positions is not None:
        begins[1:] = row.positions[1:] == 0
    cuts = np.flatnonzero((learned[1:] != learned[:-1]) | begins[1:]) + 1
    found = []
    for start, stop in zip([0, *cuts], [*cuts, len(learned)], strict=True):
        ids = row.ids[start:stop].tolist()
        if tokenizer is None:
            text = "".join(f"{i} " for i in ids)
        else:
            text = tokenizer.decode(ids, skip_special_tokens=False)
        found.append(Piece(text, bool(learned[start]), bool(begins[start])))
    return found


def as_html(
    name: str,
    contents: Mapping[str, Any],
    rows: Sequence[Row],
    tokenizer: "Tokenizer | None",
) -> str:
    """The page: the table of contents, then the rows with what is learned marked. All texts are
    escaped, as HTML and for what could turn the direction of writing."""
    shown = [(row.counted, len(row.ids), pieces(row, tokenizer)) for row in rows]
    return html_template("mesp_ref.train", "page.html.j2").render(
        name=escaped(name), lines=table({"all": contents}), rows=shown, prose=prose
    )

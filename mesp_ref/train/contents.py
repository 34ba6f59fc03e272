"""What a data file comes to: counted before the first step, told as one table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mesp_ref.ops import IGNORED, Array


class Fitted(NamedTuple):
    """How much of a document with parts that are not learned goes into a row, and what is lost."""

    stop: int  # tokens of the row; 0 where it is left out
    answers_beyond: int  # stretches to learn that do not end in it


def fitted(labels: Array, seq_len: int) -> Fitted:
    """Where a conversation longer than a row is cut: behind the last answer that ends in it.

    An answer cut in two would teach to go on where the whole one ends, so it is not learned at all;
    a conversation without one that ends within seq_len tokens is left out.
    Shapes    labels [T]
    """
    learned = labels != IGNORED
    if len(labels) <= seq_len:
        return Fitted(len(labels), 0)
    ends = np.flatnonzero(learned & ~np.append(learned[1:], False)) + 1
    inside = ends[ends <= seq_len]
    return Fitted(int(inside[-1]) if len(inside) else 0, len(ends) - len(inside))


@dataclass
class Contents:
    """What a file, or the part of it that was read, comes to in an epoch.

    documents       texts, conversations and other records; of a text file the stretches of its pages
    rows, tokens    sequences that are made of them, and all tokens in these
    learned         of these tokens, those that the loss counts
    longest         tokens of the longest document
    cut             documents cut behind the last answer that ends within a row
    too_long        documents left out, because no answer ends within a row
    nothing         documents left out, because nothing in them is to be learned
    continued       documents of which a rest goes on in another row, where it begins anew
    answers, excluded, rewritten, forged   as in TurnCounts
    answers_beyond  answers that do not end within a row, and so are not learned
    bytes_read, bytes   what was counted, and the size of all
    """

    kinds: list[str] = field(default_factory=list)
    seq_len: int = 0
    documents: int = 0
    rows: int = 0
    tokens: int = 0
    learned: int = 0
    longest: int = 0
    cut: int = 0
    too_long: int = 0
    nothing: int = 0
    continued: int = 0
    answers: int = 0
    answers_beyond: int = 0
    excluded: int = 0
    rewritten: int = 0
    forged: int = 0
    bytes_read: int = 0
    bytes: int = 0
    unused: list[str] = field(default_factory=list)

    def add_document(self, labels: Array, packed: bool) -> None:
        """Count a document by its labels [T]."""
        self.documents += 1
        self.longest = max(self.longest, len(labels))
        if packed:
            return  # where it is cut, only its place among the others tells
        if not (labels[1:] != IGNORED).any():
            self.nothing += 1
        elif (labels != IGNORED).all():
            self.continued += len(labels) > self.seq_len
        else:
            stop, beyond = fitted(labels, self.seq_len)
            self.answers_beyond += beyond
            self.too_long += stop == 0
            self.cut += 0 < stop < len(labels)


# Field, label, whether it stands there even as 0. {n} is the length of a row.
_LINES = (
    ("documents", "documents", True),
    ("rows", "rows of at most {n} tokens", True),
    ("tokens", "tokens in the rows", True),
    ("learned", "learned tokens", True),
    ("longest", "longest document, in tokens", True),
    ("cut", "cut behind the last answer that ends within {n} tokens", False),
    ("too_long", "left out: no answer ends within {n} tokens", False),
    ("nothing", "left out: nothing in them to learn", False),
    ("continued", "go on in another row, beginning anew there", False),
    ("answers", "answers", False),
    ("answers_beyond", "answers not learned: their end is beyond {n} tokens", False),
    ("excluded", "answers not learned: excluded by weight or train", False),
    ("rewritten", "answers not learned: the template rewrites them once more follows", False),
    ("forged", "conversations that spell a control token, taken as plain text", False),
)


def table(sides: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines of a table of contents, a column for each of `sides`: Contents as dicts, by heading."""
    parts = list(sides.values())
    rows = [
        (label.format(n=parts[0]["seq_len"]), [_number(part, name) for part in parts])
        for name, label, always in _LINES
        if always or any(part[name] for part in parts)
    ]
    width = max(len(label) for label, _ in rows)
    columns = [max([len(h), *(len(r[i]) for _, r in rows)]) for i, h in enumerate(sides)]
    lines = [" " * width + _right(list(sides), columns)] if len(sides) > 1 else []
    lines += [f"{label:<{width}}{_right(cells, columns)}" for label, cells in rows]
    return [*lines, *_notes(parts)]


def _number(part: Mapping[str, Any], name: str) -> str:
    """A number of all of the file; where a part of it was counted, about so many by that part."""
    value, read, size = part[name], part["bytes_read"], part["bytes"]
    if not 0 < read < size:
        return f"{value:,}"
    if name == "longest":
        return f"at least {value:,}"
    return f"about {float(f'{value * size / read:.2g}'):,.0f}"


def _right(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def _notes(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    """What no number says."""
    notes = []
    read, size = (sum(part[name] for part in parts) for name in ("bytes_read", "bytes"))
    if read < size:
        notes.append(
            f"about: by {read / 1e6:.1f} MB of {size / 1e6:.1f} MB, spread over the file; "
            "mesp-ref data counts all of it"
        )
    if any(part["cut"] or part["too_long"] for part in parts):
        notes.append(
            f"--seq-len {max(part['longest'] for part in parts)} would hold the longest whole"
        )
    if unused := dict.fromkeys(name for part in parts for name in part["unused"]):
        notes.append(f"fields that nobody reads: {', '.join(unused)}")
    return notes

"""From records to the batches of a run: token ids, labels, rows in a seeded order."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol

import numpy as np

from mesp_ref.errors import MespRefError
from mesp_ref.files.tokenizer import reasons
from mesp_ref.ops import IGNORED, Array
from mesp_ref.train.chat import ChatTemplate
from mesp_ref.train.data import DataFile, cut_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

POOL_BYTES = 1 << 20
PACKINGS = ("auto", "pack", "pad")


class Row(NamedTuple):
    """One sequence: what the model reads, and what it must say (IGNORED where it need not)."""

    ids: Array  # [T] int32
    labels: Array  # [T] int32; labels[t] is predicted from ids[:t], so labels[0] never counts

    @property
    def counted(self) -> int:
        """Number of tokens that the loss counts."""
        return int(np.count_nonzero(self.labels[1:] != IGNORED))


class Cursor(NamedTuple):
    """Where a stream of rows stands: the next row is `row` of pool `pool` in epoch `epoch`."""

    epoch: int = 0
    pool: int = 0
    row: int = 0


class RowSource(Protocol):
    """What the trainer draws from: endless rows, and a cursor that can be set back."""

    cursor: Cursor

    def take(self, count: int) -> list[Row]: ...


@dataclass(frozen=True)
class Encoder:
    """Turns text and records into rows of tokens for one model.

    `eos` closes every record of JSONL `text`; `vocab_size` is what token ids must stay below.
    """

    tokenizer: "Tokenizer | None"
    template: ChatTemplate | None
    eos: int | None
    vocab_size: int

    def text(self, text: str, special: bool = False) -> Array:
        """Token ids of a text, [T] int32."""
        if self.tokenizer is None:
            raise MespRefError(
                "tokenizer: none given, expected one for text; only tokens need none"
            )
        with reasons("tokenizer.json: cannot encode"):
            framed = special and self.tokenizer.num_special_tokens_to_add(False) > 0
            pieces = [text] if framed else cut_text(text)
            parts = [self.tokenizer.encode(p, add_special_tokens=framed).ids for p in pieces]
        ids = np.concatenate([np.array(part, np.int64) for part in parts])
        if ids.size and ids.max() >= self.vocab_size:
            raise MespRefError(
                f"tokenizer.json: found token id {ids.max()}, expected below vocab_size = "
                f"{self.vocab_size} of config.json; this is another model's tokenizer"
            )
        return ids.astype(np.int32)

    def record(self, record: dict[str, Any], where: str) -> Row:
        """One JSONL record as a row of any length. Everything counts, except in `messages`, where
        only what the assistant says does, up to and with the token that ends its turn."""
        if "messages" in record:
            return self._chat(record, where)
        if "tokens" in record:
            ids = np.array(record["tokens"], np.int32)
        else:
            ids = self.text(record["text"], special=True)
            if self.eos is not None and not (ids.size and ids[-1] == self.eos):
                ids = np.append(ids, np.int32(self.eos))
        return Row(ids, ids)

    def _chat(self, record: dict[str, Any], where: str) -> Row:
        if self.template is None:
            raise MespRefError(
                f"{where}: messages: the model has no chat template, expected chat_template in its "
                "tokenizer_config.json; use records with text instead"
            )
        try:
            segments = self.template.segments(record["messages"], record.get("tools"))
        except MespRefError as error:
            raise MespRefError(f"{where}: messages: {error}") from None
        ids, labels = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
        for text, said in segments:
            part = self.text(text)
            target = part.copy() if said else np.full_like(part, IGNORED)
            ends = np.flatnonzero(part == self.eos) if said and self.eos is not None else part[:0]
            if ends.size:
                target[ends[-1] + 1 :] = IGNORED
            ids.append(part)
            labels.append(target)
        return Row(np.concatenate(ids), np.concatenate(labels))


class RowStream:
    """Rows of a file, endlessly, in an order that (seed, cursor) alone decides.

    packing   "pack": documents one after another, cut into rows of seq_len.
              "pad": a document per row; longer ones are cut into several, conversations cut short.
              "auto": pad for conversations, else pack
    shuffle   False for evaluation: pages and rows in the order of the file, every token once.
              True: pages and rows in a seeded order, new in each epoch; the last row of a pool
              reaches back over tokens of the row before, so that it has seq_len tokens too
    """

    def __init__(
        self,
        data: DataFile,
        encoder: Encoder,
        pages: Array,
        *,
        seq_len: int,
        packing: str = "auto",
        seed: int = 0,
        shuffle: bool = True,
    ):
        if packing not in PACKINGS:
            raise MespRefError(f"packing: found {packing!r}, expected one of {', '.join(PACKINGS)}")
        self.data, self.encoder, self.pages = data, encoder, np.asarray(pages)
        self.seq_len, self.seed, self.shuffle = seq_len, seed, shuffle
        self.pack = packing == "pack" or (packing == "auto" and "messages" not in data.kinds)
        self.cursor = Cursor()
        mean = max(data.size // data.pages, 1)
        self._pool_pages = max(POOL_BYTES // mean, 1)
        self.pools = -(-len(self.pages) // self._pool_pages)
        self._documents: list[Row] | None = None
        self._order: tuple[int, Array] = (-1, self.pages)
        self._rows: tuple[tuple[int, int], list[Row]] = ((-1, -1), [])

    def take(self, count: int) -> list[Row]:
        """The next `count` rows; the cursor moves on, into the next epoch where one ends.

        Raises MespRefError when a whole epoch has no row to learn from.
        """
        taken: list[Row] = []
        barren = 0
        while len(taken) < count:
            epoch, pool, start = self.cursor
            rows = self._pool_rows(epoch, pool)
            barren = 0 if rows else barren + 1
            if barren > self.pools:
                self._refuse_barren()
            part = rows[start : start + count - len(taken)]
            taken += part
            if start + len(part) < len(rows):
                self.cursor = Cursor(epoch, pool, start + len(part))
            elif pool + 1 < self.pools:
                self.cursor = Cursor(epoch, pool + 1)
            else:
                self.cursor = Cursor(epoch + 1)
        return taken

    def once(self, limit: int | None = None) -> Iterator[Row]:
        """Rows of a single epoch, from its start, at most `limit`; the cursor stays.

        They are copies: rows of `take` are views that keep their whole pool alive.
        """
        given = 0
        for pool in range(self.pools):
            for row in self._pool_rows(0, pool):
                if given == limit:
                    return
                given += 1
                yield Row(row.ids.copy(), row.labels.copy())

    def require_full_row(self) -> None:
        """Raise MespRefError when packed data has fewer tokens than one sequence."""
        rows = self._pool_rows(0, 0)
        longest = max((len(row.ids) for row in rows), default=0)
        if self.pack and self.pools == 1 and longest < self.seq_len:
            raise MespRefError(
                f"{self.data.path}: found {longest} tokens to train on, expected at least one "
                f"sequence of {self.seq_len}; give more text or a smaller --seq-len"
            )
        if self.pools == 1 and not rows:
            self._refuse_barren()

    def _refuse_barren(self) -> NoReturn:
        raise MespRefError(
            f"{self.data.path}: found no token to learn from in sequences of {self.seq_len}, "
            "expected some; conversations are cut short there: try a larger --seq-len"
        )

    def _pool_rows(self, epoch: int, pool: int) -> list[Row]:
        if self._rows[0] != (epoch, pool):
            self._rows = ((-1, -1), [])  # let the last pool die before the next is made
            self._rows = ((epoch, pool), self._make_rows(epoch, pool))
        return self._rows[1]

    def _make_rows(self, epoch: int, pool: int) -> list[Row]:
        rng = np.random.default_rng([self.seed, 2, epoch, pool])
        documents = self._documents
        if documents is None:
            size = self._pool_pages
            documents = self._read(self._page_order(epoch)[pool * size : (pool + 1) * size])
            if self.pools == 1:  # a small file: tokenise it only once
                self._documents = documents
        if self.shuffle and self.data.jsonl:
            documents = [documents[i] for i in rng.permutation(len(documents))]
        rows = list(self._cut(documents))
        return [rows[i] for i in rng.permutation(len(rows))] if self.shuffle else rows

    def _page_order(self, epoch: int) -> Array:
        if not self.shuffle or self.pools == 1:
            return self.pages
        if self._order[0] != epoch:
            rng = np.random.default_rng([self.seed, 3, epoch])
            self._order = (epoch, rng.permutation(self.pages))
        return self._order[1]

    def _read(self, pages: Array) -> list[Row]:
        """Documents of some pages, tokenised. Text pages that follow each other stay one text;
        where they do not, the first token cannot be foreseen and is not asked for."""
        documents: list[Row] = []
        last = -2
        for page in sorted(int(page) for page in pages):
            if self.data.jsonl:
                for number, record in self.data.records(page):
                    where = f"{self.data.path}: line {number}"
                    documents.append(self.encoder.record(record, where))
                continue
            ids = self.encoder.text(self.data.read(page).decode("utf-8"))
            labels = ids.copy()
            if page != last + 1:
                labels[:1] = IGNORED
            documents.append(Row(ids, labels))
            last = page
        return documents

    def _cut(self, documents: Sequence[Row]) -> Iterator[Row]:
        """Rows of at most seq_len tokens that have something to learn."""
        if self.pack and documents:
            ids, labels = (np.concatenate(part) for part in zip(*documents, strict=True))
            documents = [Row(ids, labels)]
        for document in documents:
            length = len(document.ids)
            chat = not self.pack and bool((document.labels == IGNORED).any())
            for start in range(0, min(length, self.seq_len) if chat else length, self.seq_len):
                if self.pack and self.shuffle:
                    start = max(min(start, length - self.seq_len), 0)
                piece = slice(start, start + self.seq_len)
                row = Row(document.ids[piece], document.labels[piece])
                if row.counted:
                    yield row


def as_batch(rows: Iterable[Row]) -> tuple[Array, Array]:
    """Rows side by side, padded on the right to the longest.

    Shapes    -> input_ids, labels [N,T] int64. Padding has id 0 and label IGNORED: no counted token
              can see it, for attention is causal
    """
    rows = list(rows)
    if not rows:
        raise MespRefError(
            "rows: found none with a token to learn from, expected at least one; conversations are "
            "cut short at --seq-len: try a larger one"
        )
    shape = (len(rows), max(len(row.ids) for row in rows))
    ids, labels = np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = row.ids
        labels[i, : len(row.labels)] = row.labels
    return ids, labels

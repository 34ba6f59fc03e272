"""From records to the batches of a run: token ids, labels, rows in a seeded order."""

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol

import numpy as np

from mesp_ref.errors import MespRefError
from mesp_ref.files.tokenizer import reasons
from mesp_ref.ops import IGNORED, Array
from mesp_ref.train.chat import ChatTemplate, Cut, Span
from mesp_ref.train.contents import Contents, fitted
from mesp_ref.train.data import DataFile, cut_text
from mesp_ref.train.spelling import Control, Speller

if TYPE_CHECKING:
    from tokenizers import Tokenizer

POOL_BYTES = 1 << 20
COUNTED_POOLS = 8  # how much of a file is counted before the first step
PACKINGS = ("auto", "pack", "pad")
_PACKED = ("text", "tokens")  # forms that are packed unless it is said otherwise


class Row(NamedTuple):
    """One sequence: what the model reads, and what it must say (IGNORED where it need not).

    `positions` count each document of a packed row from 0; None where a row is one document.
    """

    ids: Array  # [T] int32
    labels: Array  # [T] int32; labels[t] is predicted from ids[:t], so labels[0] never counts
    positions: Array | None = None  # [T] int32

    @property
    def counted(self) -> int:
        """Number of tokens that the loss counts."""
        return int(np.count_nonzero(self.labels[1:] != IGNORED))


class Documents(NamedTuple):
    """Documents of a pool, each as a row of any length, and the TurnCounts of reading them."""

    rows: list[Row]
    turns: dict[str, int]


class Cursor(NamedTuple):
    """Where a stream of rows stands: the next row is `row` of pool `pool` in epoch `epoch`."""

    epoch: int = 0
    pool: int = 0
    row: int = 0


class RowSource(Protocol):
    """What the trainer draws from: endless rows, and a cursor that can be set back."""

    cursor: Cursor

    def take(self, count: int) -> list[Row]: ...


@dataclass
class TurnCounts:
    """What has been met in conversations so far.

    answers      turns of the assistant in them
    excluded     of these, turns whose `weight` is 0 or whose `train` is false
    rewritten    of these, turns that the template renders otherwise once more follows: not learned
    silent       conversations without a turn to learn
    forged       conversations whose text spells a control token, and is taken by the letter
    """

    conversations: int = 0
    answers: int = 0
    excluded: int = 0
    rewritten: int = 0
    silent: int = 0
    forged: int = 0

    def since(self, before: "TurnCounts") -> dict[str, int]:
        """What has been met after `before`."""
        then = asdict(before)
        return {name: number - then[name] for name, number in asdict(self).items()}

    def told(self) -> str:
        """What is not learned and why, in a line; empty where all is as anybody would expect."""
        notes = [
            f"{number} {what}"
            for number, what in (
                (self.excluded, "answers excluded by weight or train"),
                (self.rewritten, "not learned: the template rewrites them once more follows"),
                (self.silent, "conversations without an answer to learn"),
                (self.forged, "conversations spell a control token, which is taken as plain text"),
            )
            if number
        ]
        if not notes:
            return ""
        read = f"of {self.conversations} read so far, with {self.answers} answers"
        return f"{read}: {'; '.join(notes)}"


@dataclass(frozen=True)
class Encoder:
    """Turns text and records into rows of tokens for one model.

    `ends` are the tokens that end a text; the first of them closes every record of JSONL `text`.
    `vocab_size` is what token ids must stay below. With `special_in_text` the words of a turn may
    make control tokens, as they do in transformers; else they are spelled as any other text.
    `counts` grows with each conversation.
    """

    tokenizer: "Tokenizer | None"
    template: ChatTemplate | None
    ends: Sequence[int]
    vocab_size: int
    special_in_text: bool = False
    counts: TurnCounts = field(default_factory=TurnCounts)

    def text(self, text: str, special: bool = False) -> Array:
        """Token ids of a text, [T] int32."""
        return self._encode(self._tokenizer, text, special)

    @property
    def _tokenizer(self) -> "Tokenizer":
        if self.tokenizer is None:
            raise MespRefError(
                "tokenizer: none given, expected one for text; only tokens need none"
            )
        return self.tokenizer

    @cached_property
    def _speller(self) -> Speller:
        assert self.template is not None
        return Speller(self._tokenizer, self.template)

    def _encode(self, tokenizer: "Tokenizer", text: str, special: bool = False) -> Array:
        with reasons("tokenizer.json: cannot encode"):
            framed = special and tokenizer.num_special_tokens_to_add(False) > 0
            pieces = [text] if framed else cut_text(text)
            return np.concatenate(
                [self._known(tokenizer.encode(p, add_special_tokens=framed).ids) for p in pieces]
            )

    def _known(self, found: list[int]) -> Array:
        """Token ids that the model has, [T] int32."""
        ids = np.array(found, np.int64)
        if ids.size and ids.max() >= self.vocab_size:
            raise MespRefError(
                f"tokenizer.json: found token id {ids.max()}, expected below vocab_size = "
                f"{self.vocab_size} of config.json; this is another model's tokenizer"
            )
        return ids.astype(np.int32)

    def record(self, record: dict[str, Any], where: str) -> Row:
        """A record as a row of any length. Everything counts, except in `messages`, where only what
        the assistant says does, up to and with the token that ends its turn, and in `prompt`.
        A record that has both is a conversation for a model with a chat template."""
        if "messages" in record and (self.template is not None or "prompt" not in record):
            return self._chat(record, where)
        if "tokens" in record:
            ids = np.array(record["tokens"], np.int32)
            return Row(ids, np.array(record.get("labels", ids), np.int32))
        if "prompt" in record:
            asked = self.text(record["prompt"], special=True)
            answer = self._ended(self.text(record["completion"]))
            ids = np.concatenate([asked, answer])
            return Row(ids, np.concatenate([np.full_like(asked, IGNORED), answer]))
        ids = self._ended(self.text(record["text"], special=True))
        return Row(ids, ids)

    def _ended(self, ids: Array) -> Array:
        """With an end token, if the model has one and it is not there."""
        if self.ends and not (ids.size and ids[-1] in self.ends):
            return np.append(ids, np.int32(self.ends[0]))
        return ids

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> Array:
        """Token ids that ask for the next turn of a conversation, [T] int32."""
        assert self.template is not None
        text, data = self.template.asked(messages, tools)
        ids, _ = self._spell(text, data, 0, len(text))
        return ids

    @property
    def turn_ends(self) -> tuple[int, ...]:
        """Every token at which an answer ends: those of texts, and the template's own."""
        end = self._speller.turn_end if self.template and self.tokenizer else None
        return (*self.ends, *([end] if end is not None and end not in self.ends else []))

    def _spell(self, text: str, data: Sequence[Span], start: int, stop: int) -> tuple[Array, bool]:
        """Token ids of a stretch of rendered text, and whether its data spells a control token."""
        piece, speller = text[start:stop], self._speller
        if self.special_in_text:
            return self.text(piece), False
        controls = [
            Control(c.start - start, c.stop - start, c.token)
            for c in speller.controls(text, data, start, stop)
        ]
        return speller.spell(piece, controls, self.text, self._plain)

    def _plain(self, text: str) -> Array:
        return self._encode(self._speller.plain, text)

    def _chat(self, record: dict[str, Any], where: str) -> Row:
        if self.template is None:
            raise MespRefError(
                f"{where}: messages: the model has no chat template, expected chat_template in its "
                "tokenizer_config.json; use records with text instead"
            )
        try:
            cut = self.template.cut(record["messages"], record.get("tools"))
            ids, labels, forged = array("i"), array("i"), False
            for start, stop, said in self._pieces(cut):
                part, made = self._spell(cut.text, cut.data, start, stop)
                ids.frombytes(part.tobytes())
                labels.frombytes((part if said else np.full_like(part, IGNORED)).tobytes())
                forged |= made
        except MespRefError as error:
            raise MespRefError(f"{where}: messages: {error}") from None
        self._count(cut, forged)
        return Row(np.frombuffer(ids, np.int32), np.frombuffer(labels, np.int32))

    def _pieces(self, cut: Cut) -> Iterator[tuple[int, int, bool]]:
        """Stretches of a conversation in order, and whether they are learned."""
        done = 0
        for start, stop, last in cut.learned:
            end = self._speller.end_of_turn(cut.text, cut.data, last, stop)
            if start > done:
                yield done, start, False
            if end > start:
                yield start, end, True
            done = end
        if done < len(cut.text):
            yield done, len(cut.text), False

    def _count(self, cut: Cut, forged: bool) -> None:
        counts = self.counts
        counts.conversations += 1
        counts.answers += cut.answers
        counts.excluded += cut.excluded
        counts.rewritten += cut.rewritten
        counts.silent += not cut.learned
        counts.forged += forged


class RowStream:
    """Rows of a file, endlessly, in an order that (seed, cursor) alone decides.

    packing   "pack": documents one after another, cut into rows of seq_len, where none sees another
              and each begins at position 0; one that is cut begins anew in the next row.
              "pad": a document per row; longer ones are cut into several, those of which only parts
              are learned behind the last part that ends within a row, see `contents.fitted`.
              "auto": pack for texts and tokens, else pad
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
        self.pack = packing == "pack" or (packing == "auto" and not {*data.kinds} - {*_PACKED})
        self.cursor = Cursor()
        mean = max(data.size // data.pages, 1)
        self._pool_pages = max(POOL_BYTES // mean, 1)
        self.pools = -(-len(self.pages) // self._pool_pages)
        self._documents: Documents | None = None
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
                positions = None if row.positions is None else row.positions.copy()
                yield Row(row.ids.copy(), row.labels.copy(), positions)

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

    def contents(self, pools: int | None = COUNTED_POOLS) -> Contents:
        """What the first epoch holds, counted in at most `pools` pools spread over it: some MiB are
        tokenised before the first step, gigabytes are not. None: counted in all of it.
        """
        data, page_bytes = self.data, np.diff(self.data.offsets.astype(np.int64))
        found = Contents(list(data.kinds), self.seq_len, unused=list(data.unused))
        found.bytes = int(page_bytes[self.pages].sum())
        count = self.pools if pools is None else min(pools, self.pools)
        for pool in np.linspace(self.pools - 1, 0, count).round().astype(int).tolist():
            documents, turns = self._pool_documents(0, pool)
            for document in documents:
                found.add_document(document.labels, self.pack)
            rows = self._arranged(documents, 0, pool)
            found.rows += len(rows)
            found.tokens += sum(len(row.ids) for row in rows)
            found.learned += sum(row.counted for row in rows)
            if self.pack:
                sizes = np.array([len(d.ids) for d in documents if len(d.ids)], np.int64)
                last = np.cumsum(sizes) - 1
                first_row, last_row = (last + 1 - sizes) // self.seq_len, last // self.seq_len
                found.continued += int(np.count_nonzero(last_row > first_row))
            for name in ("answers", "excluded", "rewritten", "forged"):
                setattr(found, name, getattr(found, name) + turns[name])
            found.bytes_read += int(page_bytes[self._pool_of(0, pool)].sum())
            self._rows = ((0, pool), rows)
        return found

    def _refuse_barren(self) -> NoReturn:
        found = self.contents()
        told = self.encoder.counts.told()
        raise MespRefError(
            f"{self.data.path}: found no token to learn from in sequences of {self.seq_len}, "
            f"expected some; {found.too_long} of {found.documents} have no answer that ends there, "
            f"the longest has {found.longest} tokens: try a larger --seq-len"
            + (f" ({told})" if told else "")
        )

    def _pool_rows(self, epoch: int, pool: int) -> list[Row]:
        if self._rows[0] != (epoch, pool):
            self._rows = ((-1, -1), [])  # let the last pool die before the next is made
            self._rows = ((epoch, pool), self._make_rows(epoch, pool))
        return self._rows[1]

    def _make_rows(self, epoch: int, pool: int) -> list[Row]:
        return self._arranged(self._pool_documents(epoch, pool).rows, epoch, pool)

    def _pool_of(self, epoch: int, pool: int) -> Array:
        """Numbers of the pages of a pool."""
        size = self._pool_pages
        return self._page_order(epoch)[pool * size : (pool + 1) * size]

    def _pool_documents(self, epoch: int, pool: int) -> "Documents":
        """The documents of a pool, and what was met in them; a small file is tokenised only once."""
        if self._documents is not None:
            return self._documents
        before = replace(self.encoder.counts)
        rows = self._read(self._pool_of(epoch, pool))
        documents = Documents(rows, self.encoder.counts.since(before))
        if self.pools == 1:
            self._documents = documents
        return documents

    def _arranged(self, documents: Sequence[Row], epoch: int, pool: int) -> list[Row]:
        """Rows of a pool in the order of an epoch."""
        rng = np.random.default_rng([self.seed, 2, epoch, pool])
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
        """Documents of some pages, tokenised. Text pages that follow each other are one document;
        those that do not are several, and the first token of each is not asked for."""
        documents: list[Row] = []
        stretch: list[Array] = []
        last = -2
        for page in sorted(int(page) for page in pages):
            if self.data.jsonl:
                for where, record in self.data.records(page):
                    documents.append(self.encoder.record(record, where))
                continue
            if page != last + 1 and stretch:
                documents.append(_joined(stretch))
                stretch = []
            stretch.append(self.encoder.text(self.data.read(page).decode("utf-8")))
            last = page
        return [*documents, _joined(stretch)] if stretch else documents

    def _cut(self, documents: Sequence[Row]) -> Iterator[Row]:
        """Rows of at most seq_len tokens that have something to learn."""
        if self.pack:
            yield from self._packed(documents)
            return
        for document in documents:
            chat, length = bool((document.labels == IGNORED).any()), len(document.ids)
            if chat:
                length = fitted(document.labels, self.seq_len).stop
            for start in range(0, length, self.seq_len):
                piece = slice(start, min(start + self.seq_len, length))
                row = Row(document.ids[piece], document.labels[piece])
                if row.counted:
                    yield row

    def _packed(self, documents: Sequence[Row]) -> Iterator[Row]:
        """Documents one after another, cut every seq_len tokens. None sees another: positions begin
        anew with each, and in each row, and the first token of each is nobody's to foresee."""
        documents = [document for document in documents if len(document.ids)]
        if not documents:
            return
        ids, labels = (np.concatenate([d[part] for d in documents]) for part in (0, 1))
        starts = np.cumsum([0, *(len(d.ids) for d in documents[:-1])])
        labels[starts] = IGNORED
        for start in range(0, len(ids), self.seq_len):
            if self.shuffle:
                start = max(min(start, len(ids) - self.seq_len), 0)
            stop = min(start + self.seq_len, len(ids))
            inside = starts[np.searchsorted(starts, start, "right") : np.searchsorted(starts, stop)]
            row = Row(ids[start:stop], labels[start:stop], _positions(stop - start, inside - start))
            if row.counted:
                yield row


def _joined(stretch: Sequence[Array]) -> Row:
    ids = np.concatenate(stretch)
    return Row(ids, ids)


def _positions(length: int, starts: Array) -> Array | None:
    """Positions of a row in which documents begin at `starts`, and at 0: [T] int32, or None."""
    if not len(starts):
        return None
    begins = np.zeros(length, np.int32)
    begins[starts] = starts
    return np.arange(length, dtype=np.int32) - np.maximum.accumulate(begins)


class Batch(NamedTuple):
    """Rows side by side: [N,T] int64 each. `positions` is None where no row is packed."""

    ids: Array
    labels: Array
    positions: Array | None


def as_batch(rows: Iterable[Row]) -> Batch:
    """Rows side by side, padded on the right to the longest.

    Padding has id 0 and label IGNORED, and is a document of its own in packed rows: no counted token
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
    positions = np.tile(np.arange(shape[1]), (shape[0], 1))
    for i, row in enumerate(rows):
        length = len(row.ids)
        ids[i, :length], labels[i, :length] = row.ids, row.labels
        if row.positions is not None:
            positions[i, :length] = row.positions
            positions[i, length:] = np.arange(shape[1] - length)
    packed = any(row.positions is not None for row in rows)
    return Batch(ids, labels, positions if packed else None)

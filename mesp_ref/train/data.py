"""Training data of any size: pages of a file, tokenised when their turn comes.

A file is read through once, in bounded pieces, to check it (UTF-8, JSON, fields, line by line), to
hash it and to cut it into pages: stretches of some KiB that end between two words of a text, or
between two lines of JSON. Only the offsets of the pages stay in memory: 8 bytes for every 32 KiB of
text. An epoch visits the pages in a seeded order, a pool of about 1 MiB at a time; a pool is
tokenised, cut into rows, and its rows are shuffled. Files up to 1 MiB are one pool, so their
shuffle is perfectly uniform; larger ones mix some dozens of places per pool.

Why not tokenise the whole file first, into a mapped array: a 10 GB text would need another 10 GB of
disk and about an hour before the first step, of which a run of some hundred steps uses a
thousandth. The order is a function of (seed, epoch, pool, row) alone: a `Cursor` of three numbers
resumes it.
"""

import codecs
import hashlib
import os
import re
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mesp_ref.errors import MespRefError, shown
from mesp_ref.files.shards import shards
from mesp_ref.files.strict import open_regular, parse_json
from mesp_ref.ops import IGNORED, Array
from mesp_ref.train.chat import FIELDS, ROLES
from mesp_ref.train.forms import FORMS, turned
from mesp_ref.train.sources import (
    BOM,
    FORMATS,
    LINE_LIMIT,
    READ_BYTES,
    Held,
    converted,
    peek,
    recognised,
    unpacked,
)

_PAGE_BYTES = 1 << 15
_CUT_WINDOW = 4096
_UNUSED = 20  # names of fields that are kept to be told
# Before a single space, or after a single newline, between two characters that are not space: no
# byte-level BPE of the GPT-2 and Qwen families joins characters across such a place.
_SAFE = r"(?<=\S)(?= \S)|(?<=\S\n)(?=\S)"
_SAFE_CUT, _SAFE_CUT_TEXT = re.compile(_SAFE.encode()), re.compile(_SAFE)


@dataclass(frozen=True)
class DataFile:
    """A checked file and its pages. `offsets[i]` to `offsets[i+1]` are the bytes of page i.

    `held` has them where the file was unpacked or converted: a temporary file without a name.
    """

    path: Path
    jsonl: bool
    offsets: Array  # [P+1] uint64
    first_lines: Array  # [P] uint64: number of the first line of each page; empty for text
    kinds: tuple[str, ...]  # forms of record met, by the names of FORMS
    sha256: str
    size: int
    written: int  # st_mtime_ns when the file was checked
    format: str = "text"  # as `sources.recognised` names it
    unused: tuple[str, ...] = ()  # fields of records that nobody reads
    held: Held | None = None
    shards: tuple["DataFile", ...] = ()  # whose pages these are, one after the other

    @property
    def pages(self) -> int:
        return len(self.offsets) - 1

    def read(self, page: int) -> bytes:
        """The bytes of one page."""
        if self.shards:
            shard, page = self._shard(page)
            return shard.read(page)
        start, stop = int(self.offsets[page]), int(self.offsets[page + 1])
        if self.held is not None:
            return self.held.read(start, stop - start)
        try:
            with open_regular(self.path) as file:
                status = os.fstat(file.fileno())
                file.seek(start)
                data = file.read(stop - start)
        except OSError as error:
            raise MespRefError(f"{self.path}: cannot be read: {error.strerror}") from None
        if (status.st_size, status.st_mtime_ns) != (self.size, self.written):
            raise MespRefError(
                f"{self.path}: found another size or time than before; it changed while in use"
            )
        return data

    def records(self, page: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every record of a page of records, as `forms.turned` makes it, and where it stands."""
        if self.shards:
            shard, page = self._shard(page)
            yield from shard.records(page)
            return
        first = int(self.first_lines[page])
        for number, line in enumerate(self.read(page).split(b"\n"), first):
            if line.strip():
                where = _place(self.path, self.format, number)
                yield where, turned(parse_json(line), where).value

    def _shard(self, page: int) -> tuple["DataFile", int]:
        """The shard that a page is of, and which of its pages it is."""
        for shard in self.shards:
            if page < shard.pages:
                return shard, page
            page -= shard.pages
        raise IndexError(page)


def open_data(
    path: str | Path, *, seq_len: int = 512, form: str = "auto", vocab_size: int | None = None
) -> DataFile:
    """Check a data file and cut it into pages; nothing is tokenised yet.

    path      a file; a data set's directory of `save_to_disk`; or shards by one name with a star
              for their numbers, train-*-of-00003.parquet, which are read in order
    Forms     "text": UTF-8. "jsonl": an object per line. "json": a list of objects. "csv", "tsv":
              named columns. "auto": what the content is, Parquet, Arrow, a data set's directory of
              `save_to_disk` and gzip of any file included. Records: see `forms`
    Memory    one piece of 1 MiB, or the longest record; what stays is 8 bytes (16 for records) per
              page. What is neither text nor JSONL is written once to a temporary file
    Raises    MespRefError naming file, line and field of the first thing that is wrong
    """
    path = Path(path)
    if form not in FORMATS:
        raise MespRefError(f"format: found {form!r}, expected one of {', '.join(FORMATS)}")
    if "*" in path.name and not path.exists():
        return _joined(path, [
            open_data(shard, seq_len=seq_len, form=form, vocab_size=vocab_size)
            for shard in shards(path)
        ])  # fmt: skip
    if not path.exists():
        raise MespRefError(f"{path}: not found, expected a file of texts or records")
    if path.is_dir() and any((path / n).is_file() for n in ("state.json", "dataset_dict.json")):
        with converted(path, None, "arrow") as room:
            return replace(_scan_lines(path, room, vocab_size, "arrow"), held=Held(room))
    if not path.is_file():
        raise MespRefError(
            f"{path}: not a regular file, nor a data set's directory (with state.json), expected "
            "one of them"
        )
    try:
        with open_regular(path) as file:
            return _open_file(path, file, seq_len, form, vocab_size)
    except OSError as error:
        raise MespRefError(f"{path}: cannot be read: {error.strerror}") from None


def _joined(path: Path, parts: list[DataFile]) -> DataFile:
    """Shards as one file of all their pages; its hash is that of their hashes."""
    forms = sorted({part.format for part in parts})
    if len(forms) > 1:
        raise MespRefError(f"{path}: found shards of {' and '.join(forms)}, expected one format")
    ends = np.cumsum([0, *(part.offsets[-1] for part in parts)], dtype=np.uint64)
    offsets = [part.offsets[1:] + end for part, end in zip(parts, ends[:-1], strict=True)]
    return DataFile(
        path=path, jsonl=parts[0].jsonl, offsets=np.concatenate([ends[:1], *offsets]),
        first_lines=np.concatenate([part.first_lines for part in parts]),
        kinds=tuple(sorted({kind for part in parts for kind in part.kinds})),
        sha256=hashlib.sha256("".join(part.sha256 for part in parts).encode()).hexdigest(),
        size=sum(part.size for part in parts), written=max(part.written for part in parts),
        format=forms[0], unused=tuple(dict.fromkeys(n for part in parts for n in part.unused)),
        shards=tuple(parts),
    )  # fmt: skip


def _open_file(
    path: Path, file: BinaryIO, seq_len: int, form: str, vocab_size: int | None
) -> DataFile:
    head, whole = peek(file)
    given = file
    with ExitStack() as stack:
        if head.startswith(b"\x1f\x8b"):
            file = stack.enter_context(unpacked(path, file))
            head, whole = peek(file)
        if form == "auto":
            form = recognised(path, head, whole)
        if form == "text":
            data = _scan_text(path, file, seq_len)
        else:
            if form != "jsonl":
                file = stack.enter_context(converted(path, file, form))
            data = _scan_lines(path, file, vocab_size, form)
        return data if file is given else replace(data, held=Held(file))


def _place(path: Path, form: str, number: int) -> str:
    return f"{path}: {'line' if form == 'jsonl' else 'record'} {number}"


def _scan_text(path: Path, file: BinaryIO, seq_len: int) -> DataFile:
    """One pass: hash, UTF-8, anything but space; then the cuts."""
    digest, decoder = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")()
    position, blank = 0, True
    while piece := file.read(READ_BYTES):
        digest.update(piece)
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(piece)
        except UnicodeDecodeError as error:
            place = position - pending + error.start
            raise MespRefError(
                f"{path}: byte {place}: found 0x{error.object[error.start]:02x}, expected UTF-8 "
                "text; convert the file first"
            ) from None
        blank = blank and not text.strip("\ufeff \t\r\n")
        position += len(piece)
    if decoder.getstate()[0]:
        raise MespRefError(f"{path}: byte {position}: found the end inside a character; truncated?")
    if blank:
        raise MespRefError(f"{path}: empty, expected text to train on")
    page = min(max(position // 256, 8 * seq_len), _PAGE_BYTES)
    offsets = _text_cuts(file, position, page)
    none = np.zeros(0, np.uint64)
    written = os.fstat(file.fileno()).st_mtime_ns
    return DataFile(path, False, offsets, none, ("text",), digest.hexdigest(), position, written)


def _text_cuts(file: BinaryIO, size: int, page: int) -> Array:
    """Offsets of about one cut every `page` bytes, each between two words where there are words."""
    file.seek(0)
    start = len(BOM) if file.read(len(BOM)) == BOM else 0
    cuts = array("Q", [start])
    # A rest of less than half a page joins the page before it.
    for target in range(start + page, size - page // 2, page):
        file.seek(target)
        cut = target + _cut_in(file.read(_CUT_WINDOW))
        if cuts[-1] < cut < size:
            cuts.append(cut)
    cuts.append(size)
    return np.array(cuts)


def _cut_in(window: bytes) -> int:
    """Where to cut: a safe place, else after a newline, else between two characters."""
    if found := _SAFE_CUT.search(window):
        return found.start()
    if (newline := window.find(b"\n")) >= 0:
        return newline + 1
    return next((i for i, byte in enumerate(window) if byte & 0xC0 != 0x80), 0)


def cut_text(text: str) -> list[str]:
    """A text in pieces of some thousand characters, cut where pages are.

    A tokenizer works in a hundred times the memory of its input, so it gets a little at a time.
    """
    pieces, start = [], 0
    while len(text) - start > 2 * _CUT_WINDOW:
        begin = start + _CUT_WINDOW
        found = _SAFE_CUT_TEXT.search(text, begin, begin + _CUT_WINDOW)
        stop = found.start() if found else begin + _CUT_WINDOW
        pieces.append(text[start:stop])
        start = stop
    return [*pieces, text[start:]]


def _scan_lines(path: Path, file: BinaryIO, vocab_size: int | None, form: str) -> DataFile:
    """One pass over the lines: hash, every record checked, pages cut between records."""
    size = os.fstat(file.fileno()).st_size
    page_bytes = min(max(size // 1024, 1), _PAGE_BYTES // 2)
    digest, kinds, unused = hashlib.sha256(), set(), dict[str, None]()
    offsets, first_lines = array("Q"), array("Q")
    position, number, page_start = 0, 0, -page_bytes
    while line := file.readline(LINE_LIMIT):
        number += 1
        digest.update(line)
        where = _place(path, form, number)
        if len(line) == LINE_LIMIT:
            raise MespRefError(f"{where}: longer than {LINE_LIMIT} bytes, expected JSONL")
        begin = position + (len(BOM) if number == 1 and line.startswith(BOM) else 0)
        position += len(line)
        content = line.removeprefix(BOM) if number == 1 else line
        if not content.strip():
            continue
        kind, fields = _check_record(content, where, vocab_size)
        kinds.add(kind)
        if len(unused) < _UNUSED:
            unused |= dict.fromkeys(fields[:_UNUSED])
        if begin - page_start >= page_bytes:
            offsets.append(begin)
            first_lines.append(number)
            page_start = begin
    if not kinds:
        raise MespRefError(f"{path}: empty, expected records: a JSON object per line, or rows")
    offsets.append(position)
    return DataFile(
        path, True, np.array(offsets), np.array(first_lines), tuple(k for k in FORMS if k in kinds),
        digest.hexdigest(), position, os.fstat(file.fileno()).st_mtime_ns, form, tuple(unused),
    )  # fmt: skip


def _check_record(line: bytes, where: str, vocab_size: int | None) -> tuple[str, tuple[str, ...]]:
    """Form of a record and its unused fields; MespRefError for a line that is not one."""
    try:
        record = parse_json(line)
    except UnicodeDecodeError as error:
        raise MespRefError(
            f"{where}: byte {error.start}: not UTF-8; convert the file first"
        ) from None
    except ValueError as error:
        open_end = line.rstrip().endswith((b"{", b"[", b","))
        found = (
            "found an object that goes on in the next line" if open_end else f"not JSON ({error})"
        )
        raise MespRefError(
            f"{where}: {found}, expected one object per line, or one list of objects"
        ) from None
    form, value, unused = turned(record, where)
    if "messages" in value:
        _check_messages(value["messages"], where)
    if "tokens" in value:
        _check_tokens(value["tokens"], f"{where}: {form}", vocab_size)
        learned = [i for i in value.get("labels", ()) if i != IGNORED]
        _check_tokens(learned, f"{where}: labels", vocab_size)
    return form, unused


def _check_messages(messages: Any, where: str) -> None:
    """Turns with a known role and known fields, whose words are text."""
    if not isinstance(messages, list) or not messages:
        raise MespRefError(f"{where}: messages: found {shown(messages)}, expected a list of turns")
    for i, message in enumerate(messages, 1):
        place = f"{where}: messages: turn {i}"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise MespRefError(
                f"{place}: expected an object with role and content, found {shown(message)}"
            )
        if message["role"] not in ROLES:
            raise MespRefError(
                f"{place}: role: found {shown(message['role'])}, expected one of {', '.join(ROLES)}"
            )
        for field, value in message.items():
            if field not in FIELDS and value is not None:
                raise MespRefError(
                    f"{place}: found field {shown(field)}, expected only {', '.join(FIELDS)}; "
                    "leave it out"
                )
        _check_content(message, place)
        _check_switches(message, place)


def _check_content(message: dict[str, Any], place: str) -> None:
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise MespRefError(f"{place}: content: missing, expected a string")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise MespRefError(
                f"{place}: content: found {shown(content)}, expected a string, or a list of "
                'objects {"type": "text", "text": …}'
            )


def _check_switches(message: dict[str, Any], place: str) -> None:
    """`weight` 0 or 1 and `train` true or false, which only say of an answer that it is learned."""
    answer = message["role"] == "assistant"
    for field, allowed in (("weight", (0, 1)), ("train", (False, True))):
        value = message.get(field)
        if value is None:
            continue
        if type(value) not in {int: (int, float), bool: (bool,)}[type(allowed[0])] or (
            value not in allowed
        ):
            raise MespRefError(
                f"{place}: {field}: found {shown(value)}, expected "
                + ("0 or 1" if field == "weight" else "true or false")
            )
        if value and not answer:
            raise MespRefError(
                f"{place}: {field}: found {shown(value)} on a turn of role {message['role']}, "
                "expected it on turns of the assistant, which alone are learned; leave it out"
            )


def _check_tokens(tokens: Any, where: str, vocab_size: int | None) -> None:
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise MespRefError(f"{where}: found {shown(tokens)}, expected a list of integers")
    limit = vocab_size or np.iinfo(np.int32).max
    for token in tokens:
        if not 0 <= token < limit:
            raise MespRefError(f"{where}: found {token}, expected 0 to {limit - 1}")


def split_pages(pages: int, fraction: float, seed: int) -> tuple[Array, Array]:
    """Page numbers to train on and to hold out: a seeded choice of round(fraction·pages) pages.

    At least one page is held out when fraction > 0 and there are two pages or more; a file of a
    single page keeps it for training.
    """
    if not 0 <= fraction < 1:
        raise MespRefError(f"val-fraction: found {fraction}, expected at least 0 and below 1")
    count = min(max(round(fraction * pages), 1), pages - 1) if fraction else 0
    order = np.random.default_rng([seed, 1]).permutation(pages)
    return np.sort(order[count:]), np.sort(order[:count])

"""Data files of other kinds, written once as JSON lines to an unnamed temporary file.

A file is recognised by what is in it; its name only decides where that can be read in two ways.
Memory is bounded: by a record, a thousand rows of Arrow, or a row group of Parquet.
"""

import codecs
import csv
import gzip
import io
import json
import os
import re
import tempfile
import weakref
import zlib
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from mesp_ref.errors import MespRefError, shown
from mesp_ref.files.strict import inside, parse_json, read_bytes
from mesp_ref.lean.pread import read_at
from mesp_ref.train.forms import FORMS, KNOWN, turned

LINE_LIMIT = 1 << 26  # bytes of a record
READ_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"
FORMATS = ("auto", "text", "jsonl", "json", "csv", "tsv")
_HEAD = 1 << 16
_BATCH = 512  # rows of a table that are objects at once
_JSON_NAMES = (".jsonl", ".ndjson", ".json")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OBJECT, _ARRAY = re.compile(rb'\{\s*"(?:[^"\\\n]|\\.)*"\s*:'), re.compile(rb"\[\s*(\{|\]\s*$)")
_ARROW_MAGIC = (b"ARROW1", b"\xff\xff\xff\xff")
_FOREIGN = {
    b"PK\x03\x04": "a ZIP archive (.zip, .docx, .xlsx, .npz)", b"%PDF": "a PDF",
    b"\x28\xb5\x2f\xfd": "Zstandard", b"BZh": "bzip2", b"\xfd7zXZ": "XZ",
    b"SQLite format 3": "an SQLite database", b"\x93NUMPY": "a NumPy array",
    b"\xff\xfe": "UTF-16 text", b"\xfe\xff": "UTF-16 text",
}  # fmt: skip


class Held:
    """A temporary file without a name, read at any place; it goes with the last who holds this."""

    def __init__(self, file: BinaryIO):
        self._file = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._file)

    def read(self, start: int, size: int) -> bytes:
        """`size` bytes from `start`."""
        return read_at(self._file, size, start)


def recognised(path: Path, head: bytes, whole: bool) -> str:
    """What a file is: text, jsonl, json (an array), csv, tsv, parquet or arrow.

    `head` is its beginning, all of it if `whole`. Raises MespRefError for what is known and foreign.
    """
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(_ARROW_MAGIC):
        return "arrow"
    for magic, name in _FOREIGN.items():
        if head.startswith(magic):
            raise MespRefError(
                f"{path}: found {name}, expected text, JSON, CSV, Parquet, Arrow or gzip of these; "
                "convert it first"
            )
    suffixes = [s.lower() for s in path.suffixes if s.lower() != ".gz"]
    suffix = suffixes[-1] if suffixes else ""
    if suffix in (".parquet", ".arrow"):
        raise MespRefError(f"{path}: found no {suffix[1:]} file, expected one by its name")
    text = head.removeprefix(BOM).lstrip()
    if _ARRAY.match(text):
        return "json"
    if _OBJECT.match(text) or suffix in _JSON_NAMES:
        return "json" if text[:1] == b"[" else "jsonl"
    if suffix in (".csv", ".tsv"):
        return suffix[1:]
    return _table(text, whole) or "text"


def _table(text: bytes, whole: bool) -> str | None:
    """csv or tsv for a text whose first lines are one beyond doubt: a line of bare names, and then
    as many fields in every line."""
    lines = text.decode("utf-8", "replace").splitlines()
    for form, delimiter in (("csv", ","), ("tsv", "\t")):
        names = lines[0].split(delimiter) if lines else []
        if len(names) < 2 or not all(map(_NAME.fullmatch, names)):
            continue
        if any(set(known.needs) <= set(names) for known in FORMS.values()):
            return form
        try:
            rows = [row for row in csv.reader(lines[1 : None if whole else -1]) if row]
        except csv.Error:
            continue
        if delimiter == "\t":
            rows = [line.split("\t") for line in lines[1 : None if whole else -1] if line]
        if len(rows) >= 2 and all(len(row) == len(names) for row in rows):
            return form
    return None


def peek(file: BinaryIO) -> tuple[bytes, bool]:
    """The beginning of a file, and whether that is all of it. The file stands at 0 again."""
    head = file.read(_HEAD + 1)
    file.seek(0)
    return head[:_HEAD], len(head) <= _HEAD


@contextmanager
def _room(path: Path) -> Iterator[BinaryIO]:
    """A temporary file without a name; what cannot be written there is told as such."""
    with ExitStack() as stack:
        try:
            file = cast(BinaryIO, stack.enter_context(tempfile.TemporaryFile()))
            yield file
            file.flush()
        except OSError as error:
            raise MespRefError(
                f"{path}: cannot be unpacked into {tempfile.gettempdir()}: "
                f"{error.strerror or error}; set TMPDIR to a place with room"
            ) from None
        file.seek(0)
        stack.pop_all()


def unpacked(path: Path, file: BinaryIO) -> BinaryIO:
    """The content of a gzip file, in a temporary file."""
    with _room(path) as room, gzip.open(file) as packed:
        try:
            while piece := packed.read(READ_BYTES):
                room.write(piece)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise MespRefError(f"{path}: broken gzip file: {error}; truncated?") from None
    return room


def converted(path: Path, file: BinaryIO | None, form: str) -> BinaryIO:
    """A file of another kind as JSON lines, one to a record, in a temporary file."""
    lines: Generator[str, None, None]
    if form in ("csv", "tsv"):
        lines = _csv(path, cast(BinaryIO, file), form)
    elif form == "json":
        lines = iter(_Array(path, cast(BinaryIO, file)))
    else:
        lines = _arrow(path, file, form)
    with _room(path) as room, closing(lines):
        for number, line in enumerate(lines):
            if number == 0:  # what is of no form is refused before gigabytes are written
                turned(_parsed(line, path), f"{path}: record 1")
            room.write(line.encode("utf-8") + b"\n")
    return room


def _parsed(line: str, path: Path) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        raise MespRefError(f"{path}: record 1: not JSON ({error})") from None


class _Array:
    """The values of a JSON array, one at a time, each as it is written but in one line."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file = path, file
        self.utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.piece, self.count = "", 0, READ_BYTES, 0

    def __iter__(self) -> Generator[str, None, None]:
        self._skip("[")
        if self._next() == "]":
            return
        while True:
            yield self._value()
            self.count += 1
            if self._next() == "]":
                break
            self._skip(",")
        self._skip("]")
        if self._next():
            self._refuse("more follows the end of the list")

    def _refuse(self, reason: object) -> NoReturn:
        raise MespRefError(
            f"{self.path}: record {self.count + 1}: not JSON ({reason}), expected a list of objects"
        )

    def _more(self) -> bool:
        """Read on; False at the end of the file."""
        data = self.file.read(self.piece)
        try:
            self.text = self.text[self.at :] + self.utf8.decode(data, final=not data)
        except UnicodeDecodeError:
            self._refuse("not UTF-8; convert the file first")
        self.at = 0
        return bool(data)

    def _next(self) -> str:
        """The next character that is no space; empty at the end of the file."""
        while True:
            while self.text[self.at : self.at + 1] in (" ", "\t", "\r", "\n"):
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def _skip(self, mark: str) -> None:
        if (found := self._next()) != mark:
            self._refuse(f"expected {mark!r}, found {found!r}" if found else "truncated")
        self.at += 1

    def _value(self) -> str:
        self._next()
        self.piece = READ_BYTES
        while True:
            try:
                _, stop = json.JSONDecoder().raw_decode(self.text, self.at)
                break
            except RecursionError:
                self._refuse("nested too deeply")
            except ValueError as error:  # it may only be cut
                if len(self.text) - self.at > LINE_LIMIT or not self._more():
                    self._refuse(error)
                self.piece *= 2
        value = self.text[self.at : stop]
        self.at = stop
        return value.replace("\r", " ").replace("\n", " ")  # no string of JSON holds one


def _csv(path: Path, file: BinaryIO, form: str) -> Generator[str, None, None]:
    """Rows of a table as objects by the names of its first line."""
    csv.field_size_limit(LINE_LIMIT)
    first = file.readline(_HEAD).decode("utf-8", "replace")
    file.seek(0)
    delimiter = "\t" if form == "tsv" else max(",;\t", key=first.count)
    text = io.TextIOWrapper(file, "utf-8-sig", newline="")
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        names = next(rows, [])
        if len(set(names)) != len(names):
            raise MespRefError(f"{path}: line 1: found a column twice, expected names that differ")
        for row in rows:
            if len(row) == len(names):
                yield json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False)
            elif row:
                raise MespRefError(
                    f"{path}: line {rows.line_num}: found {len(row)} fields, expected {len(names)} "
                    "as in its first line; --format text takes a text as it is"
                )
    except (csv.Error, UnicodeDecodeError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else error
        raise MespRefError(
            f"{path}: line {rows.line_num + 1}: {reason}, expected {form.upper()}; --format text "
            "takes a text as it is"
        ) from None
    finally:
        text.detach()


def _arrow(path: Path, file: BinaryIO | None, form: str) -> Generator[str, None, None]:
    """Rows of Parquet or Arrow; columns that nobody reads are named, and not read."""
    try:
        import pyarrow
    except ImportError:
        raise MespRefError(
            f"{path}: found {form.capitalize()}, which needs pyarrow; pip install 'mesp-ref[data]'"
        ) from None
    number = 0
    try:
        files = [path / name for name in _dataset_files(path)] if file is None else [path]
        for part in files:
            with part.open("rb") if file is None else nullcontext(file) as opened:
                for record in _rows(pyarrow, path, opened, form):
                    number += 1
                    yield json.dumps(_filled(record), ensure_ascii=False)
    except MespRefError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200] or "lengths beyond all memory"
        raise MespRefError(f"{path}: record {number + 1}: not readable: {reason}") from None
    except TypeError as error:
        raise MespRefError(
            f"{path}: record {number}: {error}, expected strings, numbers and lists"
        ) from None


def _rows(pyarrow: Any, path: Path, file: Any, form: str) -> Iterator[dict[str, Any]]:
    if form == "parquet":
        from pyarrow.parquet import ParquetFile

        table = ParquetFile(file)
        schema, batches = table.schema_arrow, None
    elif file.read(6) == b"ARROW1":
        table = pyarrow.ipc.open_file(file)
        schema = table.schema
        batches = (table.get_batch(i) for i in range(table.num_record_batches))
    else:
        file.seek(0)
        batches = pyarrow.ipc.open_stream(file)
        schema = batches.schema
    used = [n for n in schema.names if n in KNOWN or _says_good(pyarrow, schema, n)]
    if len(set(schema.names)) != len(schema.names):
        raise MespRefError(f"{path}: found a column twice, expected names that differ")
    rest = dict.fromkeys(n for n in schema.names if n not in used)
    if not used:
        turned(rest, f"{path}: record 1")
    for batch in table.iter_batches(_BATCH, columns=used) if batches is None else batches:
        batch.validate(full=True)  # offsets in a damaged file lead anywhere in memory
        for start in range(0, batch.num_rows, _BATCH):
            for row in batch.select(used).slice(start, _BATCH).to_pylist():
                yield row | rest


def _says_good(pyarrow: Any, schema: Any, name: str) -> bool:
    return name == "label" and bool(pyarrow.types.is_boolean(schema.field(name).type))


def _filled(value: Any) -> Any:
    """Without the fields of a struct that are null: a column's structs have all fields."""
    if isinstance(value, list):
        return [
            {k: _filled(v) for k, v in item.items() if v is not None}
            if isinstance(item, dict)
            else _filled(item)
            for item in value
        ]
    if isinstance(value, dict):
        return {name: _filled(item) for name, item in value.items()}
    return value


def _dataset_files(directory: Path) -> list[str]:
    """Names of the Arrow files of a data set that `save_to_disk` wrote, in its order."""
    splits = directory / "dataset_dict.json"
    if splits.is_file():
        names = _json(splits).get("splits")
        raise MespRefError(
            f"{directory}: found the splits {shown(names)}, expected one of them: give its "
            "directory, and another as --val-data"
        )
    state = _json(directory / "state.json")
    if state.get("_indices_data_files"):
        raise MespRefError(f"{directory}: found indices, expected a data set saved without")
    files = state.get("_data_files")
    names = [f.get("filename") for f in files if isinstance(f, dict)] if files else []
    if not names or not all(isinstance(name, str) for name in names):
        raise MespRefError(
            f"{directory}: state.json: _data_files: found {shown(files)}, expected names of files"
        )
    return [str(inside(directory, name).relative_to(directory)) for name in names]


def _json(file: Path) -> dict[str, Any]:
    try:
        value = parse_json(read_bytes(file))
    except (OSError, ValueError) as error:
        raise MespRefError(f"{file}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise MespRefError(f"{file}: found {shown(value)}, expected an object")
    return value

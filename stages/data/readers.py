"""How a file becomes rows or text: its format by name and content, what gzip or Zstandard packed unpacked.

    .jsonl .ndjson   a line is a row
    .json            an array of rows, one object, or objects one after another
    .csv .tsv        a line is a row, the first names the fields; a .csv may have semicolons, as Excel writes it
    .parquet         a row is a row
    anything else    UTF-8 text; refused when it begins as JSON does

Each may also be packed (.gz, .zst); that, and Parquet, are known by their first bytes, whatever the name says. A
byte-order mark is dropped, and text that begins with the one of UTF-16 or UTF-32 is decoded as such.
"""

import codecs
import contextlib
import csv
import gzip
import io
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from stages.files.artifacts import Refusal

BLOCK = 1 << 20  # bytes or characters, read at once
HEAD_BYTES = 1 << 16  # of a file, by which its format and encoding are known
LONG_TEXT_BYTES = 1 << 18
PIECE_CHARACTERS = 1 << 14
PIECES_OF_A_SHORT_TEXT = LONG_TEXT_BYTES // PIECE_CHARACTERS  # so that both kinds of cut agree at that length
LEAST_PIECE_CHARACTERS = 1 << 10
SUFFIXES = {".jsonl": "lines", ".ndjson": "lines", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
PACKED_SUFFIXES = (".gz", ".zst")
GZIP, ZSTANDARD, PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
ENCODINGS = {  # by byte-order mark; that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
JSON_ROW = re.compile(r'\s*(?:\[\s*)?(?=\{\s*"(?:[^"\\]|\\.)*"\s*:)')  # up to an object with a first key

Row = tuple[str, Any]  # where it stands, for a message; what it is


class Undecodable(Refusal):
    """Bytes that are no text: the setting corpus.undecodable can skip such a file."""


@dataclass(frozen=True)
class TextFile:
    """A file of the corpus, as its name and its first bytes present it."""

    path: Path
    format: str  # a value of SUFFIXES, or "text"
    encoding: str

    def __str__(self) -> str:
        return readable(self.path)


def readable(path: str | Path) -> str:
    """The path as text that can be printed and written, also where its bytes are not UTF-8: caf\\xe9.txt."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def look_at(path: Path) -> TextFile:
    """What is in the file; structured data under the name of a text is refused, as are bytes that are no text."""
    with unpacked(path) as stream:
        head = stream.read(HEAD_BYTES)
    if head.startswith(PARQUET):
        return TextFile(path, "parquet", "")
    encoding = next((name for mark, name in ENCODINGS.items() if head.startswith(mark)), "utf-8")
    file = TextFile(path, SUFFIXES.get(_suffix(path), "text"), encoding)
    if encoding == "utf-8" and head.count(0) * 3 > len(head):
        raise Undecodable(f"{file}: byte {head.index(0)} is NUL: it is binary, or UTF-16 without a mark; {CURE}")
    if file.format == "text" and _begins_as_json(head.decode(encoding, "ignore"), whole=len(head) < HEAD_BYTES):
        raise Refusal(
            f"{file} holds JSON, not plain text: rename it to .jsonl (a line is a row) or .json (an array, an object), "
            "so that its rows are read, or leave it out of corpus.paths"
        )
    return file


CURE = "convert the file to UTF-8, or skip such files with corpus.undecodable=skip"


def _suffix(path: Path) -> str:
    *_, before, last = ["", *path.suffixes] if path.suffixes else ["", ""]
    return (before if last.lower() in PACKED_SUFFIXES else last).lower()


def _begins_as_json(head: str, whole: bool) -> bool:
    """Whether the text begins with an object, or an array of them, and what follows is no prose."""
    row = JSON_ROW.match(head)
    if not row:
        return False
    try:
        _, end = json.JSONDecoder().raw_decode(head, row.end())
    except (ValueError, RecursionError):
        return not whole  # an object longer than the head
    return head[end:].lstrip()[:1] in ("", "{", ",", "]")


# ---- bytes and characters


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[IO[bytes]]:
    """The content of the file as a stream; damage and what cannot be read become one line."""
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
            file.seek(0)
            if magic.startswith(GZIP):
                yield gzip.open(file)  # type: ignore[misc]
            elif magic == ZSTANDARD:
                yield io.BufferedReader(ZstandardStream(file, path))
            else:
                yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Refusal(f"{readable(path)} cannot be unpacked ({error}): it is damaged or cut short") from None
    except OSError as error:
        reason = error.strerror or error
        raise Refusal(f"{readable(path)} cannot be read ({reason}): correct that, or leave it out") from None


class ZstandardStream(io.RawIOBase):
    """The content of a Zstandard file of one frame or several. The library's own stream ends without an error where
    a file was cut short."""

    def __init__(self, file: IO[bytes], path: Path):
        try:
            import zstandard
        except ImportError:
            raise Refusal(f"{readable(path)} is packed with Zstandard, which needs: pip install zstandard") from None
        self._library, self._file = zstandard, file
        self._frame: Any = None
        self._packed, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._ready:
            self._packed = self._packed or self._file.read(HEAD_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the file ended before its last frame did")
                return 0
            self._frame = self._frame or self._library.ZstdDecompressor().decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(self._packed))
            except self._library.ZstdError as error:
                raise EOFError(str(error)) from None
            self._packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(target), len(self._ready))
        target[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


@contextlib.contextmanager
def characters(file: TextFile, newline: str = "") -> Iterator[io.TextIOWrapper]:
    """The text of the file as a stream, line ends as they are."""
    try:
        with unpacked(file.path) as stream:
            yield io.TextIOWrapper(stream, encoding=file.encoding, newline=newline)
    except UnicodeDecodeError:
        refuse_undecodable(file)
        raise


def refuse_undecodable(file: TextFile) -> None:
    """Reads the file through, for the place of the first byte that is no text."""
    decoder = codecs.getincrementaldecoder(file.encoding.removesuffix("-sig"))()  # whose places count the mark
    offset, line = 0, 1  # of what the decoder is about to see
    with unpacked(file.path) as stream:
        while True:
            block = stream.read(BLOCK)
            waiting = decoder.getstate()[0]  # bytes of a character that the last block began
            try:
                line += decoder.decode(block, final=not block).count("\n")
            except UnicodeDecodeError as error:
                line += (waiting + block)[: error.start].count(b"\n")
                at, name = offset - len(waiting) + error.start, error.encoding.upper()
                raise Undecodable(f"{file}, line {line}: byte {at} is not {name} ({error.reason}); {CURE}") from None
            offset += len(block)
            if not block:
                return


# ---- rows


def rows_of(file: TextFile, field: str) -> Iterator[Row]:
    """The rows of a structured file; of Parquet only the column of `field`, if there is one."""
    if file.format == "parquet":
        return parquet_rows(file, field)
    return {"lines": line_rows, "json": json_rows, "csv": csv_rows}[file.format](file)


def line_rows(file: TextFile) -> Iterator[Row]:
    """Every line's JSON; blank lines are passed over."""
    with characters(file, newline="\n") as lines:  # JSON strings may hold other line ends
        for number, line in enumerate(lines, start=1):
            where, line = f"{file}, line {number}", line.strip().strip("\ufeff")  # joined files carry marks inside
            if not line:
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise Refusal(f"{where} is not JSON ({error}): each line must be one object") from None
            yield where, row


def json_rows(file: TextFile) -> Iterator[Row]:
    """The objects of an array, or those that stand one after another; only a few of them are in memory."""
    decoder, rest, at, line, number = json.JSONDecoder(), "", 0, 1, 0
    array, more = False, True
    with characters(file) as stream:
        while more:
            line += rest.count("\n", 0, at)
            block = stream.read(max(BLOCK, len(rest) - at))  # so that a long row is not parsed again and again
            rest, at, more = rest[at:] + block, 0, bool(block)
            while (at := _start_of_value(rest, at)) < len(rest):
                first = rest[at]
                if first == "[" and not number and not array:
                    at, array = at + 1, True
                elif first == "," and number and array:
                    at += 1
                elif first == "]" and array:
                    at, array = at + 1, False
                else:
                    try:
                        row, end = decoder.raw_decode(rest, at)
                    except (ValueError, RecursionError) as error:
                        if more and _ends_early(error, rest):
                            break
                        place = line + rest.count("\n", 0, getattr(error, "pos", at))
                        reason = getattr(error, "msg", error)
                        raise Refusal(f"{file}, line {place} is not JSON ({reason}): correct the file") from None
                    yield f"{file}, row {number}", row
                    at, number = end, number + 1
    if array:
        raise Refusal(f"{file} ends inside its array: it was cut short")


def _start_of_value(text: str, at: int) -> int:
    return re.compile(r"[\s\ufeff]*").match(text, at).end()  # type: ignore[union-attr]  # it matches nothing, too


def _ends_early(error: Exception, text: str) -> bool:
    """Whether more text may cure the error: it lies in a string without an end, or in the last few characters."""
    return isinstance(error, json.JSONDecodeError) and (
        error.msg.startswith("Unterminated") or error.pos > len(text) - 16
    )


def csv_rows(file: TextFile) -> Iterator[Row]:
    """The rows under the header; strict, because a quote that does not end would swallow the rows after it."""
    csv.field_size_limit(2**31 - 1)
    with characters(file) as stream:
        header = stream.readline()
        semicolons = ";" in header and "," not in header
        delimiter = "\t" if _suffix(file.path) == ".tsv" else ";" if semicolons else ","
        names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        while True:
            where = f"{file}, line {reader.line_num + 2}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise Refusal(f"{where}: {error}: close the quotes of this cell, and double those inside it") from None
            if cells is None:
                return
            if any(cells[len(names) :]):
                count = f"has {len(cells)} cells and the header {len(names)}"
                raise Refusal(f"{where} {count}: quote a cell that holds the delimiter ({delimiter!r})")
            if cells:
                yield where, dict.fromkeys(names) | dict(zip(names, cells, strict=False))


def parquet_rows(file: TextFile, field: str) -> Iterator[Row]:
    """A few rows at a time; without the field's column one of them is enough to say what there is."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise Refusal(f"{file} is Parquet, which needs: pip install pyarrow") from None

    with unpacked(file.path) as stream, tempfile.TemporaryFile() as copy:
        if not isinstance(getattr(stream, "raw", None), io.FileIO):  # packed, and Parquet is read from its end
            shutil.copyfileobj(stream, copy)
            stream = copy
        try:
            with parquet.ParquetFile(stream) as table:
                columns = [name for name in (field, field.split(".")[0]) if name in table.schema_arrow.names][:1]
                number = 0
                for batch in table.iter_batches(batch_size=1024, columns=columns or None):
                    for row in batch.to_pylist():
                        yield f"{file}, row {number}", row
                        number += 1
                    if not columns:
                        return
        except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = (str(error).splitlines() or ["no reason given"])[0]
            raise Refusal(f"{file} cannot be read as Parquet: {reason}") from None


# ---- plain text


def text_documents(file: TextFile, separator: str | None, few: bool) -> Iterator[tuple[str, str]]:
    """What stands between the separators, without the line ends beside them; the whole text where there is none.

    A document longer than LONG_TEXT_BYTES is cut at blank lines, so that it never stands in memory whole. Where the
    corpus is only a `few` texts, a shorter one is cut too, or there would be nothing to split.
    """
    beside, rest, cutting = "\r\n" if separator else "", "", False
    with characters(file) as stream:
        for block in iter(partial(stream.read, BLOCK), ""):
            *ended, rest = (rest + block).split(separator) if separator else [rest + block]
            for document in ended:
                document = document.rstrip(beside) if cutting else document.strip(beside)
                yield from ((str(file), piece) for piece in pieces(document, cutting or is_long(document)))
                cutting = False
            if not cutting:
                rest = rest.lstrip(beside)
            if cutting or len(rest) > 2 * LONG_TEXT_BYTES:
                cutting, start = True, 0
                while len(rest) - start > 2 * PIECE_CHARACTERS + len(separator or ""):  # of which a part may have come
                    end = border(rest, start, PIECE_CHARACTERS)
                    yield str(file), rest[start:end]
                    start = end
                rest = rest[start:]
    few = few and not separator
    yield from ((str(file), piece) for piece in pieces(rest.rstrip(beside), cutting or is_long(rest), few))


def is_long(text: str) -> bool:
    return len(text.encode("utf-8")) > LONG_TEXT_BYTES


def pieces(text: str, long: bool, few: bool = False) -> Iterator[str]:
    size, start = len(text), 0
    if long:
        size = PIECE_CHARACTERS
    elif few:
        size = max(LEAST_PIECE_CHARACTERS, len(text) // PIECES_OF_A_SHORT_TEXT)
    while len(text) - start > 2 * size:
        end = border(text, start, size)
        yield text[start:end]
        start = end
    yield text[start:]


def border(text: str, start: int, size: int) -> int:
    """Where the piece from `start` ends: after a blank line, else a line, else in the middle of one."""
    early, late = start + size, start + 2 * size
    for end in ("\n\n", "\n"):
        position = text.find(end, early, late)
        if position >= 0:
            return position + len(end)
    return late

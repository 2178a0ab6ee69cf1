"""Where documents come from: one object that is read once, from start to end, and counts what it met.

    stdlib       the running interpreter's own library sources: a file is a document
    files        paths and globs of text, .jsonl (a line is a document) and .parquet (a row is one)
    huggingface  `datasets`: a name on the hub, or a folder saved with save_to_disk (a row is a document)

A text file up to LONG_TEXT_BYTES is one document; a longer one is a collection in a single file and is
cut at blank lines, so that it can be split into training and test text and never stands in memory whole.
"""

import codecs
import glob
import json
import os
import platform
import sys
import sysconfig
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from stages.artifacts import Refusal
from stages.resuming import ResumeState, resume_key

KEEP_SECONDS, KEEP_BYTES = 10, 1 << 26  # a stream's rows are kept this often, or when they are this many
LONG_TEXT_BYTES = 1 << 18
PIECE_CHARACTERS = 1 << 14
BLOCK_BYTES = 1 << 20
SOURCES = ("stdlib", "files", "huggingface")

# Folders of the library that nobody wrote by hand or that distributions leave out: without them the corpus
# is the same on Debian, in a container and under pyenv. The generated ones hold machine paths.
NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
GENERATED = ("_sysconfigdata", "config-")


@dataclass
class Corpus:
    """Iterate it to get texts; afterwards it knows what was read, skipped and cut.

    Within `with corpus:` what it streams from the hub is kept, until the work on it has ended well.
    """

    source: str
    paths: tuple = ()
    text_field: str = "text"
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    max_bytes: int | None = None
    root: Path = field(default_factory=Path)  # what relative paths are relative to

    files: list = field(default_factory=list)  # names, without the folders of this machine
    bytes: int = 0
    empty: int = 0
    undecodable: int = 0
    reached_max_bytes: bool = False
    _kept: ExitStack = field(default_factory=ExitStack)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._kept.__exit__(*error)

    def __iter__(self):
        readers = {"stdlib": self._stdlib, "files": self._files, "huggingface": self._huggingface}
        if self.source not in readers:
            raise Refusal(f"corpus.source is {self.source!r}: it must be one of {', '.join(SOURCES)}")
        for where, text in readers[self.source]():
            if text is None or not text.strip():
                self.empty += 1
                continue
            try:
                size = len(text.encode("utf-8"))
            except UnicodeEncodeError as error:  # JSON may spell half of a surrogate pair
                raise Refusal(
                    f"{where}: character {error.start} is half a surrogate pair: mend the text"
                ) from None
            if self.max_bytes and self.bytes + size > self.max_bytes:
                self.reached_max_bytes = True
                break
            self.bytes += size
            yield text
        if not self.bytes:
            limit = f" within corpus.max_bytes ({self.max_bytes})" if self.reached_max_bytes else ""
            raise Refusal(f"the corpus ({self._name()}) holds no text{limit}: name another source")

    def describe(self):
        """What the corpus card says: no path, host or date, so that equal texts give equal cards."""
        card = {
            "source": self.source,
            "name": self._name(),
            "bytes_read": self.bytes,
            "empty_documents_skipped": self.empty,
            "undecodable_files_skipped": self.undecodable,
            "reached_max_bytes": self.reached_max_bytes,
        }
        if self.source == "stdlib":
            card |= {"python": platform.python_version(), "files": len(self.files)}
        elif self.source == "files":
            card |= {"files": self.files}
        else:
            card |= {"subset": self.subset, "split": self.split, "text_field": self.text_field}
        return card

    def _name(self):
        if self.source == "stdlib":
            return f"the standard library of Python {platform.python_version()}"
        if self.source == "files":
            return f"{len(self.files)} files"
        given = str(self.dataset)
        return Path(given).name if (self.root / given).is_dir() else given

    def _stdlib(self):
        for name, path in library_files():
            try:
                text = path.read_bytes().decode("utf-8")
            except UnicodeDecodeError:  # a few sources carry another coding cookie
                self.undecodable += 1
                continue
            self.files.append(name)
            yield path, text

    def _files(self):
        readers = {".jsonl": jsonl_documents, ".parquet": parquet_documents}
        for name, path in find_files(self.paths, self.root):
            self.files.append(name)
            reader = readers.get(path.suffix.lower())
            yield from reader(path, self.text_field) if reader else text_documents(path)

    def _huggingface(self):
        rows, revision = open_dataset(self.dataset, self.subset, self.split, self.root)
        name = f"corpus.dataset {self.dataset}"
        if revision is None:
            yield from row_texts(rows, self.text_field, name)
            return
        stream = [self.dataset, self.subset, self.split, self.text_field, revision]
        state = self._kept.enter_context(ResumeState(self.root, "prepare", resume_key("prepare", stream)))
        texts = kept_texts(rows, self.text_field, name, state)
        self._kept.callback(texts.close)  # an interruption, too, keeps what has arrived
        yield from texts


def library_files():
    """(name, path) of the library's sources, in the order of their names."""
    library, found = Path(sysconfig.get_paths()["stdlib"]), []
    for folder, folders, files in os.walk(library):
        folders[:] = [name for name in folders if name not in NOT_LIBRARY and not name.startswith(GENERATED)]
        found += [Path(folder, name) for name in files if name.endswith(".py") and not name.startswith(GENERATED)]
    named = ((path.relative_to(library).as_posix(), path) for path in found)
    return sorted((name, path) for name, path in named if path.is_file())


def find_files(paths, root):
    """(name, path) of every file that the paths and globs give, once each, in the order of their names."""
    if not paths:
        raise Refusal("corpus.paths is empty: name files or globs, such as corpus.paths=[texts/*.txt]")
    found = {}
    for given in map(str, paths):
        path = root / Path(given).expanduser()
        if path.is_dir():
            example = f"{given.rstrip('/')}/**/*.txt"
            raise Refusal(f"corpus.paths names the folder {given}: name its files, such as {example}")
        if path.is_file():  # before the glob, so that a name with brackets in it can be given as it is
            found[path.resolve()] = path.name
            continue
        matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
        matches = [match for match in matches if match.is_file()]
        if not matches:
            kind = "matches no file" if glob.has_magic(given) else "does not exist"
            raise Refusal(f"corpus.paths: {given} {kind} (looked in {root.resolve()})")
        fixed = []  # the folders before the first wildcard: a document's name starts after them
        for part in path.parts:
            if glob.has_magic(part):
                break
            fixed.append(part)
        for match in matches:
            found.setdefault(match.resolve(), match.relative_to(Path(*fixed)).as_posix())
    return sorted((name, path) for path, name in found.items())


def text_documents(path):
    """The documents of a text file: itself, or pieces of it cut at blank lines when it is long."""
    blocks = _decoded_blocks(path)
    if path.stat().st_size <= LONG_TEXT_BYTES:
        yield path, "".join(blocks)
        return
    rest = ""
    for block in blocks:
        rest += block
        start = 0
        while len(rest) - start > 2 * PIECE_CHARACTERS:  # so that the cut never depends on the block's end
            end = _border(rest, start)
            yield path, rest[start:end]
            start = end
        rest = rest[start:]
    yield path, rest


def _border(text, start):
    """Where the piece from `start` ends: after a blank line, else a line, else in the middle of one."""
    early, late = start + PIECE_CHARACTERS, start + 2 * PIECE_CHARACTERS
    for border in ("\n\n", "\n"):
        position = text.find(border, early, late)
        if position >= 0:
            return position + len(border)
    return late


def _decoded_blocks(path):
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(path, "rb") as file:
        offset = 0  # in the file, of what the decoder is about to see
        while True:
            block = file.read(BLOCK_BYTES)
            waiting = len(decoder.getstate()[0])  # bytes of a character that the last block began
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                at = offset - waiting + error.start
                raise Refusal(f"{path}: byte {at} is not UTF-8 ({error.reason}): convert the file") from None
            offset += len(block)
            if not block:
                return


def jsonl_documents(path, text_field):
    """The text field of every line; blank lines are let through."""
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            try:
                row = json.loads(line.decode("utf-8")) if line.strip() else None
            except UnicodeDecodeError as error:
                at = offset + error.start
                raise Refusal(f"{where}: byte {at} is not UTF-8 ({error.reason}): convert the file") from None
            except (json.JSONDecodeError, RecursionError) as error:
                raise Refusal(f"{where} is not JSON ({error}): each line must be one object") from None
            offset += len(line)
            if line.strip():
                yield where, _text_of(row, text_field, where)


def parquet_documents(path, text_field):
    """The text column, a few rows at a time."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise Refusal(f"{path} is Parquet, which needs: pip install pyarrow") from None

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                known = ", ".join(names)
                raise Refusal(
                    f"{path} has no column {text_field!r}: corpus.text_field must be one of {known}"
                )
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
                for row in batch.to_pylist():
                    where = f"{path}, row {number}"
                    yield where, _text_of(row, text_field, where)
                    number += 1
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise Refusal(f"{path} cannot be read as Parquet: {_first_line(error)}") from None


def open_dataset(dataset, subset, split, root):
    """Rows of a Hugging Face dataset: streamed from the hub, or from the local cache when it is offline.

    And the revision of the stream, None for what is on this machine.
    """
    if not dataset:
        raise Refusal("corpus.dataset is empty: name a dataset of the hub, or the folder of a saved one")
    try:
        import datasets  # a second of imports that the other sources do without
    except ImportError:
        raise Refusal("corpus.source is huggingface, which needs: pip install datasets") from None

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    folder = root / Path(dataset).expanduser()
    try:
        if not folder.is_dir():
            if dataset.startswith(("/", ".", "~")):
                raise Refusal(f"corpus.dataset: the folder {dataset} does not exist")
            if datasets.config.HF_HUB_OFFLINE:
                return datasets.load_dataset(dataset, subset, split=split), None
            builder = datasets.load_dataset_builder(dataset, subset)  # its hash is the commit on the hub
            return builder.as_streaming_dataset(split), builder.hash  # so that max_bytes also bounds the download
        saved = datasets.load_from_disk(str(folder))
    except Refusal:
        raise
    except Exception as error:  # the library raises a dozen unrelated types: network, naming, format, gating
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise Refusal(f"corpus.dataset {dataset} cannot be opened: {reason}") from None
    if not isinstance(saved, datasets.DatasetDict):
        return saved, None
    if split not in saved:
        known = ", ".join(saved)
        raise Refusal(f"corpus.dataset {dataset} has no split {split!r}: corpus.split must be one of {known}")
    return saved[split], None


def row_texts(rows, text_field, name, first=0):
    for number, row in enumerate(rows, first):
        where = f"{name}, row {number}"
        yield where, _text_of(row, text_field, where)


def kept_texts(rows, text_field, name, state):
    """The texts of a stream, copied as they arrive: an interrupted download goes on after them."""
    steps, count, position = 0, 0, None
    while (content := state.load(f"rows-{steps:05d}")) is not None:
        step = json.loads(content)
        for text in step["texts"]:
            yield f"{name}, row {count}", text
            count += 1
        steps, position = steps + 1, step["position"]
    if steps:
        print(f"prepare: continuing the download after {count} rows", file=sys.stderr)
        rows.load_state_dict(position)
    copied, size, saved = [], 0, time.monotonic()

    def save():
        step = {"texts": copied, "position": rows.state_dict()}
        state.save(f"rows-{steps:05d}", json.dumps(step).encode())

    try:
        for where, text in row_texts(rows, text_field, name, first=count):
            copied.append(text)
            size += len(text or "")
            yield where, text
            if size >= KEEP_BYTES or time.monotonic() - saved >= KEEP_SECONDS:
                save()
                steps, copied, size, saved = steps + 1, [], 0, time.monotonic()
        save()
    except GeneratorExit:
        save()
        raise


def _text_of(row, text_field, where):
    """The text of a row. A null is an empty document; anything else that is not a string is a mistake."""
    if not isinstance(row, dict):
        raise Refusal(f'{where} is not an object: it must look like {{"{text_field}": "…"}}')
    if text_field not in row:
        known = ", ".join(row) or "its fields, and it has none"
        raise Refusal(f"{where} has no field {text_field!r}: corpus.text_field must be one of {known}")
    text = row[text_field]
    if text is not None and not isinstance(text, str):
        kind = type(text).__name__
        raise Refusal(f"{where}: field {text_field!r} is a {kind}, not text: set corpus.text_field")
    return text


def _first_line(error):
    return (str(error).splitlines() or ["no reason given"])[0]

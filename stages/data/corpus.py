"""Where documents come from: one object that is read once, from start to end, and counts what it met.

    stdlib       the running interpreter's own library sources: a file is a document
    files        paths and globs of text, JSON, CSV and Parquet, packed or not (readers.py)
    huggingface  `datasets`: a name on the hub, or a folder saved with save_to_disk (a row is a document)

A text file up to LONG_TEXT_BYTES is one document; a longer one is a collection in a single file and is
cut at blank lines, so that it can be split into training and test text and never stands in memory whole.
So is a shorter one where the corpus is only FEW_FILES text files or less. With corpus.separator a text file
holds a document between any two of these. Of a row, corpus.text_field is read (fields.py).
"""

import json
import platform
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from stages.data.fields import WITHOUT_FIELD, field_texts
from stages.data.paths import in_a_copy, library_files, matches_of
from stages.data.readers import Undecodable, look_at, readable, refuse_undecodable, rows_of, text_documents
from stages.data.shards import END_OF_TEXT
from stages.files.artifacts import Refusal
from stages.files.resuming import ResumeState, resume_key

KEEP_SECONDS, KEEP_BYTES = 10, 1 << 26  # a stream's rows are kept this often, or when they are this many
FEW_FILES = 3  # too few documents for three splits
SURELY_SEPARATORS = 10  # so many in one text file are no mention of it
PATIENCE_ROWS = 1000  # of a dataset, whose rows are alike, without the field
SOURCES = ("stdlib", "files", "huggingface")


@dataclass
class Corpus:
    """Iterate it to get texts; afterwards it knows what was read, skipped and cut.

    Within `with corpus:` what it streams from the hub is kept, until the work on it has ended well.
    """

    source: str
    paths: tuple = ()
    text_field: str = "text"
    separator: str | None = None
    undecodable: str = "refuse"  # or skip; the standard library's few are always skipped
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    max_bytes: int | None = None
    root: Path = field(default_factory=Path)  # what relative paths are relative to

    files: list = field(default_factory=list)  # names, without the folders of this machine
    bytes: int = 0
    empty: int = 0
    without_field: int = 0
    undecodable_files: list = field(default_factory=list)
    broken_links: list = field(default_factory=list)
    cut_files: int = 0
    separators_kept: int = 0  # <|endoftext|> in text files, read as text
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
            if text is WITHOUT_FIELD:
                self.without_field += 1
                continue
            text = (text or "").removeprefix("\ufeff")
            if not text.strip():
                self.empty += 1
                continue
            try:
                size = len(text.encode("utf-8"))
            except UnicodeEncodeError as error:  # JSON may spell half of a surrogate pair
                raise Refusal(f"{where}: character {error.start} is half a surrogate pair: correct the text") from None
            if self.max_bytes and self.bytes + size > self.max_bytes:
                self.reached_max_bytes = True
                break
            self.bytes += size
            yield text
        self._tell()
        if not self.bytes:
            limit = f" within corpus.max_bytes ({self.max_bytes})" if self.reached_max_bytes else ""
            skipped = f"; left out: {', '.join(self.left_out())}" if self.left_out() else ""
            raise Refusal(f"the corpus ({self._name()}) holds no text{limit}{skipped}: name another source")

    def left_out(self) -> list[str]:
        """What was skipped, for a reader."""
        counts = {
            "empty documents": self.empty,
            f"rows without {self.text_field!r}": self.without_field,
            "files that are not UTF-8": len(self.undecodable_files),
            "broken links": len(self.broken_links),
        }
        return [f"{count:,} {what}" for what, count in counts.items() if count]

    def describe(self):
        """What the corpus card says: no path, host or date, so that equal texts give equal cards."""
        card = {
            "source": self.source,
            "name": self._name(),
            "bytes_read": self.bytes,
            "empty_documents_skipped": self.empty,
            "undecodable_files_skipped": len(self.undecodable_files),
            "reached_max_bytes": self.reached_max_bytes,
        }
        if self.source == "stdlib":
            return card | {"python": platform.python_version(), "files": len(self.files)}
        card |= {"text_field": self.text_field, "rows_without_field_skipped": self.without_field}
        if self.source == "huggingface":
            return card | {"subset": self.subset, "split": self.split}
        return card | {
            "files": self.files,
            "separator": self.separator,
            "separators_kept_as_text": self.separators_kept,
            "text_files_cut": self.cut_files,
            "broken_links_skipped": len(self.broken_links),
        }

    def _name(self):
        if self.source == "stdlib":
            return f"the standard library of Python {platform.python_version()}"
        if self.source == "files":
            return f"{len(self.files)} file{'s' * (len(self.files) != 1)}"
        given = str(self.dataset)
        return Path(given).name if (self.root / given).is_dir() else given

    def _stdlib(self):
        for name, path in library_files():
            try:
                text = path.read_bytes().decode("utf-8")
            except UnicodeDecodeError:  # a few sources carry another coding cookie
                self.undecodable_files.append(path)
                continue
            self.files.append(name)
            yield path, text

    def _files(self):
        found, self.broken_links = matches_of(self.paths, self.root)
        looks = self._decodable(found)
        first = list(islice(looks, FEW_FILES + 1))
        few = len(first) <= FEW_FILES and all(file.format == "text" for _, file in first)
        for name, file in chain(first, looks):
            self.files.append(name)
            if file.format != "text":
                yield from field_texts(rows_of(file, self.text_field), self.text_field, str(file))
                continue
            documents = separators = 0
            for where, text in text_documents(file, self.separator, few):
                documents += 1
                separators += text.count(END_OF_TEXT) if self.separator is None else 0
                yield where, text
            self.cut_files += documents > 1 and self.separator is None
            self.separators_kept += separators if separators >= SURELY_SEPARATORS else 0

    def _decodable(self, found):
        """The files that are read, each looked at when its turn comes."""
        for name, path in found:
            try:
                file = look_at(path)
                if self.undecodable == "skip" and file.format != "parquet":
                    refuse_undecodable(file)
            except Undecodable:
                if self.undecodable == "refuse":
                    raise
                self.undecodable_files.append(path)
                continue
            yield name, file

    def _tell(self):
        """What a person who gave these files should hear, a line each."""
        lines = []
        for paths, what in (
            (self.broken_links, "broken symbolic links"),
            (self.undecodable_files, "files that are not UTF-8"),
        ):
            if paths and self.source == "files":
                lines.append(f"skipped {len(paths):,} {what}, the first is {readable(paths[0])}")
        if self.without_field:
            lines.append(f"skipped {self.without_field:,} rows without the field {self.text_field!r}")
        if self.separators_kept:
            lines.append(
                f"{END_OF_TEXT} stands {self.separators_kept:,} times in the text files and is read as text. "
                f'If it separates documents, set corpus.separator: in params.yaml separator: "{END_OF_TEXT}" in the '
                f"mapping corpus, or on the command line 'corpus.separator=\"{END_OF_TEXT}\"'"
            )
        for line in lines:
            print(f"prepare: {line}", file=sys.stderr)

    def _huggingface(self):
        rows, revision = open_dataset(self.dataset, self.subset, self.split, self.root)
        name = f"corpus.dataset {self.dataset}"
        if revision is None:
            yield from field_texts(numbered(rows, name), self.text_field, name, PATIENCE_ROWS)
            return
        stream = [self.dataset, self.subset, self.split, self.text_field, revision]
        state = self._kept.enter_context(ResumeState(self.root, "prepare", resume_key("prepare", stream)))
        texts = kept_texts(rows, self.text_field, name, state)
        self._kept.callback(texts.close)  # an interruption, too, keeps what has arrived
        yield from texts


# ---- datasets


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
                raise Refusal(f"corpus.dataset: the folder {dataset} does not exist{in_a_copy(dataset, root)}")
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


def numbered(rows, name, first=0):
    return ((f"{name}, row {number}", row) for number, row in enumerate(rows, first))


def kept_texts(rows, text_field, name, state):
    """The texts of a stream, copied as they arrive: an interrupted download goes on after them."""
    steps, count, position, found = 0, 0, None, False
    while (content := state.load(f"rows-{steps:05d}")) is not None:
        step = json.loads(content)
        for text in step["texts"]:
            yield f"{name}, row {count}", text
            count, found = count + 1, found or text is not WITHOUT_FIELD
        steps, position = steps + 1, step["position"]
    if steps:
        print(f"prepare: continuing the download after {count} rows", file=sys.stderr)
        rows.load_state_dict(position)
    copied, size, saved = [], 0, time.monotonic()

    def save():
        step = {"texts": copied, "position": rows.state_dict()}
        state.save(f"rows-{steps:05d}", json.dumps(step).encode())

    try:
        for where, text in field_texts(numbered(rows, name, count), text_field, name, PATIENCE_ROWS, found):
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


def _first_line(error):
    return (str(error).splitlines() or ["no reason given"])[0]

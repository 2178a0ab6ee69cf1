"""Files are read as what they hold: rows from every format, packed or not; data is never taken as text in silence."""

import codecs
import csv
import gzip
import io
import json
import sys

import pytest

from stages.data import readers
from stages.data.corpus import Corpus
from stages.data.readers import LONG_TEXT_BYTES, PIECE_CHARACTERS
from stages.files.artifacts import Refusal

TEXTS = ["erste Zeile,\nzweite", 'a "quoted" word', "ünd \u2028 so"]
ROWS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]


def read(root, *paths, **more):
    return list(Corpus(source="files", paths=paths or ("*",), root=root, **more))


def refusal(root, *paths, **more):
    with pytest.raises(Refusal) as caught:
        read(root, *paths, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def lines(rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode() + b"\n"


def table(rows, delimiter):
    written = io.StringIO(newline="")
    writer = csv.DictWriter(written, rows[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return written.getvalue().encode()


def parquet(rows):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    written = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist(rows), written)
    return written.getvalue()


FORMATS = {
    "a.jsonl": lines,
    "a.ndjson": lines,
    "lines.json": lines,
    "array.json": lambda rows: json.dumps(rows).encode(),
    "pretty.json": lambda rows: json.dumps(rows, indent=4).encode(),
    "objects.json": lambda rows: "\n".join(json.dumps(row, indent=1) for row in rows).encode(),
    "a.csv": lambda rows: table(rows, ","),
    "semicolons.CSV": lambda rows: table(rows, ";").replace(b"id;text", b"id; text"),
    "a.tsv": lambda rows: table(rows, "\t"),
    "a.parquet": parquet,
}


def packed(kind, content):
    if kind == "gz":
        return gzip.compress(content)
    if kind == "zst":
        return pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(content)
    return content


@pytest.mark.parametrize("pack", ["plain", "gz", "zst"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_its_rows_packed_or_not(tmp_path, name, pack):
    suffix = "" if pack == "plain" else f".{pack}"
    (tmp_path / f"{name}{suffix}").write_bytes(packed(pack, FORMATS[name](ROWS)))
    assert read(tmp_path) == TEXTS


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.json", "a.txt"])
def test_gzip_is_known_without_its_suffix_and_a_wrong_suffix_does_no_harm(tmp_path, name):
    content = b"plain words" if name == "a.txt" else FORMATS.get(name, lines)(ROWS)
    (tmp_path / name).write_bytes(gzip.compress(content))
    (tmp_path / f"b{name}.gz").write_bytes(content)
    assert read(tmp_path) == 2 * (["plain words"] if name == "a.txt" else TEXTS)


def test_parquet_is_known_without_its_suffix(tmp_path):
    (tmp_path / "part-0000").write_bytes(parquet(ROWS))
    assert read(tmp_path) == TEXTS


@pytest.mark.parametrize("pack", ["gz", "zst"])
def test_a_packed_file_that_is_cut_short_or_damaged_is_refused_and_several_frames_are_one(tmp_path, pack):
    content = lines({"text": f"{number} {number**9}"} for number in range(999))
    whole = packed(pack, content)
    (tmp_path / "a.jsonl").write_bytes(whole + packed(pack, lines(ROWS)))
    assert len(read(tmp_path)) == 1002
    (tmp_path / "a.jsonl").write_bytes(whole[: len(whole) * 3 // 4])
    assert "a.jsonl cannot be unpacked" in refusal(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(whole[:60] + b"\0" * 60 + whole[120:])
    assert "a.jsonl cannot be unpacked" in refusal(tmp_path)


def test_zstandard_without_its_library_is_one_line_that_says_how_to_install_it(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(readers.ZSTANDARD + b"anything")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert "a.jsonl.zst is packed with Zstandard, which needs: pip install zstandard" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["array.json", "pretty.json", "objects.json", "lines.json"])
def test_json_is_read_a_part_at_a_time_whatever_the_part_ends_in(tmp_path, name, monkeypatch):
    rows = [{"id": -1.5e-7, "odd": [True, None, {}], "text": f'{number} "\\u00e9" ü'} for number in range(20)]
    (tmp_path / name).write_bytes(FORMATS[name](rows))
    for block in (1, 7, 64):
        monkeypatch.setattr(readers, "BLOCK", block)
        assert read(tmp_path) == [row["text"] for row in rows]


@pytest.mark.parametrize(
    "content, words",
    [
        ('[{"text": "a"},\n {"text": b}]', "line 2 is not JSON"),
        ('[{"text": "a"},\n', "was cut short"),
        ('[{"text": "a"},\n {"text": "b', "line 2 is not JSON"),
        ('[{"text": "a"}, 5]', "row 1 is not an object"),
        ('"text"', "row 0 is not an object"),
        ('{"text": ' + "1" * 5000 + "}", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_bad_json_is_refused_with_its_place(tmp_path, content, words):
    (tmp_path / "a.json").write_text(content)
    message = refusal(tmp_path)
    assert "a.json" in message and words in message


def test_an_empty_array_or_file_is_no_text(tmp_path):
    (tmp_path / "a.json").write_text("[]\n")
    (tmp_path / "b.csv").write_text("")
    (tmp_path / "c.jsonl").write_text("\n")
    assert "holds no text" in refusal(tmp_path)


@pytest.mark.parametrize(
    "content, words",
    [
        ("id,text\n1,Hello, world\n", "line 2 has 3 cells and the header 2: quote a cell"),
        ('id,text\n1,a\n2,"open\n3,b\n', "line 3: unexpected end of data"),
        ('id,text\n1,"a"b\n', "line 2: "),
    ],
)
def test_csv_that_would_lose_text_is_refused_with_its_line(tmp_path, content, words):
    (tmp_path / "a.csv").write_text(content)
    assert f"a.csv, {words}" in refusal(tmp_path)


def test_csv_with_short_rows_long_cells_and_old_line_ends_is_read(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"id,text,more\r\n1\r\n\r\n2,two,\r\n3," + b"x" * 500_000 + b",y,,\r\n")
    assert read(tmp_path) == ["two", "x" * 500_000]


# ---- data is no text


@pytest.mark.parametrize("name", ["a.txt", "a", "a.md", "a.txt.gz"])
@pytest.mark.parametrize("content", [FORMATS[name] for name in FORMATS if "json" in name or "ndjson" in name])
def test_json_under_the_name_of_a_text_is_refused_and_the_way_out_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(packed(name[-2:], content(ROWS * 900)))  # longer than what is looked at
    message = refusal(tmp_path)
    assert f"{name} holds JSON, not plain text: rename it to .jsonl" in message
    (tmp_path / name).write_bytes(packed(name[-2:], codecs.BOM_UTF8 + b" \n" + content(ROWS[:1])))
    assert "holds JSON" in refusal(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["{brace} first", '["x", "y"] is a list', '{"a": 1} is JSON, this is not', "[1, 2]\n", '{"a": 1,}'],
)
def test_a_text_that_begins_with_a_bracket_stays_a_text(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert read(tmp_path) == [text]


# ---- marks and encodings


@pytest.mark.parametrize("name", ["a.jsonl", "array.json", "a.csv", "a.tsv", "a.txt"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_are_dropped_and_obeyed(tmp_path, name, encoding):
    content = FORMATS.get(name, lambda rows: "Zeile\r\nünd".encode())(ROWS).decode()
    (tmp_path / name).write_bytes(content.encode(encoding))
    assert read(tmp_path) == (["Zeile\r\nünd"] if name == "a.txt" else TEXTS)


def test_marks_of_joined_files_and_inside_of_rows_are_dropped(tmp_path):
    one = '\ufeff{"text": "\\ufeffa"}\r\n'
    (tmp_path / "a.jsonl").write_text(one + one.replace("ufeffa", "ufeffb"), encoding="utf-8", newline="")
    assert read(tmp_path) == ["a", "b"]


def test_utf_16_without_a_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("plain words".encode("utf-16-le"))
    assert "byte 1 is NUL: it is binary, or UTF-16 without a mark" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["b.txt", "b.jsonl", "b.json", "b.csv", "b.txt.gz"])
def test_a_file_that_is_not_utf8_is_named_or_skipped_and_counted(tmp_path, name, capsys):
    (tmp_path / "a.txt").write_text("good")
    bad = 'text\n{"text": "gut"}\n{"text": "schön"}\n'.encode("latin-1")
    (tmp_path / name).write_bytes(packed(name[-2:], bad if name[2:] not in ("jsonl", "json") else bad[5:]))
    message = refusal(tmp_path)
    at = bad.index(b"\xf6") - (5 if name[2:] in ("jsonl", "json") else 0)
    assert f"{name}, line " in message and f"byte {at} is not UTF-8" in message and "corpus.undecodable=skip" in message
    corpus = Corpus(source="files", paths=("*",), root=tmp_path, undecodable="skip")
    assert list(corpus) == ["good"] and corpus.files == ["a.txt"]
    assert corpus.describe()["undecodable_files_skipped"] == 1
    assert f"skipped 1 files that are not UTF-8, the first is {tmp_path / name}" in capsys.readouterr().err


def test_a_long_file_that_is_not_utf8_at_its_end_leaves_nothing_behind(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"line\n" * LONG_TEXT_BYTES + b"\xff")
    (tmp_path / "b.txt").write_text("good")
    assert read(tmp_path, undecodable="skip") == ["good"]


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")

    def denied(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(readers, "open", denied, raising=False)  # root may read everything
    assert "a.txt cannot be read (Permission denied)" in refusal(tmp_path)


# ---- documents inside a text


@pytest.mark.parametrize("block", [1, 5, 1000, 1 << 20])
def test_a_separator_divides_a_text_file_and_long_documents_are_cut(tmp_path, monkeypatch, block):
    if block < 1000:
        monkeypatch.setattr(readers, "LONG_TEXT_BYTES", 400)
        monkeypatch.setattr(readers, "PIECE_CHARACTERS", 30)
    longest = readers.LONG_TEXT_BYTES
    monkeypatch.setattr(readers, "BLOCK", block)
    long = "".join(f"Sätze {number}\n\n" for number in range(longest // 3))
    texts = ["one\n\nmore", "two", "x" * longest, long.strip()]
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(["", *texts, ""]), encoding="utf-8")
    documents = read(tmp_path, separator="<|endoftext|>")
    assert documents[:3] == texts[:3] and "".join(documents[3:]) == texts[3]
    assert max(map(len, documents[3:])) <= 2 * readers.PIECE_CHARACTERS + 13


def test_blank_separators_work(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    assert read(tmp_path, separator="\n") == ["one", "two", "three"]


def test_many_separators_that_are_read_as_text_are_mentioned_once(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("story\n<|endoftext|>\n" * 50)
    (tmp_path / "b.txt").write_text("a word on <|endoftext|>")
    corpus = Corpus(source="files", paths=("*.txt",), root=tmp_path)
    assert len(list(corpus)) == 2
    assert corpus.describe()["separators_kept_as_text"] == 50
    (said,) = capsys.readouterr().err.splitlines()
    assert "<|endoftext|> stands 50 times" in said and "'corpus.separator=\"<|endoftext|>\"'" in said


def test_a_few_texts_are_cut_where_there_would_be_nothing_to_split(tmp_path):
    text = "".join(f"Sentence {number}.\n" for number in range(3000))
    assert len(text) < LONG_TEXT_BYTES
    (tmp_path / "a.txt").write_text(text)
    corpus = Corpus(source="files", paths=("*",), root=tmp_path)
    assert "".join(pieces := list(corpus)) == text and 8 <= len(pieces) <= 16
    assert corpus.describe()["text_files_cut"] == 1
    for name in "bcd":
        (tmp_path / f"{name}.txt").write_text(f"{name} {text}")
    assert len(read(tmp_path)) == 4, "four documents can be split"
    assert len(read(tmp_path, "[ab].txt", separator="xyz")) == 2, "who names a separator has said where"


def test_the_cut_of_a_single_text_has_no_step_where_it_becomes_long(tmp_path):
    counts = []
    for size in (LONG_TEXT_BYTES - 100, LONG_TEXT_BYTES + 100):
        (tmp_path / "a.txt").write_text(("x" * 99 + "\n") * (size // 100))
        counts.append(len(read(tmp_path)))
    assert abs(counts[0] - counts[1]) <= 1 and counts[0] * PIECE_CHARACTERS <= LONG_TEXT_BYTES

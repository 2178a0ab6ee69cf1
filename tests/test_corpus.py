"""Every source gives texts, says what it left out, and refuses bad input in one line that names the place."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.data.corpus import Corpus
from stages.data.paths import find_files
from stages.data.readers import LONG_TEXT_BYTES, PIECE_CHARACTERS
from stages.files.artifacts import Refusal

ROOT = Path(__file__).parent.parent


def files(root, *paths, **more):
    return Corpus(source="files", paths=paths, root=root, **more)


def refusal(corpus):
    with pytest.raises(Refusal) as caught:
        list(corpus)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_standard_library_is_read_in_the_same_order_and_names_no_folder_of_this_machine():
    corpus = Corpus(source="stdlib")
    texts = list(corpus)
    assert texts == list(Corpus(source="stdlib"))
    assert corpus.bytes > 5_000_000
    assert corpus.files == sorted(corpus.files) and "json/decoder.py" in corpus.files
    assert not any("site-packages" in name or name.startswith(("test/", "/")) for name in corpus.files)
    assert corpus.describe()["python"] in corpus.describe()["name"]
    assert corpus.describe()["files"] == len(corpus.files)


def test_reading_stops_before_max_bytes(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("ä" * 10)
    corpus = files(tmp_path, "*.txt", max_bytes=45)
    assert list(corpus) == ["ä" * 10] * 2
    assert corpus.bytes == 40 and corpus.describe()["reached_max_bytes"]


def test_text_jsonl_and_parquet_give_their_documents_in_the_order_of_names(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "c.txt").write_bytes("Zeile\r\nünd\n".encode())
    rows = [{"text": "first", "other": 1}, {"text": "second"}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    parquet.write_table(
        arrow.table({"id": [1, 2, 3], "text": ["third", None, "fourth"]}), tmp_path / "b.parquet"
    )
    corpus = files(tmp_path, "**/*", "a.jsonl")
    assert list(corpus) == ["first", "second", "third", "fourth", "Zeile\r\nünd\n"]
    assert corpus.files == ["a.jsonl", "b.parquet", "inner/c.txt"]
    assert corpus.empty == 1


def test_long_text_file_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
    paragraph = "Ein längerer Satz, der sich wiederholt. " * 20 + "\n\n"
    text = paragraph * (LONG_TEXT_BYTES * 3 // len(paragraph))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    pieces = list(files(tmp_path, "book.txt"))
    assert "".join(pieces) == text
    assert len(pieces) > 20
    assert all(piece.endswith("\n\n") and len(piece) <= 2 * PIECE_CHARACTERS for piece in pieces[:-1])


def test_long_text_without_line_ends_is_cut_too(tmp_path):
    (tmp_path / "line.txt").write_text("é" * LONG_TEXT_BYTES, encoding="utf-8")
    pieces = list(files(tmp_path, "line.txt"))
    assert sum(map(len, pieces)) == LONG_TEXT_BYTES and max(map(len, pieces)) <= 2 * PIECE_CHARACTERS


@pytest.mark.parametrize("before", [3, LONG_TEXT_BYTES, (1 << 20) - 1])
def test_undecodable_byte_is_refused_with_file_and_offset(tmp_path, before):
    (tmp_path / "bad.txt").write_bytes(b"a" * before + b"\xe2\x82" + b"more text")
    message = refusal(files(tmp_path, "bad.txt"))
    assert "bad.txt" in message and f"byte {before} " in message


def test_text_that_ends_inside_a_character_is_refused_with_its_offset(tmp_path):
    (tmp_path / "cut.txt").write_bytes(b"abc\xc3")
    assert "byte 3 " in refusal(files(tmp_path, "cut.txt"))


def test_undecodable_line_of_jsonl_is_refused_with_line_and_offset(tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    message = refusal(files(tmp_path, "bad.jsonl"))
    assert "line 2" in message and "byte 24 " in message


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"text": 5}', "is of type int, not text"),
        ('{"text": "x"', "is not JSON"),
        ('["x"]', "is not an object"),
        ('{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_bad_line_of_jsonl_is_refused_with_its_number(tmp_path, line, words):
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    message = refusal(files(tmp_path, "bad.jsonl"))
    assert "bad.jsonl, line 2" in message and words in message


def test_parquet_without_the_column_or_not_parquet_at_all_is_refused(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    message = refusal(files(tmp_path, "a.parquet"))
    assert "no row has the field 'text'" in message and "set corpus.text_field=body" in message
    (tmp_path / "b.parquet").write_text("not parquet")
    assert "b.parquet" in refusal(files(tmp_path, "b.parquet"))


def test_missing_file_empty_glob_folder_and_empty_corpus_are_refused(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "folder").mkdir()
    assert "missing.txt does not exist" in refusal(files(tmp_path, "missing.txt"))
    assert "*.md matches no file" in refusal(files(tmp_path, "*.md"))
    assert "folder/**/*.txt" in refusal(files(tmp_path, "folder"))
    assert "holds no text" in refusal(files(tmp_path, "empty.txt"))
    (tmp_path / "text.txt").write_text("long enough")
    assert "max_bytes (4)" in refusal(files(tmp_path, "text.txt", max_bytes=4))


def test_file_whose_name_looks_like_a_glob_is_read(tmp_path):
    (tmp_path / "a[1].txt").write_text("text")
    assert list(files(tmp_path, "a[1].txt")) == ["text"]


@pytest.mark.parametrize("folder", ["my data [v1]", 'q "x" =y (é)', "a*b?", "[!x]"])
def test_an_existing_folder_is_taken_literally_whatever_its_name(tmp_path, folder):
    (tmp_path / folder / "in [2]").mkdir(parents=True)
    (tmp_path / folder / "in [2]" / "a.txt").write_text("text")
    (tmp_path / folder / "in [2]" / "b[1] x.txt").write_text("more")
    for root, start in ((tmp_path, folder), (tmp_path / "elsewhere", tmp_path / folder)):
        assert names(root, f"{start}/**/*.txt") == ["in [2]/a.txt", "in [2]/b[1] x.txt"]
        assert names(root, f"{start}/in [2]/*.txt") == ["a.txt", "b[1] x.txt"]
        assert names(root, f"{start}/*/b[1]*.txt") == ["in [2]/b[1] x.txt"]
        assert names(root, f"{start}/in [2]/[ab].txt") == ["a.txt"]
        assert names(root, f"{start}/in [2]/a.txt") == ["a.txt"]


def names(root, *paths):
    return [name for name, _ in find_files(paths, root)]


def test_names_that_are_not_utf8_can_be_written_into_the_card(tmp_path):
    for name in (b"caf\xe9 1.txt", "schön.txt".encode()):
        with open(os.path.join(os.fsencode(tmp_path), name), "w") as file:
            file.write(str(name))
    corpus = files(tmp_path, "*.txt")
    assert len(list(corpus)) == 2
    assert corpus.describe()["files"] == ["caf\\xe9 1.txt", "schön.txt"]
    json.dumps(corpus.describe(), ensure_ascii=False).encode("utf-8")
    (tmp_path / os.fsdecode(b"caf\xe9 1.txt")).write_bytes(b"\xff")
    assert "caf\\xe9 1.txt, line 1: byte 0" in refusal(files(tmp_path, "*.txt"))


def test_paths_are_found_in_a_locale_that_cannot_spell_them(tmp_path):
    (tmp_path / "wört [é]").mkdir()
    (tmp_path / "wört [é]" / "ä.txt").write_text("text")
    script = (
        "from pathlib import Path; from stages.data.corpus import Corpus\n"
        "corpus = Corpus(source='files', paths=('w\\xf6rt [\\xe9]/*.txt',), root=Path('.'))\n"
        "print(ascii((list(corpus), corpus.files)))"
    )
    plain = os.environ | {"PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for environment in (plain, plain | {"PYTHONUTF8": "1"}):
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == ascii((["text"], ["ä.txt"])), "the card does not depend on the locale"


def test_broken_links_are_skipped_counted_and_named(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").symlink_to("a.txt")
    (tmp_path / "c.txt").symlink_to("gone.txt")
    (tmp_path / "d.txt").symlink_to("d.txt")
    corpus = files(tmp_path, "*.txt", "[a-c].txt")
    assert list(corpus) == ["text"]
    assert corpus.describe()["broken_links_skipped"] == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "skipped 2 broken symbolic links" in said and str(tmp_path / "c.txt") in said
    assert "c.txt is a broken symbolic link" in refusal(files(tmp_path, "c.txt"))
    assert "[cd].txt matches only broken symbolic links" in refusal(files(tmp_path, "[cd].txt"))


def test_the_glob_proposed_for_a_folder_finds_its_files(tmp_path):
    (tmp_path / "my [data]" / ".git").mkdir(parents=True)
    for name in ("a.jsonl", "b.jsonl", "c.md", ".git/x.txt", ".git/y.txt", ".git/z.txt"):
        (tmp_path / "my [data]" / name).write_text('{"text": "x"}')
    message = refusal(files(tmp_path, "my [data]"))
    assert names(tmp_path, message.partition("such as ")[2]) == ["a.jsonl", "b.jsonl"]


def test_an_empty_list_of_paths_names_the_file_and_the_key():
    message = refusal(Corpus(source="files"))
    assert "params.yaml corpus: {source: files, paths: [texts/*.txt]}" in message
    assert "corpus=files 'corpus.paths=[texts/*.txt]'" in message


def test_in_dvcs_temporary_copy_a_missing_relative_path_names_the_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "prepare")
    for source, root, said in (("elsewhere", tmp_path, True), (".", tmp_path, False)):
        monkeypatch.setenv("DVC_ROOT", str(tmp_path / source))
        for corpus in (files(root, "texts/*.txt"), Corpus(source="huggingface", dataset="./saved", root=root)):
            message = refusal(corpus)
            assert ("only files that git tracks: give an absolute path" in message) == said
        assert "git" not in refusal(files(root, str(tmp_path / "no.txt")))


def test_huggingface_dataset_saved_to_disk_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"story": ["one", "two", ""], "id": [1, 2, 3]})
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "saved"))
    rows.save_to_disk(str(tmp_path / "plain"))

    def saved(dataset="saved", **more):
        return Corpus(source="huggingface", dataset=dataset, root=tmp_path, **{"text_field": "story", **more})

    corpus = saved()
    assert list(corpus) == ["one", "two"] and corpus.empty == 1
    assert corpus.describe()["name"] == "saved" and str(tmp_path) not in json.dumps(corpus.describe())
    assert list(saved("plain")) == ["one", "two"]
    assert "no split 'test'" in refusal(saved(split="test"))
    assert "set corpus.text_field=story" in refusal(saved(text_field="text"))
    assert "does not exist" in refusal(saved("./nowhere"))


def test_huggingface_name_without_a_network_is_refused_in_one_line(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refusal(Corpus(source="huggingface", dataset="nobody/no-such-data", root=tmp_path))
    assert "nobody/no-such-data cannot be opened" in message

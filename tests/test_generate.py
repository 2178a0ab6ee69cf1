"""The command that continues a text: what it prints, where it stops, what it refuses."""

import io
import sys
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_model_folder import completed
from test_shards import BPE
from test_student import SHAPE

from stages import generate as command
from stages.files import streams
from stages.files.artifacts import Refusal
from stages.model import generation
from stages.model.folders import folder_of
from stages.model.hub import load


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkout")
    completed(root, replace(SHAPE, vocab_size=BPE.vocab_size, sequence_tokens=64))
    return root


@pytest.fixture(autouse=True)
def here(root, monkeypatch):
    monkeypatch.setattr(command, "folder_of", partial(folder_of, root=root))


def expected(root, prompt, tokens, **options):
    model = load(root / "artifacts/student")
    ids = generation.generate(model, BPE.encode(prompt), tokens, end_of_text=BPE.end_of_text, **options)
    return BPE.decode(ids)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9, "seed": 7}])
def test_it_prints_the_text_that_the_model_writes(root, options, capsys):
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command.main(["--tokens", "20", *words, "def first"])
    said = capsys.readouterr()
    assert said.out == "def first" + expected(root, "def first", 20, **options) + "\n"
    assert "tokens/s" in said.err


def test_a_prompt_comes_from_standard_input_and_a_model_from_any_folder(root, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("x = "))
    command.main(["--model", str(root / "artifacts/student"), "--temperature", "0", "--tokens", "3"])
    assert capsys.readouterr().out == "x = " + expected(root, "x = ", 3) + "\n"


def test_an_empty_prompt_begins_a_text(capsys):
    command.main(["--temperature", "0", "--tokens", "3", ""])
    assert capsys.readouterr().out != "\n"


def test_it_stops_before_a_text_that_is_named(root, capsys):
    whole = expected(root, "x = ", 20)
    stop = whole[7:10]
    command.main(["--temperature", "0", "--tokens", "20", "--stop", stop, "x = "])
    assert capsys.readouterr().out == "x = " + whole[: whole.index(stop)] + "\n"


def test_models_stand_side_by_side(root, capsys):
    command.main(["--compare", "student,student", "--temperature", "0", "--tokens", "8", "x"])
    said = capsys.readouterr()
    head, rule, *lines = (line.partition(command.COLUMN_GAP) for line in said.out.splitlines())
    assert head[0].strip() == head[2] == "student" and set(rule[0]) == {"-"}
    assert lines and all(left.rstrip() == right for left, _, right in lines)
    assert said.err.count("student: 8 tokens") == 2


def test_columns_break_long_lines_and_fill_short_texts():
    assert command.side_by_side([["abcde\nf", "x"]], 3).splitlines() == ["abc  |  x", "de   |", "f    |"]


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_text_is_cut_at_the_stop_that_is_complete_first_however_it_arrives(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    assert "".join(command.until(pieces, stops)) == text[: min(ends, default=(0, len(text)))[1]]


def test_a_character_of_several_tokens_is_printed_when_it_is_whole():
    class Bytes:
        @staticmethod
        def bytes_of(ids):
            return bytes(ids)

    writer = object.__new__(command.Writer)
    writer.tokenizer = Bytes
    assert list(writer._decoded("aé中".encode())) == ["a", "", "é", "", "", "中", ""]
    assert "".join(writer._decoded(b"\xe4\xb8")) == "\ufffd"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model", "nobody"], "nobody: no model of that name and no folder with a config.json"),
        (["--compare", "student,"], "no model of that name"),
        (["--tokens", "0"], "--tokens 0: must be from 1 to 1,048,576"),
        (["--tokens", "9999999"], "--tokens 9999999: must be from 1"),
        (["--temperature", "-1"], "--temperature -1: must be a number from 0 on"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--temperature", "inf"], "--temperature inf"),
        (["--top-p", "0"], "--top-p 0: must be above 0 and at most 1"),
        (["--seed", "-1"], "--seed -1"),
        (["--stop", ""], "--stop: an empty text"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(words, told):
    with pytest.raises(Refusal) as caught:
        command.main([*words, "x"])
    assert told in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "ended"),
    [
        (BrokenPipeError(32, "Broken pipe"), 0),
        (OSError(28, "No space left on device"), "offramp: standard output could not be written (No space left"),
    ],
)
def test_a_reader_that_has_seen_enough_is_no_error_and_a_full_disk_is_one_line(monkeypatch, error, ended):
    def write(words):
        raise error

    monkeypatch.setattr(command, "main", write)
    monkeypatch.setattr(streams, "drop_output", lambda: None)
    said = command.entry()
    assert said == ended or said.startswith(ended)

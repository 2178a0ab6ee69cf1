"""The text of a row is found by name, by path or as a chat; a message about it names a setting that then works."""

import json
import re

import pytest

from stages.data.corpus import Corpus
from stages.files.artifacts import Refusal


def corpus_of(root, rows, field="text"):
    (root / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return Corpus(source="files", paths=("a.jsonl",), root=root, text_field=field)


def refusal(corpus):
    with pytest.raises(Refusal) as caught:
        list(corpus)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_dotted_path_leads_into_a_row_and_a_name_with_a_dot_comes_first(tmp_path):
    rows = [{"meta": {"text": "a"}}, {"meta": None}, {"meta.text": "b", "meta": {"text": "c"}}]
    corpus = corpus_of(tmp_path, rows, "meta.text")
    assert list(corpus) == ["a", "b"] and corpus.empty == 1


def test_a_path_reads_one_column_of_parquet(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"id": 1, "meta": {"text": "a", "n": 1}}, {"id": 2, "meta": None}, {"id": 3, "meta": {"text": "b", "n": 1}}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    parquet.write_table(arrow.table({"meta.text": ["c"], "meta": ["d"]}), tmp_path / "b.parquet")
    corpus = Corpus(source="files", paths=("*.parquet",), root=tmp_path, text_field="meta.text")
    assert list(corpus) == ["a", "b", "c"] and corpus.empty == 1
    assert "set corpus.text_field=meta.text," in refusal(
        Corpus(source="files", paths=("a.parquet",), root=tmp_path, text_field="text")
    )


def test_a_chat_becomes_one_text_by_the_stated_rule(tmp_path):
    image = {"type": "image_url", "image_url": {"url": "x"}}
    parts = [{"type": "text", "text": "Look:"}, image, {"type": "text", "text": "?"}]
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello\nyou"}]},
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": None, "tool_calls": []}]},
        {"messages": [{"from": "human", "value": "older form"}]},
        {"messages": None},
        {"messages": [{"role": "assistant", "content": None}]},
    ]
    corpus = corpus_of(tmp_path, rows, "messages")
    assert list(corpus) == ["user: Hi\n\nassistant: Hello\nyou", "user: Look:\n?", "human: older form"]
    assert corpus.empty == 2


def test_rows_without_the_field_are_skipped_and_counted_apart_from_nulls(tmp_path, capsys):
    corpus = corpus_of(tmp_path, [{"title": "x"}, {"text": "a"}, {"text": None}, {"title": "y"}, {"text": "b"}])
    assert list(corpus) == ["a", "b"]
    card = corpus.describe()
    assert "skipped 2 rows without the field 'text'" in capsys.readouterr().err
    assert card["rows_without_field_skipped"] == 2 and card["empty_documents_skipped"] == 1


CHAT = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    "row, field, works",
    [
        ({"id": 1, "title": "x"}, "text", ["title"]),
        ({"id": 1, "meta": {"deep": {"text": "x"}}}, "text", ["meta.deep.text"]),
        ({"id": 1, "messages": CHAT, "url": "x"}, "text", ["messages", "url"]),
        ({"text": {"body": "x"}, "title": "y"}, "text", ["text.body"]),
        ({"text": ["a"], "title": "y"}, "text", ["title"]),
        ({"text": 5, "meta": {"odd.name": "no path leads here", "text": "x"}}, "text", ["meta.text"]),
    ],
)
def test_what_a_message_proposes_works(tmp_path, row, field, works):
    message = refusal(corpus_of(tmp_path, [row], field))
    proposal = r"set corpus\.text_field=(\S+?),? (?:\(or ([^)]*)\), )?in params.yaml as"
    first, others = re.search(proposal, message).groups()
    assert [first, *filter(None, (others or "").split(", "))] == works
    for proposed in works:
        assert len(list(corpus_of(tmp_path, [row], proposed))) == 1


@pytest.mark.parametrize("row", [{"id": 1, "tokens": ["a", "b"]}, {}])
def test_where_no_field_is_text_no_setting_is_proposed(tmp_path, row):
    message = refusal(corpus_of(tmp_path, [row]))
    assert "corpus.text_field" not in message and "convert the data" in message


def test_a_stream_is_given_up_after_its_first_rows_but_not_where_earlier_ones_had_the_field(tmp_path):
    from stages.data.fields import WITHOUT_FIELD, field_texts

    rows = [("somewhere", {"title": "x"})] * 50
    with pytest.raises(Refusal, match="corpus.text_field=title"):
        list(field_texts(iter(rows), "text", "a stream", patience=10))
    assert [text for _, text in field_texts(rows, "text", "a stream", 10, found=True)] == [WITHOUT_FIELD] * 50

"""Equal conditions must give equal bytes and a break of that is loud; other conditions say what moved."""

import copy
import subprocess

import pytest

from stages.files.artifacts import Refusal, write_json
from stages.run import compare

RECORD = {
    "conditions": {"processor": "AuthenticAMD family 25 model 17", "torch": "2.13.0+cpu"},
    "recipe": "r",
    "inputs": {"artifacts/data": "d"},
    "outs": {"artifacts/teacher": "t", "plots/pretrain.csv": "p"},
    "metrics": {"validation_bits_per_byte": 1.2345, "best.bits_per_byte": 1.0},
}


def changed(**parts):
    record = copy.deepcopy(RECORD)
    for part, value in parts.items():
        record[part] = record[part] | value if isinstance(value, dict) else value
    return record


def said(record):
    return compare.sentence("pretrain", compare.compare(RECORD, record))


def test_the_same_run_again_is_told_in_few_words():
    assert said(changed()) == "pretrain: same bytes as the committed run"


def test_other_bytes_under_the_same_conditions_are_a_warning_that_names_the_out():
    line = said(changed(outs={"artifacts/teacher": "other"}))
    assert line.startswith("WARNING: pretrain: artifacts/teacher: other bytes than those of the committed run")
    assert "plots/pretrain.csv" not in line and "no headline metric moved" in line


def test_another_machine_is_named_with_the_move_of_the_metric_that_moved_most():
    other = changed(
        conditions={"processor": "GenuineIntel family 6 model 207", "ATEN_CPU_CAPABILITY": "avx2"},
        outs={"artifacts/teacher": "other"},
        metrics={"validation_bits_per_byte": 1.2361, "best.bits_per_byte": 1.0001},
    )
    assert said(other) == (
        "pretrain: made under other conditions than the committed run (processor: AuthenticAMD family 25 model 17"
        " -> GenuineIntel family 6 model 207; ATEN_CPU_CAPABILITY: none -> avx2): bytes may differ, and do;"
        " validation_bits_per_byte 1.2345 -> 1.2361 (+0.13%), 1 more by less"
    )


def test_another_machine_with_the_same_bytes_is_told_too():
    assert said(changed(conditions={"torch": "2.13.0+cu130"})).endswith("bytes may differ, these are the same")


@pytest.mark.parametrize("part", [{"recipe": "edited"}, {"inputs": {"artifacts/data": "other"}}])
def test_an_edit_or_another_input_explains_other_bytes_and_nothing_is_said(part):
    assert said(changed(outs={"artifacts/teacher": "other"}, **part)) == ""


def test_a_metric_that_was_zero_or_is_new_divides_by_nothing():
    other = changed(conditions={"torch": "3"}, outs={"plots/pretrain.csv": "o"}, metrics={"new": 1.0})
    assert "no headline metric moved" in said(other)
    assert "x 0 -> 2" in compare.largest_move(compare.Comparison(True, {}, [], [], {"x": (0.0, 2.0)}))


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A checkout whose commit holds the record of pretrain."""
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    (tmp_path / "dvc.yaml").write_text("stages: {config: {}, pretrain: {}, evaluate: {}}")
    write_json(tmp_path / "provenance/pretrain.json", RECORD)
    write_json(tmp_path / "provenance.json", {"pretrain": RECORD})
    git = ["git", "-C", str(tmp_path), "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "run"], ["tag", "first"]):
        subprocess.run([*git, *words], check=True)
    return tmp_path


def test_the_command_compares_with_the_commit_a_tag_or_a_folder(repository, tmp_path_factory, capsys):
    for words in ([], ["first"], [str(repository)]):
        assert compare.main(words) == 0
        header, row = capsys.readouterr().out.splitlines()
        assert header.split()[:2] == ["stage", "settings"]
        assert row.split() == ["pretrain", "same", "same", "same", "same", "same"]
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    other = changed(conditions={"torch": "2.12.0"}, outs={"plots/x": "o"})
    write_json(elsewhere / "provenance.json", {"pretrain": other})  # where nothing has run
    assert compare.main([str(elsewhere)]) == 0
    row, told = capsys.readouterr().out.splitlines()[1:]
    assert row.split()[2:] == ["1", "other", "same", "1", "other", "same"]
    assert told == "torch: 2.12.0 -> 2.13.0+cpu (pretrain)"


def test_a_broken_promise_ends_the_command_with_code_1(repository, capsys):
    write_json(repository / "provenance/pretrain.json", changed(outs={"artifacts/teacher": "other"}))
    assert compare.main([]) == 1
    assert "WARNING: pretrain: artifacts/teacher" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["no-such-tag"], ["--help-me"], ["one", "two"]])
def test_a_comparison_with_nothing_is_refused(repository, words):
    with pytest.raises(Refusal):
        compare.main(words)


def test_without_git_or_with_a_foreign_file_there_is_no_committed_record(tmp_path, repository):
    assert compare.committed(tmp_path / "nowhere", "pretrain") is None
    write_json(repository / "provenance/evaluate.json", {"another": "form"})
    assert compare.in_folder(repository, "evaluate") is None

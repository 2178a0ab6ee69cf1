"""The table of the engines side by side: what it says of runs that are equal, that differ, and that could not be."""

import pytest

from benchmarks import engines
from benchmarks.engines import NotHere, Outcome, as_markdown, differing, outcome

SHA = "0123456789abcdef" * 4
LOCAL = Outcome("local", "ran", 1, 2.5, 3.25, SHA)


def ran(trees, out):
    """As an engine that leaves a model."""
    model, curve = trees[0] / out / "artifacts/teacher/model.safetensors", trees[0] / out / "plots/pretrain/teacher.csv"
    for file, text in ((model, "weights"), (curve, "step,loss,validation_bits_per_byte\n10,3.0,\n12,2.5,3.25\n")):
        file.parent.mkdir(parents=True)
        file.write_text(text)
    return 2, "ran: two workers"


def absent(trees, out):
    raise NotHere("ray is not installed: make test-engines")


def test_a_run_is_told_by_its_last_loss_and_its_weights_and_one_that_cannot_be_by_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "RUNS", {"torchrun": ran, "ray": absent})
    found = outcome("torchrun", [tmp_path])
    assert (found.nodes, found.loss, found.bits_per_byte) == (2, 2.5, 3.25) and len(found.sha256) == 64
    assert outcome("ray", [tmp_path]) == Outcome("ray", "not here: ray is not installed: make test-engines")


def test_other_bytes_are_named():
    same, other = Outcome("torchrun", "ran: two nodes", 2, 2.5, 3.25, SHA), Outcome("ray", "ran", 2, 2.6, 3.3, "f" * 64)
    absent = Outcome("slurm", "not here: no sbatch")
    assert differing([LOCAL, same, absent]) == [] and differing([LOCAL, same, absent, other]) == ["ray"]
    lines = as_markdown([LOCAL, same, absent, other]).splitlines()
    assert "| local | ran | 1 x 2 | 2.50000 | 3.25000 | `0123456789abcdef` | (the first) |" in lines
    assert "| torchrun | ran: two nodes | 2 x 1 | 2.50000 | 3.25000 | `0123456789abcdef` | yes |" in lines
    assert "| slurm | not here: no sbatch | | | | | |" in lines
    assert "| ray | ran | 2 x 1 | 2.60000 | 3.30000 | `ffffffffffffffff` | NO |" in lines


@pytest.mark.parametrize(
    ("marks", "told"),
    [
        (set(), "rendered, read by boto3 1.2 and moto[sagemaker] 3.4"),
        ({"skipped"}, "rendered; not read here: make test-engines installs boto3 1.2 and moto[sagemaker] 3.4"),
    ],
)
def test_a_document_is_called_read_only_where_its_parser_read_it(marks, told):
    versions = {"boto3": "1.2", "moto[sagemaker]": "3.4"}
    assert engines._read("sagemaker", marks, tuple(versions), versions) == Outcome("sagemaker", told)
    with pytest.raises(RuntimeError, match="^sagemaker: its parser does not take the document"):
        engines._read("sagemaker", {"failure"}, tuple(versions), versions)


def test_the_parsers_that_the_table_names_are_tests_and_pinned_packages():
    tests, pins = (engines.ROOT / engines.PARSER_TESTS).read_text(), (engines.ROOT / "tests/engines.txt").read_text()
    for test, packages in engines.PARSERS.values():
        assert f"def {test}(" in tests and all(f"{package}==" in pins for package in packages)

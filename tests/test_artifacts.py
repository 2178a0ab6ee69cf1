"""Files that stages write: exact JSON, whole files, checksums."""

import math

import numpy as np
import pytest

from stages.files.artifacts import Refusal, read_json, rounded, sha256_of, write_json, written_whole


def test_json_is_canonical_whole_and_exact(tmp_path):
    value = {"b": 1 / 3, "a": [1e-9 / 7, True, None], "c": np.float32(0.1), "d": np.arange(3)}
    write_json(tmp_path / "a.json", value)
    write_json(tmp_path / "b.json", dict(reversed(value.items())) | {"a": (1e-9 / 7, True, None)})
    assert sha256_of(tmp_path / "a.json") == sha256_of(tmp_path / "b.json")
    assert read_json(tmp_path / "a.json") == value | {"c": float(np.float32(0.1)), "d": [0, 1, 2]}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_metrics_are_rounded_to_six_digits():
    figures = {"loss": [1 / 3, np.float32(2 / 3)], "steps": 1_234_567, "name": "a", "none": None, "yes": True}
    assert rounded(figures) == figures | {"loss": [0.333333, 0.666667]}


@pytest.mark.parametrize("bad", [math.nan, math.inf, np.array([1.0, math.nan])])
def test_json_that_is_not_finite_is_refused_by_name_and_leaves_the_file(tmp_path, bad):
    write_json(tmp_path / "a.json", {"loss": 1.0})
    with pytest.raises(Refusal, match=r"a\.json was not written: models\.0\.loss(\.1)? is (nan|inf)"):
        write_json(tmp_path / "a.json", {"models": [{"loss": bad}]})
    assert read_json(tmp_path / "a.json") == {"loss": 1.0}


def test_the_checksum_of_a_folder_depends_on_names_and_contents(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x").write_text("1")
    first = sha256_of(tmp_path / "a")
    (tmp_path / "a/x").rename(tmp_path / "a/y")
    assert sha256_of(tmp_path / "a") != first


def test_damaged_json_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(Refusal, match="not JSON"):
        read_json(tmp_path / "a.json")
    with pytest.raises(Refusal, match="missing"):
        read_json(tmp_path / "b.json")


def test_a_file_that_another_writer_makes_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "model.gguf"
    with pytest.raises(OSError), written_whole(path) as partial:
        partial.write_bytes(b"half")
        raise OSError("the disk is full")
    assert not list(tmp_path.iterdir())
    with written_whole(path) as partial:
        partial.write_bytes(b"whole")
        assert not path.exists()
    assert [found.name for found in tmp_path.iterdir()] == ["model.gguf"] and path.read_bytes() == b"whole"

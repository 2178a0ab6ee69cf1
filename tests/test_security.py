"""Nothing that a stage reads can run code: traps in place of every artifact, and rules held over the sources."""

import ast
import hashlib
import io
import json
import os
import pickle
import runpy
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from test_shards import BPE, folder_of
from test_student import SHAPE

from stages.data.shards import Tokens, load_tokenizer, read_card, write_card
from stages.files.artifacts import ROOT, Refusal, read_json, sha256_of, write_json
from stages.files.resuming import ResumeState
from stages.measure import scoring
from stages.model import hub as models
from stages.run.entry import _resolved
from stages.settings.compose import compose
from stages.settings.schema import validate
from stages.tracking import records
from stages.training.checkpoints import Checkpoint


class Trap:
    """Unpickled without care, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "executed"


def npy(trap):
    buffer = io.BytesIO()
    np.save(buffer, np.array([trap], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def torch_file(trap):
    buffer = io.BytesIO()
    torch.save({"step": 1, "model": trap}, buffer)
    return buffer.getvalue()


TRAPS = {
    "pickle": pickle.dumps,
    "old pickle": lambda trap: pickle.dumps(trap, protocol=0),
    "torch": torch_file,
    "npy": npy,
    "yaml": lambda trap: f"!!python/object/apply:os.mkdir ['{trap.path}']\n".encode(),
}
OPENERS = {
    "pickle": pickle.loads,
    "old pickle": pickle.loads,
    "torch": lambda content: torch.load(io.BytesIO(content), weights_only=False),
    "npy": lambda content: np.load(io.BytesIO(content), allow_pickle=True),
    "yaml": lambda content: yaml.load(content, yaml.UnsafeLoader),
}


@pytest.fixture(params=TRAPS)
def trap(request, marker):
    """The bytes of a file that runs code where it is read carelessly: proven on each, then disarmed."""
    content = TRAPS[request.param](Trap(marker))
    OPENERS[request.param](content)
    marker.rmdir()
    return content


def refused(marker, read, *words):
    with pytest.raises(Refusal, match=words[0] if words else None) as refusal:
        read()
    assert not marker.exists() and "\n" not in str(refusal.value)


@pytest.fixture
def data(tmp_path):
    return folder_of(tmp_path / "data", BPE)


@pytest.fixture
def model(tmp_path):
    models.save(models.new_model(SHAPE, seed=1), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_model_folder(model, trap, marker, name):
    (model / name).write_bytes(trap)
    if name == "model.safetensors":  # an attacker would mend the hashes too
        config = json.loads((model / "config.json").read_text())
        del config["config_sha256"]
        write_json(model / "config.json", config | {"weights_sha256": sha256_of(model / name)})
    refused(marker, lambda: models.load(model), name)


@pytest.mark.parametrize("name", ["card.json", "train-documents.npy", "train-00000.bin"])
def test_a_data_folder(data, trap, marker, name):
    (data / name).write_bytes(trap)
    refused(marker, lambda: Tokens(data, "train"), name)


def vouched(data, change):
    """The card, changed and with a checksum of its own that is right."""
    card = read_card(data)
    card.pop("sha256")
    change(card)
    write_card(data, card)


def test_a_table_of_documents_that_the_card_vouches_for(data, trap, marker):
    path = data / "train-documents.npy"
    path.write_bytes(trap)
    vouched(data, lambda card: card["splits"]["train"]["documents_table"].update(sha256=sha256_of(path)))
    refused(marker, lambda: Tokens(data, "train"), path.name)


def test_a_tokenizer(data, trap, marker):
    path = data / "tokenizer.json"
    path.write_bytes(trap)
    refused(marker, lambda: load_tokenizer(data), path.name)
    vouched(data, lambda card: card.update(tokenizer_sha256=sha256_of(path)))
    refused(marker, lambda: load_tokenizer(data), path.name)


def test_a_checkpoint_is_dropped_and_the_fit_starts_again(tmp_path, trap, marker, capsys):
    (tmp_path / "teacher-1.pt").write_bytes(trap)
    index = {"file": "teacher-1.pt", "sha256": sha256_of(tmp_path / "teacher-1.pt"), "step": 1}
    write_json(tmp_path / "teacher.json", index)
    assert Checkpoint(tmp_path, "teacher").load() is None
    (tmp_path / "teacher.json").write_bytes(trap)
    assert Checkpoint(tmp_path, "teacher").load() is None
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2 and all("damaged" in line for line in told) and not marker.exists()


def test_the_progress_of_a_scoring_is_dropped_and_it_starts_again(tmp_path, trap, marker, capsys):
    with ResumeState(tmp_path, "evaluate", "key") as state:
        for content in (trap, hashlib.sha256(trap).digest() + trap):
            (state.folder / scoring.SUMS).write_bytes(content)
            sums, confidences = np.zeros((1, 2, 3)), np.zeros((1, 4), dtype=np.float32)
            assert scoring._continue(state, sums, confidences, sequence_tokens=4) == 0
            assert not sums.any() and not confidences.any() and not marker.exists()
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and all("damaged" in line for line in told)


def test_the_resolved_settings(tmp_path, trap, marker):
    path = tmp_path / "resolved.yaml"
    path.write_bytes(trap)
    refused(marker, lambda: _resolved(path, ("seed",)), "resolved.yaml")


@pytest.mark.parametrize("name", ["params.yaml", "conf/base.yaml", "conf/config.yaml", "conf/scale/tiny.yaml"])
def test_the_sheet_and_the_presets(tmp_path, trap, marker, name):
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    shutil.copy(ROOT / "params.yaml", tmp_path / "params.yaml")
    (tmp_path / name).write_bytes(trap)
    refused(marker, lambda: validate(compose(["scale=tiny"], root=tmp_path)))


def test_the_record_of_a_run_and_what_was_sent_of_it(tmp_path, trap, marker):
    (tmp_path / "events.jsonl").write_bytes(trap)
    (tmp_path / "sent.json").write_bytes(trap)
    assert records.read_lines(tmp_path / "events.jsonl") == [] and records.read_sent(tmp_path) == {}
    assert not marker.exists()


@pytest.mark.parametrize("name", ["..", "../../other", "/etc", "", "files", "files/..", "files/0-a/../..", None, 3])
def test_a_record_names_only_files_of_its_own(tmp_path, name):
    whole = {"kind": "artifact", "file": "files/0-a.csv"}
    lines = [json.dumps(whole), json.dumps({"kind": "model", "file": name})]
    (tmp_path / "events.jsonl").write_text("\n".join(lines) + "\n")
    assert records.read_lines(tmp_path / "events.jsonl") == [whole]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_damage_of_a_record_costs_only_the_lines_it_meets(data):
    written = [{"kind": "metrics", "step": number, "values": {"loss": 1 / (number + 1)}} for number in range(9)]
    lines = [json.dumps(line).encode() + b"\n" for line in written]
    content = b"".join(lines)
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(content))] * 2)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "events.jsonl"
        path.write_bytes(content[:start] + data.draw(st.binary(max_size=20)) + content[end:])
        read = records.read_lines(path)
    edges = [sum(map(len, lines[:number])) for number in range(10)]
    met = [number for number in range(9) if edges[number + 1] >= start and edges[number] <= end]
    assert [line for line in written if line in read] == [line for line in read if line in written]
    assert all(line in read for number, line in enumerate(written) if number not in met)


@settings(max_examples=200, deadline=None)
@given(st.recursive(st.none() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_whatever_stands_in_sent_json_is_states_by_store_or_nothing(anything):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sent.json").write_text(json.dumps(anything))
        assert isinstance(records.is_sent(Path(folder)), bool)


def test_a_served_model(model, data, trap, marker):
    from types import SimpleNamespace

    from stages.tracking.served_model import ServedModel

    (model / "model.safetensors").write_bytes(trap)
    context = SimpleNamespace(artifacts={"model": str(model), "tokenizer": str(data)})
    refused(marker, lambda: ServedModel().load_context(context), "model.safetensors")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "\0", '"\\ud800'])
def test_json_made_to_exhaust_its_reader_is_refused(tmp_path, marker, text):
    (tmp_path / "a.json").write_text(text)
    refused(marker, lambda: read_json(tmp_path / "a.json"), "a.json is not JSON")


# ---- known vulnerabilities


def test_the_audit_counts_what_it_found_and_names_what_it_could_not_audit():
    audit = runpy.run_path(str(ROOT / ".ci/audit.py"))["verdict"]
    whole, odd = {"name": "a", "version": "1", "vulns": []}, {"name": "b", "skip_reason": "not found"}
    hole = {"name": "c", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["2.1"]}]}
    assert audit([whole]) == (["0 known vulnerabilities in 1 of 1 pinned packages"], 0)
    assert audit([odd]) == (["not audited: the service answered for none of the pinned packages"], 0)
    lines, code = audit([whole, odd, hole])
    assert lines[0] == "c 2: CVE-1, mended in 2.1" and lines[1] == "not audited: b" and code == 1


# ---- the sources


def calls():
    """(where, dotted name, call) of every call under stages/."""
    for path in sorted((ROOT / "stages").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield f"{path.name}:{node.lineno}", ast.unparse(node.func), node


def keyword(call, name):
    return next((ast.unparse(word.value) for word in call.keywords if word.arg == name), None)


def test_no_source_calls_what_runs_code_that_it_reads():
    forbidden = {"eval", "exec", "compile", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
    found = [f"{where} {name}" for where, name, _ in calls() if name in forbidden]
    for word in ("shell", "trust_remote_code"):
        found += [f"{where} {word}=True" for where, _, call in calls() if keyword(call, word) not in (None, "False")]
    assert not found


def test_arrays_and_checkpoints_are_read_as_data_only():
    loads = {"torch.load": ("weights_only", "True")}
    loads |= dict.fromkeys(["np.load", "np.lib.format.read_array"], ("allow_pickle", "False"))
    seen = [(where, name, call) for where, name, call in calls() if name in loads]
    assert len(seen) >= 3, "the rule meets what it is for"
    assert not [f"{where} {name}" for where, name, call in seen if keyword(call, loads[name][0]) != loads[name][1]]


def test_no_source_imports_a_pickler():
    picklers = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    for path in (ROOT / "stages").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            assert not picklers.intersection(name.split(".")[0] for name in names), path

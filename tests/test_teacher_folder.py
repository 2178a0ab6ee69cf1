"""A teacher from a folder: what is refused before any work, what DVC sees of it, how it becomes artifacts/teacher."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_student import SHAPE as QWEN3

from benchmarks.checkout import checkout, environment
from benchmarks.checkout import stage as run_stage
from stages import prepare, pretrain
from stages.data.fingerprints import refuse_changed, teacher_fingerprint
from stages.data.shards import load_tokenizer, read_card
from stages.data.teacher_folder import teacher_folder
from stages.files import weight_files
from stages.files.artifacts import Refusal, read_json, write_json
from stages.model.hub import load, new_model, save
from stages.prepare import train_tokenizer
from stages.run.entry import Place
from stages.settings.compose import compose
from stages.settings.reading import picked
from stages.settings.schema import validate
from stages.tracking.record import Run

TEXTS = [f"Document {number} says {number * number}, and {'again ' * (number % 5)}so on.\n" * 8 for number in range(90)]
PADDED = 320  # rows of the embedding; the tokenizer has 300 tokens
LLAMA = replace(QWEN3, vocab_size=PADDED, sequence_tokens=64, kind="llama", tied=True, norm_epsilon=1e-5)


@pytest.fixture(scope="module")
def mine(tmp_path_factory) -> Path:
    """A folder as transformers leaves it: a tied Llama of random weights in two files, and a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "mine"
    save(new_model(LLAMA, seed=5), folder)
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {key: config[key] for key in config if not key.endswith("sha256")})
    split_weights(folder, 2)
    (folder / "tokenizer.json").write_text(train_tokenizer("bpe", 300, TEXTS).to_json())
    (folder / "README.md").write_text("a model\n")
    return folder


def split_weights(folder: Path, files: int, dtype: torch.dtype = torch.float32) -> None:
    tensors, weight_map = load_file(folder / "model.safetensors"), {}
    for number in range(files):
        name = f"model-{number:05d}.safetensors"
        part = {key: tensors[key].to(dtype) for key in sorted(tensors)[number::files]}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors").unlink()


@pytest.fixture
def root(tmp_path, mine) -> Path:
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / f"texts/{number}.txt").write_text(text)
    shutil.copytree(mine, tmp_path / "models/mine")
    return tmp_path


def teacher(**changes) -> SimpleNamespace:
    return SimpleNamespace(**{"source": "folder", "path": "models/mine", "end_of_text": None} | changes)


# ---- before any work


@pytest.mark.parametrize(
    ("damage", "path", "line"),
    [
        ("none", "models/other", "teacher.path: models/other does not exist (looked in "),
        ("none", "models/mine/config.json", "teacher.path: models/mine/config.json is a file (looked in "),
        ("none", "models/none.gguf", "teacher.path: models/none.gguf does not exist (looked in "),
        ("none", "models/mine.gguf", "teacher.path = models/mine.gguf: "),
        ("config.json", "models/mine", "teacher.path: models/mine has no config.json: save model and tokenizer"),
        ("tokenizer.json", "models/mine", "teacher.path: models/mine has no tokenizer.json: save model and tokenizer"),
        ("*.safetensors", "models/mine", "teacher.path: models/mine has no *.safetensors: pytorch_model.bin may be"),
    ],
)
def test_a_path_that_is_no_model_is_refused_in_one_line(root, damage, path, line):
    (root / "models/mine/pytorch_model.bin").write_bytes(b"a pickle")
    (root / "models/mine.gguf").write_bytes(b"beside a folder that was not made of it")
    for file in (root / "models/mine").glob(damage):
        file.unlink()
    with pytest.raises(Refusal) as refusal:
        teacher_folder(path, root)
    assert str(refusal.value).startswith(line) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("auto_map", "config.json: auto_map is set: it asks for code from its folder, and none is executed"),
        ("quantization_config", "config.json: quantization_config is set: its weights are quantised: save the folder"),
    ],
)
def test_a_folder_that_cannot_be_read_is_refused_by_config_before_any_work(root, key, line):
    path = root / "models/mine/config.json"
    config = read_json(path)
    write_json(path, config | {key: {"AutoModel": "model.py"}})
    with pytest.raises(Refusal, match=line):
        teacher_fingerprint(teacher(), root)
    path.write_text("{")
    with pytest.raises(Refusal, match="config.json is not JSON .*: copy the file to the folder again"):
        teacher_fingerprint(teacher(), root)
    write_json(path, config)
    shard = root / "models/mine/model-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(Refusal, match="model-00001.safetensors is damaged .*: copy the file to the folder again"):
        teacher_fingerprint(teacher(), root)
    shard.unlink()
    with pytest.raises(Refusal, match="model-00001.safetensors is missing, which .* names: copy it again"):
        teacher_fingerprint(teacher(), root)


def test_other_weights_or_another_tokenizer_are_another_teacher_and_a_readme_is_not(root):
    folder = root / "models/mine"
    before = teacher_fingerprint(teacher(), root)
    assert before == teacher_fingerprint(teacher(path=str(folder)), root) and str(root) not in json.dumps(before)
    (folder / "README.md").write_text("another text\n")
    assert teacher_fingerprint(teacher(), root) == before
    assert teacher_fingerprint(teacher(source="train", path=None), root) is None
    for name in ("model-00001.safetensors", "tokenizer.json", "config.json"):
        content = (folder / name).read_bytes()
        changed = content[:-1] + bytes([content[-1] ^ 1]) if name.endswith("safetensors") else content + b"\n"
        (folder / name).write_bytes(changed)
        assert teacher_fingerprint(teacher(), root) != before, name
        (folder / name).write_bytes(content)
    assert teacher_fingerprint(teacher(), root) == before


def test_a_folder_that_changed_since_config_saw_it_is_refused(root):
    corpus = SimpleNamespace(source="files", paths=("texts/*.txt",), dataset=None)
    settings = SimpleNamespace(corpus=corpus, teacher=teacher())
    write_json(root / "inputs.json", {"teacher": teacher_fingerprint(teacher(), root)})
    refuse_changed(settings, root)
    (root / "models/mine/tokenizer.json").write_text("{}")
    with pytest.raises(Refusal, match="^the teacher is not the one that inputs.json describes: it has changed since"):
        refuse_changed(settings, root)


# ---- prepare and pretrain


def settings_of(sections, *words):
    small = ("scale=tiny", "corpus=files", "corpus.paths=[texts/*.txt]", "prepare.max_documents=0")
    plain = compose([*small, "sequence_tokens=16", "teacher=folder", "teacher.path=models/mine", *words])
    return validate(picked(plain, sections), sections)


def prepared(root: Path, *words) -> Path:
    prepare.main(settings_of(prepare.SECTIONS, *words), Place(root, root), Run())
    return root / "artifacts/data"


def test_prepare_takes_the_tokenizer_as_it_is_with_the_vocabulary_of_the_embedding(root):
    data = prepared(root)
    card, tokenizer = read_card(data), load_tokenizer(data)
    assert card["vocab_size"] == tokenizer.vocab_size == PADDED
    assert card["teacher"] == teacher_fingerprint(teacher(), root)
    assert tokenizer.encode(TEXTS[7]) == train_tokenizer("bpe", 300, TEXTS).encode(TEXTS[7])
    assert tokenizer.decode([*tokenizer.encode(TEXTS[3]), PADDED - 1]) == TEXTS[3], "a padded row stands for no text"
    assert "tokens, the teacher's own" in (data / "CORPUS.md").read_text()


def rank_of(monkeypatch, ranks=1):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(ranks))


def fit_of(root, *words):
    (fit,) = pretrain.fits(settings_of(pretrain.SECTIONS, *words), Place(root, root), None)
    return fit


def test_pretrain_says_what_the_teacher_takes_and_keeps_it_as_it_is(root, monkeypatch, capsys):
    prepared(root)
    rank_of(monkeypatch)
    fit = fit_of(root)
    files = weight_files.weight_files(root / "models/mine")
    told = capsys.readouterr().out
    size = f"{files.parameters:,} parameters, {4 * files.parameters:,} bytes in memory"
    assert told.startswith(f"teacher: models/mine: {size}")
    assert "tokens/s forward on a rank's processor, by matrix products of 512 x 1024 x 1024 timed now" in told
    assert (fit.steps, fit.unknown_before, fit.model.shape) == (0, True, LLAMA)
    assert torch.equal(fit.model.head.weight, load(root / "models/mine").embedding.weight)


def test_a_teacher_that_does_not_fit_data_memory_or_context_is_refused(root, monkeypatch):
    data = prepared(root)
    rank_of(monkeypatch, ranks=2)
    for early in (fit_of, prepared):
        with pytest.raises(Refusal, match="^sequence_tokens = 65: max_position_embeddings is 64 in .*config.json: set"):
            early(root, "sequence_tokens=65")
    files = weight_files.weight_files(root / "models/mine")
    needed = 3 * files.bytes  # in two ranks, and a copy that is written
    monkeypatch.setattr(weight_files, "available_bytes", lambda: needed - 1)
    figures = f"{files.bytes:,} bytes in each of 2 ranks, and loading and saving them {needed:,} in all; {needed - 1:,}"
    with pytest.raises(Refusal, match=figures):
        fit_of(root)
    monkeypatch.setattr(weight_files, "available_bytes", lambda: needed)
    assert fit_of(root).model.shape == LLAMA
    place = Place(root, root)
    assert len(pretrain.sources_of(settings_of(pretrain.SECTIONS), place)) == 1
    assert pretrain.sources_of(settings_of(pretrain.SECTIONS, "teacher=train", "teacher.path=null"), place) == {}
    save(new_model(replace(LLAMA, vocab_size=301), seed=0), root / "models/mine")
    with pytest.raises(Refusal, match="^artifacts/data was not made with models/mine as it is now: run dvc repro prep"):
        pretrain.sources_of(settings_of(pretrain.SECTIONS), place)
    with pytest.raises(Refusal, match="mine: vocab_size is 301, artifacts/data has 320: run dvc repro prepare"):
        fit_of(root)
    assert data.is_dir()


def test_what_is_free_is_read_from_the_kernel_and_a_larger_model_is_refused_before_it_is_read(mine, monkeypatch):
    assert weight_files.available_bytes() > 1 << 20
    monkeypatch.setattr(weight_files, "available_bytes", lambda: 1000)
    with pytest.raises(Refusal, match=r"mine: [\d,]+ parameters take [\d,]+ bytes, and loading them [\d,]+ in all; 1"):
        load(mine)
    monkeypatch.setattr(weight_files, "available_bytes", lambda: None)
    assert load(mine).shape == LLAMA


PEAK = """
import sys
from pathlib import Path
from stages.model.hub import load
def resident(kind):
    line = next(line for line in open("/proc/self/status") if line.startswith(kind))
    return int(line.split()[1]) * 1024
load(sys.argv[1])  # what the libraries take once
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = resident("VmRSS")
model = load(sys.argv[2])
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_peaks_at_the_model_and_one_file(mine, tmp_path):
    shape = replace(LLAMA, vocab_size=8192, width=384, heads=6, kv_heads=2, head_dim=64, mlp_width=1536, layers=5)
    save(new_model(shape, seed=0), tmp_path)
    config = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", {key: config[key] for key in config if not key.endswith("sha256")})
    split_weights(tmp_path, 8, torch.bfloat16)
    files = weight_files.weight_files(tmp_path)
    words = [sys.executable, "-c", PEAK, str(mine), str(tmp_path)]
    done = subprocess.run(words, env=environment(PYTHONPATH=os.getcwd()), capture_output=True, text=True, check=True)
    assert files.bytes * 0.9 < int(done.stdout) < 1.03 * (files.bytes + files.largest_file_bytes)


def test_the_stage_writes_the_outs_of_a_trained_teacher_and_says_what_is_not_known(root):
    chosen = {"seed: 1 ": "teacher: {source: folder, path: models/mine}\nseed: 1 ", "scale: demo ": "scale: tiny "}
    tree = checkout(root / "tree", edits={"params.yaml": chosen})
    prepared(root)
    shutil.copytree(root / "artifacts", tree / "artifacts")
    shutil.copytree(root / "models", tree / "models")
    run_stage(tree, "pretrain", "hydra.run.dir=outputs/mine", "sequence_tokens=16", "trainer.ranks=1")
    out = tree / "outputs/mine"
    metrics = read_json(out / "metrics/pretrain.json")
    assert (metrics["tokens"], metrics["expert_load"], metrics["source"]) == (0, [], "folder")
    made = read_json(out / "artifacts/costs/pretrain.json")["teacher"]
    assert (made["training_flops"], made["unknown_before"], made["config"]["model_type"]) == (0, True, "llama")
    rows = (out / "plots/pretrain/teacher.csv").read_text().splitlines()
    assert rows[1].startswith("0,,") and float(rows[1].split(",")[2]) == pytest.approx(
        metrics["validation_bits_per_byte"], abs=1e-4
    )
    theirs, ours = load(root / "models/mine"), load(out / "artifacts/teacher")
    assert all(torch.equal(part, ours.state_dict()[name]) for name, part in theirs.state_dict().items())
    card = (out / "artifacts/teacher/README.md").read_text()
    assert "a llama, read from a folder of its user's and not trained here" in card
    assert teacher_fingerprint(teacher(), root)["sha256"] in card

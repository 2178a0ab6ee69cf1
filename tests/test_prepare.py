"""prepare end to end on real text: nothing leaks, nothing depends on chance, too little is refused early."""

import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from stages.data.shards import SPLITS, Tokens, load_tokenizer
from stages.files.artifacts import Refusal, sha256_of
from stages.prepare import SECTIONS, main, train_tokenizer
from stages.run.entry import Place
from stages.settings.compose import compose
from stages.settings.reading import picked
from stages.settings.schema import validate
from stages.tracking.record import Run

ROOT = Path(__file__).parent.parent
TINY = (
    "scale=tiny",
    "corpus=files",
    "corpus.paths=[texts/*.txt]",
    "prepare.max_documents=0",
    "sequence_tokens=16",
)

HUB = ("corpus=huggingface", "corpus.paths=[]")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with 120 small documents, among them duplicates; each has a word of its own."""
    root = tmp_path_factory.mktemp("root")
    (root / "texts").mkdir()
    for number in range(120):
        word = (
            hashlib.sha256(str(number).encode())
            .hexdigest()[:12]
            .translate(str.maketrans("0123456789", "ghijklmnop"))
        )
        text = f"Document {number} speaks of {word}.\n" + f"The {word} sees a {word}, ünd so on.\n" * 12
        (root / "texts" / f"{number:03d}.txt").write_text(text, encoding="utf-8")
        if number % 20 == 0:
            (root / "texts" / f"{number:03d}-again.txt").write_text(text, encoding="utf-8")
    (root / "texts" / "blank.txt").write_text("\n")
    return root


def prepare(root, out, *overrides):
    plain = compose([*TINY, *overrides])
    main(validate(picked(plain, SECTIONS), SECTIONS), Place(root, out), Run())
    return out / "artifacts/data"


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory):
    return prepare(corpus, tmp_path_factory.mktemp("out"))


def texts_of(folder, split):
    tokens, tokenizer = Tokens(folder, split), load_tokenizer(folder)
    return [
        tokenizer.decode(tokens.window(start, count - 1).tolist()) for start, count, _ in tokens.documents
    ]


def source_texts(corpus):
    return {path.read_bytes().decode() for path in corpus.glob("texts/*.txt") if path.name != "blank.txt"}


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_every_document_comes_back_whole_in_exactly_one_split(corpus, tmp_path, kind):
    folder = prepare(corpus, tmp_path, f"prepare.tokenizer={kind}")
    counted = Counter(text for split in SPLITS for text in texts_of(folder, split))
    assert set(counted) == source_texts(corpus)
    assert set(counted.values()) == {1}


def test_card_and_metrics_say_what_is_on_disk(folder):
    card = json.loads((folder / "card.json").read_text())
    metrics = json.loads((folder.parents[1] / "metrics/prepare.json").read_text())
    assert card["duplicates_dropped"] == metrics["duplicates_dropped"] == 6
    assert metrics["documents_in_two_splits"] == 0
    assert card["corpus"]["empty_documents_skipped"] == 1
    assert card["vocab_size"] == load_tokenizer(folder).vocab_size <= 512
    assert card["tokenizer_sha256"] == sha256_of(folder / "tokenizer.json")
    for split in SPLITS:
        tokens, part = Tokens(folder, split), card["splits"][split]
        assert part["tokens"] == len(tokens) == sum(shard["tokens"] for shard in part["shards"])
        assert part["documents"] == len(tokens.documents)
        assert part["bytes"] == sum(len(text.encode()) for text in texts_of(folder, split))
        assert all(
            tokens.window(start + count - 1, 1)[0] == card["end_of_text"]
            for start, count, _ in tokens.documents
        )
    assert "| train |" in (folder / "CORPUS.md").read_text()
    assert (
        json.loads((folder.parents[1] / "measurements/prepare.json").read_text())["tokens_per_second_encoded"]
        > 0
    )


def test_tokenizer_is_trained_on_the_training_split_only(folder):
    again = train_tokenizer("bpe", 512, texts_of(folder, "train"))
    assert again.to_json() == (folder / "tokenizer.json").read_text()
    everything = train_tokenizer("bpe", 512, [text for split in SPLITS for text in texts_of(folder, split)])
    assert everything.to_json() != again.to_json()


def test_same_corpus_gives_the_same_bytes_in_another_process_and_place(corpus, folder, tmp_path):
    script = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from pathlib import Path; from test_prepare import prepare\n"
        "prepare(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, str(corpus), str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=120)
    assert sha256_of(tmp_path / "artifacts/data") == sha256_of(folder)
    assert sha256_of(tmp_path / "metrics") == sha256_of(folder.parents[1] / "metrics")


def test_outs_name_no_folder_of_this_machine(corpus, folder):
    written = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert str(corpus).encode() not in written and str(Path.home()).encode() + b"/" not in written


def test_document_stays_in_its_split_when_others_come_or_go(corpus, folder, tmp_path):
    fewer = prepare(corpus, tmp_path / "fewer", "prepare.max_documents=40")
    part = prepare(corpus, tmp_path / "part", "corpus.paths=[texts/0*.txt]")
    for split in SPLITS:
        whole = texts_of(folder, split)
        assert set(texts_of(fewer, split)) < set(whole) or split != "train"
        assert set(texts_of(fewer, split)) <= set(whole)
        assert set(texts_of(part, split)) <= set(whole)
    assert sum(len(texts_of(fewer, split)) for split in SPLITS) <= 40


def test_seed_changes_nothing_here(corpus, folder, tmp_path):
    assert sha256_of(prepare(corpus, tmp_path, "seed=5")) == sha256_of(folder)


def test_files_of_a_former_run_do_not_stay(corpus, folder, tmp_path):
    prepare(corpus, tmp_path, "prepare.shard_tokens=500")
    assert len(list((tmp_path / "artifacts/data").glob("train-*.bin"))) > 1
    assert sha256_of(prepare(corpus, tmp_path)) == sha256_of(folder)


def test_run_that_fails_leaves_no_card_of_an_earlier_one(corpus, tmp_path):
    folder = prepare(corpus, tmp_path)
    with pytest.raises(Refusal):
        prepare(corpus, tmp_path, "sequence_tokens=100000")
    assert not (folder / "card.json").exists()
    with pytest.raises(Refusal, match=r"card\.json is missing"):
        Tokens(folder, "train")


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["corpus.paths=['texts/00[01]*.txt','texts/blank.txt']"], r"has 2 documents \(left out: 1 empty .*, 1 exact"),
        (["sequence_tokens=100000"], r"its train split has \d+ tokens .* a sequence is 100001"),
        (["prepare.vocab_size=100"], "vocab_size"),
        (["corpus.paths=[nowhere/*.txt]"], r"nowhere/\*\.txt matches no file"),
    ],
)
def test_too_little_is_refused_in_one_line(corpus, tmp_path, overrides, words):
    with pytest.raises(Refusal, match=words) as caught:
        prepare(corpus, tmp_path, *overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("count", [10, 56])
def test_a_small_corpus_is_split_so_that_each_split_has_documents(corpus, tmp_path, count):
    for first in range(0, 60, 20):
        paths = ",".join(f"texts/{number:03d}.txt" for number in range(first, first + count))
        folder = prepare(corpus, tmp_path / str(first), f"corpus.paths=[{paths}]")
        card = json.loads((folder / "card.json").read_text())
        assert sum(part["documents"] for part in card["splits"].values()) == count
        assert card["splits"]["val"]["documents"] >= 1 and card["splits"]["test"]["documents"] >= 2
        told = "went to the one next to theirs" in (folder / "CORPUS.md").read_text()
        assert told == (card["documents_moved_to_fill_splits"] > 0)


def test_one_text_is_enough(corpus, tmp_path):
    text = "".join(f"Line {number} of the only book.\n" for number in range(2000))
    (tmp_path / "book.txt").write_text(text)
    folder = prepare(tmp_path, tmp_path / "out", "corpus.paths=[book.txt]")
    assert "1 text files were cut into pieces" in (folder / "CORPUS.md").read_text()
    assert all(texts_of(folder, split) for split in SPLITS)
    assert sum(len(text) for split in SPLITS for text in texts_of(folder, split)) == len(text)


def test_too_short_a_split_names_the_limit_that_left_documents_out(tmp_path):
    (tmp_path / "many").mkdir()
    for number in range(300):
        (tmp_path / "many" / f"{number}.txt").write_text(f"{number} words")
    words = ["corpus.paths=[many/*.txt]", "sequence_tokens=64"]
    with pytest.raises(Refusal, match="prepare.max_documents is 60 and left out 240 documents") as caught:
        prepare(tmp_path, tmp_path / "out", *words, "prepare.max_documents=60")
    assert "share" not in str(caught.value)
    with pytest.raises(Refusal, match="set prepare.val_share=0.1"):
        prepare(tmp_path, tmp_path / "out", *words)
    prepare(tmp_path, tmp_path / "out", *words, "prepare.val_share=0.1")


def test_what_was_left_out_and_names_of_any_bytes_stand_in_the_card(corpus, tmp_path):
    (tmp_path / "texts").mkdir()
    rows = [{"meta": {"text": path.read_text()}} for path in sorted(corpus.glob("texts/*.txt"))]
    rows += [{"meta": {}}, {"meta": {"text": None}}]
    name = os.path.join(os.fsencode(tmp_path), b"texts", b"caf\xe9.jsonl.gz")
    with gzip.open(name, "wb") as file:
        file.write("\n".join(map(json.dumps, rows)).encode("utf-8-sig"))
    (tmp_path / "texts" / "bad.jsonl").write_bytes(b"\xff")
    (tmp_path / "texts" / "gone.jsonl").symlink_to("nowhere")
    words = "corpus.paths=[texts/*]", "corpus.text_field=meta.text", "corpus.undecodable=skip"
    folder = prepare(tmp_path, tmp_path / "out", *words)
    card = json.loads((folder / "card.json").read_text())["corpus"]
    assert card["files"] == ["caf\\xe9.jsonl.gz"] and card["rows_without_field_skipped"] == 1
    assert card["empty_documents_skipped"] == 2, "the blank document and the null"
    said = (folder / "CORPUS.md").read_text()
    for words in ("1 rows without the field `meta.text`", "1 files that are not UTF-8", "1 broken symbolic links"):
        assert words in said


def test_huggingface_dataset_goes_all_the_way(corpus, folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"text": [path.read_bytes().decode() for path in sorted(corpus.glob("texts/*.txt"))]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "saved"))
    saved = prepare(corpus, tmp_path, *HUB, f"corpus.dataset={tmp_path / 'saved'}")
    for split in SPLITS:  # the same texts from another source are the same tokens
        assert sha256_of(saved / f"{split}-00000.bin") == sha256_of(folder / f"{split}-00000.bin")
    assert str(tmp_path) not in (saved / "card.json").read_text()


def test_command_of_a_user_refuses_a_missing_file_in_one_line(tmp_path):
    for name in ("stages", "conf"):  # a tree of its own, so that the failed run is not recorded in this one
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    command = [
        sys.executable,
        "-m",
        "stages.prepare",
        "scale=tiny",
        "corpus=files",
        "corpus.paths=[no/such.txt]",
    ]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    for name in ("DVC_STAGE", "MLFLOW_TRACKING_URI"):
        environment.pop(name, None)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stderr.splitlines() if "no/such.txt" in line]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert len(lines) == 1 and lines[0].startswith("offramp: ")


# ---- interrupted and continued

# prepare in a process of its own; it holds its breath after each thing it keeps, so that a signal meets it there
VICTIM = """
import sys, time
sys.path.insert(0, "tests")
from pathlib import Path
from stages import prepare
from stages.files import resuming
from stages.run import entry as runs
from test_prepare import prepare as prepare_here

kept, save = [], resuming.ResumeState.save

def slow(self, name, content):
    save(self, name, content)
    kept.append(name)
    if len(kept) == int(sys.argv[3]):
        print(name, flush=True)
        time.sleep(0.5)

resuming.ResumeState.save = slow
try:
    prepare_here(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[4:])
except KeyboardInterrupt as interruption:
    sys.exit(f"offramp: {interruption}")
"""
SHARDS = "prepare.shard_tokens=500"


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    return sha256_of(prepare(corpus, tmp_path_factory.mktemp("whole"), SHARDS))


def stopped_after(kept, number, root, out, *overrides):
    """Send a signal when the process has kept so many things; returns what it said."""
    command = [sys.executable, "-c", VICTIM, str(root), str(out), str(kept), *overrides]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout.readline(), child.communicate()[1]
    child.send_signal(number)
    said = child.communicate(timeout=60)[1].decode()
    assert child.returncode != 0 and "Traceback" not in said
    return said


@pytest.fixture
def root(corpus, tmp_path):
    """A checkout whose resume state no other test sees."""
    shutil.copytree(corpus / "texts", tmp_path / "root/texts")
    return tmp_path / "root"


def test_killed_at_any_moment_it_continues_and_ends_with_the_same_bytes(root, whole, tmp_path, capsys, monkeypatch):
    for kept in random.Random(3).sample(range(1, 8), 2):  # the tokenizer is the first thing kept, then come shards
        out = tmp_path / str(kept)
        stopped_after(kept, signal.SIGKILL, root, out, SHARDS)
        assert not (out / "artifacts/data/card.json").exists()
        shutil.rmtree(out / "artifacts")  # as DVC does before it runs a stage again
    (state,) = (root / ".runs/resume").glob("prepare-*")
    steps = len(list(state.glob("train-*")))
    monkeypatch.setattr("stages.prepare.train_tokenizer", lambda *arguments: 1 / 0)  # nobody trains it again
    assert sha256_of(prepare(root, tmp_path / "out", SHARDS)) == whole
    said = capsys.readouterr().err
    assert "continuing with the tokenizer" in said and f"continuing train after {steps} shards" in said
    assert not list((root / ".runs/resume").iterdir())


def test_told_to_stop_it_says_so_in_a_line_and_continues(root, whole, tmp_path, capsys):
    said = stopped_after(1, signal.SIGTERM, root, tmp_path / "stopped", SHARDS)
    assert "prepare: interrupted while encoding train; the same command continues there" in said
    assert sha256_of(prepare(root, tmp_path / "out", SHARDS)) == whole
    assert "continuing with the tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tokenizer.json", "train-00002", "data/train-00001.bin"])
def test_damage_to_what_was_kept_is_named_and_done_again(root, whole, tmp_path, capsys, name):
    stopped_after(6, signal.SIGKILL, root, tmp_path / "killed", SHARDS)
    (damaged,) = (root / ".runs/resume").glob(f"prepare-*/{name}")
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    assert sha256_of(prepare(root, tmp_path / "out", SHARDS)) == whole
    assert f"{damaged} is damaged" in capsys.readouterr().err


def test_changed_text_setting_or_code_starts_afresh(root, folder, tmp_path, capsys, monkeypatch):
    stopped_after(3, signal.SIGKILL, root, tmp_path / "killed", SHARDS)
    capsys.readouterr()
    assert sha256_of(prepare(root, tmp_path / "setting")) == sha256_of(folder)
    with monkeypatch.context() as patch:
        patch.setattr("stages.files.resuming.platform.python_version", lambda: "4.0")  # as good as another room of code
        prepare(root, tmp_path / "code", SHARDS)
    changed, before = root / "texts/000.txt", os.stat(root / "texts/000.txt")
    text = changed.read_text()
    for path in (changed, root / "texts/000-again.txt"):
        path.write_text(text.replace("sees", "seas"))  # neither the size nor, below, the time tells
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    now = prepare(root, tmp_path / "text", SHARDS)
    assert "continuing" not in capsys.readouterr().err
    assert any("seas" in text for split in SPLITS for text in texts_of(now, split))


def test_an_interrupted_download_goes_on_after_the_rows_it_had(corpus, tmp_path, monkeypatch, capsys):
    datasets = pytest.importorskip("datasets")
    rows = [{"text": path.read_bytes().decode(), "n": 1} for path in sorted(corpus.glob("texts/*.txt"))]
    served, revision = [], "one"

    def stream(shards):
        for shard in shards:
            for row in rows[shard * 9 : shard * 9 + 9]:
                served.append(row)
                yield row

    class Builder:
        def as_streaming_dataset(self, split):
            return datasets.IterableDataset.from_generator(stream, gen_kwargs={"shards": list(range(15))})

    def hub(dataset, subset):
        builder = Builder()
        builder.hash = revision
        return builder

    monkeypatch.setattr(datasets, "load_dataset_builder", hub)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    words = (*HUB, "corpus.dataset=org/name")
    whole = sha256_of(prepare(tmp_path / "root", tmp_path / "whole", *words))
    everything = len(served)

    served.clear()
    monkeypatch.setattr("stages.data.corpus.KEEP_BYTES", 20_000)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("stages.prepare.Interruption.check", stop_at_document(70))
        prepare(tmp_path / "root", tmp_path / "stopped", *words)
    assert 0 < len(served) < everything

    before = len(served)
    assert sha256_of(prepare(tmp_path / "root", tmp_path / "resumed", *words)) == whole
    assert "continuing the download after 70 rows" in capsys.readouterr().err
    assert len(served) - before <= everything - 63, "at most the shard of the stream that was open is asked for again"
    assert not list((tmp_path / "root/.runs/resume").iterdir())

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("stages.prepare.Interruption.check", stop_at_document(70))
        prepare(tmp_path / "root", tmp_path / "stopped", *words)
    revision = "two"
    served.clear()
    prepare(tmp_path / "root", tmp_path / "newer", *words)
    assert len(served) == everything, "another revision of the dataset starts afresh"


def stop_at_document(count):
    calls = []

    def check(self, doing):
        calls.append(doing)
        if len(calls) == count:
            raise KeyboardInterrupt

    return check

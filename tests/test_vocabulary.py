"""A trimmed vocabulary: a corpus has the same pieces, a model the same logits, and on export all of it comes back."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_file_tokenizer import KINDS, ROWS, SPELT, TEXTS, written
from test_student import SHAPE as QWEN3
from test_teacher import SHAPE as MIXTURE
from test_teacher_folder import rank_of

from stages import config, export, prepare, pretrain
from stages.compress.cut import cut_student
from stages.data.hub_tokenizer import load_hub_tokenizer
from stages.data.shards import SPLITS, Tokens, Windows, byte_alphabet, load_tokenizer, read_card, write_card
from stages.data.vocabulary import KEPT, closed, read_kept, trimmed
from stages.files.artifacts import ROOT, Refusal, read_json
from stages.formats.whole_vocabulary import WholeVocabulary
from stages.model.hub import load, new_model, save
from stages.model.vocabulary import dropped_nats, restored, with_rows
from stages.prepare import train_tokenizer
from stages.run.entry import Place
from stages.settings.compose import compose
from stages.settings.reading import picked
from stages.settings.schema import validate
from stages.tracking.record import Run
from stages.training.model_folder import complete_folder

TRIM = "teacher.trim_vocabulary=true"
BPE_KINDS = sorted(kind for kind in KINDS if kind != "unigram")
TOKENS_BT = torch.randint(40, (3, 20), generator=torch.Generator().manual_seed(0))


# ---- the tokenizer


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: load_hub_tokenizer(written(root / kind, KINDS[kind]), ROWS) for kind in BPE_KINDS}


@given(corpus=st.lists(TEXTS, max_size=4), other=TEXTS, kind=st.sampled_from(BPE_KINDS))
def test_a_corpus_is_split_as_before_and_no_other_text_is_lost(read, corpus, other, kind):
    whole = read[kind]
    before = whole.encode_batch(corpus)
    kept = closed(whole, {id for ids in before for id in ids})
    smaller = trimmed(whole, kept)
    after = smaller.encode_batch(corpus)
    assert [[kept[id] for id in ids] for ids in after] == before == [whole.encode(text) for text in corpus]
    assert [smaller.encode(text) for text in corpus] == after
    (ids,) = smaller.encode_batch([other])
    assert smaller.bytes_of(ids)[smaller.prefix_bytes :] == other.encode() and smaller.encode(other) == ids
    assert smaller.vocab_size == len(kept) == len(smaller.ids) and kept[smaller.end_of_text] == whole.end_of_text
    special = {added["content"] for added in whole.content["added_tokens"] if added["special"]}
    assert special <= smaller.ids.keys() and kept == sorted(kept)


@given(
    joins=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), min_size=6, max_size=24),
    corpus=st.lists(st.text("ab", min_size=2, max_size=8), min_size=1, max_size=3),
    whole_words=st.booleans(),
)
def test_so_is_it_with_any_merges_also_several_that_lead_to_one_token(tmp_path_factory, joins, corpus, whole_words):
    content = json.loads(json.dumps(KINDS["gpt2"]))
    tokens, merges, vocab = [*"ab"], [], {token: id for id, token in enumerate(["<|endoftext|>", *byte_alphabet()])}
    for pair in ([tokens[at % len(tokens)] for at in join] for join in joins):
        if pair not in merges and len(joined := "".join(pair)) < 5:  # few, so that many have several ways
            merges.append(pair)
            tokens += [joined] if joined not in tokens else []
            vocab.setdefault(joined, len(vocab))
    content["model"] |= {"vocab": vocab, "merges": merges, "ignore_merges": whole_words}
    content["added_tokens"] = content["added_tokens"][:1]
    whole = load_hub_tokenizer(written(tmp_path_factory.getbasetemp() / "any", content), len(vocab))
    before = whole.encode_batch(corpus)
    smaller = trimmed(whole, kept := closed(whole, {id for ids in before for id in ids}))
    assert [[kept[id] for id in ids] for ids in smaller.encode_batch(corpus)] == before


def test_what_no_text_uses_leaves_with_its_merges_and_what_a_token_is_joined_from_stays(read):
    smaller = trimmed(read["gpt2"], kept := closed(read["gpt2"], [read["gpt2"].ids["def"]]))
    assert "def" in smaller.ids and "de" in smaller.ids and "Ġre" not in smaller.ids and "fir" not in smaller.ids
    assert smaller.content["model"]["merges"] == [["d", "e"], ["de", "f"]]
    assert len(kept) == 256 + 2 + len(["de", "def"])


def test_merges_of_an_old_file_are_texts_and_stay_texts(tmp_path):
    content = json.loads(json.dumps(KINDS["gpt2"]))
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    whole = load_hub_tokenizer(written(tmp_path, content), ROWS)
    smaller = trimmed(whole, closed(whole, whole.encode("def fi")))
    assert smaller.content["model"]["merges"] == ["d e", "de f", "f i"]


# ---- prepare and pretrain


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A tied Llama with a tokenizer of this project's documents, and the corpus of `tiny` as data, trimmed and not."""
    root = tmp_path_factory.mktemp("trimmed")
    texts = [path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))]
    tokenizer = train_tokenizer("bpe", 1500, texts)
    shape = replace(QWEN3, vocab_size=1600, sequence_tokens=64, kind="llama", tied=True, norm_epsilon=1e-5)
    save(strong(shape, seed=5), root / "models/mine")
    (root / "models/mine/tokenizer.json").write_text(tokenizer.to_json())
    os.symlink(root / "models", (root / "whole").mkdir() or root / "whole/models")
    for out, words in (("whole", []), (".", [TRIM])):
        prepare.main(tiny(prepare.SECTIONS, *words), Place(root, root / out), Run())
    return root


def strong(shape, seed):
    model = new_model(shape, seed).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that logits differ
    return model


def tiny(sections, *words):
    plain = compose(["scale=tiny", "corpus=stdlib", "teacher=folder", "teacher.path=models/mine", *words])
    return validate(picked(plain, sections), sections)


def test_the_tiny_corpus_has_the_same_tokens_by_their_old_ids(root):
    whole, data = root / "whole/artifacts/data", root / "artifacts/data"
    kept, vocab_size = read_kept(data)
    assert vocab_size == 1600 > read_card(data)["vocab_size"] == len(kept) > 257
    assert read_kept(whole) is None
    for split in SPLITS:
        before, after = Tokens(whole, split), Tokens(data, split)
        assert len(before) == len(after) > 1000 and after.bytes == before.bytes
        assert np.array_equal(np.asarray(kept)[after.window(0, len(after))], before.window(0, len(before)))
    used = {id for split in SPLITS for id in np.unique(Tokens(data, split).window(0, len(Tokens(data, split))))}
    smaller = load_tokenizer(data)
    assert 1500 - len(kept) > 100, "some of the documents' words are in no source file"
    assert kept == closed(load_tokenizer(whole), [kept[id] for id in used]) and smaller.end_of_text in used
    strange = "Zürich 中\u0301 <|endoftext|>\0"
    assert smaller.decode(smaller.encode(strange)) == strange
    assert f"{1600 - len(kept):,} others of it, in no text here, were left out" in (data / "CORPUS.md").read_text()


def test_prepare_goes_on_with_the_ids_that_an_interrupted_run_had_found(root, tmp_path, monkeypatch):
    os.symlink(root / "models", tmp_path / "models")
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"Teacher {number}: {'learns and ' * number}tells.\n" * 9)
    settings = tiny(prepare.SECTIONS, TRIM, "corpus=files", "corpus.paths=[*.txt]", "sequence_tokens=16")
    for name in ("corpus_card", "closed"):  # where the first try ends, and what the second one must not ask for again
        with monkeypatch.context() as patch:
            patch.setattr(prepare, name, lambda *_: 1 / 0)
            if name == "corpus_card":
                with pytest.raises(ZeroDivisionError):
                    prepare.main(settings, Place(tmp_path, tmp_path), Run())
            else:
                prepare.main(settings, Place(tmp_path, tmp_path), Run())
    kept, _ = read_kept(tmp_path / "artifacts/data")
    assert len(kept) == read_card(tmp_path / "artifacts/data")["vocab_size"]


def test_pretrain_takes_the_kept_rows_and_tells_what_the_loss_gains(root, monkeypatch, capsys):
    rank_of(monkeypatch)
    (fit,) = pretrain.fits(tiny(pretrain.SECTIONS, TRIM), Place(root, root), None)
    kept, _ = read_kept(root / "artifacts/data")
    whole = load(root / "models/mine")
    assert fit.model.shape == replace(whole.shape, vocab_size=len(kept))
    assert fit.model.head.weight is fit.model.embedding.weight
    dropped = (1600 - len(kept)) * whole.shape.width
    assert fit.notes["parameters_dropped"] == dropped
    told = f"{len(kept):,} of 1,600 tokens kept, {parameters(whole) - dropped:,} of {parameters(whole):,} parameters"
    assert told in capsys.readouterr().out
    val = Tokens(root / "artifacts/data", "val")
    windows_WT1 = prepare_windows(val, tiny(pretrain.SECTIONS, TRIM))
    before, after = bits(whole, torch.tensor(kept)[windows_WT1], val), bits(fit.model, windows_WT1, val)
    assert fit.notes[pretrain.GAIN] == pytest.approx(before - after, abs=1e-6) and before - after > 0.01


def parameters(model):
    return sum(part.numel() for part in model.parameters())


def prepare_windows(tokens, settings):
    return Windows(tokens, settings.sequence_tokens, seed=None).spread(settings.pretrain.validation_sequences)


@torch.no_grad()
def bits(model, windows_WT1, tokens):
    nats = F.cross_entropy(model(windows_WT1[:, :-1]).double().mT, windows_WT1[:, 1:])
    return nats.item() / 0.693147180559945 / tokens.bytes_per_token


def test_data_that_was_trimmed_otherwise_or_is_damaged_is_refused(root, tmp_path):
    place = Place(root, root)
    assert pretrain.sources_of(tiny(pretrain.SECTIONS, TRIM), place)
    with pytest.raises(Refusal, match="not made with teacher.trim_vocabulary = false: run dvc repro prepare"):
        pretrain.sources_of(tiny(pretrain.SECTIONS), place)
    with pytest.raises(Refusal, match="not made with teacher.trim_vocabulary = true: run dvc repro prepare"):
        pretrain.sources_of(tiny(pretrain.SECTIONS, TRIM), Place(root / "whole", root / "whole"))
    card = {key: value for key, value in read_card(root / "artifacts/data").items() if key != "sha256"}
    (tmp_path / KEPT).write_text("0\n")
    write_card(tmp_path, card)
    with pytest.raises(Refusal, match=f"{KEPT} is not the file that was written: delete .* and run dvc repro"):
        read_kept(tmp_path)


def test_what_is_no_byte_pair_encoding_is_refused_by_config_and_prepare(root, tmp_path, monkeypatch):
    folder = tmp_path / "models/mine"
    folder.parent.mkdir()
    os.symlink(root / "models/mine/model.safetensors", (folder.mkdir() or folder) / "model.safetensors")
    (folder / "config.json").write_text((root / "models/mine/config.json").read_text())
    written(folder, KINDS["unigram"])
    settings, line = tiny(prepare.SECTIONS, TRIM), "^teacher.trim_vocabulary = true: the model of .*.json is Unigram"
    with pytest.raises(Refusal, match=line):
        prepare.main(settings, Place(tmp_path, tmp_path), Run())
    assert not (tmp_path / "artifacts/data").exists()
    monkeypatch.setattr(config, "ROOT", tmp_path)
    with pytest.raises(Refusal, match=line):
        config.inputs_of(settings)
    assert "teacher" in config.inputs_of(tiny(prepare.SECTIONS))
    with pytest.raises(Refusal, match="^teacher.trim_vocabulary = True: only source folder reads it"):
        validate(compose([TRIM]))


# ---- the model, and back


SHAPES = {"tied": replace(QWEN3, kind="llama", tied=True), "own head": QWEN3}
KEEP = [0, 3, 4, 17, 20, 39]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_model_of_some_rows_gives_their_logits_and_with_the_others_put_back_all_of_them(shape, tmp_path):
    whole = strong(shape, 1)
    some = with_rows(whole, KEEP)
    tokens_BT = TOKENS_BT % len(KEEP)
    with torch.no_grad():
        logits_BTV = whole(torch.tensor(KEEP)[tokens_BT])
        torch.testing.assert_close(some(tokens_BT), logits_BTV[..., KEEP])
        save(some, tmp_path)
        assert torch.equal(load(tmp_path)(tokens_BT), some(tokens_BT))
        back = restored(some, whole, KEEP)
        assert back.shape == whole.shape and torch.equal(back(TOKENS_BT), whole(TOKENS_BT))
        lost = logits_BTV.logsumexp(-1) - logits_BTV[..., KEEP].logsumexp(-1)
        assert dropped_nats(whole, [torch.tensor(KEEP)[tokens_BT]], KEEP) == pytest.approx(lost.mean().item(), rel=1e-5)
        some.embedding.weight.zero_()
    assert whole.embedding.weight.all() and parameters(back) == parameters(whole), "they share no memory"


def test_a_student_cut_out_of_the_teacher_keeps_its_own_rows_and_gets_the_teachers_for_the_rest():
    whole = strong(SHAPES["tied"], 1)
    student, _ = cut_student(with_rows(whole, KEEP), 0.7, 1.0, 1.0, [TOKENS_BT % len(KEEP)])
    with torch.no_grad():
        student.embedding.weight.mul_(1.25)  # as if trained
    back = restored(student, whole, KEEP)
    rest = sorted(set(range(whole.shape.vocab_size)) - set(KEEP))
    assert torch.equal(back.embedding.weight[KEEP], student.embedding.weight)
    assert torch.equal(back.embedding.weight[rest], whole.embedding.weight[rest])
    assert back.shape == replace(student.shape, vocab_size=whole.shape.vocab_size)


def test_a_model_that_the_teachers_rows_mean_nothing_in_is_refused_in_one_line():
    whole = strong(QWEN3, 1)
    small, width = replace(QWEN3, vocab_size=len(KEEP)), QWEN3.width
    lines = {
        replace(small, width=2 * width): f"the width of the model is {2 * width}, the teacher's {width}",
        small: r"the embedding of the model did not start from the teacher's \(mean cosine of their rows -?0.\d\d",
        replace(MIXTURE, vocab_size=len(KEEP)): "the model is of the family deepseek_v3, the teacher of qwen3",
    }
    for shape, line in lines.items():
        with pytest.raises(Refusal, match=f"^no whole vocabulary: {line}"):
            restored(new_model(shape, 2), whole, KEEP)


# ---- export


@pytest.fixture(scope="module")
def exported(root, tmp_path_factory, tiny_settings) -> Path:
    """`export.vocabulary: whole` of the teacher, of a student cut out of it, and of one that it is not."""
    place, kept = Place(root, root), read_kept(root / "artifacts/data")[0]
    card = read_card(root / "artifacts/data")
    teacher = with_rows(load(root / "models/mine"), kept)
    models = {"teacher": teacher, "student": cut_student(teacher, 0.9, 1.0, 1.0, [TOKENS_BT])[0]}
    models["control"] = new_model(teacher.shape, 0)
    for name, model in models.items():
        save(model, root / "artifacts" / name, card["end_of_text"], card["tokenizer_sha256"])
        complete_folder(place, name, "Made for a test.", (), {"tokens": 5}, 64)
    out = tmp_path_factory.mktemp("out")
    knobs = {"models": tuple(models), "formats": ("hf",), "prompts": 2, "new_tokens": 6, "test_sequences": 2}
    settings = tiny(export.SECTIONS, TRIM)
    chosen = settings.export.model_copy(update=knobs | {"vocabulary": "whole"})
    export.main(settings.model_copy(update={"export": chosen}), Place(root, out), Run())
    return out


def test_the_exported_teacher_has_the_logits_of_the_folder_that_it_came_from_for_all_ids(root, exported):
    theirs, ours = load(root / "models/mine"), load(exported / "export/teacher/hf")
    tokens_BT = torch.arange(1600).view(25, 64)
    with torch.no_grad():
        assert torch.equal(ours(tokens_BT), theirs(tokens_BT))
    figures = read_json(exported / "metrics/export.json")
    assert figures["teacher"]["hf"]["largest_logit_difference"] == 0
    assert figures["teacher"]["hf"]["equal_continuations"] == 2 and figures["control"] == {}
    trimmed_teacher, tokens = load(root / "artifacts/teacher"), Tokens(root / "artifacts/data", "test")
    rows_BT1 = Windows(tokens, 64, seed=None).spread(2)
    kept = torch.tensor(read_kept(root / "artifacts/data")[0])
    assert figures["teacher"]["hf"]["bits_per_byte"] == pytest.approx(bits(theirs, kept[rows_BT1], tokens), rel=1e-5)
    assert bits(trimmed_teacher, rows_BT1, tokens) < figures["teacher"]["hf"]["bits_per_byte"]


def test_an_exported_folder_has_the_teachers_tokenizer_and_its_card_says_which_rows_are_untrained(root, exported):
    folder = exported / "export/student/hf"
    tokenizer, whole = load_hub_tokenizer(folder, 1600), load_tokenizer(root / "whole/artifacts/data")
    assert tokenizer.to_json() == whole.to_json() and tokenizer.end_of_text == whole.end_of_text
    config = read_json(folder / "config.json")
    assert (config["vocab_size"], config["eos_token_id"]) == (1600, whole.end_of_text)
    assert config["tokenizer_sha256"] == read_card(root / "whole/artifacts/data")["tokenizer_sha256"]
    card, kept = (folder / "README.md").read_text(), len(read_kept(root / "artifacts/data")[0])
    assert f"The rows of the {1600 - kept:,} others are the teacher's as they came" in card
    assert card.index("## Whole vocabulary") < card.index("## Limits") and config["weights_sha256"] in card
    assert f"Its vocabulary is {kept:,} of the teacher's 1,600 tokens" in card
    assert not list((exported / "export").glob("tmp*"))
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in SPELT:
        assert theirs(text)["input_ids"] == whole.encode(text)


def test_a_trimmed_folder_is_complete_too(root, exported):
    transformers = pytest.importorskip("transformers")
    folder = root / "artifacts/student"
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(root / "artifacts/data")
    for text in [*SPELT, (ROOT / "README.md").read_text()]:
        assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.eos_token_id == ours.end_of_text
    model, tokens_BT = transformers.AutoModelForCausalLM.from_pretrained(folder), TOKENS_BT
    with torch.no_grad():
        torch.testing.assert_close(model(tokens_BT).logits, load(folder)(tokens_BT), rtol=1e-4, atol=1e-4)


def test_without_the_teachers_folder_or_a_trimmed_vocabulary_nothing_is_put_back(root):
    with pytest.raises(Refusal, match="^export.vocabulary = whole: artifacts/data has the whole vocabulary: set it"):
        WholeVocabulary(root / "whole/artifacts/data", root / "models/mine")
    settings = tiny(export.SECTIONS, "teacher=train", "teacher.path=null")
    with pytest.raises(Refusal, match="^export.vocabulary = whole: it needs the teacher's folder as .*source = train"):
        export.whole_vocabulary(settings.teacher, Place(root, root))

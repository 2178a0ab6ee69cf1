"""A student as GGUF in a real llama.cpp: the same tokens, and its server on the loopback interface."""

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from dataclasses import replace

import pytest
import torch
from test_file_tokenizer import KINDS as TOKENIZERS
from test_file_tokenizer import ROWS, written
from test_model_folder import completed
from test_shards import BPE, folder_of
from test_student import SHAPE

from stages.compress.pruning import prune
from stages.compress.scores import importance
from stages.data.hub_tokenizer import load_hub_tokenizer, tokenizer_files
from stages.data.shards import BytesTokenizer
from stages.data.vocabulary import closed, trimmed
from stages.files.artifacts import ROOT, Refusal, read_json
from stages.formats.gguf_file import KINDS, load_gguf, write_gguf
from stages.formats.gguf_import import folder_from_gguf
from stages.model.generation import generate
from stages.model.hub import load, new_model, save

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
# heads whose width llama.cpp's kernels know, and rows that q8_0 can cut into blocks
STUDENT = replace(SHAPE, vocab_size=BPE.vocab_size, sequence_tokens=64, width=64, head_dim=32, mlp_width=96)
TEXTS = ["def first():\n", "kürzer 中文 🙂", "x = 3\n<|endoftext|>y", "a", "  return 'll\n\n\t1234"]


def llama_cpp():
    pytest.importorskip("xllamacpp", reason="the extra gguf is not installed")
    from stages.formats.llama_cpp import LlamaCpp

    return LlamaCpp


def decided(folder):
    """The saved model with weights far from uniform logits, so that rounding cannot decide; saved again."""
    model, config = load(folder), read_json(folder / "config.json")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    save(model, folder, config["eos_token_id"], config["tokenizer_sha256"])
    return model


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = completed(tmp_path_factory.mktemp("student"), STUDENT)
    decided(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_holds_every_tensor_and_the_tokenizer(student, kind, tmp_path):
    write_gguf(student, tmp_path / "a.gguf", kind)
    write_gguf(student, tmp_path / "b.gguf", kind)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2, "nothing half-written is left"
    found, error = load_gguf(student, tmp_path / "a.gguf").state_dict(), {"f32": 0, "f16": 1e-3, "q8_0": 1e-2}[kind]
    for name, part in load(student).state_dict().items():
        assert (found[name] - part).norm() <= error * part.norm(), name
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    assert fields["qwen3.attention.head_count_kv"].contents() == STUDENT.kv_heads
    assert fields["tokenizer.ggml.tokens"].contents()[:3] == [BPE._tokenizer.id_to_token(id) for id in range(3)]


def test_a_matrix_that_q8_0_cannot_cut_is_f16_and_llama_cpp_reads_both(tmp_path):
    folder = completed(tmp_path, replace(STUDENT, mlp_width=40))  # as pruning to a budget leaves it
    decided(folder)
    write_gguf(folder, tmp_path / "student.gguf", "q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "student.gguf").tensors}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")
    model = load_gguf(folder, tmp_path / "student.gguf")
    with llama_cpp()(tmp_path / "student.gguf", 1, 64) as server:
        for text in TEXTS:
            ids = BPE.encode(text)
            # one token: llama.cpp rounds activations to eight bits too
            assert server.greedy(ids, 1)[0] == generate(model, ids, 1, end_of_text=BPE.end_of_text), text


@pytest.mark.parametrize("pruned", [False, True], ids=["student", "sparse student"])
@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_llama_cpp_splits_texts_and_continues_them_as_we_do(student, kind, pruned, tmp_path):
    folder, model = student, load(student)
    if pruned:
        batch = torch.randint(STUDENT.vocab_size, (2, 17), generator=torch.Generator().manual_seed(0))
        words = {"heads": "magnitude", "neurons": "magnitude"}
        model = prune(model, {"heads": 0.5, "neurons": 0.67}, importance(model, [batch], words)).eval()
        folder = tmp_path / "artifacts/sparse"
        folder.mkdir(parents=True)
        for file in student.glob("*.json"):
            (folder / file.name).write_bytes(file.read_bytes())
        save(model, folder, BPE.end_of_text)
    write_gguf(folder, tmp_path / "student.gguf", kind)
    with llama_cpp()(tmp_path / "student.gguf", 1, 64) as server:
        for text in TEXTS:
            ids = BPE.encode(text)
            assert server.tokens(text) == ids
            assert server.greedy(ids, 16)[0] == generate(model, ids, 16, end_of_text=BPE.end_of_text), text


RELATIVES = {"llama": {"kind": "llama"}, "tied llama": {"kind": "llama", "tied": True, "norm_epsilon": 1e-5},
             "mistral": {"kind": "mistral", "heads": 3, "kv_heads": 1},
             "qwen2": {"kind": "qwen2", "heads": 2}}  # fmt: skip


@pytest.mark.parametrize("changes", RELATIVES.values(), ids=RELATIVES)
def test_so_does_it_with_models_of_a_teachers_own_family(changes, tmp_path):
    folder = completed(tmp_path, replace(STUDENT, **changes))
    model = decided(folder)
    write_gguf(folder, tmp_path / "model.gguf", "f32")
    for name, part in load_gguf(folder, tmp_path / "model.gguf").state_dict().items():
        assert torch.equal(part, model.state_dict()[name]), name
    again = folder_from_gguf(tmp_path / "model.gguf", tmp_path / "again")
    with llama_cpp()(tmp_path / "model.gguf", 1, 64) as server:
        for text in TEXTS:
            ids = BPE.encode(text)
            assert server.tokens(text) == ids == load_hub_tokenizer(again, BPE.vocab_size).encode(text)
            assert server.greedy(ids, 16)[0] == generate(model, ids, 16, end_of_text=BPE.end_of_text), text
    for name, part in load(again).state_dict().items():
        assert torch.equal(part, model.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["llama2", "mistral"])
def test_a_tokenizer_that_writes_spaces_as_pieces_has_the_same_tokens_there(kind, tmp_path):
    save(new_model(replace(STUDENT, vocab_size=ROWS, kind="llama"), 1), tmp_path / "m", 2)
    written(tmp_path / "m", TOKENIZERS[kind])
    tokenizer, model = load_hub_tokenizer(tmp_path / "m", ROWS), decided(tmp_path / "m")
    write_gguf(tmp_path / "m", tmp_path / "model.gguf", "f32")
    again = folder_from_gguf(tmp_path / "model.gguf", tmp_path / "again")
    with llama_cpp()(tmp_path / "model.gguf", 1, 64) as server:
        for text in [*TEXTS, " def first  re on", "</s><unk>fir 12üü"]:
            ids = tokenizer.encode(text)
            assert server.tokens(text) == ids == load_hub_tokenizer(again, ROWS).encode(text), text
        assert server.greedy(ids, 16)[0] == generate(model, ids, 16, end_of_text=tokenizer.end_of_text)


@pytest.mark.parametrize("kind", ["smollm", "llama2"])
def test_a_trimmed_tokenizer_has_the_same_tokens_there(kind, tmp_path):
    whole = load_hub_tokenizer(written(tmp_path / "m", TOKENIZERS[kind]), ROWS)
    tokenizer = trimmed(whole, closed(whole, whole.encode("def  12 re fi")))
    assert len(tokenizer.content["model"]["merges"]) < len(whole.content["model"]["merges"])
    save(new_model(replace(STUDENT, vocab_size=tokenizer.vocab_size, kind="llama"), 1), tmp_path / "m", 2)
    (tmp_path / "m/tokenizer.json").write_text(tokenizer.to_json())
    write_gguf(tmp_path / "m", tmp_path / "model.gguf", "f32")
    with llama_cpp()(tmp_path / "model.gguf", 1, 64) as server:
        for text in [*TEXTS, " def first  re on", "fir 12üü"]:
            assert server.tokens(text) == tokenizer.encode(text), text


def test_a_model_over_plain_bytes_has_the_same_tokens_there(tmp_path):
    tokenizer = BytesTokenizer()
    save(new_model(replace(STUDENT, vocab_size=257), 1), tmp_path, tokenizer.end_of_text)
    for name, content in tokenizer_files(folder_of(tmp_path / "data", tokenizer), 64).items():
        (tmp_path / name).write_text(content)
    model = decided(tmp_path)
    write_gguf(tmp_path, tmp_path / "student.gguf", "f32")
    with llama_cpp()(tmp_path / "student.gguf", 1, 64) as server:
        for text in [*TEXTS, "ZZZ Z\0ZZ"]:
            assert server.tokens(text) == tokenizer.encode(text)
        ids = tokenizer.encode("abc")
        assert server.greedy(ids, 16)[0] == generate(model, ids, 16, end_of_text=tokenizer.end_of_text)


def test_what_has_no_gguf_is_refused(tmp_path, student):
    from test_teacher import SHAPE as TEACHER

    save(new_model(TEACHER, 1), tmp_path / "teacher")
    with pytest.raises(Refusal, match="no GGUF of the family deepseek_v3"):
        write_gguf(tmp_path / "teacher", tmp_path / "a.gguf", "f32")
    narrow = completed(tmp_path, replace(STUDENT, width=40))
    with pytest.raises(Refusal, match="is 40 wide, q8_0 needs a multiple of 32: f16"):
        write_gguf(narrow, tmp_path / "a.gguf", "q8_0")
    content = read_json(student / "tokenizer.json")
    shutil.copytree(student, tmp_path / "copy")
    for step in ({"type": "Digits", "individual_digits": False}, {"type": "Punctuation", "behavior": "Isolated"}):
        parts = {"type": "Sequence", "pretokenizers": [step, content["pre_tokenizer"]]}
        (tmp_path / "copy/tokenizer.json").write_text(json.dumps(content | {"pre_tokenizer": parts}))
        with pytest.raises(Refusal, match="its word pattern has no name"):
            write_gguf(tmp_path / "copy", tmp_path / "a.gguf", "f32")
    wide = completed(tmp_path / "wide", replace(STUDENT, kind="qwen2", heads=4))
    with pytest.raises(Refusal, match="no GGUF of a qwen2 whose heads .128 wide in all. are not as wide as the model"):
        write_gguf(wide, tmp_path / "a.gguf", "f32")
    biased = completed(tmp_path / "biased", replace(STUDENT, kind="llama", attention_bias=True))
    with pytest.raises(Refusal, match="no GGUF of a llama with attention_bias"):
        write_gguf(biased, tmp_path / "a.gguf", "f32")
    assert not list(tmp_path.glob("*.gguf"))


def test_a_padded_embedding_has_as_many_tokens_there(tmp_path):
    folder = completed(tmp_path, replace(STUDENT, vocab_size=BPE.vocab_size + 5))
    model = decided(folder)
    write_gguf(folder, tmp_path / "student.gguf", "f32")
    with llama_cpp()(tmp_path / "student.gguf", 1, 64) as server:
        ids = BPE.encode("def first():\n")
        assert server.tokens("def first():\n") == ids
        assert server.greedy(ids, 8)[0] == generate(model, ids, 8, end_of_text=BPE.end_of_text)


@pytest.fixture
def served(student):
    """`python -m stages.serve` as a person starts it; its first line."""
    llama_cpp()
    words = [sys.executable, "-m", "stages.serve", "--model", str(student), "--kind", "f32", "--port", "0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as process:
        line = process.stdout.readline()
        yield line.split(" at ")[1].split(" until ")[0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_the_openai_client_gets_the_students_text(student, served):
    openai = pytest.importorskip("openai", reason="the extra gguf is not installed")
    assert served.startswith("http://127.0.0.1:")
    client, prompt = openai.OpenAI(base_url=served, api_key="any"), "def first():"
    expected = BPE.decode(generate(load(student), BPE.encode(prompt), 12, end_of_text=BPE.end_of_text))
    asked = {"model": "student", "max_tokens": 12, "temperature": 0}
    assert client.completions.create(prompt=prompt, **asked).choices[0].text == expected
    pieces = client.completions.create(prompt=prompt, stream=True, **asked)
    assert "".join(piece.choices[0].text for piece in pieces) == expected
    chat = client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **asked)
    assert chat.choices[0].message.content == expected
    assert [model.id for model in client.models.list()] == ["student"]


def test_no_web_page_may_ask_the_server(served):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(served + "/models", headers={"Origin": "http://somewhere.example"})
    with opener.open(request) as answer:
        assert not answer.headers["Access-Control-Allow-Origin"]

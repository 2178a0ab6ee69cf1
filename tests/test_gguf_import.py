"""A GGUF file comes in as a Hugging Face folder: the same weights, the same tokens, the same text as in llama.cpp."""

import json

import numpy as np
import pytest
import torch
from test_file_tokenizer import ROWS, SPACED, SPECIAL, bpe

from stages.data.hub_tokenizer import load_hub_tokenizer
from stages.data.shards import byte_alphabet
from stages.data.teacher_folder import teacher_folder
from stages.files.artifacts import Refusal
from stages.formats import gguf_import
from stages.formats.gguf_import import CLASSES, folder_from_gguf
from stages.formats.gguf_names import BLOCK, ONLY
from stages.formats.pre_tokenizers import PRE_TOKENIZERS, name_of

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
SIZES = {"vocab_size": ROWS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32,
         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
         "rope_theta": 5000.0, "initializer_range": 0.2}  # fmt: skip
LEVELLED = bpe(byte_alphabet(), ["<|endoftext|>", "<|im_end|>"])
TEXTS = ["def first(12345):\n  re", "ü 中 'LL<s>\n\n\nx"]


def described(kind, pre="gpt-2", context=64, **changes):
    """A writer that has everything but tensors; `changes` are fields set again."""
    writer = gguf.GGUFWriter(path=None, arch=kind)
    numbers = {"block_count": 2, "context_length": context, "embedding_length": 64, "feed_forward_length": 96,
               "attention.head_count": 2, "attention.head_count_kv": 1, "attention.key_length": 32,
               "attention.value_length": 32}  # fmt: skip
    for key, value in numbers.items():
        writer.add_uint32(f"{kind}.{key}", changes.pop(key, value))
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_string("general.license", "apache-2.0")
    tokens, types = [*LEVELLED["model"]["vocab"]], [gguf.TokenType.CONTROL] * 2
    types += [gguf.TokenType.NORMAL] * (len(tokens) - 2) + [gguf.TokenType.UNUSED] * (ROWS - len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens + [f"[PAD{id}]" for id in range(len(tokens), ROWS)])
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in LEVELLED["model"]["merges"]])
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    for key, value in changes.items():
        writer.add_uint32(f"{kind}.{key}", value)
    return writer


def written(writer, path):
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def twin(kind, tied=False):
    """transformers' model of these sizes, with random weights, biases and norms."""
    import transformers

    config = transformers.AutoConfig.for_model(kind, tie_word_embeddings=tied, **SIZES)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def add_weights(writer, model, kind, quantised="F32", tied=False):
    """As llama.cpp's converter names and orders them."""
    theirs = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    theirs |= {} if tied else {"lm_head.weight": "output.weight"}
    for layer in range(2):
        for name, ours in (BLOCK | ONLY[kind]).items():
            theirs[f"model.layers.{layer}.{ours}"] = f"blk.{layer}.{name}"
    state = model.state_dict()
    for ours, name in theirs.items():
        values = state[ours].numpy()
        if kind == "llama" and (".q_proj." in ours or ".k_proj." in ours):
            heads = 2 if ".q_proj." in ours else 1
            values = values.reshape(heads, 2, len(values) // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)
        how = gguf.GGMLQuantizationType[quantised if values.ndim > 1 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(values), how), raw_dtype=how)
    return writer


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", CLASSES)
def test_transformers_computes_with_the_folder_what_the_model_of_the_file_computes(kind, tied, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    model = twin(kind, tied)
    path = written(add_weights(described(kind), model, kind, tied=tied), tmp_path / "m.gguf")
    monkeypatch.setattr(gguf_import, "SHARD_BYTES", 100_000 if tied else 2 << 30)
    folder = folder_from_gguf(path, tmp_path / "folder")
    assert (folder / "model.safetensors.index.json").exists() == tied
    loaded, told = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    tokens_BT = torch.randint(ROWS, (2, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(tokens_BT).logits, model(tokens_BT).logits)
    assert "apache-2.0" in (folder / "ORIGIN.md").read_text() and loaded.config.rms_norm_eps == 1e-5


@pytest.mark.parametrize(("quantised", "error"), [("F16", 1e-3), ("Q8_0", 1e-2), ("Q5_1", 0.05), ("Q5_0", 0.06),
                                                  ("Q4_1", 0.1), ("Q4_0", 0.12)])  # fmt: skip
def test_quantised_weights_come_back_as_near_as_the_file_has_them(quantised, error, tmp_path):
    from safetensors.torch import load_file

    model = twin("llama")
    path = written(add_weights(described("llama"), model, "llama", quantised), tmp_path / "m.gguf")
    found = load_file(folder_from_gguf(path, tmp_path / "folder") / "model.safetensors")
    for name, part in model.state_dict().items():
        assert 0 < (found[name] - part).norm() / part.norm() < error if part.dim() > 1 else (found[name] == part).all()


def test_k_quants_are_read_as_the_package_reads_them():
    drawn = np.random.default_rng(1)
    for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"):
        kind = gguf.GGMLQuantizationType[name]
        raw = drawn.integers(0, 60, (2, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
        tensor = type("Tensor", (), {"data": raw, "tensor_type": kind})
        config = SIZES | {"model_type": "llama"}
        values = gguf_import._values(gguf, "model.layers.0.mlp.down_proj.weight", tensor, config)
        assert values.shape == (2, 256) and values.dtype == np.float32 and np.isfinite(values).all()


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_llama_cpp_splits_texts_and_continues_them_as_the_folder_does(pre, tmp_path):
    pytest.importorskip("xllamacpp", reason="the extra gguf is not installed")
    transformers = pytest.importorskip("transformers")
    from stages.formats.llama_cpp import LlamaCpp

    model = twin("llama", tied=True)
    path = written(add_weights(described("llama", pre), model, "llama", tied=True), tmp_path / "m.gguf")
    folder = folder_from_gguf(path, tmp_path / "folder")
    tokenizer = load_hub_tokenizer(folder, ROWS)
    again = json.loads((folder / "tokenizer.json").read_text())
    assert PRE_TOKENIZERS[name_of(again)] is PRE_TOKENIZERS[pre]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with LlamaCpp(path, 1, 64) as server:
        for text in TEXTS:
            ids = tokenizer.encode(text)
            assert server.tokens(text) == ids
            theirs = loaded.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=1)
            new = theirs[0, len(ids) :].tolist()
            assert server.greedy(ids, 8)[0] == (new[: new.index(1)] if 1 in new else new)


def test_sentencepiece_tokens_are_joined_by_score_and_fall_back_to_bytes(tmp_path):
    content = bpe(SPACED, SPECIAL)
    tokens = [*content["model"]["vocab"]]
    control, kinds = gguf.TokenType.CONTROL, {"<unk>": gguf.TokenType.UNKNOWN}
    fields = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.scores": [-float(id) for id in range(len(tokens))],
        "tokenizer.ggml.token_type": [kinds.get(token, control if token in SPECIAL else 1) for token in tokens],
    }  # fmt: skip
    whole, _ = gguf_import.tokenizer_of(fields, tmp_path / "m.gguf")
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    tokenizer = load_hub_tokenizer(tmp_path, ROWS)
    for text in TEXTS:
        (ids,) = tokenizer.encode_batch([text])
        assert tokenizer.bytes_of(ids) == b" " + text.encode()
    assert [tokens[id] for id in tokenizer.encode("def first re")] == ["▁", "def", "▁", "fir", "s", "t", "▁re"]


REFUSED = {
    "architecture 'gemma' is not read here": lambda: described("gemma"),
    "llama.expert_count is 8": lambda: described("llama", expert_count=8),
    "how its tokenizer splits words, 'tekken', is not known here": lambda: whole_file("llama", "tekken"),
    r"blk.0.ffn_gate.weight is \[96, 64\], its settings say \[80, 64\]":
        lambda: whole_file("llama", feed_forward_length=80),
    "has blk.1.attn_k.weight": lambda: whole_file("llama", block_count=1),
    "lacks blk.2.attn_k.weight": lambda: whole_file("llama", block_count=3),
}  # fmt: skip


def whole_file(kind, pre="gpt-2", **changes):
    return add_weights(described(kind, pre, **changes), twin(kind), kind)


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_read_is_refused_by_name_before_anything_is_written(reason, tmp_path):
    path = written(REFUSED[reason](), tmp_path / "m.gguf")
    with pytest.raises(Refusal, match=reason) as caught:
        folder_from_gguf(path, tmp_path / "folder")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "folder").exists()


def test_a_damaged_file_and_an_unreadable_quantisation_are_refused(tmp_path, monkeypatch):
    path = written(whole_file("llama"), tmp_path / "m.gguf")
    whole = path.read_bytes()
    for damaged in (b"nonsense", whole[: len(whole) // 2], whole[:300]):
        path.write_bytes(damaged)
        with pytest.raises(Refusal, match="no whole GGUF file"):
            folder_from_gguf(path, tmp_path / "folder")
    with pytest.raises(Refusal, match="is missing"):
        folder_from_gguf(tmp_path / "none.gguf", tmp_path / "folder")
    path.write_bytes(whole)

    def unknown(*_):
        raise NotImplementedError

    monkeypatch.setattr(gguf.quants, "dequantize", unknown)
    with pytest.raises(Refusal, match="is F32, which the package gguf cannot turn into numbers"):
        folder_from_gguf(path, tmp_path / "folder")


def test_a_teacher_s_file_becomes_a_folder_once_and_again_when_it_has_changed(tmp_path, capsys):
    def seen():
        folder = teacher_folder("m.gguf", tmp_path)
        return folder, "becomes the folder m" in capsys.readouterr().out

    written(whole_file("llama"), tmp_path / "m.gguf")
    assert [seen() for _ in range(2)] == [(tmp_path / "m", True), (tmp_path / "m", False)]
    assert (tmp_path / "m/config.json").exists()
    written(whole_file("qwen3"), tmp_path / "m.gguf")
    assert seen()[1] and "Qwen3" in (tmp_path / "m/config.json").read_text()
    (tmp_path / "m.gguf").write_bytes(b"GGUF, cut short")
    for _ in range(2):
        with pytest.raises(Refusal, match="^teacher.path = m.gguf: gguf_import: .*is no whole GGUF file"):
            teacher_folder("m.gguf", tmp_path)

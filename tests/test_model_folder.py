"""A model folder is complete: transformers generates from it, and its card says what it was made from."""

import json
from dataclasses import replace

import pytest
import yaml
from test_shards import BPE, folder_of
from test_student import SHAPE as STUDENT
from test_teacher import SHAPE as TEACHER

from stages.data.shards import read_card, write_card
from stages.files.weight_files import weight_files
from stages.model.generation import generate
from stages.model.hub import load, new_model, save
from stages.run.entry import Place
from stages.training.model_folder import complete_folder

FIGURES = {"validation_bits_per_byte": 1.23456789, "tokens": 4096}
WIDE = {"vocab_size": BPE.vocab_size, "sequence_tokens": 64}
FAST = {"expert_width": 8, "dense_width": 48}  # transformers' grouped products take multiples of 16 bytes


def completed(root, shape, source="stdlib"):
    """A data folder and a completed model, as a stage leaves them."""
    data = folder_of(root / "artifacts/data", BPE)
    card = {key: value for key, value in read_card(data).items() if key != "sha256"}
    write_card(data, card | {"corpus": {"source": source, "name": "some text"}})
    save(new_model(shape, 1), root / "artifacts/student", BPE.end_of_text, card["tokenizer_sha256"])
    place = Place(root, root)
    complete_folder(place, "student", "Made for a test.", ("student",), FIGURES, shape.sequence_tokens)
    return root / "artifacts/student"


@pytest.mark.parametrize("parents", [(), ("student",)], ids=["from nothing", "made from it"])
def test_beside_a_teacher_from_a_folder_a_card_says_what_was_read_here_and_whose_licence_holds(parents, tmp_path):
    folder = completed(tmp_path, replace(STUDENT, **WIDE | {"sequence_tokens": 512}))
    data = tmp_path / "artifacts/data"
    card = {key: value for key, value in read_card(data).items() if key != "sha256"}
    write_card(data, card | {"teacher": {"files": 3, "sha256": "0" * 64}})
    complete_folder(Place(tmp_path, tmp_path), "student", "Made for a test.", parents, FIGURES, 64)
    said = card_of(folder)
    assert ("that one's licence" in said) == bool(parents)
    assert ("training texts are not known here" in said) == bool(parents)
    assert ("at most 64 tokens at a time" in said and "| context in training, tokens | 64 |" in said) != bool(parents)


def card_of(folder):
    return (folder / "README.md").read_text()


SHAPES = {"student": replace(STUDENT, **WIDE), "teacher": replace(TEACHER, **WIDE, **FAST)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_text_generation_pipeline_writes_what_our_generation_writes(shape, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = completed(tmp_path, shape)
    writer = transformers.pipeline("text-generation", model=str(folder), device="cpu")
    prompt = "def first():"
    theirs = writer(prompt, max_new_tokens=12, return_full_text=False)[0]["generated_text"]
    ours = generate(load(folder), BPE.encode(prompt), 12, end_of_text=BPE.end_of_text)
    assert theirs == BPE.decode(ours) and len(ours) == 12


def test_the_card_names_what_the_model_was_made_from(tmp_path):
    folder = completed(tmp_path, replace(STUDENT, **WIDE))
    config, card = json.loads((folder / "config.json").read_text()), card_of(folder)
    data = read_card(tmp_path / "artifacts/data")
    for value in (config["weights_sha256"], config["tokenizer_sha256"], data["sha256"]):
        assert f"`{value}`" in card
    assert "weights of `student`" in card and "1.23457" in card and "some text" in card
    assert f"| parameters | {sum(p.numel() for p in load(folder).parameters()):,} |" in card
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["pipeline_tag"] == "text-generation" and metadata["library_name"] == "transformers"
    assert "license" not in metadata, "nobody has decided it"


def test_equal_models_have_equal_folders_wherever_they_stand(tmp_path):
    one, two = (completed(tmp_path / at, replace(STUDENT, **WIDE)) for at in ("a", "b/deeper"))
    files = sorted(path.name for path in one.iterdir())
    assert files == ["README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                     "tokenizer_config.json"]  # fmt: skip
    assert [name for name in files if (one / name).read_bytes() != (two / name).read_bytes()] == []
    assert str(tmp_path) not in card_of(one)


@pytest.mark.parametrize("source", ["files", "huggingface"])
def test_the_card_states_only_licences_that_are_known(source, tmp_path):
    assert "PSF" not in card_of(completed(tmp_path, replace(STUDENT, **WIDE), source))


def test_a_softmax_teacher_says_that_transformers_cannot_read_it(tmp_path):
    shape = replace(TEACHER, gating="softmax", **WIDE)
    assert "only Offramp's own code reads it" in card_of(completed(tmp_path, shape))
    state = load(tmp_path / "artifacts/student").state_dict()
    assert weight_files(tmp_path / "artifacts/student").parameters == sum(part.numel() for part in state.values())


def test_the_card_of_a_family_that_transformers_computes_names_its_experts(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=BPE.vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    card = card_of(completed(tmp_path, load(tmp_path / "mixtral").shape))
    assert "| routed experts | 3 |" in card and "| experts per token | 2 |" in card

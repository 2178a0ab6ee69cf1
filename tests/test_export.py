"""Exports: each form beside the model it was made from, and one line where an extra is missing."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from test_model_folder import WIDE, completed
from test_student import SHAPE as STUDENT
from test_teacher import SHAPE as TEACHER

from stages import export
from stages.files.artifacts import Refusal
from stages.model.hub import load
from stages.run.commandline import _readers
from stages.run.entry import Place

WIDTHS = {"width": 64, "head_dim": 32, "mlp_width": 96}
EVALUATION = {
    "test": {"documents": 3, "tokens": 4000},
    "models": {"student": {"bits_per_byte": 1.5, "bits_per_byte_low": 1.25, "bits_per_byte_high": 1.75,
                           "top1_accuracy": 0.5, "top1_accuracy_low": 0.4, "top1_accuracy_high": 0.6}},
}  # fmt: skip


class NoRun:
    def metrics(self, numbers):
        self.numbers = numbers


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("exported")
    completed(root, replace(STUDENT, **WIDE, **WIDTHS))
    (root / "artifacts/evaluation.json").write_text(json.dumps(EVALUATION))
    return root


def exported(root, out, settings, **chosen):
    """The command's figures, as it writes them."""
    knobs = {"models": ("student",), "prompts": 2, "new_tokens": 6, "test_sequences": 2} | chosen
    settings = settings.model_copy(update={"export": settings.export.model_copy(update=knobs), "sequence_tokens": 16})
    export.main(settings, Place(root, out), NoRun())
    return json.loads((out / "metrics/export.json").read_text())


def test_a_hugging_face_folder_is_the_models_with_the_test_figures_in_its_card(root, tiny_settings, tmp_path):
    figures = exported(root, tmp_path, tiny_settings, formats=("hf",))["student"]["hf"]
    source, target = root / "artifacts/student", tmp_path / "export/student/hf"
    assert {path.name for path in target.iterdir()} == {path.name for path in source.iterdir()}
    for path in source.iterdir():
        assert path.name == "README.md" or (target / path.name).read_bytes() == path.read_bytes()
    card = (target / "README.md").read_text()
    assert "| bits per byte | 1.5000 | 1.2500 to 1.7500 |" in card and "come later" not in card
    assert "come later" in (source / "README.md").read_text()
    assert figures["largest_logit_difference"] == 0 and figures["equal_continuations"] == 2
    assert figures["bytes"] == sum(path.stat().st_size for path in target.iterdir())
    assert "score_tokens_per_second" in json.loads((tmp_path / "measurements/export.json").read_text())["student"]["hf"]


def test_bits_per_byte_are_those_of_the_models_own_logits(root, tiny_settings, tmp_path):
    found = exported(root, tmp_path, tiny_settings, formats=("hf",))["student"]["hf"]["bits_per_byte"]
    knobs = tiny_settings.export.model_copy(update={"prompts": 2, "test_sequences": 2})
    yardstick = export.read_yardstick(Place(root, tmp_path), 16, knobs)
    rows = yardstick.windows_WT1
    with torch.no_grad():
        nats = torch.nn.functional.cross_entropy(load(root / "artifacts/student")(rows[:, :-1]).mT, rows[:, 1:])
    assert found == pytest.approx(nats.item() / 0.693147180559945 / yardstick.bytes_per_token, rel=1e-5)


def test_gguf_files_are_read_by_llama_cpp_and_a_model_without_one_is_left_out(root, tiny_settings, tmp_path, capsys):
    for module in ("gguf", "xllamacpp"):
        pytest.importorskip(module, reason="the extra gguf is not installed")
    figures = exported(root, tmp_path, tiny_settings, formats=("gguf",))["student"]
    assert set(figures) == {"gguf f32", "gguf f16", "gguf q8_0"}
    sizes = [figures[form]["bytes"] for form in ("gguf f32", "gguf f16", "gguf q8_0")]
    assert sizes == sorted(sizes, reverse=True)
    assert figures["gguf f32"]["largest_logit_difference"] == 0
    assert 0 < figures["gguf f16"]["largest_logit_difference"] < figures["gguf q8_0"]["largest_logit_difference"] < 0.1
    teacher = tmp_path / "other"
    completed(teacher, replace(TEACHER, **WIDE))
    assert exported(teacher, tmp_path / "out", tiny_settings, formats=("gguf",)) == {"student": {}}
    assert capsys.readouterr().out.count("left out: ") == 1


SHORT = {"student": replace(STUDENT, layers=1, **WIDE), "teacher": replace(TEACHER, layers=2, dense_layers=1, **WIDE)}


@pytest.mark.parametrize("shape", SHORT.values(), ids=SHORT)
def test_onnx_runtime_gives_the_models_logits_for_any_batch_and_length(shape, tmp_path):
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module, reason="the extra onnx is not installed")
    from stages.formats.onnx_graph import OnnxModel, write_onnx

    folder = completed(tmp_path, shape)
    write_onnx(folder, tmp_path / "model.onnx")
    assert str(tmp_path).encode() not in (tmp_path / "model.onnx").read_bytes()
    graph, model = OnnxModel(tmp_path / "model.onnx", 1), load(folder)
    for size in ((1, 1), (1, 17), (3, 9), (2, 64)):
        tokens_BT = torch.randint(0, shape.vocab_size, size, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            torch.testing.assert_close(graph.logits(tokens_BT), model(tokens_BT), rtol=1e-4, atol=1e-4)


def test_a_softmax_teacher_which_transformers_lacks_has_no_onnx(tmp_path):
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module, reason="the extra onnx is not installed")
    from stages.formats.onnx_graph import write_onnx

    folder = completed(tmp_path, replace(TEACHER, gating="softmax", **WIDE))
    with pytest.raises(Refusal, match="no ONNX of model_type 'offramp_softmax_moe'"):
        write_onnx(folder, tmp_path / "model.onnx")


def test_int8_is_read_by_transformers_and_a_mixture_is_left_out(root, tiny_settings, tmp_path, capsys):
    pytest.importorskip("torchao", reason="the extra int8 is not installed")
    figures = exported(root, tmp_path, tiny_settings, formats=("hf", "int8"))["student"]
    assert figures["int8"]["bytes"] < figures["hf"]["bytes"]
    assert 0 < figures["int8"]["largest_logit_difference"] < 0.1
    assert figures["int8"]["bits_per_byte"] == pytest.approx(figures["hf"]["bits_per_byte"], rel=0.01)
    config = json.loads((tmp_path / "export/student/int8/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "torchao" and "weights_sha256" not in config
    speeds = json.loads((tmp_path / "measurements/export.json").read_text())["student"]["int8"]
    assert speeds["write_tokens_per_second"] > 0 and speeds["score_tokens_per_second"] > 0
    teacher = tmp_path / "other"
    completed(teacher, replace(TEACHER, **WIDE))
    assert exported(teacher, tmp_path / "out", tiny_settings, formats=("int8",)) == {"student": {}}
    assert "left out: " in capsys.readouterr().out


def test_int8_writes_the_likeliest_tokens_by_its_own_logits(root, tmp_path):
    pytest.importorskip("torchao", reason="the extra int8 is not installed")
    from stages.formats.int8_folder import Int8Model, write_int8

    write_int8(root / "artifacts/student", tmp_path / "int8")
    model, ids = Int8Model(tmp_path / "int8"), [5, 9, 31, 7]
    found, _ = model.greedy(ids, 6)
    for token in found:
        assert model.logits(torch.tensor([ids]))[0, -1].argmax() == token
        ids = [*ids, token]


RELATIVES = {"qwen3": {}, "tied llama": {"kind": "llama", "tied": True}, "mistral": {"kind": "mistral"},
             "qwen2": {"kind": "qwen2", "heads": 2}}  # fmt: skip


@pytest.mark.parametrize("changes", RELATIVES.values(), ids=RELATIVES)
def test_onnx_runtime_genai_writes_the_models_greedy_text(changes, tiny_settings, tmp_path):
    for module in ("onnxruntime_genai", "onnx_ir"):
        pytest.importorskip(module, reason="the extra genai is not installed")
    completed(tmp_path / "root", replace(STUDENT, **WIDE, **WIDTHS, **changes))
    found = exported(tmp_path / "root", tmp_path / "out", tiny_settings, formats=("onnx_genai",))["student"]
    figures = found["onnx_genai"]
    assert figures["equal_continuations"] == 2 and figures["largest_logit_difference"] < 1e-4
    folder = tmp_path / "out/export/student/onnx_genai"
    assert figures["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    assert [path.name for path in folder.parent.iterdir()] == ["onnx_genai"], "nothing of the builder's is left"


def test_what_has_no_graph_for_genai_is_left_out_and_a_builder_that_fails_is_one_line(tmp_path, monkeypatch):
    for module in ("onnxruntime_genai", "onnx_ir"):
        pytest.importorskip(module, reason="the extra genai is not installed")
    from stages.formats import onnx_genai

    teacher = completed(tmp_path / "teacher", replace(TEACHER, **WIDE))
    with pytest.raises(Refusal, match="no graph for ONNX Runtime GenAI of the family deepseek_v3: only models of"):
        onnx_genai.write_onnx_genai(teacher, tmp_path / "out/a")
    student = completed(tmp_path / "student", replace(STUDENT, **WIDE, **WIDTHS))
    monkeypatch.setattr(onnx_genai, "BUILDER", "onnxruntime_genai.models.no_such_builder")
    with pytest.raises(Refusal, match="the builder of ONNX Runtime GenAI does not take it .*no_such_builder"):
        onnx_genai.write_onnx_genai(student, tmp_path / "out/a")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir()), "nothing half-written"


EXTRA = {"onnx_genai": "genai"}
FORMS = [("gguf", "gguf"), ("gguf", "xllamacpp"), ("onnx", "onnxruntime"), ("onnx_genai", "onnxruntime_genai"),
         ("int8", "torchao")]  # fmt: skip


@pytest.mark.parametrize(("form", "module"), FORMS)
def test_a_missing_extra_is_one_line_before_any_file(root, tiny_settings, tmp_path, monkeypatch, form, module):
    for others in ("gguf", "xllamacpp", "onnx", "onnxscript", "onnxruntime", "onnxruntime_genai", "onnx_ir", "torchao"):
        monkeypatch.setitem(sys.modules, others, sys)  # anything that is there
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(Refusal, match=rf"{module} is not installed: .*'\.\[{EXTRA.get(form, form)}\]'"):
        exported(root, tmp_path / "out", tiny_settings, formats=("hf", form))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_complete_or_of_other_data_is_refused(root, tiny_settings, tmp_path):
    with pytest.raises(Refusal, match="no model of that name"):
        exported(root, tmp_path / "out", tiny_settings, models=("nobody",), formats=("hf",))
    with pytest.raises(Refusal, match="names two models student"):
        exported(root, tmp_path / "out", tiny_settings, models=("student", "student"), formats=("hf",))
    shutil.copytree(root / "artifacts/student", tmp_path / "bare")
    for name in ("tokenizer.json", "README.md"):
        (tmp_path / "bare" / name).unlink()
    with pytest.raises(Refusal, match="tokenizer.json is missing"):
        exported(root, tmp_path / "out", tiny_settings, models=(str(tmp_path / "bare"),), formats=("hf",))
    shutil.copytree(root / "artifacts/student", tmp_path / "foreign")
    config = json.loads((tmp_path / "foreign/config.json").read_text()) | {"tokenizer_sha256": "0" * 64}
    (tmp_path / "foreign/config.json").write_text(json.dumps(config))
    with pytest.raises(Refusal, match="another tokenizer than artifacts/data has"):
        exported(root, tmp_path / "out", tiny_settings, models=(str(tmp_path / "foreign"),), formats=("hf",))


def test_a_stage_that_is_given_a_setting_of_the_command_is_told_who_reads_it():
    assert _readers({"export"}, "distill") == "python -m stages.export does"
    assert _readers({"distill"}, "export") == "distill does", "of a command no stage's outs are named"

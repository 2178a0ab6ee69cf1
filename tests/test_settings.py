"""What may be set: everything shipped is valid, every mistake is one line that names key, value and rule."""

import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import yaml
from dvc.utils.hydra import apply_overrides
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from pydantic import BaseModel

from stages.files.artifacts import ROOT, Refusal, sha256_of
from stages.run import unchanged
from stages.settings.compose import compose, explain
from stages.settings.lightning import duration_seconds
from stages.settings.schema import BATCHES, SECTIONS, Settings, as_yaml, leaves, refuse_uneven_batches, validate
from stages.settings.untracked import OF_TRAINING, SECTION, UNTRACKED, divided, joined

SCALES = sorted(file.stem for file in (ROOT / "conf/scale").glob("*.yaml"))
CORPORA = sorted(file.stem for file in (ROOT / "conf/corpus").glob("*.yaml"))
TINY = compose(["scale=tiny", "corpus=stdlib"])


def changed(key, value):
    plain = copy.deepcopy(TINY)
    *path, last = key.split(".")
    inner = plain
    for name in path:
        inner = inner[name]
    inner[last] = value
    return plain


@pytest.fixture
def sheet(tmp_path):
    """A copy of params.yaml and conf/ to spoil."""
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    shutil.copy(ROOT / "params.yaml", tmp_path / "params.yaml")
    return tmp_path


def test_the_five_scales_are_shipped():
    assert SCALES == ["demo", "gpu", "node", "smollm", "tiny"]


def test_the_scale_of_a_real_teacher_reads_what_make_smollm_writes():
    settings = validate(compose(["scale=smollm", "distill.init=pruned"]))
    folder = re.search(r"^SMOLLM := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert (settings.teacher.source, settings.teacher.path) == ("folder", folder) and settings.pretrain.steps == 0


@pytest.mark.parametrize("corpus", CORPORA)
@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_and_corpus_composes_and_validates(scale, corpus):
    files = ["corpus.paths=[a.txt]"] if corpus == "files" else []
    settings = validate(compose([f"scale={scale}", f"corpus={corpus}", *files]))
    assert settings.corpus.source == corpus


def test_the_sheet_as_shipped_validates():
    assert isinstance(validate(compose()), Settings)


def test_sections_limit_what_is_read_and_needed():
    settings = validate({"seed": 3, "trainer": TINY["trainer"]}, ["seed", "trainer"])
    assert settings.seed == 3 and settings.teacher is None


def test_settings_survive_a_round_trip_through_plain_values_and_yaml(tiny_settings):
    assert validate(tiny_settings.model_dump()) == tiny_settings
    assert validate(yaml.safe_load(as_yaml(TINY))) == tiny_settings


MISTAKES = [
    ("teacher.source", "hub", "teacher.source = hub: must be train or folder"),
    ("teacher.source", "folder", "teacher.path = None: must name the folder of a model when teacher.source is folder"),
    ("teacher.path", "models/mine", "teacher.path = models/mine: only source folder reads it, and teacher.source is"),
    ("teacher.end_of_text", "</s>", "teacher.end_of_text = '</s>': only source folder reads it, and teacher.source is"),
    ("teacher.path", 3, "teacher.path = 3: must be a word"),
    ("pretrain.steps", 0, "pretrain.steps = 0: must be at least 1: only a teacher from a folder needs no training"),
    ("distill.init", "pruned", "distill.init = pruned: cuts a dense teacher from a folder (teacher=folder)"),
    ("student.parameters_share", 0, "student.parameters_share = 0: must be above 0"),
    ("teacher.experts_per_token", 9, "teacher.experts_per_token = 9: must be at most teacher.experts (8)"),
    ("teacher.dense_layers", 4, "teacher.dense_layers = 4: must be at most teacher.layers (3)"),
    ("teacher.rope_head_dim", 7, "teacher.rope_head_dim = 7: must be even: rotation works on pairs"),
    ("teacher.gating", "sigmod", "teacher.gating = sigmod: must be sigmoid or softmax"),
    ("teacher.expert", 3, "teacher.expert: no such setting; did you mean teacher.experts?"),
    ("teacher.temperature", 3, "teacher.temperature: no such setting; did you mean distill.temperature?"),
    ("student.kv_heads", 3, "student.heads = 4: must be a multiple of student.kv_heads (3)"),
    ("distill.temperature", -1, "distill.temperature = -1: must be above 0"),
    ("distill.temperature", float("nan"), "distill.temperature = nan: must be a finite number"),
    ("distill.temperature", "hot", "distill.temperature = 'hot': must be a number"),
    ("distill.soft_weight", 1.5, "distill.soft_weight = 1.5: must be at most 1"),
    ("sparsify.student.keep_neurons", 0, "sparsify.student.keep_neurons = 0: must be above 0"),
    ("pretrain.steps", 3.0, "pretrain.steps = 3.0: must be a whole number"),
    ("pretrain.steps", True, "pretrain.steps = True: must be a whole number"),
    ("pretrain.steps", None, "pretrain.steps = None: must be a whole number"),
    ("trainer.ranks", 3, "pretrain.batch_sequences = 8: must be a multiple of trainer.ranks (3): set it to 9"),
    ("trainer.ranks", "many", "trainer.ranks = 'many': must be auto or a number"),
    ("trainer.deterministic", "often", "trainer.deterministic = 'often': must be true or false"),
    ("prepare.vocab_size", 257, "prepare.vocab_size = 257: must be at least 258"),
    ("prepare.val_share", 0.6, "prepare.val_share = 0.6: must be at most 0.5"),
    ("optimizer.decay_share", 0.99, "optimizer.decay_share = 0.99: must be at most 1 - "),
    ("evaluate.checkpoint_every_blocks", [], "evaluate.checkpoint_every_blocks = []: must name at least one"),
    ("evaluate.checkpoint_every_blocks", [0], "evaluate.checkpoint_every_blocks = 0: must be at least 1"),
    ("export.formats", ["hfx"], "export.formats = hfx: must be hf, gguf, onnx, onnx_genai or int8"),
    ("corpus.source", "huggingface", "corpus.dataset = None: must name a dataset"),
    ("corpus.source", "files", "corpus.paths = []: must name at least one file or glob: in params.yaml corpus: {"),
    ("corpus.paths", ["a.txt"], "corpus.paths = ['a.txt']: only source files reads it"),
    ("corpus.separator", "--", "corpus.separator = --: only source files reads it"),
    ("corpus.separator", "", "corpus.separator = '': must be a word"),
    ("corpus.dataset", "a/b", "corpus.dataset = a/b: only source huggingface reads it"),
    ("corpus.undecodable", "ignore", "corpus.undecodable = ignore: must be refuse or skip"),
    ("corpus.paths", "a.txt", "corpus.paths = 'a.txt': must be a list, such as [a, b]"),
    ("seed", "5", "seed = '5': must be a whole number, and this is text: write it without quotes"),
    ("distill.temperature", "1e3", "distill.temperature = '1e3': must be a number, and this is text"),
    ("export.formats", ["pdf"], "export.formats = pdf: must be hf, gguf, onnx, onnx_genai or int8"),
    ("plan.chips", [0], "plan.chips = 0: must be at least 1"),
    ("plan.chips", [], "plan.chips = []: must name at least one"),
    ("plan.provider", [], "plan.provider = []: must name at least one"),
    ("plan.grid.years", [], "plan.grid.years = []: must name at least one"),
    ("plan.today", "2026-02-30", "plan.today = 2026-02-30: must be a day that exists, as YYYY-MM-DD, or now"),
    ("plan.today", "soon", "plan.today = soon: must be a"),
    ("plan.tokens", -1.0, "plan.tokens = -1.0: must be above 0"),
    ("plan.terms", "hourly", "plan.terms = hourly: must be on_demand, spot"),
    ("teacher", 3, "teacher = 3: must be a mapping of settings"),
    ("trainer.gradient_clip_val", 0, "trainer.gradient_clip_val = 0: must be above 0"),
    ("optimizer.clip_norm", 1.0, "optimizer.clip_norm: no such setting; it is trainer.gradient_clip_val now"),
    ("trainer.max_time", "30:00", "trainer.max_time = 30:00: must be a time such as \"00:12:30:00\" (days:hours:min"),
    ("trainer.max_time", "00:00:00:00", "trainer.max_time = 00:00:00:00: must be a time such as"),
    ("trainer.max_time", 43200, "trainer.max_time = 43200: must be a time such as \"00:12:30:00\" (days:hours:"),
    ("trainer.limit_val_batches", 0, "trainer.limit_val_batches = 0: must be a number of batches from 1 on, or a sha"),
    ("trainer.limit_val_batches", 1.5, "trainer.limit_val_batches = 1.5: must be a number of batches from 1 on"),
    ("trainer.limit_val_batches", True, "trainer.limit_val_batches = True: must be a number of batches"),
    ("trainer.fast_dev_run", -1, "trainer.fast_dev_run = -1: must be false, true, or a number of steps up to 65,536"),
    ("trainer.fast_dev_run", "yes", "trainer.fast_dev_run = yes: must be false, true, or a number of steps"),
    ("logger", ["csv"], "logger = ['csv']: must be a mapping of names to a class each: {name: {_target_: package.Cl"),
    ("logger", {"csv": {"save_dir": "x"}}, "logger = {'csv': {'save_dir': 'x'}}: must be a mapping of names to a cl"),
    ("callbacks", {"mine": {"_target_": "a.B", "x": float("nan")}}, "callbacks = {'mine': {'_target_': 'a.B', 'x':"),
    ("sede", 3, "sede: no such setting; did you mean seed?"),
    ("seed", 10**5000, "seed = a very large int: must be at most"),
]


@pytest.mark.parametrize(("key", "value", "line"), MISTAKES, ids=[line[:40] for _, _, line in MISTAKES])
def test_a_mistake_is_one_line_naming_key_value_and_rule(key, value, line):
    with pytest.raises(Refusal) as refusal:
        validate(changed(key, value))
    assert str(refusal.value).startswith(line) and "\n" not in str(refusal.value)


def test_batches_that_the_ranks_found_here_cannot_share_are_refused_for_the_stage_that_runs():
    plain = changed("pretrain.batch_sequences", 7)
    settings = validate(plain)
    line = r"^pretrain.batch_sequences = 7: must be a multiple of the 2 ranks here \(trainer.ranks is auto\): set it to"
    with pytest.raises(Refusal, match=line):
        refuse_uneven_batches(settings, 2)
    refuse_uneven_batches(validate(plain, ["trainer", "distill"]), 2)
    refuse_uneven_batches(settings, 1)


def numbers(kind=Settings, path=()):
    """Dotted name, type and bounds of every numeric setting."""
    for name, field in kind.model_fields.items():
        key, kinds, metadata = (*path, name), [field.annotation, *typing.get_args(field.annotation)], field.metadata
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from numbers(field.annotation, key)
            continue
        for inner in typing.get_args(field.annotation):  # of a list or a union
            kinds, metadata = [*kinds, *typing.get_args(inner)], [*metadata, *getattr(inner, "__metadata__", ())]
        if key[-1] in ("limit_val_batches", "fast_dev_run"):  # either of two kinds: their rules are among MISTAKES
            continue
        kind_of_number = next((each for each in kinds if each in (int, float)), None)
        if kind_of_number:
            bounds = {}
            for each in metadata:
                for part in getattr(each, "metadata", [each]):
                    bounds |= {word: getattr(part, word) for word in ("gt", "ge", "le") if hasattr(part, word)}
            yield ".".join(key), kind_of_number, typing.get_origin(field.annotation) is tuple, bounds


# what a rule that joins settings wants beside one at its end
BESIDE = {
    "teacher.layers": {"teacher.dense_layers": 1},
    "teacher.dense_layers": {"teacher.layers": 2**40},
    "teacher.experts": {"teacher.experts_per_token": 1},
    "teacher.experts_per_token": {"teacher.experts": 2**40},
    "student.heads": {"student.kv_heads": 1},
    "student.kv_heads": {"student.heads": 2**40},
    "profile.router_experts": {"profile.router_experts_per_token": 1},
    "profile.router_experts_per_token": {"profile.router_experts": 2**40},
    "prepare.vocab_size": {"prepare.tokenizer": "bytes"},
    "optimizer.warmup_share": {"optimizer.decay_share": 0},
    "optimizer.decay_share": {"optimizer.warmup_share": 0},
    "engine.nodes": {"engine.name": "slurm"},
    "engine.node_rank": {"engine.name": "torchrun", "engine.nodes": 65536, "engine.master_address": "10.0.0.1"},
    "trainer.ranks": dict.fromkeys(BATCHES.values(), 65536),
    "pretrain.steps": {"teacher.source": "folder", "teacher.path": "models/mine"},
}


@pytest.mark.parametrize(("key", "kind", "listed", "bounds"), numbers(), ids=[key for key, *_ in numbers()])
def test_both_ends_of_every_bound_are_accepted_and_what_lies_beyond_is_refused(key, kind, listed, bounds):
    def validated(value):
        plain = changed(key, [value] if listed else value)
        for other, needed in BESIDE.get(key, {}).items():
            section, *names, last = other.split(".")
            inner = plain[section]
            for name in names:
                inner = inner[name]
            inner[last] = needed
        return validate(plain)

    def beyond(value, direction):
        return value + direction if kind is int else math.nextafter(value, direction * math.inf)

    high = bounds["le"]
    validated(beyond(bounds["gt"], 1) if "gt" in bounds else bounds["ge"])
    validated(high)
    for value in (bounds["gt"] if "gt" in bounds else beyond(bounds["ge"], -1), beyond(high, 1)):
        with pytest.raises(Refusal, match=f"^{key} = .*: must be (above|at least|at most) "):
            validated(value)


@pytest.mark.parametrize("key", [*leaves(), *SECTIONS])
def test_every_setting_is_needed(key):
    plain = changed(key, 0)
    *path, last = key.split(".")
    inner = plain
    for name in path:
        inner = inner[name]
    del inner[last]
    with pytest.raises(Refusal, match=f"^{key}: missing"):
        validate(plain)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@effort(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([*leaves(), *SECTIONS]), anything), min_size=1, max_size=3))
def test_arbitrary_values_give_settings_or_one_refusal(edits):
    plain = copy.deepcopy(TINY)
    for key, value in edits:
        *path, last = key.split(".")
        inner = plain
        for name in path:
            inner = inner[name] if isinstance(inner, dict) and name in inner else {}
        if isinstance(inner, dict):
            inner[last] = value
    accepted_or_refused_in_one_line(plain)


@effort(max_examples=100, deadline=None)
@given(anything, st.dictionaries(st.sampled_from(SECTIONS) | st.text() | st.integers(), anything, max_size=4))
def test_arbitrary_structures_give_settings_or_one_refusal(whole, extra):
    accepted_or_refused_in_one_line(whole)
    accepted_or_refused_in_one_line({**TINY, **extra})


def accepted_or_refused_in_one_line(plain):
    try:
        validate(plain)
    except Refusal as refusal:
        assert len(str(refusal).splitlines()) == 1 and len(str(refusal)) < 600


SPOILED = [
    ("scale: demo", "scale: dmeo", "params.yaml: scale = dmeo: must be one of demo, gpu, node, smollm, tiny"),
    ("scale: demo", "scale: 3", "params.yaml: scale = 3: must be one of"),
    ("scale: demo", "", "params.yaml: scale: missing; write one of"),
    ("scale: demo", "scale: demo\nspeed: fast", "speed: no such setting"),
    ("seed: 1", "seed: 1\nseed: 2", "params.yaml, line "),
    ("seed: 1", "seed: [1", "params.yaml, line "),
    ("seed: 1", "", "seed: missing"),
    ("seed: 1", "seed: 1\nhydra: {run: {dir: /}}", "hydra: no such setting"),
    ("seed: 1", "seed: 1\ndefaults: [x]", "defaults: no such setting"),
    ("seed: 1", "seed: 2026-01-01", "seed = "),
    ("seed: 1", "seed: " + "[" * 5000, "params.yaml"),
    ("seed: 1", "seed: ???", "seed: Missing mandatory value"),
    ("seed: 1", "seed: ${nowhere}", "seed: Interpolation key 'nowhere' not found"),
    ("seed: 1", "seed: 1\nteacher: {layers: 2, layers: 3}", "params.yaml, line "),
    ("seed: 1", "seed: 1\noptimizer: muon", "optimizer = muon: must be a mapping of settings"),
    ("seed: 1", "seed: ${oc.env:OFFRAMP_UNSET}", "seed: the environment variable OFFRAMP_UNSET is not set"),
    ("corpus: stdlib", "corpus: {paths: [a]}", "params.yaml: corpus.source: missing; write one of files, hugging"),
    ("corpus: stdlib", "corpus: {source: file}", "params.yaml: corpus = file: must be one of files, huggingface, std"),
    ("corpus: stdlib", "corpus: {source: files, path: [a]}", "corpus.path: no such setting; did you mean corp"),
    ("scale: demo", "scale: {source: demo}", "params.yaml: scale = {'source': 'demo'}: must be one of"),
]


@pytest.mark.parametrize(("before", "after", "line"), SPOILED, ids=range(len(SPOILED)))
def test_a_spoiled_sheet_is_refused_in_one_line(sheet, before, after, line):
    text = (sheet / "params.yaml").read_text()
    (sheet / "params.yaml").write_text(text.replace(before, after, 1))
    with pytest.raises(Refusal) as refusal:
        validate(compose(root=sheet))
    assert str(refusal.value).startswith(line) and "\n" not in str(refusal.value)


def edited(sheet, *edits):
    text = (sheet / "params.yaml").read_text()
    for before, after in edits:
        assert before in text
        text = text.replace(before, after, 1)
    (sheet / "params.yaml").write_text(text)


def test_any_setting_of_any_preset_may_be_set_again_in_the_sheet_and_on_the_command_line(sheet):
    """Later wins: conf/base.yaml, the presets, params.yaml, the command line."""
    edited(sheet, ("seed: 1", "seed: 1\npretrain: {steps: 50}\ntrainer: {ranks: 1}\nsequence_tokens: 9"))
    plain = compose(root=sheet)
    assert (plain["pretrain"]["steps"], plain["trainer"]["ranks"], plain["sequence_tokens"]) == (50, 1, 9)
    assert plain["pretrain"]["batch_sequences"] == compose()["pretrain"]["batch_sequences"]
    assert compose(["scale=tiny"], root=sheet)["pretrain"]["steps"] == 50
    assert compose(["pretrain.steps=7"], root=sheet)["pretrain"]["steps"] == 7
    scale = sheet / "conf/scale/demo.yaml"
    scale.write_text(scale.read_text() + "trainer: {ranks: 4, log_every_steps: 3}\n")
    assert compose(root=sheet)["trainer"]["ranks"] == 1 and compose(root=sheet)["trainer"]["log_every_steps"] == 3


@pytest.mark.parametrize("word", ["+pretrain.steps=50", "++pretrain.steps=50"])
def test_an_experiment_sets_what_the_sheet_lacks(sheet, word):
    apply_overrides(sheet / "params.yaml", [word])
    assert validate(compose(root=sheet)).pretrain.steps == 50


def test_an_experiment_brings_a_corpus_of_its_own(sheet):
    apply_overrides(sheet / "params.yaml", ["corpus={source:files,paths:[texts/*.txt]}"])
    assert validate(compose(root=sheet)).corpus.paths == ("texts/*.txt",)


def test_a_corpus_is_a_word_or_a_mapping_whose_source_chooses_the_preset(sheet):
    edited(sheet, ("corpus: stdlib", "corpus: {source: huggingface, max_bytes: 5}"))
    of_sheet = compose(root=sheet)["corpus"]
    assert of_sheet == compose(["corpus=huggingface", "corpus.max_bytes=5"])["corpus"]
    assert of_sheet == compose(["corpus={source:huggingface,max_bytes:5}"])["corpus"]
    assert compose(["corpus=huggingface"], root=sheet)["corpus"] == of_sheet
    assert compose(["corpus=stdlib"], root=sheet)["corpus"] == compose()["corpus"]  # not with what was the other's
    own = (sheet / "conf/corpus/files.yaml").read_text().replace("paths: []", "paths: [mine.txt]")
    (sheet / "conf/corpus/mine.yaml").write_text(own)
    edited(sheet, ("source: huggingface", "source: mine"))
    corpus = validate(compose(root=sheet)).corpus
    assert (corpus.source, corpus.paths, corpus.max_bytes) == ("files", ("mine.txt",), 5)


def test_a_teacher_from_a_folder_is_chosen_by_a_word_and_is_not_trained_unless_steps_are_named(sheet):
    words = ["teacher=folder", "teacher.path=models/mine"]
    chosen = validate(compose(words, root=sheet))
    assert (chosen.teacher.source, chosen.teacher.path, chosen.pretrain.steps) == ("folder", "models/mine", 0)
    for spelled in (["teacher={source:folder,path:models/mine}"], ["teacher.source=folder", words[1]]):
        assert validate(compose(spelled, root=sheet)) == chosen
    assert compose([*words, "pretrain.steps=7"], root=sheet)["pretrain"]["steps"] == 7
    assert compose([*words, "+experiment=short"], root=sheet)["pretrain"]["steps"] == 0
    edited(sheet, ("seed: 1", "teacher: {source: folder, path: models/mine}\nseed: 1"))
    assert validate(compose(root=sheet)) == chosen
    assert compose(["teacher=train"], root=sheet) == compose()
    edited(sheet, ("{source: folder, path: models/mine}", "{layers: 2}"))
    assert validate(compose(root=sheet)).teacher.layers == 2, "without a source it is the one that is trained"


def test_a_stage_that_declares_one_setting_of_a_section_gets_no_other(sheet):
    one = validate(TINY, ["teacher.path", "teacher.source", "seed"])
    assert one.teacher.model_dump() == {"source": "train", "path": None} and one.seed == TINY["seed"]
    with pytest.raises(Refusal, match="^teacher.path: missing"):
        validate({"teacher": {"source": "train"}}, ["teacher.source", "teacher.path"])
    with pytest.raises(Refusal, match="^teacher = 3: must be a mapping"):
        validate({"teacher": 3}, ["teacher.source"])


def test_a_preset_of_ones_own_without_its_first_line_is_told_which(sheet):
    text = (sheet / "conf/scale/tiny.yaml").read_text()
    (sheet / "conf/scale/mine.yaml").write_text(text.replace("# @package _global_\n", ""))
    assert validate(compose(root=sheet))  # not in use
    for words in (["scale=mine"], ["scale=tiny,mine"]):
        with pytest.raises(Refusal, match="^conf/scale/mine.yaml: its first line must be `# @package _global_`"):
            compose(words, root=sheet)
    (sheet / "conf/scale/mine.yaml").write_text(text)
    assert validate(compose(["scale=mine"], root=sheet)).sequence_tokens == 64


def test_an_experiment_is_a_word_that_any_place_may_say_and_what_is_set_beside_it_wins(sheet):
    assert compose(root=sheet) == compose(["experiment=none"], root=sheet)
    short = compose(["+experiment=short"])
    assert (short["pretrain"]["steps"], short["pretrain"]["batch_sequences"]) == (40, 8)
    assert compose(["experiment=short"]) == short and compose(["experiment=short", "pretrain.steps=7"])["pretrain"] == {
        **short["pretrain"],
        "steps": 7,
    }
    assert explain("pretrain.steps", ["+experiment=short"]) == "pretrain.steps = 40  # conf/experiment/short.yaml"
    apply_overrides(sheet / "params.yaml", ["+experiment=short"])  # dvc exp run -S
    assert compose(root=sheet) == short
    apply_overrides(sheet / "params.yaml", ["+pretrain.steps=50"])
    assert compose(root=sheet)["pretrain"]["steps"] == 50
    assert compose(["experiment=none"], root=sheet)["distill"] == compose()["distill"]


def test_an_experiment_that_the_sheet_leaves_nothing_of_is_refused(sheet):
    hot = sheet / "conf/experiment/hot.yaml"
    hot.write_text("# @package _global_\ndistill: {temperature: 4}\n")
    line = "^conf/experiment/hot.yaml changes nothing: params.yaml sets distill.temperature and wins; delete that there"
    with pytest.raises(Refusal, match=line):
        compose(["+experiment=hot"], root=sheet)
    edited(sheet, ("temperature: 1.0", "# temperature: 1.0"))
    assert compose(["+experiment=hot"], root=sheet)["distill"]["temperature"] == 4


@pytest.mark.parametrize("scale", ["demo", "gpu", "node"])
def test_every_shipped_experiment_validates_at_every_scale_above_tiny(scale):
    for file in sorted((ROOT / "conf/experiment").glob("*.yaml")):
        assert validate(compose([f"scale={scale}", f"experiment={file.stem}"]))


def test_a_setting_that_is_equal_in_all_scales_stands_once():
    def leaves_of(values, path=()):
        if not isinstance(values, dict):
            return {(".".join(path), str(values))}
        return {leaf for name, inner in values.items() for leaf in leaves_of(inner, (*path, name))}

    scales = [leaves_of(yaml.safe_load((ROOT / f"conf/scale/{scale}.yaml").read_text())) for scale in SCALES]
    assert not set.intersection(*scales), "write it in conf/base.yaml"


def test_the_schema_for_editors_is_up_to_date_and_knows_every_setting_and_word():
    schema = (ROOT / "conf/schema.json").read_text()
    printed = [sys.executable, "-m", "stages.config", "--schema"]
    done = subprocess.run(printed, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == schema, "python -m stages.config --schema > conf/schema.json"
    known = json.loads(schema)
    assert known["properties"]["scale"] == {"enum": SCALES}
    for leaf in leaves():
        inner = known
        for name in leaf.split("."):
            entry = inner["properties"][name]
            reference = next((each["$ref"] for each in (entry, *entry.get("anyOf", ())) if "$ref" in each), None)
            inner = known["$defs"][reference.rsplit("/", 1)[1]] if reference else {}
            assert "required" not in inner and inner.get("additionalProperties", False) is False
    steps = known["$defs"]["SoftTargets"]["properties"]["steps"]
    assert {"minimum": 1, "maximum": 2**40, "type": "integer"} in steps["anyOf"]


@pytest.mark.parametrize("file", [ROOT / "params.yaml", *sorted((ROOT / "conf").rglob("*.yaml"))], ids=lambda f: f.name)
def test_every_file_of_settings_names_its_schema(file):
    if file.name == "config.yaml" or file.is_relative_to(ROOT / "conf/plan"):  # Hydra's own; ledgers
        return
    (line,) = [line for line in file.read_text().splitlines()[:2] if line.startswith("# yaml-language-server: ")]
    schema = file.parent / line.partition("$schema=")[2]
    reference = json.loads(schema.read_text()).get("$ref", "")
    assert not reference or json.loads((ROOT / "conf/schema.json").read_text())["$defs"][reference.rsplit("/", 1)[1]]


def test_where_a_value_comes_from_is_told(sheet):
    edited(sheet, ("corpus: stdlib", "corpus: {source: files, paths: [a]}\ntrainer: {gradient_clip_val: 2}"))
    assert explain("distill.temperature", root=sheet) == "distill.temperature = 1.0  # params.yaml"
    assert explain("pretrain.steps", ["scale=tiny"], sheet) == "pretrain.steps = 20  # conf/scale/tiny.yaml"
    assert explain("pretrain.steps", ["++pretrain.steps=3"], sheet) == "pretrain.steps = 3  # command line"
    assert explain("trainer.gradient_clip_val", root=sheet) == "trainer.gradient_clip_val = 2  # params.yaml"
    assert "optimizer.adamw_beta1 = 0.9  # conf/base.yaml" in explain("optimizer", root=sheet).splitlines()
    corpus = explain("corpus", ["corpus.split=x"], sheet).splitlines()
    assert corpus[:2] == ["corpus.source = files  # conf/corpus/files.yaml", "corpus.paths = [a]  # params.yaml"]
    assert "corpus.split = x  # command line" in corpus
    assert "corpus.paths = []  # conf/corpus/stdlib.yaml" in explain("corpus", ["corpus=stdlib"], sheet)
    assert explain("trainer.max_time", root=sheet) == "trainer.max_time = null  # conf/base.yaml"
    assert explain("trainer.deterministic", root=sheet) == "trainer.deterministic = true  # conf/base.yaml"
    assert "LearningRateMonitor" in explain("callbacks", ["callbacks=learning_rate"], sheet)
    assert explain("logger", ["logger=[csv,dvclive]"], sheet).endswith("# command line")
    with pytest.raises(Refusal, match="did you mean pretrain.steps"):
        explain("pretrain.stps", root=sheet)


@pytest.mark.parametrize(("value", "number"), [("5", 5), ("0.5", 0.5), ("1e-3", 1e-3), ("007", 7)])
def test_text_from_the_environment_is_a_number_where_it_reads_as_one(sheet, monkeypatch, value, number):
    monkeypatch.setenv("NUMBER", value)
    edited(sheet, ("temperature: 1.0", "temperature: ${oc.env:NUMBER}"))
    assert validate(compose(root=sheet)).distill.temperature == number
    assert compose(["corpus.text_field=a-${oc.env:NUMBER}"], sheet)["corpus"]["text_field"] == f"a-{value}"


@effort(max_examples=25, deadline=None)
@given(st.data())
def test_an_arbitrarily_edited_sheet_gives_settings_or_one_refusal(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("sheet")
    shutil.copytree(ROOT / "conf", root / "conf")
    raw = (ROOT / "params.yaml").read_bytes()
    cut = data.draw(st.integers(0, len(raw)))
    end = data.draw(st.integers(cut, min(len(raw), cut + 40)))
    (root / "params.yaml").write_bytes(raw[:cut] + data.draw(st.binary(max_size=12)) + raw[end:])
    try:
        validate(compose(root=root))
    except Refusal as refusal:
        assert len(str(refusal).splitlines()) == 1


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("scale=dmeo", "scale = dmeo: must be one of demo, gpu, node, smollm, tiny; did you mean demo?"),
        ("distill.temprature=2", "distill.temprature: no such setting; did you mean distill.temperature?"),
        ("+distill.warmth=2", "distill.warmth: no such setting"),
        ("seed==[", "'seed==[': Hydra cannot read this (extraneous input '='): put double quotes around the text"),
        ("corpus.paths=[my texts (1)/*.txt]", "'corpus.paths=[my texts (1)/*.txt]': Hydra cannot read this (no viable"),
        ("+experiment=shrt", "experiment = shrt: must be one of none, short; did you mean short?"),
        ("scale", "scale: write it as key=value"),
        ("corpus={source:files,path:[a]}", "corpus.path: no such setting; did you mean corpus.paths?"),
        ("corpus={source:fils}", "corpus = fils: must be one of files, huggingface, stdlib; did you mean files?"),
        ("corpus={source:files},{source:stdlib}", "corpus: a sweep takes words, not mappings"),
        ("seed=1,2", "Ambiguous value for argument 'seed=1,2': 1. To use it as a list, use key=[value1,value2]; 2."),
    ],
)
def test_a_mistyped_override_is_refused_in_one_line(override, line):
    with pytest.raises(Refusal) as refusal:
        validate(compose([override]))
    assert str(refusal.value).startswith(line) and "\n" not in str(refusal.value)


PIECES = [*leaves(), *SECTIONS, "scale", "corpus", "hydra.run.dir", "hydra", "hydra:", "now:%Y", "oc.env:HOME"]
PIECES += ["choice:scale", "choice(1,2)", "range(1,3)", "interval(0,1)", "demo", "tiny", "null"]
PIECES += ["1", "nan", "1e400", "9" * 5000, "[" * 200]
PIECES += [*"+~=,[]{}$'\"\\@:/. \n\0é\ud800", "++", "${", "..", "???", "_self_", "@_global_", "_target_"]
words = st.lists(st.sampled_from(PIECES), max_size=5).map("".join)
overrides = words | st.builds("{}{}={}".format, st.sampled_from(["", "+", "++", "~"]), st.sampled_from(PIECES), words)


@effort(max_examples=60, deadline=None)
@given(st.lists(overrides, min_size=1, max_size=2))
def test_arbitrary_overrides_give_settings_or_one_refusal(given_words):
    try:
        validate(compose(given_words))
    except Refusal as refusal:
        assert len(str(refusal).splitlines()) == 1 and len(str(refusal)) < 6000


def test_the_config_stage_writes_the_same_bytes_each_time_without_machine_paths(tmp_path):
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    shutil.copytree(ROOT / "stages", tmp_path / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "params.yaml", tmp_path / "params.yaml")
    sums = set()
    for seed in ("1", "2"):
        environment = os.environ | {"DVC_STAGE": "config", "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-m", "stages.config"], cwd=tmp_path, env=environment, check=True)
        sums.add(sha256_of(tmp_path / "resolved.yaml"))
    text = (tmp_path / "resolved.yaml").read_text()
    assert len(sums) == 1 and str(tmp_path) not in text and str(Path.home()) not in text
    plain = yaml.safe_load(text)
    assert list(plain) == sorted({*SECTIONS} - {*OF_TRAINING} | {SECTION})
    assert validate(joined(plain)) == validate(compose())


def test_two_spellings_of_a_number_are_one_setting():
    words = "4", "4.0", "4e0"
    printed = {
        subprocess.run(
            [sys.executable, "-m", "stages.config", f"distill.temperature={word}"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout
        for word in words
    }  # fmt: skip
    assert len(printed) == 1 and "temperature: 4.0" in printed.pop()


def test_the_config_stage_by_hand_only_prints():
    before = (ROOT / "resolved.yaml").exists() and sha256_of(ROOT / "resolved.yaml")
    command = [sys.executable, "-m", "stages.config", "scale=gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert yaml.safe_load(done.stdout)["sequence_tokens"] == 2048
    assert before == ((ROOT / "resolved.yaml").exists() and sha256_of(ROOT / "resolved.yaml"))


def test_the_config_stage_imports_no_torch():
    code = "import sys, stages.config; stages.config.main(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)


def test_what_no_out_depends_on_stands_apart_in_resolved_yaml():
    """An edit of it reruns no stage, for dvc.yaml names the other sections."""
    plain = compose(["scale=tiny", "logger=csv", "trainer.max_time=00:00:30:00"])
    tracked, untracked = divided(plain)
    assert untracked == {
        "callbacks": {},
        "engine": plain["engine"],
        "logger": plain["logger"],
        "trainer": {"fast_dev_run": False, "max_time": "00:00:30:00", "move": False},
    }
    assert divided(TINY)[0] == tracked and joined(tracked | {SECTION: untracked}) == plain
    assert {key.split(".")[0] for key in UNTRACKED} <= {*SECTIONS}
    assert duration_seconds("01:02:03:04") == 93784


def test_an_engine_is_a_word_of_the_sheet_or_a_mapping_with_its_name_and_no_reason_to_run_a_stage_again(sheet):
    plain, tracked = compose(root=sheet), divided(compose(root=sheet))[0]
    for entry, nodes in (("slurm", 2), ("{name: slurm, nodes: 4}", 4)):
        before = (sheet / "params.yaml").read_text()
        edited(sheet, ("corpus: stdlib", f"corpus: stdlib\nengine: {entry}"))
        engine = validate(compose(root=sheet)).engine
        assert (engine.name, engine.nodes, engine.options["partition"]) == ("slurm", nodes, None)
        assert divided(compose(root=sheet))[0] == tracked
        assert compose(["engine=local"], root=sheet) == plain, "the command line has the last word"
        (sheet / "params.yaml").write_text(before)


@pytest.mark.parametrize("entry", ["csv", "[csv]", "[csv, dvclive]", "{mine: {_target_: own.Log, at: '${run:fit}'}}"])
def test_loggers_are_one_preset_several_or_spelled_out(sheet, entry):
    edited(sheet, ("corpus: stdlib", f"corpus: stdlib\nlogger: {entry}"))
    logger = validate(compose(root=sheet)).logger
    assert list(logger) == (["mine"] if "mine" in entry else entry.strip("[]").split(", "))
    assert "mine" not in entry or logger["mine"]["at"] == "${run:fit}", "left to the rank"
    assert list(validate(compose(["logger=tensorboard"], root=sheet)).logger) == ["tensorboard"]
    assert list(validate(compose(["logger=[csv,tensorboard]"], root=sheet)).logger) == ["csv", "tensorboard"]
    assert compose(["logger=none"], root=sheet)["logger"] == {}


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        ("cvs", "params.yaml: logger = cvs: must be one of csv, dvclive, none, tensorboard; did you mean csv?"),
        ("[csv, cvs]", "params.yaml: logger = cvs: must be one of csv"),
        ("3", "logger = 3: must be a mapping of names to a class each"),
        ("{a: {_target_: b.C, x: '${run:nowhere}'}}", "logger.a.x: ${run:nowhere}: there are ${run:folder}"),
    ],
)
def test_a_logger_that_cannot_be_is_refused_in_one_line(sheet, entry, line):
    edited(sheet, ("corpus: stdlib", f"corpus: stdlib\nlogger: {entry}"))
    with pytest.raises(Refusal) as refusal:
        validate(compose(root=sheet))
    assert str(refusal.value).startswith(line) and "\n" not in str(refusal.value)


def test_a_trial_is_refused_under_dvc_which_would_keep_its_outs():
    sheet_words = ["trainer.fast_dev_run=2"]
    assert validate(compose(sheet_words)).trainer.fast_dev_run == 2
    code = f"import os, stages.config; os.environ['DVC_STAGE'] = 'config'; stages.config.main({sheet_words})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and "trainer.fast_dev_run: DVC would keep its outs: run it by hand" in done.stderr


@pytest.fixture
def project(tmp_path):
    """A copy whose stage config has run under DVC; `again` runs it once more and tells whether it composed."""
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    shutil.copytree(ROOT / "stages", tmp_path / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "text.txt").write_text("a text\n")
    sheet = (ROOT / "params.yaml").read_text().replace("corpus: stdlib", "corpus: {source: files, paths: [text.txt]}")
    (tmp_path / "params.yaml").write_text(sheet)
    assert composed_again(tmp_path), "nothing is remembered yet"
    return tmp_path


def composed_again(project, **variables):
    code = "import sys, stages.config; stages.config.main(); print('hydra' in sys.modules)"
    environment = os.environ | {"DVC_STAGE": "config", "PYTHONPATH": str(project)} | variables
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip() == "True"


def test_settings_of_which_nothing_changed_are_not_composed_again_and_inputs_are_looked_at(project):
    outs = {name: (project / name).read_bytes() for name in ("resolved.yaml", "inputs.json")}
    assert not composed_again(project)
    assert outs == {name: (project / name).read_bytes() for name in outs}
    (project / "inputs.json").unlink()
    assert not composed_again(project) and (project / "inputs.json").read_bytes() == outs["inputs.json"]
    (project / "text.txt").write_text("another text\n")
    assert not composed_again(project) and (project / "inputs.json").read_bytes() != outs["inputs.json"]


CHANGES = {  # a file: what is done to it
    "params.yaml": lambda text: text.replace("seed: 1 ", "seed: 2 "),
    "conf/scale/demo.yaml": lambda text: text.replace("pretrain: {steps: ", "pretrain: {steps: 1"),
    "conf/config.yaml": lambda text: f"{text}# a word\n",
    "conf/experiment/mine.yaml": lambda _: "# @package _global_\nseed: 3\n",
    "stages/settings/schema.py": lambda text: f"{text}# a word\n",
    "stages/training/launchers/mine.py": lambda _: "",
    "resolved.yaml": lambda text: text.replace("seed: 1", "seed: 5"),
    "stages/config.py": lambda text: f"{text}# a word\n",
    ".runs/accepted/params.yaml": lambda text: f"{text}# a word\n",
    ".runs/accepted/composed.json": lambda text: text[:20],
}


def test_after_any_change_settings_are_composed_again(project):
    for name, change in CHANGES.items():
        path = project / name
        before = path.read_bytes() if path.exists() else None
        path.write_text(change(before.decode() if before else ""))
        assert path.read_bytes() != before and unchanged.unchanged_sections(project) is None, name
        path.unlink()
        assert before is None or unchanged.unchanged_sections(project) is None, f"without {name}"
        if before is not None:
            path.write_bytes(before)
        assert unchanged.unchanged_sections(project), f"{name} is as it was"
    (project / "params.yaml").write_text((project / "params.yaml").read_text().replace("seed: 1 ", "seed: 2 "))
    assert composed_again(project) and not composed_again(project)
    assert yaml.safe_load((project / "resolved.yaml").read_text())["seed"] == 2


@pytest.mark.parametrize("value", ["${oc.env:SEED}", "${oc.decode:${oc.env:SEED}}", "${now:%S}", "${distill.steps}"])
def test_a_value_from_elsewhere_is_never_taken_for_unchanged(sheet, value):
    assert unchanged._composed_of(sheet)
    edited(sheet, ("seed: 1 ", f"seed: {value} "))
    assert unchanged._composed_of(sheet) is None


def test_a_value_of_the_environment_is_read_again_each_time(project):
    edited(project, ("seed: 1 ", "seed: ${oc.env:SEED} "))
    assert composed_again(project, SEED="4") and composed_again(project, SEED="5")
    assert yaml.safe_load((project / "resolved.yaml").read_text())["seed"] == 5


def test_other_libraries_compose_again(project, monkeypatch):
    assert unchanged.unchanged_sections(project).corpus.paths == ["text.txt"]
    monkeypatch.setattr(unchanged.metadata, "version", lambda name: "0")
    assert unchanged.unchanged_sections(project) is None

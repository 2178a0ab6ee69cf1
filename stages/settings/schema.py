"""What may be set, of which type and within which bounds: a plain dictionary becomes frozen models (`validate`).

A mistake is refused before any work, in one line that names the key, the value and the rule:
`teacher.experts_per_token = 9: must be at most teacher.experts (8)`.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, create_model

from stages.files.artifacts import ROOT, Refusal
from stages.settings import shapes
from stages.settings.bounds import (
    MOST,
    Blank,
    Count,
    HeldOut,
    Keep,
    Natural,
    NotStrict,
    Positive,
    Section,
    Share,
    Some,
    Word,
)
from stages.settings.engine import Engine, engine_rules
from stages.settings.lightning import Observers
from stages.settings.models import TEACHER_FOLDER, Student, Teacher, distill_rules, pretrain_rules, teacher_rules
from stages.settings.plan import Plan, plan_rules
from stages.settings.reading import picked, refuse, refuse_first, refuse_unknown, shown
from stages.settings.trainer import CUDA_ONLY, DEEPSPEED, Optimizer, Trainer

OWN_FILES = "in params.yaml corpus: {source: files, paths: [texts/*.txt]}, or corpus=files 'corpus.paths=[texts/*.txt]'"


class Corpus(Section):
    source: Literal["stdlib", "files", "huggingface"]
    paths: Annotated[tuple[Word, ...], NotStrict]
    text_field: Word
    separator: Blank | None
    undecodable: Literal["refuse", "skip"]
    dataset: Word | None
    subset: Word | None
    split: Word
    max_bytes: Count


class Prepare(Section):
    tokenizer: Literal["bpe", "bytes"]
    vocab_size: Annotated[int, Field(ge=1, le=1_000_000)]
    max_documents: Natural  # 0: all
    shard_tokens: Count
    near_duplicates: Literal["keep", "group", "drop"]
    near_duplicate_similarity: Annotated[float, Field(ge=0.4, le=0.99)]  # Jaccard; the bands miss 6% of pairs at 0.4
    near_duplicate_words: Annotated[int, Field(ge=1, le=100)]  # of an n-gram
    val_share: HeldOut
    test_share: HeldOut


class Recipe(Section):
    """With what batches a model is trained, and how often it is looked at."""

    batch_sequences: Count  # of all ranks together
    learning_rate_scale: Positive
    validate_every_steps: Count
    validation_sequences: Count


class Training(Recipe):
    """One fit, which also says how long."""

    steps: Count


class Pretrain(Recipe):
    steps: Natural  # 0: a teacher from a folder stays as it is


class SoftTargets(Training):
    """A fit towards the soft targets of a larger model."""

    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon", "skewed_kl", "total_variation"]
    chunk_tokens: Count  # whose logits stand in memory together
    temperature: Positive
    soft_weight: Share


class Distill(SoftTargets):
    init: Literal["teacher", "pruned", "random"]


class SparsifyTeacher(Section):
    keep_heads: Keep
    keep_neurons: Keep
    keep_experts: Keep
    keep_experts_per_token: Keep
    expert_choice: Literal["fixed", "confidence"]
    bias_update_rate: Share  # of the router's biases while it recovers


class SparsifyStudent(Section):
    keep_heads: Keep
    keep_neurons: Keep


class SparsifyScore(Section):
    """Which units of a structure matter; the words are those of stages/compress/scores.py."""

    heads: Literal["taylor", "contribution", "magnitude"]
    neurons: Literal["contribution", "magnitude"]
    experts: Literal["reap", "magnitude"]


class Sparsify(Section):
    score: SparsifyScore
    teacher: SparsifyTeacher
    student: SparsifyStudent
    recovery: SoftTargets
    neuron_multiple: Annotated[int, Field(ge=1, le=4096)]
    calibration_sequences: Annotated[int, Field(ge=8, le=MOST)]


class Challenge(Recipe):
    """The models trained from nothing: their steps follow from what the others cost."""


class Evaluate(Section):
    test_tokens: Count
    batch_sequences: Count
    bootstrap_resamples: Annotated[int, Field(ge=2, le=MOST)]
    checkpoint_batch_sequences: Count
    checkpoint_layers: Count  # of the model whose activation checkpointing is measured, else shaped as the teacher
    checkpoint_every_blocks: Annotated[tuple[Count, ...], NotStrict]


class Profile(Section):
    repetitions: Count  # of each timing
    prefill_tokens: Count
    decode_tokens: Count
    router_tokens: Count
    router_experts: Count
    router_experts_per_token: Count


class Export(Section):
    models: Annotated[tuple[Word, ...], Some]  # names under artifacts/, or folders
    formats: Annotated[tuple[Literal["hf", "gguf", "onnx", "onnx_genai", "int8"], ...], Some]
    vocabulary: Literal["trimmed", "whole"]  # where teacher.trim_vocabulary left rows out
    gguf_kinds: Annotated[tuple[Literal["f32", "f16", "q8_0"], ...], Some]
    prompts: Count
    new_tokens: Annotated[int, Field(ge=3, le=MOST)]  # after each prompt; the first two are not timed
    test_sequences: Count


class Settings(Section):
    """Everything; a stage gets only the sections it declared, the others are None."""

    corpus: Corpus
    prepare: Prepare
    teacher: Teacher
    student: Student
    optimizer: Optimizer
    trainer: Trainer
    callbacks: Observers
    logger: Observers
    engine: Engine
    pretrain: Pretrain
    distill: Distill
    sparsify: Sparsify
    challenge: Challenge
    evaluate: Evaluate
    profile: Profile
    plan: Plan
    export: Export
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)]
    sequence_tokens: Annotated[int, Field(ge=2, le=MOST)]


SECTIONS = tuple(sorted(Settings.model_fields))


def validate(plain: Any, sections: Any = None) -> Settings:
    """The settings in a plain dictionary, or a Refusal of its first mistake.

    With `sections`, only these are needed and read; the rest of the result is None and counts as unset for
    `model_dump(exclude_unset=True)`. "teacher.path" is one setting of a section. A rule that joins several is asked
    only where all of them were read.
    """
    settings = parse(plain, sections)
    read = {*(SECTIONS if sections is None else sections)}
    for needs, rule in RULES:
        if all(need in read or need.partition(".")[0] in read for need in needs):
            rule(settings)
    return settings


def parse(plain: Any, sections: Any = None) -> Settings:
    """As `validate`, without the rules that join several settings: names, types and bounds."""
    wanted = SECTIONS if sections is None else tuple(sections)
    if not isinstance(plain, dict):
        raise Refusal(f"settings = {shown(plain)}: must be a mapping of sections")
    for name in [*plain, *(name.partition(".")[0] for name in wanted)]:
        refuse_unknown(name, SECTIONS)
    part = _part_of(Settings, wanted)
    try:
        read = part.model_validate(picked(plain, wanted))
    except ValidationError as error:
        refuse_first(error, part)
    return Settings.model_construct({*part.model_fields}, **dict.fromkeys(SECTIONS) | dict(read))


def _part_of(model: type[BaseModel], wanted: tuple[str, ...]) -> type[BaseModel]:
    """The model with the fields of these names alone; "teacher.path" leaves that of `teacher` with this one."""
    inner: dict[str, list[str]] = {}
    for name in wanted:
        section, _, setting = name.partition(".")
        inner.setdefault(section, []).extend([setting] if setting else [])
    fields: dict[str, Any] = {}
    for section, names in inner.items():
        field = model.model_fields[section]
        kind: Any = field.annotation
        is_part = bool(names) and section not in wanted
        fields[section] = (_part_of(kind, tuple(names)), ...) if is_part else (kind, field)
    return create_model("Part", __base__=Section, **fields)


def leaves(model: type[BaseModel] = Settings, path: tuple[str, ...] = ()) -> list[str]:
    """Dotted names of all settings."""
    names = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            names += leaves(inner, (*path, name))
        else:
            names.append(".".join((*path, name)))
    return names


# --- rules that join several settings; each runs when the sections it needs were read


def _at_most(settings, key, limit_key):
    value, limit = _get(settings, key), _get(settings, limit_key)
    if value > limit:
        refuse(key, value, f"must be at most {limit_key} ({limit})")


def _get(settings, key):
    for name in key.split("."):
        settings = getattr(settings, name)
    return settings


def _shape_rules(section, rules):
    def rule(settings):
        shape = getattr(settings, section)
        for field, text in rules(shape, f"{section}."):
            refuse(f"{section}.{field}", getattr(shape, field), text)

    return rule


def _corpus_rules(settings):
    corpus = settings.corpus
    if corpus.source == "files" and not corpus.paths:
        refuse("corpus.paths", [], f"must name at least one file or glob: {OWN_FILES}")
    if corpus.source == "huggingface" and corpus.dataset is None:
        refuse("corpus.dataset", None, "must name a dataset when corpus.source is huggingface")
    for key, source in (("paths", "files"), ("separator", "files"), ("dataset", "huggingface")):
        value = getattr(corpus, key)
        if value and corpus.source != source:
            rule = f"only source {source} reads it, and corpus.source is {corpus.source}: choose corpus={source}"
            refuse(f"corpus.{key}", list(value) if key == "paths" else value, rule)


def _prepare_rules(settings):
    prepare = settings.prepare
    if prepare.tokenizer == "bpe" and prepare.vocab_size < 258:
        rule = "must be at least 258: 256 bytes, end of text, one merge"
        refuse("prepare.vocab_size", prepare.vocab_size, rule)


def _optimizer_rules(settings):
    optimizer = settings.optimizer
    if optimizer.warmup_share + optimizer.decay_share > 1:
        rule = f"must be at most 1 - optimizer.warmup_share ({1 - optimizer.warmup_share:g})"
        refuse("optimizer.decay_share", optimizer.decay_share, rule)


def _trainer_rules(settings):
    for key, folder in (("launcher", "launchers"), ("strategy", "strategies")):
        files = (ROOT / "stages/training" / folder).glob("*.py")
        words = sorted(file.stem for file in files if file.stem != "__init__")
        if getattr(settings.trainer, key) not in words:
            rule = f"must be one of {', '.join(words)}; to add one, add a file to stages/training/{folder}"
            refuse(f"trainer.{key}", getattr(settings.trainer, key), rule)
    if settings.trainer.strategy in DEEPSPEED:
        if settings.trainer.accelerator == "cpu":
            refuse("trainer.strategy", settings.trainer.strategy, CUDA_ONLY)
        if settings.optimizer.name == "muon":
            why = "DeepSpeed gives a rank a piece of one long vector, and Muon takes matrices"
            refuse("optimizer.name", "muon", f"{why}: set it to adamw, or trainer.strategy to fsdp2, which has both")


def _evaluate_rules(settings):
    if not settings.evaluate.checkpoint_every_blocks:
        refuse("evaluate.checkpoint_every_blocks", [], "must name at least one period in blocks")


def _ranks_share(key):
    def rule(settings):
        if settings.trainer.ranks != "auto":
            _refuse_uneven(key, settings, settings.trainer.ranks)

    return rule


def refuse_uneven_batches(settings: Settings, ranks: int) -> None:
    """For `trainer.ranks: auto`, once the machine has said how many that is here."""
    for section, key in BATCHES.items():
        if getattr(settings, section) is not None:
            _refuse_uneven(key, settings, ranks)


def _refuse_uneven(key, settings, ranks):
    batch = _get(settings, key)
    if batch % ranks:
        asked = settings.trainer.ranks
        number = f"trainer.ranks ({asked})" if asked == ranks else f"the {ranks} ranks here (trainer.ranks is {asked})"
        more = batch + ranks - batch % ranks
        refuse(key, batch, f"must be a multiple of {number}: set it to {more}, or change the ranks")


BATCHES = {
    "pretrain": "pretrain.batch_sequences",
    "distill": "distill.batch_sequences",
    "sparsify": "sparsify.recovery.batch_sequences",
    "challenge": "challenge.batch_sequences",
}

RULES = (
    (TEACHER_FOLDER, teacher_rules),
    (("teacher.source", "pretrain"), pretrain_rules),
    (("teacher.source", "distill"), distill_rules),
    (("teacher",), _shape_rules("teacher", shapes.deepseek_v3)),
    (("student",), _shape_rules("student", shapes.qwen3)),
    (("corpus",), _corpus_rules),
    (("prepare",), _prepare_rules),
    (("optimizer",), _optimizer_rules),
    (("trainer",), _trainer_rules),
    (("trainer", "engine"), engine_rules),
    (("evaluate",), _evaluate_rules),
    (("profile",), lambda read: _at_most(read, "profile.router_experts_per_token", "profile.router_experts")),
    (("plan",), plan_rules),
    *((("trainer", section), _ranks_share(key)) for section, key in BATCHES.items()),
)


def as_yaml(plain: dict[str, Any]) -> str:
    """Sorted, so that equal settings are equal bytes."""
    import yaml

    return yaml.safe_dump(plain, sort_keys=True, allow_unicode=True, width=110)

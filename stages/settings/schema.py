"""What may be set, of which type and within which bounds: a plain dictionary becomes frozen dataclasses (`validate`).

A mistake is refused before any work, in one line that names the key, the value and the rule:
`teacher.experts_per_token = 9: must be at most teacher.experts (8)`.
"""

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, Literal

from stages.files.artifacts import ROOT, Refusal
from stages.settings.reading import read, refuse, refuse_missing, refuse_unknown, shown

OWN_FILES = "in params.yaml corpus: {source: files, paths: [texts/*.txt]}, or corpus=files 'corpus.paths=[texts/*.txt]'"
MOST = 2**40  # no count in here is sensible above this; beyond it sizes overflow far from their cause


def bounded(low: float, high: float = MOST, above: bool = False) -> Any:
    """A number from low to high; with `above`, low itself is out."""
    return dataclasses.field(metadata={"low": low, "high": high, "above": above})


def count() -> Any:
    return bounded(1)


def share() -> Any:
    """A part of a whole, none and all included."""
    return bounded(0, 1)


def keep() -> Any:
    """A part kept: something always stays."""
    return bounded(0, 1, above=True)


def positive() -> Any:
    return bounded(0, 1e9, above=True)


def word() -> Any:
    """A choice, where the fields above it carry bounds."""
    return dataclasses.field()


@dataclass(frozen=True)
class Corpus:
    source: Literal["stdlib", "files", "huggingface"]
    paths: tuple[str, ...]
    text_field: str
    separator: str | None = dataclasses.field(metadata={"blank": True})
    undecodable: Literal["refuse", "skip"]
    dataset: str | None
    subset: str | None
    split: str
    max_bytes: int = count()


@dataclass(frozen=True)
class Prepare:
    tokenizer: Literal["bpe", "bytes"]
    vocab_size: int = bounded(1, 1_000_000)
    max_documents: int = bounded(0)  # 0: all
    shard_tokens: int = count()
    val_share: float = bounded(0, 0.5, above=True)
    test_share: float = bounded(0, 0.5, above=True)


@dataclass(frozen=True)
class Teacher:
    layers: int = count()
    dense_layers: int = bounded(0)
    width: int = count()
    heads: int = count()
    nope_head_dim: int = count()
    rope_head_dim: int = bounded(2)
    value_head_dim: int = count()
    latent_width: int = count()
    dense_width: int = count()
    experts: int = count()
    experts_per_token: int = count()
    shared_experts: int = bounded(0)
    expert_width: int = count()
    gating: Literal["sigmoid", "softmax"] = word()
    route_scale: float = positive()
    bias_update_rate: float = share()
    balance_loss_weight: float = share()
    rope_theta: float = bounded(1, 1e12, above=True)


@dataclass(frozen=True)
class Student:
    layers: int = count()
    width: int = count()
    heads: int = count()
    kv_heads: int = count()
    head_dim: int = bounded(2)
    mlp_width: int = count()
    rope_theta: float = bounded(1, 1e12, above=True)


@dataclass(frozen=True)
class Optimizer:
    muon_learning_rate: float = positive()
    adamw_learning_rate: float = positive()
    weight_decay: float = bounded(0, 100)
    muon_momentum: float = bounded(0, 0.9999)
    adamw_beta1: float = bounded(0, 0.9999)
    adamw_beta2: float = bounded(0, 0.99999)
    clip_norm: float = positive()
    warmup_share: float = share()
    decay_share: float = share()


@dataclass(frozen=True)
class Trainer:
    accelerator: Literal["auto", "cpu", "gpu"]
    launcher: str  # a module of stages/training/launchers
    strategy: str  # a module of stages/training/strategies
    precision: Literal["auto", "32-true", "bf16-mixed"]
    deterministic: bool
    ranks: int | Literal["auto"] = bounded(1, 65536)
    accumulate_grad_batches: int = bounded(1, 65536)
    checkpoint_every_seconds: float = bounded(0, 1e9)
    log_every_steps: int = count()


@dataclass(frozen=True)
class Training:
    """One fit: how long, with what batches, and how often it is looked at."""

    steps: int = count()
    batch_sequences: int = count()  # of all ranks together
    learning_rate_scale: float = positive()
    validate_every_steps: int = count()
    validation_sequences: int = count()


@dataclass(frozen=True)
class Pretrain(Training):
    pass


@dataclass(frozen=True)
class SoftTargets(Training):
    """A fit towards the soft targets of a larger model."""

    chunk_tokens: int = count()  # whose logits stand in memory together
    temperature: float = positive()
    soft_weight: float = share()


@dataclass(frozen=True)
class Distill(SoftTargets):
    init: Literal["teacher", "random"] = word()


@dataclass(frozen=True)
class SparsifyTeacher:
    keep_heads: float = keep()
    keep_neurons: float = keep()
    keep_experts: float = keep()
    keep_experts_per_token: float = keep()


@dataclass(frozen=True)
class SparsifyStudent:
    keep_heads: float = keep()
    keep_neurons: float = keep()


@dataclass(frozen=True)
class Sparsify:
    teacher: SparsifyTeacher
    student: SparsifyStudent
    recovery: SoftTargets
    calibration_sequences: int = bounded(8)


@dataclass(frozen=True)
class Evaluate:
    test_tokens: int = count()
    batch_sequences: int = count()
    bootstrap_resamples: int = bounded(2)
    checkpoint_batch_sequences: int = count()
    checkpoint_every_blocks: tuple[int, ...] = count()


@dataclass(frozen=True)
class Profile:
    repetitions: int = count()  # of each timing
    prefill_tokens: int = count()
    decode_tokens: int = count()
    router_tokens: int = count()
    router_experts: int = count()
    router_experts_per_token: int = count()


@dataclass(frozen=True)
class Settings:
    """Everything; a stage gets only the sections it declared, the others are None."""

    corpus: Corpus
    prepare: Prepare
    teacher: Teacher
    student: Student
    optimizer: Optimizer
    trainer: Trainer
    pretrain: Pretrain
    distill: Distill
    sparsify: Sparsify
    evaluate: Evaluate
    profile: Profile
    seed: int = bounded(0, 2**32 - 1)
    sequence_tokens: int = bounded(2)


SECTIONS = tuple(sorted(field.name for field in dataclasses.fields(Settings)))


def validate(plain: Any, sections: Any = None) -> Settings:
    """The settings in a plain dictionary, or a Refusal of its first mistake.

    With `sections`, only these are needed and read; the rest of the result is None. A rule that joins several
    sections is asked only where all of them were read.
    """
    settings = parse(plain, sections)
    for needs, rule in RULES:
        if all(getattr(settings, need) is not None for need in needs):
            rule(settings)
    return settings


def parse(plain: Any, sections: Any = None) -> Settings:
    """As `validate`, without the rules that join several settings: names, types and bounds."""
    wanted = SECTIONS if sections is None else tuple(sections)
    if not isinstance(plain, dict):
        raise Refusal(f"settings = {shown(plain)}: must be a mapping of sections")
    for name in [*plain, *wanted]:
        refuse_unknown(name, SECTIONS)
    hints, fields = typing.get_type_hints(Settings), {f.name: f for f in dataclasses.fields(Settings)}
    sections_read: dict[str, Any] = dict.fromkeys(SECTIONS)
    for name in SECTIONS:
        if name in wanted:
            if name not in plain:
                refuse_missing((name,))
            sections_read[name] = read(plain[name], hints[name], (name,), fields[name].metadata)
    return Settings(**sections_read)


def leaves(kind: Any = Settings, path: tuple[str, ...] = ()) -> list[str]:
    """Dotted names of all settings."""
    hints, names = typing.get_type_hints(kind), []
    for name, inner in hints.items():
        deeper = dataclasses.is_dataclass(inner)
        names += leaves(inner, (*path, name)) if deeper else [".".join((*path, name))]
    return names


# --- rules that join several settings; each runs when the sections it needs were read


def _at_most(settings, key, limit_key):
    value, limit = _get(settings, key), _get(settings, limit_key)
    if value > limit:
        refuse(key, value, f"must be at most {limit_key} ({limit})")


def _even(settings, key):
    if _get(settings, key) % 2:
        refuse(key, _get(settings, key), "must be even: rotation works on pairs")


def _get(settings, key):
    for name in key.split("."):
        settings = getattr(settings, name)
    return settings


def _teacher_rules(settings):
    _at_most(settings, "teacher.experts_per_token", "teacher.experts")
    _at_most(settings, "teacher.dense_layers", "teacher.layers")
    _even(settings, "teacher.rope_head_dim")


def _student_rules(settings):
    student = settings.student
    if student.heads % student.kv_heads:
        rule = f"must be a multiple of student.kv_heads ({student.kv_heads})"
        refuse("student.heads", student.heads, rule)
    _even(settings, "student.head_dim")


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


def _evaluate_rules(settings):
    if not settings.evaluate.checkpoint_every_blocks:
        refuse("evaluate.checkpoint_every_blocks", [], "must name at least one period in blocks")


def _profile_rules(settings):
    _at_most(settings, "profile.router_experts_per_token", "profile.router_experts")


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
}

RULES = (
    (("teacher",), _teacher_rules),
    (("student",), _student_rules),
    (("corpus",), _corpus_rules),
    (("prepare",), _prepare_rules),
    (("optimizer",), _optimizer_rules),
    (("trainer",), _trainer_rules),
    (("evaluate",), _evaluate_rules),
    (("profile",), _profile_rules),
    *((("trainer", section), _ranks_share(key)) for section, key in BATCHES.items()),
)


def as_yaml(plain: dict[str, Any]) -> str:
    """Sorted, so that equal settings are equal bytes."""
    import yaml

    return yaml.safe_dump(plain, sort_keys=True, allow_unicode=True, width=110)

"""What may be set, of which type and within which bounds; and how params.yaml and conf/ become one
plain dictionary (`compose`) and then frozen dataclasses (`validate`).

A mistake is refused before any work, in one line that names the key, the value and the rule:
`teacher.experts_per_token = 9: must be at most teacher.experts (8)`.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stages.artifacts import ROOT, Refusal

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
    precision: Literal["auto", "float32", "bfloat16"]
    deterministic: bool
    ranks: int | Literal["auto"] = bounded(1, 65536)
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
    timing_repetitions: int = count()
    prefill_tokens: int = count()
    decode_tokens: int = count()
    checkpoint_batch_sequences: int = count()
    checkpoint_every_blocks: tuple[int, ...] = count()
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
    seed: int = bounded(0, 2**32 - 1)
    sequence_tokens: int = bounded(2)


SECTIONS = tuple(sorted(field.name for field in dataclasses.fields(Settings)))


def validate(plain: Any, sections: Any = None) -> Settings:
    """The settings in a plain dictionary, or a Refusal of its first mistake.

    With `sections`, only these are needed and read; the rest of the result is None.
    """
    wanted = SECTIONS if sections is None else tuple(sections)
    if not isinstance(plain, dict):
        raise Refusal(f"settings = {_shown(plain)}: must be a mapping of sections")
    for name in [*plain, *wanted]:
        _refuse_unknown(name, SECTIONS, ())
    hints, fields = typing.get_type_hints(Settings), {f.name: f for f in dataclasses.fields(Settings)}
    read: dict[str, Any] = dict.fromkeys(SECTIONS)
    for name in SECTIONS:
        if name in wanted:
            if name not in plain:
                _refuse_missing((name,))
            read[name] = _read(plain[name], hints[name], (name,), fields[name].metadata)
    settings = Settings(**read)
    for needs, rule in RULES:
        if all(read[need] is not None for need in needs):
            rule(settings)
    return settings


def _refuse_unknown(name, known, path):
    if isinstance(name, str) and name in known:
        return
    key = ".".join((*path, name if isinstance(name, str) and re.fullmatch(r"[\w-]+", name) else _shown(name)))
    close = difflib.get_close_matches(str(name), known, n=1) if isinstance(name, str) else []
    elsewhere = [leaf for leaf in leaves() if isinstance(name, str) and leaf.endswith(f".{name}")]
    if close:
        hint = f"did you mean {'.'.join((*path, close[0]))}?"
    elif elsewhere:
        hint = f"did you mean {elsewhere[0]}?"
    else:
        hint = f"there are {', '.join(sorted(known))}"
    raise Refusal(f"{key}: no such setting; {hint}")


def _read(value, kind, path, bounds):
    """The value as `kind`, or a Refusal; `bounds` are those of the field for its numbers."""
    key, origin = ".".join(path), typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _read_section(value, kind, path)
    if origin in (types.UnionType, typing.Union):
        return _read_either(value, typing.get_args(kind), path, bounds)
    if origin is Literal:
        words = typing.get_args(kind)
        if not isinstance(value, str) or value not in words:
            _refuse(key, value, f"must be {_one_of(words)}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            _refuse(key, value, "must be a list")
        return tuple(_read(item, typing.get_args(kind)[0], path, bounds) for item in value)
    if kind is bool:
        if not isinstance(value, bool):
            _refuse(key, value, "must be true or false")
        return value
    if kind is str:
        if not isinstance(value, str) or not (value.strip() or value and "blank" in bounds) or "\0" in value:
            _refuse(key, value, "must be a word")
        return value
    return _read_number(value, kind, key, bounds)


def _read_section(value, kind, path):
    if not isinstance(value, dict):
        _refuse(".".join(path), value, "must be a mapping of settings")
    hints, fields = typing.get_type_hints(kind), dataclasses.fields(kind)
    names = [field.name for field in fields]
    for name in value:
        _refuse_unknown(name, names, path)
    for name in names:
        if name not in value:
            _refuse_missing((*path, name))
    return kind(**{f.name: _read(value[f.name], hints[f.name], (*path, f.name), f.metadata) for f in fields})


def _read_either(value, kinds, path, bounds):
    if value is None and type(None) in kinds:
        return None
    kinds = [kind for kind in kinds if kind is not type(None)]
    words = [word for kind in kinds if typing.get_origin(kind) is Literal for word in typing.get_args(kind)]
    if isinstance(value, str) and value in words:
        return value
    if words and (isinstance(value, bool) or not isinstance(value, (int, float))):
        _refuse(".".join(path), value, f"must be {_one_of(words)} or a number")
    return _read(value, kinds[0], path, bounds)


def _read_number(value, kind, key, bounds):
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        _refuse(key, value, "must be a whole number" if kind is int else "must be a number")
    if isinstance(value, float) and not math.isfinite(value):
        _refuse(key, value, "must be a finite number")
    low, high, above = bounds["low"], bounds["high"], bounds["above"]
    if value < low or value > high or (above and value == low):
        floor = f"above {low:g}" if above else f"at least {low:g}"
        rule = floor if value <= low else f"at most {high:,}"
        _refuse(key, value, f"must be {rule}")
    return kind(value)


def _refuse(key, value, rule):
    raise Refusal(f"{key} = {_shown(value)}: {rule}")


def _refuse_missing(path):
    raise Refusal(f"{'.'.join(path)}: missing; put it in params.yaml or in a preset of conf/")


def _one_of(words):
    return " or ".join(words) if len(words) < 3 else "one of " + ", ".join(words)


def _shown(value):
    """The value as a person wrote it, short and on one line."""
    try:
        plain_word = isinstance(value, str) and re.fullmatch(r"[\w./:-]+", value, re.ASCII)
        text = value if plain_word else repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a bottomless list
        text = f"a very large {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= 80 else text[:77] + "..."


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
        _refuse(key, value, f"must be at most {limit_key} ({limit})")


def _even(settings, key):
    if _get(settings, key) % 2:
        _refuse(key, _get(settings, key), "must be even: rotation works on pairs")


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
        _refuse("student.heads", student.heads, rule)
    _even(settings, "student.head_dim")


def _corpus_rules(settings):
    corpus = settings.corpus
    if corpus.source == "files" and not corpus.paths:
        _refuse("corpus.paths", [], f"must name at least one file or glob: {OWN_FILES}")
    if corpus.source == "huggingface" and corpus.dataset is None:
        _refuse("corpus.dataset", None, "must name a dataset when corpus.source is huggingface")
    for key, source in (("paths", "files"), ("separator", "files"), ("dataset", "huggingface")):
        value = getattr(corpus, key)
        if value and corpus.source != source:
            rule = f"only source {source} reads it, and corpus.source is {corpus.source}: choose corpus={source}"
            _refuse(f"corpus.{key}", list(value) if key == "paths" else value, rule)


def _prepare_rules(settings):
    prepare = settings.prepare
    if prepare.tokenizer == "bpe" and prepare.vocab_size < 258:
        rule = "must be at least 258: 256 bytes, end of text, one merge"
        _refuse("prepare.vocab_size", prepare.vocab_size, rule)


def _optimizer_rules(settings):
    optimizer = settings.optimizer
    if optimizer.warmup_share + optimizer.decay_share > 1:
        rule = f"must be at most 1 - optimizer.warmup_share ({1 - optimizer.warmup_share:g})"
        _refuse("optimizer.decay_share", optimizer.decay_share, rule)


def _evaluate_rules(settings):
    _at_most(settings, "evaluate.router_experts_per_token", "evaluate.router_experts")
    if not settings.evaluate.checkpoint_every_blocks:
        _refuse("evaluate.checkpoint_every_blocks", [], "must name at least one period in blocks")


def _ranks_share_batches_of(key):
    def rule(settings):
        ranks, batch = settings.trainer.ranks, _get(settings, key)
        if ranks != "auto" and batch % ranks:
            _refuse(key, batch, f"must be a multiple of trainer.ranks ({ranks})")

    return rule


RULES = (
    (("teacher",), _teacher_rules),
    (("student",), _student_rules),
    (("corpus",), _corpus_rules),
    (("prepare",), _prepare_rules),
    (("optimizer",), _optimizer_rules),
    (("evaluate",), _evaluate_rules),
    (("trainer", "pretrain"), _ranks_share_batches_of("pretrain.batch_sequences")),
    (("trainer", "distill"), _ranks_share_batches_of("distill.batch_sequences")),
    (("trainer", "sparsify"), _ranks_share_batches_of("sparsify.recovery.batch_sequences")),
)


def as_yaml(plain: dict[str, Any]) -> str:
    """Sorted, so that equal settings are equal bytes."""
    import yaml

    return yaml.safe_dump(plain, sort_keys=True, allow_unicode=True, width=110)


# --- composition: params.yaml chooses presets of conf/ by word and lays its knobs on top


def compose(overrides: Any = (), root: Path = ROOT) -> dict[str, Any]:
    """The settings of params.yaml, conf/ and overrides such as "scale=tiny", as a plain dictionary."""
    import hydra
    from omegaconf import OmegaConf

    offer_sheet(overrides, root)
    with one_line_errors(Exception), hydra.initialize_config_dir(str(root / "conf"), version_base="1.3"):
        cfg = hydra.compose("config", overrides=list(overrides))
        return typing.cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))


def offer_sheet(overrides: Any = (), root: Path = ROOT) -> None:
    """Make params.yaml known to Hydra: its words as the resolver `choice`, its knobs as the config `params`.

    Everything in params.yaml and conf/ that Hydra would accept silently or explain badly is refused here.
    """
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    conf = root / "conf"
    sheet = _load_yaml(root / "params.yaml", root)
    groups = {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
        for folder in sorted(conf.iterdir())
        if folder.is_dir() and folder.name != "hydra"
    }
    choices = {name: sheet[name] for name in groups if name in sheet and not isinstance(sheet[name], dict)}
    for name, presets in groups.items():
        if name not in sheet:
            raise Refusal(f"params.yaml: {name}: missing; write one of {', '.join(presets)}")
    for name, word in choices.items():
        _refuse_unknown_preset(f"params.yaml: {name}", word, groups[name])
    for override in overrides:
        name, _, words = str(override).partition("=")
        if name in groups and re.fullmatch(r"[\w-]+(,[\w-]+)*", words):
            for word in words.split(","):
                _refuse_unknown_preset(name, word, groups[name])
    knobs = {name: value for name, value in sheet.items() if name not in choices}
    for name in knobs:  # also `hydra` and `defaults`, which Hydra would obey and drop
        _refuse_unknown(name, SECTIONS, ())
    _refuse_second_homes(knobs, conf, root)
    OmegaConf.register_new_resolver("choice", choices.__getitem__, replace=True)
    ConfigStore.instance().store(name="params", node=knobs, package="_global_")


def _refuse_unknown_preset(key, word, presets):
    if not isinstance(word, str) or word not in presets:
        close = difflib.get_close_matches(str(word), presets, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        _refuse(key, word, f"must be one of {', '.join(presets)}{hint}")


def _load_yaml(path, root):
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    name = path.relative_to(root).as_posix()
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError:
        raise Refusal(f"{name} is missing: restore it (git checkout {name})") from None
    except (YAMLError, OmegaConfBaseException, OSError, ValueError, RecursionError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"{name}, line {mark.line + 1}" if mark else name
        raise Refusal(f"{where}: not valid YAML: {' '.join(str(problem or error).split())}") from None
    if not isinstance(loaded, dict):
        raise Refusal(f"{name}: must be a mapping of settings")
    return loaded


def _refuse_second_homes(knobs, conf, root):
    """A value lives in exactly one file: the sheet, or one preset of one group."""
    homes = {key: ("", "params.yaml") for key in _flat(knobs)}
    for file in sorted([*conf.glob("*.yaml"), *conf.glob("*/*.yaml")]):
        group = file.parent.name if file.parent != conf else ""
        if group == "hydra" or file == conf / "config.yaml":
            continue
        package = re.match(r"\s*#\s*@package\s+(\S+)", file.read_text(encoding="utf-8", errors="replace"))
        prefix = package[1] if package else (group or "_global_")
        content = _load_yaml(file, root)
        name = file.relative_to(root).as_posix()
        for key in _flat(content, () if prefix == "_global_" else tuple(prefix.split("."))):
            for taken, (its_group, its_file) in homes.items():
                same = key == taken or key.startswith(taken + ".") or taken.startswith(key + ".")
                if same and (not group or group != its_group):  # presets of one group are alternatives
                    shared = min(key, taken, key=len)
                    raise Refusal(f"{shared} is set in {its_file} and in {name}: keep it in one of the two")
            homes.setdefault(key, (group, name))


def _flat(value, path=()):
    if isinstance(value, dict) and (value or not path):
        return [key for name, inner in value.items() for key in _flat(inner, (*path, str(name)))]
    return [".".join(path)]


class one_line_errors:
    """Turns what Hydra and OmegaConf raise, many lines about their internals, into one Refusal.

    Where nothing but composition runs, they may raise anything: an assertion, or a decoding error.
    """

    def __init__(self, *kinds: type[Exception]):
        self.kinds = kinds

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError

        known = (HydraException, OmegaConfBaseException, YAMLError, *self.kinds)
        if isinstance(error, Refusal) or not isinstance(error, known):
            return
        text = str(error) or f"Hydra cannot read this ({kind.__name__})"
        unknown = re.search(r"Could not override '([^']*)'", text)
        if unknown:
            close = difflib.get_close_matches(unknown[1], leaves(), n=1)
            hint = f"did you mean {close[0]}?" if close else "python -m stages.config lists them all"
            raise Refusal(f"{unknown[1]}: no such setting; {hint}") from None
        full_key = re.search(r"full_key: (\S+)", text)
        first = " ".join(text.strip().split("\n")[0].split())[:300]
        raise Refusal(f"{full_key[1]}: {first}" if full_key else first) from None

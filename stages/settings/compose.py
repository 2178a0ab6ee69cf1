"""How params.yaml and conf/ become one plain dictionary: presets chosen by a word, then the values of the sheet.

What comes later wins: conf/base.yaml, the presets of `corpus`, `scale`, `experiment`, `callbacks`, `logger` and
`engine`, params.yaml, the command line.
`python -m stages.config --explain pretrain.steps` says which of them it was.
"""

import difflib
import re
import typing
from pathlib import Path
from typing import Any

from stages.files.artifacts import ROOT, Refusal
from stages.settings.reading import RENAMED, refuse, refuse_unknown, shown
from stages.settings.schema import SECTIONS, leaves
from stages.settings.untracked import OBSERVERS

ORDER = ("corpus", "scale", "experiment", *OBSERVERS, "engine")  # as conf/config.yaml lays the presets
# of the groups that params.yaml need not name
DEFAULTS = dict.fromkeys(("experiment", *OBSERVERS), "none") | {"engine": "local"}
CHOOSER = {"engine": "name"}  # the setting of a section that names its preset, where it is not `source`
RUN_FACTS = ("folder", "stage", "fit")  # ${run:...} in a preset of a callback or logger; a rank fills them in


def compose(overrides: Any = (), root: Path = ROOT) -> dict[str, Any]:
    """The settings of params.yaml, conf/ and overrides such as "scale=tiny", as a plain dictionary."""
    return _composed(offer_sheet(overrides, root), root)[0]


def _composed(words, root):
    import hydra
    from omegaconf import OmegaConf

    with one_line_errors(Exception), hydra.initialize_config_dir(str(root / "conf"), version_base="1.3"):
        cfg = hydra.compose("config", overrides=words, return_hydra_config=True)
        choices = OmegaConf.to_container(cfg.hydra.runtime.choices)
        OmegaConf.set_struct(cfg, False)
        del cfg["hydra"]  # it needs what only a run knows
        return plain_values(cfg), choices


def plain_values(cfg: Any) -> dict[str, Any]:
    """The composed configuration as plain values; text from `${oc.env:NAME}` is a number where it reads as one."""
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    return typing.cast(dict[str, Any], _decoded(plain, OmegaConf.to_container(cfg, resolve=False)))


def _decoded(value, raw):
    if isinstance(value, dict) and isinstance(raw, dict):
        return {key: _decoded(inner, raw[key]) for key, inner in value.items()}
    if isinstance(value, str) and re.fullmatch(r"\$\{oc\.env:[^{}]*\}", str(raw)):
        for kind, form in ((int, r"[-+]?\d{1,18}"), (float, r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")):
            if re.fullmatch(form, value, re.ASCII):
                return kind(value)
        return {"true": True, "false": False}.get(value.lower(), value)
    return value


def explain(key: str, overrides: Any = (), root: Path = ROOT) -> str:
    """A line for each setting under `key`: its value and which file, or the command line, it comes from."""
    words = offer_sheet(overrides, root)
    plain, choices = _composed(words, root)
    wanted = [leaf for leaf in leaves() if leaf == key or leaf.startswith(f"{key}.")]
    if not wanted:
        refuse_unknown(key, leaves())
    chosen = [(group, word) for group in ORDER for word in _chosen(group, words) or [choices[group]]]
    presets = [root / "conf/base.yaml", *(root / "conf" / group / f"{word}.yaml" for group, word in chosen)]
    homes = [(file.relative_to(root).as_posix(), _keys(preset_of(file, root))) for file in presets]
    homes += [("params.yaml", _keys(read_sheet(words, root)[1]))]
    typed = {word.lstrip("+~").partition("=")[0] for word in words}
    homes += [("command line", typed - choices.keys())]
    lines = []
    for leaf in wanted:
        value: Any = plain
        for name in leaf.split("."):
            value = value[name]
        home = [name for name, keys in homes if any(_within(leaf, key) or _within(key, leaf) for key in keys)]
        lines.append(f"{leaf} = {_in_yaml(value)}  # {home[-1]}")
    return "\n".join(lines)


def _in_yaml(value):
    """As params.yaml takes it."""
    from yaml import safe_dump

    text = safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    return text.removesuffix("...\n").strip()


def _within(key, of):
    return key == of or key.startswith(f"{of}.")


def _keys(value, path=()):
    if isinstance(value, dict) and (value or not path):
        return [key for name, inner in value.items() for key in _keys(inner, (*path, str(name)))]
    return [".".join(path)]


# ---- the sheet


def offer_sheet(overrides: Any = (), root: Path = ROOT) -> list[str]:
    """Make params.yaml known to Hydra: its words as the resolver `choice`, its values as the config `params`.

    Everything in params.yaml and conf/ that Hydra would accept silently or explain badly is refused here. Returns
    the overrides as Hydra is to read them: `corpus={source:files,...}` as the word of a preset and its settings.
    """
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    words = [part for word in overrides for part in _spelled_out(str(word), preset_groups(root))]
    choices, values = read_sheet(words, root)
    OmegaConf.register_new_resolver("choice", choices.__getitem__, replace=True)
    OmegaConf.register_new_resolver("run", _left_to_the_rank, replace=True)
    ConfigStore.instance().store(name="params", node=values, package="_global_")
    return words


def read_sheet(words: Any = (), root: Path = ROOT) -> tuple[dict[str, str], dict[str, Any]]:
    """The presets that params.yaml chooses, by group, and its own values, as far as the overrides leave them."""
    values, choices = _load_yaml(root / "params.yaml", root), {}
    for group, presets in preset_groups(root).items():
        entry = values.pop(group, DEFAULTS.get(group))
        if group in OBSERVERS and not isinstance(entry, str):
            entry, values[group] = "none", _observers(group, entry, presets, root)
        mapping = group in SECTIONS and isinstance(entry, dict)
        chooser = CHOOSER.get(group, "source")
        choice = entry.get(chooser, DEFAULTS.get(group)) if mapping else entry
        if choice is None:
            key = f"{group}.{chooser}" if mapping else group
            raise Refusal(f"params.yaml: {key}: missing; write one of {', '.join(presets)}")
        _refuse_unless_preset(f"params.yaml: {group}", choice, group, presets, root)
        chosen = _chosen(group, words)
        for name in chosen:
            _refuse_unless_preset(group, name, group, presets, root)
        if group in OBSERVERS and chosen:  # the overrides have the last word
            values.pop(group, None)
        if group in DEFAULTS:
            _refuse_without_effect(group, chosen or [choice], values, root)
        if mapping and set(chosen) <= {choice}:  # what belongs to one preset is not laid on another
            values[group] = {name: value for name, value in entry.items() if name != chooser}
        choices[group] = choice
    for name in values:  # also `hydra` and `defaults`, which Hydra would obey and drop
        refuse_unknown(name, SECTIONS)
    return choices, values


def _chosen(group, words):
    """The presets of a group that the overrides name: `logger=csv`, `logger=[csv,tensorboard]`, or words of a sweep."""
    typed = [re.fullmatch(rf"{group}=\[?([\w,-]+)\]?", word) for word in words]
    return [name for found in typed if found for name in found[1].split(",")]


def _observers(group, entry, presets, root):
    """Callbacks or loggers that params.yaml names in a list of presets, or spells out."""
    if not isinstance(entry, list):
        return entry
    found: dict[str, Any] = {}
    for word in entry:
        _refuse_unless_preset(f"params.yaml: {group}", word, group, presets, root)
        found |= preset_of(root / "conf" / group / f"{word}.yaml", root).get(group, {})
    return found


def _left_to_the_rank(fact):
    if fact not in RUN_FACTS:
        raise Refusal(f"${{run:{fact}}}: there are {', '.join(f'${{run:{name}}}' for name in RUN_FACTS)}")
    return f"${{run:{fact}}}"


def preset_groups(root: Path = ROOT) -> dict[str, list[str]]:
    """The folders of conf/ that a word of params.yaml chooses from, and their presets."""
    return {group: sorted(file.stem for file in (root / "conf" / group).glob("*.yaml")) for group in sorted(ORDER)}


def preset_of(file: Path, root: Path = ROOT) -> dict[str, Any]:
    """What a preset sets, under the names that it has in the settings."""
    content, package = _load_yaml(file, root), _package(file)
    if package is None and file.parent != root / "conf":
        package = file.parent.name
    for name in reversed([] if package in (None, "_global_") else package.split(".")):
        content = {name: content}
    return content


def _package(file):
    found = re.match(r"\s*#\s*@package\s+(\S+)", file.read_text(encoding="utf-8", errors="replace"))
    return found[1] if found else None


def _spelled_out(word, groups):
    """`corpus={source:files,paths:[a.txt]}` as `corpus=files corpus.paths=[a.txt]`, which sweeps keep apart."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Override

    name, _, value = word.lstrip("+").partition("=")
    if name not in groups:
        return [word]
    if name in OBSERVERS or not value.lstrip().startswith("{"):
        return [word.lstrip("+")]  # conf/config.yaml names every group: +experiment=short adds nothing to the list
    with one_line_errors():
        override = OverridesParser.create().parse_override(word)
    if override.is_sweep_override():
        raise Refusal(f"{name}: a sweep takes words, not mappings: write {name}=a,b with presets of conf/{name}/")
    entries = {str(key): Override._get_value_element_as_str(inner) for key, inner in override._value.items()}
    choice = entries.pop(CHOOSER.get(name, "source"), None)
    return ([f"{name}={choice}"] if choice else []) + [f"{name}.{key}={text}" for key, text in entries.items()]


def _refuse_unless_preset(key, word, group, presets, root):
    if not isinstance(word, str) or word not in presets:
        close = difflib.get_close_matches(str(word), presets, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        refuse(key, word, f"must be one of {', '.join(presets)}{hint}")
    if group not in SECTIONS and _package(root / "conf" / group / f"{word}.yaml") is None:
        line = "# @package _global_"
        raise Refusal(f"conf/{group}/{word}.yaml: its first line must be `{line}`, else its settings are not found")


def _refuse_without_effect(group, words, values, root):
    """params.yaml is laid on the presets: one of which it sets every key would be accepted and change nothing."""
    for word in words:
        file, of_sheet = root / "conf" / group / f"{word}.yaml", set(_keys(values))
        keys = _keys(preset_of(file, root))
        if keys and of_sheet.issuperset(keys):
            name = file.relative_to(root).as_posix()
            raise Refusal(f"{name} changes nothing: params.yaml sets {', '.join(keys)} and wins; delete that there")


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


# ---- what Hydra says


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
        if isinstance(error, known) and not isinstance(error, Refusal):
            raise Refusal(" ".join(_in_one_line(error).split())) from None


def _in_one_line(error):
    from hydra.errors import MissingConfigException, OverrideParseException

    text = str(error) or f"Hydra cannot read this ({type(error).__name__})"
    lines = [" ".join(line.split()) for line in text.strip().splitlines()]
    if isinstance(error, OverrideParseException):
        return _how_to_write(error.override, lines)
    unknown = re.search(r"Could not override '([^']*)'", text)
    if unknown:
        close = difflib.get_close_matches(unknown[1], leaves(), n=1)
        hint = f"did you mean {close[0]}?" if close else "python -m stages.config lists them all"
        hint = f"it is {RENAMED[unknown[1]]} now" if unknown[1] in RENAMED else hint
        if unknown[1] in leaves():  # a mapping of names of one's own
            return f"{unknown[1]}: it has no key of that name yet: add one with +{unknown[1]}.NAME=value"
        return f"{unknown[1]}: no such setting; {hint}"
    full_key = re.search(r"full_key: (\S{1,80})", text)
    variable = re.search(r"Environment variable '([^']*)' not found", text)
    if variable:
        asking = f"{full_key[1]}: " if full_key else ""
        return f"{asking}the environment variable {variable[1]} is not set: set it, or write a value"
    if isinstance(error, MissingConfigException):
        del lines[1:]  # what follows are paths of Hydra's
    advice = [line for line in lines if line and not re.match("(full_key|object_type|reference_type)[:=]", line)]
    advice[0] = advice[0].removeprefix("Refusal raised while resolving interpolation: ")
    message = ": ".join(filter(None, (advice[0].rstrip("."), "; ".join(advice[1:]))))[:400]
    return f"{full_key[1]}: {message}" if full_key else message


def _how_to_write(override, lines):
    """Hydra's grammar refuses an override: what it needs is nearly always quotes, for it and for the shell."""
    key, equals, _ = override.partition("=")
    if not equals:
        return f"{shown(override)}: write it as key=value"
    reason = next((line for line in lines if not line.startswith(("Error parsing", "LexerNo", "^", "See "))), "")
    reason = reason.partition(" expecting ")[0]
    quotes = f"put double quotes around the text and single quotes around the whole, as in '{key[:80]}=\"a = (b)\"'"
    if re.match(r"[\w.]+=\[", override):
        quotes = quotes.replace('"a = (b)"', '["a = (b).txt"]')
    return f"{shown(override)}: Hydra cannot read this{f' ({reason[:80]})' if reason else ''}: {quotes}"

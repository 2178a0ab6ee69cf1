"""Spares a `dvc repro` with nothing to do the composition of its settings, whose libraries take most of `config`.

    known = unchanged_sections(root)     # None: compose, as always
    remember(root, plain)                # after composing: what the next run compares with

What was composed is trusted only where every file that it was composed of has the same bytes, the code and libraries
are the same, resolved.yaml is as it was written, and no setting asks for what is not in a file: `${oc.env:NAME}`.
"""

import hashlib
import json
import re
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from stages.files.artifacts import sha256_of, write_json
from stages.run.experiments import ACCEPTED

MEMORY = ACCEPTED / "composed.json"
SECTIONS = ("corpus", "teacher")  # which name what DVC cannot see
LIBRARIES = ("hydra-core", "omegaconf", "pydantic", "PyYAML")
FROM_ELSEWHERE = re.compile(r"\$\{(?!run:)")  # ${run:...} is left to the ranks
FROM_ELSEWHERE_IN_CONFIG = re.compile(r"\$\{(?!choice:\w+\}|hydra\.|now:)")  # words of params.yaml, folders by hand


def unchanged_sections(root: Path) -> SimpleNamespace | None:
    """The sections `SECTIONS` where all settings are as they were composed last; None where that is not certain."""
    try:
        known = json.loads((root / MEMORY).read_text(encoding="utf-8"))
        same = known["of"] == _composed_of(root) and known["resolved"] == sha256_of(root / "resolved.yaml")
        accepted = sha256_of(root / ACCEPTED / "params.yaml") == sha256_of(root / "params.yaml")
        sections = {name: SimpleNamespace(**known[name]) for name in SECTIONS}
        return SimpleNamespace(**sections) if same and accepted else None
    except (OSError, ValueError, LookupError, TypeError):  # nothing is remembered, or it is damaged
        return None


def remember(root: Path, plain: dict[str, Any]) -> None:
    """Call it when resolved.yaml and the accepted params.yaml are written."""
    of = _composed_of(root)
    if of is None:
        (root / MEMORY).unlink(missing_ok=True)
    else:
        sections = {name: plain[name] for name in SECTIONS}
        write_json(root / MEMORY, {"of": of, "resolved": sha256_of(root / "resolved.yaml")} | sections)


def _composed_of(root: Path) -> str | None:
    """Checksum of all that settings are composed of; None where a value comes from elsewhere."""
    settings = [root / "params.yaml", *sorted((root / "conf").rglob("*.yaml"))]
    digest = hashlib.sha256(json.dumps([sys.version, *map(metadata.version, LIBRARIES)]).encode())
    for path in [*settings, *sorted((root / "stages").rglob("*.py"))]:
        content = path.read_bytes()
        asks = FROM_ELSEWHERE_IN_CONFIG if path == root / "conf/config.yaml" else FROM_ELSEWHERE
        if path.suffix == ".yaml" and asks.search(content.decode("utf-8")):
            return None
        digest.update(f"{path.relative_to(root).as_posix()}\0{hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()

"""Compares how these outs were made (provenance/) with the records of a commit (provenance.json) or of a checkout.

    python -m stages.run.compare                # with the last commit
    python -m stages.run.compare v0.1.0         # with a tag or any other revision of git
    python -m stages.run.compare ../elsewhere   # with a checkout that another machine has run

The same settings and code under the same conditions give the same bytes; if not, this prints a warning and exits with
code 1. Under other conditions bytes may differ; then it prints by how much the metrics differ.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml
from tabulate import tabulate

from stages.files.artifacts import ROOT, Refusal, read_json
from stages.files.streams import whole_output
from stages.run.provenance import RECORDS, record_path

PARTS = {"conditions", "recipe", "inputs", "outs", "metrics"}


@dataclass(frozen=True)
class Comparison:
    same_recipe: bool  # the same settings and code, of this stage and of all before it
    conditions: dict[str, tuple]  # name -> (theirs, ours), of those that differ
    inputs: list[str]  # read with other bytes
    outs: list[str]  # written with other bytes
    metrics: dict[str, tuple[float, float]]

    @property
    def broken(self) -> bool:
        """The promise is: the same recipe, conditions and inputs make the same bytes."""
        return bool(self.same_recipe and self.outs and not self.conditions and not self.inputs)


def compare(theirs: dict, ours: dict) -> Comparison:
    def differing(part: str) -> dict[str, tuple]:
        old, new = theirs[part], ours[part]
        names = [*old, *(name for name in new if name not in old)]
        return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}

    moved = {name: pair for name, pair in differing("metrics").items() if None not in pair}
    same_recipe = theirs["recipe"] == ours["recipe"]
    return Comparison(same_recipe, differing("conditions"), [*differing("inputs")], [*differing("outs")], moved)


def sentence(stage: str, found: Comparison, other: str = "the committed run") -> str:
    """The comparison in one line; empty where settings, code or inputs explain a difference."""
    if found.broken:
        return (
            f"WARNING: {stage}: {', '.join(found.outs)}: other bytes than those of {other}, from the same settings,"
            f" code and inputs under the same conditions; {largest_move(found)}. This must not happen: please report"
            f" it with both {record_path(stage)}"
        )
    if not found.same_recipe or (found.inputs and not found.conditions):
        return ""
    if not found.conditions:
        return f"{stage}: same bytes as {other}"
    made = f"{stage}: made under other conditions than {other}"
    made += f" ({'; '.join(change(name, pair) for name, pair in found.conditions.items())})"
    made += f"{', from other inputs' if found.inputs else ''}: bytes may differ, "
    return made + (f"and do; {largest_move(found)}" if found.outs else "these are the same")


def change(name: str, pair: tuple) -> str:
    old, new = ("none" if value in (None, "") else value for value in pair)
    return f"{name}: {old} -> {new}"


def largest_move(found: Comparison) -> str:
    if not found.metrics:
        return "no headline metric moved"
    name, (old, new) = max(found.metrics.items(), key=lambda item: _relative(*item[1]))
    percent = f" ({100 * (new / old - 1):+.2g}%)" if old else ""
    others = len(found.metrics) - 1
    return f"{name} {old:g} -> {new:g}{percent}" + (f", {others} more by less" if others else "")


def _relative(old: float, new: float) -> float:
    return abs(new - old) / max(abs(old), abs(new))


# ---- where records are


def committed(root: Path, stage: str, revision: str = "HEAD") -> dict | None:
    """The record in a revision of git; None without git, without that revision or without the file."""
    words = ["git", "-C", str(root), "show", f"{revision}:./{RECORDS}"]
    try:
        done = subprocess.run(words, capture_output=True, timeout=10)
        return _record(json.loads(done.stdout).get(stage)) if done.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired, ValueError, AttributeError):
        return None


def in_folder(root: Path, stage: str) -> dict | None:
    """The record beside the outs; in a checkout where nothing has run yet, the committed one."""
    path, committed = root / record_path(stage), root / RECORDS
    if path.exists():
        return _record(read_json(path))
    return _record(read_json(committed).get(stage)) if committed.exists() else None


def _record(content) -> dict | None:
    """None if another version wrote it in another form."""
    return content if isinstance(content, dict) and PARTS <= content.keys() else None


# ---- the table


def table(found: dict[str, Comparison]) -> str:
    """A line per stage, and under them what differs in their conditions."""
    rows = [["stage", "settings and code", "conditions", "inputs", "outs", "metrics"]]
    stages_with: dict[str, list[str]] = {}
    for stage, one in found.items():
        counts = [f"{len(part)} other" if part else "same" for part in (one.conditions, one.inputs, one.outs)]
        recipe, moved = "same" if one.same_recipe else "other", largest_move(one) if one.metrics else "same"
        rows.append([stage, recipe, *counts, moved])
        for name, pair in one.conditions.items():
            stages_with.setdefault(change(name, pair), []).append(stage)
    drawn = tabulate(rows, headers="firstrow", tablefmt="plain", disable_numparse=True)
    return "\n".join([drawn, *(f"{changed} ({', '.join(stages)})" for changed, stages in stages_with.items())])


def main(words: list[str]) -> int:
    if words in (["--help"], ["-h"]):
        print(__doc__)
        return 0
    if len(words) > 1 or any(word.startswith("-") for word in words):
        raise Refusal(f"{' '.join(words)}: usage: python -m stages.run.compare [revision or folder]")
    other = words[0] if words else "HEAD"
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    found = {}
    for stage in stages:
        ours = in_folder(ROOT, stage)
        theirs = in_folder(Path(other), stage) if Path(other).is_dir() else committed(ROOT, stage, other)
        if ours and theirs:
            found[stage] = compare(theirs, ours)
    if not found:
        raise Refusal(f"no stage has a record in provenance/ both here and in {other}: run dvc repro, or name another")
    print(table(found))
    for stage, one in found.items():
        if one.broken:
            print(f"offramp: {sentence(stage, one, other)}", file=sys.stderr)
    return int(any(one.broken for one in found.values()))


if __name__ == "__main__":
    try:
        with whole_output():
            code = main(sys.argv[1:])
        sys.exit(code)
    except Refusal as refusal:
        sys.exit(f"offramp: {refusal}")

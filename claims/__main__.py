"""The experiment of record: every claim over several seeds and corpora, with intervals over seeds and documents.

    make claims                                     # hours on 2 cores; writes docs/claims.md and the README's table
    python -m claims corpus=python seed=1,2         # a part of it; prints the table, writes nothing
    python -m claims hydra.sweeper.params=null      # prints the table of what has run

Each job runs the pipeline up to `evaluate`, and the control of equal time (claims/challenge.py), in a copy of this
checkout under .runs/claims/, named by a hash of code and settings. A job that was cut off continues there, as `dvc
repro` does, and a finished one is not run again.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import hydra
import yaml
from omegaconf import DictConfig, OmegaConf

from benchmarks.checkout import DVC, checkout, environment
from benchmarks.table import ROOT
from claims.challenge import SCORES
from claims.table import MIN_CORPORA, MIN_SEEDS, TIMED, Runs, compared, page, summary
from stages.files.artifacts import write_atomically
from stages.files.resuming import resume_key

FOLDER = ROOT / ".runs" / "claims"
WRITTEN, README = ROOT / "docs" / "claims.md", ROOT / "README.md"
MARKS = "<!-- seeds -->", "<!-- /seeds -->"  # of the table in the README


def package_folder(name: str) -> str:
    """Where an installed package keeps its files."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        sys.exit(f"claims/sweep.yaml: the package {name} is not installed: choose another corpus")
    return found.submodule_search_locations[0]


def code_key() -> str:
    """What the figures depend on: another key has other folders."""
    settings = sorted((ROOT / "conf").rglob("*.yaml"))
    return resume_key("claims", [], [*settings, ROOT / "params.yaml", ROOT / "dvc.yaml"])


def prepare_checkout(folder: Path, corpus: dict, seed: int) -> None:
    """A copy of this checkout with these settings; whole or not there."""
    fresh = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    checkout(fresh)
    sheet = yaml.safe_load((fresh / "params.yaml").read_text())
    (fresh / "params.yaml").write_text(yaml.safe_dump(sheet | {"seed": seed, "corpus": corpus}, sort_keys=False))
    fresh.rename(folder)


@hydra.main(version_base=None, config_path=".", config_name="sweep")
def job(settings: DictConfig) -> None:
    """One corpus and one seed: the pipeline to `evaluate`, and the control of equal time."""
    words: Any = OmegaConf.to_container(settings, resolve=True)
    corpus, seed = words["corpus"], words["seed"]
    if corpus not in words["corpora"]:
        sys.exit(f"claims: corpus={corpus} is not one of {', '.join(words['corpora'])} (claims/sweep.yaml)")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        sys.exit(f"claims: seed={seed}: must be a whole number from 0 to 2**32 - 1")
    folder = FOLDER / code_key() / f"{corpus}-{seed}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        prepare_checkout(folder, words["corpora"][corpus], seed)
    print(f"claims: {corpus}, seed {seed}: {folder.relative_to(ROOT)}", flush=True)
    timed = [sys.executable, "-m", "claims.challenge", f"hydra.run.dir={TIMED}"]
    for words in ([*DVC, "repro", "--quiet", "evaluate"], *([] if (folder / TIMED / SCORES).exists() else [timed])):
        done = subprocess.run(words, cwd=folder, env=environment(PYTHONPATH=f".{os.pathsep}{ROOT}"))
        if done.returncode:
            sys.exit(f"claims: {corpus}, seed {seed} ended early: the same command continues it")


def main() -> None:
    OmegaConf.register_new_resolver("package", package_folder)
    job()
    runs = Runs.of(FOLDER / code_key())
    if not runs.folders:
        sys.exit("claims: no run has finished yet")
    corpora, found = compared(runs)
    text = page(corpora, found)
    print(text)
    if runs.seeds < MIN_SEEDS or len(runs.corpora) < MIN_CORPORA:
        print(f"not written: {MIN_CORPORA} corpora with {MIN_SEEDS} seeds each are needed")
        return
    write_atomically(WRITTEN, text)
    before, _, rest = README.read_text().partition(MARKS[0])
    write_atomically(README, f"{before}{MARKS[0]}\n{summary(found)}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")
    print(f"written: {WRITTEN.relative_to(ROOT)} and the table of {README.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

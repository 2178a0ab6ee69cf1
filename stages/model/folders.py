"""Where a model is that a person names, and the names in its folder that several modules know."""

from pathlib import Path

from stages.files.artifacts import ROOT, Refusal

MODEL_CARD = "README.md"
FIGURES_LATER = "Test figures with 95% intervals come later: metrics/evaluate.json and report/index.html of the run."


def folder_of(word: str, root: Path = ROOT) -> Path:
    """artifacts/<word>, or the folder of this path; a word that is neither is refused."""
    for folder in (root / "artifacts" / word, Path(word)):
        if (folder / "config.json").is_file():
            return folder
    known = ", ".join(sorted(path.parent.name for path in (root / "artifacts").glob("*/config.json")))
    here = f"artifacts/ has {known}" if known else "artifacts/ has no model yet: run dvc repro"
    raise Refusal(f"{word}: no model of that name and no folder with a config.json; {here}")

"""A model folder to publish: the one of artifacts/, with what was measured of it since in its card."""

from collections.abc import Mapping
from pathlib import Path

from stages.files.artifacts import link_or_copy, write_atomically
from stages.model.folders import FIGURES_LATER, MODEL_CARD


def write_hugging_face(folder: Path, target: Path, name: str, evaluation: Mapping | None) -> None:
    """Copies a complete model folder; `evaluation` is the content of artifacts/evaluation.json, where there is one."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name != MODEL_CARD:
            link_or_copy(file, target / file.name)
    card = (folder / MODEL_CARD).read_text(encoding="utf-8")
    if evaluation and name in evaluation["models"]:
        card = card.replace(FIGURES_LATER, figures_of(evaluation["models"][name], evaluation["test"]))
    write_atomically(target / MODEL_CARD, card)


def figures_of(figures: Mapping, test: Mapping) -> str:
    """The part of the card that has them, with their 95% intervals."""
    rows = []
    for key, word in (("bits_per_byte", "bits per byte"), ("top1_accuracy", "share of next tokens right")):
        interval = f"{figures[f'{key}_low']:.4f} to {figures[f'{key}_high']:.4f}"
        rows.append(f"| {word} | {figures[key]:.4f} | {interval} |")
    text = f"On {test['tokens']:,} tokens of {test['documents']} test documents; the intervals are over documents."
    return "\n".join(["| test figures | measured | 95% interval |", "| --- | ---: | ---: |", *rows, "", text])

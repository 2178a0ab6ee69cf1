"""Writes the report, an HTML page that can be read offline: published claims beside what this machine measured.

    dvc repro report
    python -m stages.report            # by hand, into outputs/

The same metrics and the same timings (measurements/profile.json) give the same page, table and claims.
"""

import csv
import hashlib
from collections.abc import Iterable
from pathlib import Path

import yaml

from stages.data.shards import read_card
from stages.files.artifacts import Refusal, read_json, rounded, write_atomically, write_json
from stages.reporting.claims import claims_as_markdown, make_claims
from stages.reporting.page import make_page
from stages.run.entry import run_stage
from stages.run.provenance import RECORDS, record_path

SECTIONS = ("seed",)

STAGES = ("pretrain", "distill", "sparsify", "challenge", "evaluate", "profile", "plan")
CURVES = {  # the models that each stage trains
    "pretrain": ("teacher",),
    "distill": ("student", "control", "warm_control", "cold_student"),
    "sparsify": ("sparse_teacher", "continued_teacher", "sparse_student", "continued_student"),
    "challenge": ("scratch_student", "scratch_sparse_teacher", "scratch_sparse_student"),
}


def main(settings, place, run) -> None:
    refuse_altered(place.root)
    metrics = {stage: read_json(place.read(f"metrics/{stage}.json")) for stage in CURVES}
    metrics["evaluate"] = read_json(place.read("artifacts/evaluation.json"))  # all figures, not only the headline
    curves = {stage: read_curves(place.read(f"plots/{stage}"), models) for stage, models in CURVES.items()}
    card = read_card(place.read("artifacts/data"))
    texts = read_json(place.read("artifacts/samples.json"))
    timings = read_json(place.read("measurements/profile.json"))
    plan, money = (read_json(place.read(f"{folder}/plan.json")) for folder in ("artifacts", "measurements"))
    records = {stage: read_json(place.read(record_path(stage))) for stage in ("prepare", *STAGES)}
    made = {stage: record["conditions"] for stage, record in records.items()}

    claims = make_claims(metrics, timings)
    write_json(place.write("report/claims.json"), {"claims": [rounded(claim._asdict()) for claim in claims]})
    write_atomically(place.write("report/claims.md"), claims_as_markdown(claims))
    page = place.write("report/index.html")
    made_page = make_page(claims, metrics, curves, texts, card, timings, plan, money, made, settings.seed)
    write_atomically(page, made_page)
    write_json(place.write(RECORDS), records)
    run.artifact(page)
    print(f"report: {page}")


def refuse_altered(root: Path) -> None:
    """Refuse files that differ from dvc.lock, because JSON and CSV have no checksum of their own."""
    if not (root / "dvc.lock").exists():
        return
    try:
        stages = yaml.safe_load((root / "dvc.lock").read_text(encoding="utf-8"))["stages"]
        read = [stages[name] for name in STAGES if name in stages]
        recorded = {out["path"]: out["md5"] for stage in read for out in stage["outs"]}
    except (yaml.YAMLError, ValueError, LookupError, TypeError):
        raise Refusal(f"{root / 'dvc.lock'} is damaged: restore it (git checkout dvc.lock), then dvc repro") from None
    for path, md5 in recorded.items():
        if path.endswith((".json", ".csv")) and (root / path).is_file():
            if hashlib.md5((root / path).read_bytes(), usedforsecurity=False).hexdigest() != md5:
                raise Refusal(f"{root / path} is not the file that dvc.lock records: run dvc repro")


def read_curves(folder: Path, models: Iterable[str]) -> dict[str, list[dict]]:
    """The rows of each model's curve; an empty field is None."""
    curves = {}
    for model in models:
        path = folder / f"{model}.csv"
        try:
            with open(path, newline="", encoding="utf-8") as file:
                rows = [*csv.DictReader(file)]
        except FileNotFoundError:
            raise Refusal(f"{path} is missing: run the stage that writes it (dvc repro)") from None
        curves[model] = [{key: float(text) if text else None for key, text in row.items()} for row in rows]
    return curves


if __name__ == "__main__":
    run_stage(main, "report", SECTIONS)

"""What `dvc plots show` and `dvc exp show` draw from this dvc.yaml, in a small repository without training."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from benchmarks.checkout import DVC, environment
from stages.evaluate import MODELS, headline, quality_csv
from stages.files.artifacts import ROOT, write_json
from stages.planning.tables import plots as plots_of_plan
from stages.report import CURVES
from stages.run.entry import Place
from stages.training.launch import write_curves
from tests.test_report import evaluation, planned

PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())
CURVES_DRAWN = [name for plot in PIPELINE["plots"] for name, shown in plot.items() if shown["template"] == "curves"]
OUTS = [out for stage in PIPELINE["stages"].values() for out in stage["outs"]]


def run(root: Path, *command: str, columns: int = 200) -> str:
    site = root.with_name(f"{root.name}-site")  # git, which adds all, must not see its files come and go
    theirs = environment(DVC_SITE_CACHE_DIR=str(site), COLUMNS=str(columns))
    done = subprocess.run(command, cwd=root, env=theirs, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A repository of DVC with this project's plots, params and metrics, but none of its stages."""
    root = tmp_path_factory.mktemp("repository")
    run(root, "git", "init")
    run(root, "git", "config", "user.name", "test")
    run(root, "git", "config", "user.email", "test@localhost")
    run(root, *DVC, "init", "-q")
    metrics = [path for stage in PIPELINE["stages"].values() for entry in stage.get("metrics", []) for path in entry]
    declared = {"metrics": metrics, "params": PIPELINE["params"], "plots": PIPELINE["plots"]}
    (root / "dvc.yaml").write_text(yaml.safe_dump(declared))
    shutil.copytree(ROOT / ".dvc/plots", root / ".dvc/plots")
    return root


def write_plots(root: Path) -> None:
    """As the stages write them: most steps of a curve are not validated."""
    place = Place(root, root)
    for stage, models in CURVES.items():
        curve = [{"step": step, "loss": 4.0 - step / 10, "validation_bits_per_byte": None} for step in range(1, 9)]
        curve[3]["validation_bits_per_byte"], curve[7]["validation_bits_per_byte"] = 2.0, 1.5
        write_curves(place, stage, {model: {"curve": curve} for model in models})
    place.write("plots/quality.csv").write_text(quality_csv(evaluation()))
    for name, text in plots_of_plan(planned()["artifacts/plan.json"]).items():
        place.write(f"plots/plan/{name}.csv").write_text(text)


@pytest.fixture(scope="module")
def plots(repository) -> dict:
    """The specification that `dvc plots show` gives to the browser, by the plot's name."""
    write_plots(repository)
    shown = json.loads(run(repository, *DVC, "plots", "show", "--json"))
    assert "errors" not in shown
    return {name: views[0]["content"] for name, views in shown["data"].items()}


def lines_of(specification: dict) -> dict[str, list[dict]]:
    """The points of each file of a curve plot; the template colours by the file's name."""
    by_file: dict[str, list[dict]] = {}
    for point in specification["data"]["values"]:
        by_file.setdefault(Path(point["filename"]).stem, []).append(point)
    return by_file


def test_each_model_is_a_line_of_its_own(plots):
    trained = [model for models in CURVES.values() for model in models]
    for start, wanted in {"validation": trained, "training loss": trained}.items():
        drawn = [model for name, plot in plots.items() if name.startswith(start) for model in lines_of(plot)]
        assert sorted(drawn) == sorted(wanted), "each model once"
    for name in CURVES_DRAWN:
        (named,) = [step for step in plots[name]["transform"] if "calculate" in step]
        assert "datum.filename" in named["calculate"] and named["as"] == "model"
        assert plots[name]["encoding"]["color"]["field"] == "model"
        assert {"field": "model"} in plots[name]["encoding"]["tooltip"]
        for points in lines_of(plots[name]).values():
            steps = [int(point["step"]) for point in points]
            assert steps == sorted(set(steps)), "one value at a step"


def test_a_step_without_validation_is_left_out_rather_than_drawn_as_zero(plots):
    for name in CURVES_DRAWN:
        y = plots[name]["encoding"]["y"]["field"]
        assert {"filter": f"isValid(toNumber(datum['{y}']))"} in plots[name]["transform"]


def test_distillation_losses_and_cross_entropies_have_no_axis_in_common(plots):
    distilled = {"student", "cold_student", "sparse_teacher", "sparse_student"}
    for name, plot in plots.items():
        if name.startswith("training loss"):
            assert set(lines_of(plot)) <= distilled or not set(lines_of(plot)) & distilled, name


def test_each_point_of_quality_against_compute_has_its_models_name(plots):
    plot = plots["quality against compute"]
    assert {point["model"] for point in plot["data"]["values"]} == set(MODELS)
    assert plot["encoding"]["color"]["field"] == "model"
    assert {"field": "model"} in plot["encoding"]["tooltip"] and {"field": "documents"} in plot["encoding"]["tooltip"]
    assert [layer["encoding"]["text"] for layer in plot["layer"] if layer["mark"]["type"] == "text"] == [
        {"field": "model"}
    ]


def test_the_planners_plots_show_intervals_and_colour_by_provider(plots):
    speed, cost = plots["tokens per second by chips"], plots["dollars of the training by nodes"]
    assert {layer["mark"]["type"] for layer in speed["layer"]} == {"area", "line"}
    assert cost["encoding"]["color"]["field"] == "provider"
    assert {point["provider"] for point in cost["data"]["values"]} == {"coreweave", "aws", "lambda", "own"}
    months = plots["months to break even by rent and utilization"]
    assert months["encoding"]["color"]["field"] == "break_even_months" and len(months["data"]["values"]) == 81


def test_every_curve_that_a_stage_writes_is_an_out_and_is_drawn():
    written = {f"plots/{stage}/{model}.csv" for stage, models in CURVES.items() for model in models}
    others = {"plots/quality.csv", *(f"plots/plan/{name}.csv" for name in ("scaling", "cost", "rent_or_own"))}
    assert {out for out in OUTS if isinstance(out, str) and out.startswith("plots/")} == written | others
    drawn = {path for plot in PIPELINE["plots"] for shown in plot.values() for path in shown["y"]}
    assert drawn == written | others
    assert written | {"artifacts/evaluation.json"} <= set(PIPELINE["stages"]["report"]["deps"])


def test_the_readmes_table_of_experiments_fits_120_columns(repository):
    (command,) = re.findall(r"`dvc (exp show [^`]+)`", (ROOT / "README.md").read_text())
    words = [word.strip("'") for word in re.findall(r"'[^']*'|\S+", command)]
    for temperature in (1.0, 4.0):
        for path in ("params.yaml", "resolved.yaml"):
            settings = yaml.safe_load((ROOT / path).read_text())
            settings["distill"]["temperature"] = temperature
            (repository / path).write_text(yaml.safe_dump(settings))
        write_json(repository / "metrics/evaluate.json", headline(evaluation()))
        for stage in ("prepare", "pretrain", "distill", "sparsify", "challenge"):
            write_json(repository / f"metrics/{stage}.json", {"temperature": temperature, "tokens": 10_240})
        if temperature == 1.0:
            run(repository, "git", "add", "--all")
            run(repository, "git", "commit", "-qm", "one")
        else:
            run(repository, *DVC, "exp", "save", "--name", "four")
    table = run(repository, *DVC, *words, "--no-pager", columns=120)
    assert max(map(len, table.splitlines())) <= 120 and "…" not in table
    for name in ("gap_closed", "quality_kept", "student_bits_per_byte", "distill.temperature", "four"):
        assert name in table

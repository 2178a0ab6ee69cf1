"""The stage `plan` as a person types it: a table, a sweep, the validation; the same bytes; mistakes in one line."""

import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages import plan
from stages.files.artifacts import ROOT, Refusal, read_json, sha256_of, write_json
from stages.planning import validate as validation
from stages.planning.points import load_points
from stages.run import sweeps
from stages.settings.compose import compose
from stages.settings.schema import validate
from tests.test_report import SilentRun, evaluation, place_in, timings


def settings(**changes):
    read = validate(compose(["scale=tiny"]))
    return SimpleNamespace(plan=read.plan.model_copy(update=changes))


@functools.cache
def registry():
    return load_points()


@functools.cache
def validated():
    return validation.validate(registry())


@pytest.fixture(autouse=True)
def registry_read_once(monkeypatch):
    """The registry and its errors are the same in every test here, and take seconds."""
    monkeypatch.setattr(plan, "load_points", registry)
    monkeypatch.setattr(plan, "validate", lambda points: validated())


@pytest.fixture
def checkout(tmp_path):
    """What the stages before it leave."""
    shutil.copytree(ROOT / "conf/plan", tmp_path / "conf/plan")
    write_json(tmp_path / "artifacts/evaluation.json", evaluation())
    write_json(tmp_path / "measurements/profile.json", timings())
    write_json(tmp_path / "metrics/pretrain.json", {"tokens": 819_200})
    write_json(tmp_path / "metrics/distill.json", {"tokens": 307_200})
    return tmp_path


def outs(root: Path) -> dict[str, str]:
    files = [path for name in ("artifacts/plan.json", "metrics", "plots") for path in [root / name]]
    return {path.name: sha256_of(path) for path in files}


def test_what_dvc_keeps_depends_on_no_clock_and_what_the_times_lead_to_stands_apart(checkout):
    plan.main(settings(), place_in(checkout), SilentRun())
    before, money = outs(checkout), read_json(checkout / "measurements/plan.json")
    slower = timings()
    for figures in slower["latency"].values():
        for name in ("prefill_seconds", "prefill_seconds_quartile_low", "prefill_seconds_quartile_high"):
            figures[name] *= 2
    write_json(checkout / "measurements/profile.json", slower)
    plan.main(settings(), place_in(checkout), SilentRun())
    assert outs(checkout) == before
    again = read_json(checkout / "measurements/plan.json")
    reads = [each["machine"]["seconds_per_token"]["student"]["read"][0] for each in (money, again)]
    assert reads[1] == pytest.approx(2 * reads[0], rel=1e-5)


def test_the_metrics_hold_what_a_person_compares_and_the_columns_of_a_sweep(checkout):
    plan.main(settings(), place_in(checkout), SilentRun())
    metrics, content = read_json(checkout / "metrics/plan.json"), read_json(checkout / "artifacts/plan.json")
    assert set(sweeps.COLUMNS["plan"]) <= set(sweeps.numbers_of(checkout / "metrics/plan.json"))
    assert metrics["cheapest"]["dollars"] == min(each["dollars"][0] for each in content["answers"])
    assert (
        metrics["ledger"]["rents"]
        == len(content["ledger"]["rents"])
        == sum(metrics["ledger"][age] for age in ("fresh", "stale", "undated"))
    )
    assert (
        metrics["planner"]["points"] >= 60 and metrics["planner"]["planner_error"] < metrics["planner"]["linear_error"]
    )
    assert metrics["leaving"]["own"]["change_high"] < 0
    assert 0 < metrics["circulated"]["wrong"] < metrics["circulated"]["claims"]


def test_the_provider_that_is_left_is_not_the_cheapest_of_those_asked_for(checkout):
    plan.main(settings(provider=("aws",)), place_in(checkout), SilentRun())
    answers = read_json(checkout / "artifacts/plan.json")["answers"]
    cheapest = min(each["dollars"][0] for each in answers if each["provider"] == "aws")
    assert read_json(checkout / "metrics/plan.json")["cheapest"]["dollars"] == cheapest
    assert cheapest > min(each["dollars"][0] for each in answers)


def test_the_readme_says_what_the_default_question_is_answered(checkout):
    plan.main(settings(), place_in(checkout), SilentRun())
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert read_json(checkout / "artifacts/plan.json")["sentence"] in readme


def test_the_machines_price_turns_its_times_into_dollars(checkout):
    plan.main(settings(machine_dollars_per_hour=0.5), place_in(checkout), SilentRun())
    money = read_json(checkout / "measurements/plan.json")
    seconds = money["machine"]["seconds_per_token"]["teacher"]["read"]
    dollars = money["machine"]["dollars_per_million_tokens"]["teacher"]["read"]
    assert dollars == pytest.approx([each / 3600 * 0.5e6 for each in seconds], rel=1e-5)


def test_on_a_machine_with_the_chip_that_is_asked_for_its_times_are_taken_as_they_are(checkout):
    own = timings()
    own["machine"]["device"] = "NVIDIA H100 80GB HBM3"
    write_json(checkout / "measurements/profile.json", own)
    plan.main(settings(), place_in(checkout), SilentRun())
    money = read_json(checkout / "measurements/plan.json")
    assert money["measured_on_chip"] and "write" in money["chip"]["dollars"]["aws"]["student"]
    assert money["chip"]["seconds_per_token"] == money["machine"]["seconds_per_token"]


def test_a_question_needs_no_model_of_ours(tmp_path, capsys):
    shutil.copytree(ROOT / "conf/plan", tmp_path / "conf/plan")
    plan.main(settings(chip="GB300", model="Kimi-K2", provider=("oracle",)), place_in(tmp_path), SilentRun())
    content = read_json(tmp_path / "artifacts/plan.json")
    assert content["by_flops"] is None and content["rent_or_own"] is None
    assert not (tmp_path / "measurements/plan.json").exists()
    assert "no dated price" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"provider": ("awz",)}, "plan.provider = awz: no such provider; did you mean aws?"),
        ({"leave": "nobody"}, "plan.provider = nobody: no such provider"),
        ({"chip": "H1000"}, "plan.chip = H1000: no row of it in conf/plan/prices.yaml; did you mean H100"),
        ({"chip": "H100-NVL"}, "plan.chip = H100-NVL: no peak of it in conf/plan/chips.yaml"),
        ({"model": "GPT"}, "plan.model = GPT: no such model"),
        ({"chips": (100,)}, "plan.chips = 100: must be whole nodes of 8 H100"),
        ({"today": "now"}, "plan.today = now: what DVC keeps must not depend on the day"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(checkout, changes, line):
    with pytest.raises(Refusal) as refusal:
        plan.main(settings(**changes), place_in(checkout), SilentRun())
    assert str(refusal.value).startswith(line) and "\n" not in str(refusal.value)
    assert not (checkout / "artifacts/plan.json").exists() and not (checkout / "plots").exists()


def test_a_list_of_providers_or_chips_is_a_list_and_in_a_sweep_jobs():
    words = ["plan.provider=aws,own", "plan.chips=512,1024", "plan.chip=H100", "plan.provider=[aws,own]"]
    assert plan.listed(words) == [
        "plan.provider=[aws,own]", "plan.chips=[512,1024]", "plan.chip=H100", "plan.provider=[aws,own]",
    ]  # fmt: skip
    assert plan.listed(["-m", *words]) == ["-m", *words]
    read = compose(["plan.provider=aws", "plan.chips=512"])
    assert validate(read).plan.provider == ("aws",) and validate(read).plan.chips == (512,)


def typed(*words, check=True, cwd=ROOT, shell="{}"):
    theirs = {name: value for name, value in os.environ.items() if name not in ("DVC_STAGE", "DVC_ROOT")}
    theirs |= {"PYTHONPATH": str(ROOT), "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, "-m", "stages.plan", *words]
    done = subprocess.run(
        shell.format(shlex.join(command)), cwd=cwd, env=theirs, capture_output=True, text=True, shell=True
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def test_the_command_line_of_the_documentation_prints_a_table(tmp_path):
    words = ["plan.model=Llama-3.1-405B", "plan.chips=512", "plan.provider=aws,own"]
    done = typed(*words, f"hydra.run.dir={tmp_path}")
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[0] for row in rows if row[1:3] == ["512", "64"]] == ["coreweave", "aws", "own"]
    dollars = {each["provider"]: each["dollars"] for each in read_json(tmp_path / "artifacts/plan.json")["answers"]}
    assert read_json(tmp_path / "metrics/plan.json")["cheapest"]["dollars"] == dollars["own"][0]
    assert read_json(tmp_path / "metrics/plan.json")["cheapest"]["chips"] == 512


def test_validate_prints_and_writes_the_errors_of_a_file_of_points(tmp_path):
    file = tmp_path / "points.yaml"
    mine = {
        "id": "mine", "set": "mine", "publisher": "me", "model": "DeepSeek-V3", "chip": "H100", "chips": 1024,
        "nodes": 128, "precision": "bf16", "layout": {"tp": 2, "pp": 8, "vp": 1, "ep": 64},
        "global_batch_sequences": 8192, "micro_batch_sequences": 1, "sequence_tokens": 4096,
        "metric": "step_seconds", "value": 50.0, "anchor": "base", "source": "a test",
    }  # fmt: skip
    base = mine | {"id": "base", "chips": 512, "nodes": 64, "global_batch_sequences": 4096, "anchor": None}
    file.write_text(json.dumps([base, mine]))
    done = typed("validate", "--points", "points.yaml", cwd=tmp_path)
    assert "| mine |" in done.stdout and "linear" in done.stdout
    table = tmp_path / "outputs/plan/validation-points.md"
    assert table.read_text() == done.stdout and str(table.relative_to(tmp_path)) in done.stderr
    table.unlink()
    unread = typed("validate", "--points=points.yaml", cwd=tmp_path, shell="{} >/dev/full")
    assert "Traceback" not in unread.stderr and table.read_text() == done.stdout
    file.write_text(json.dumps([base | {"chips": 0, "id": "two\nlines"}]))
    refused = typed("validate", "--points", "points.yaml", check=False, cwd=tmp_path)
    assert refused.returncode == 1 and refused.stderr.startswith("offramp: ") and refused.stderr.count("\n") == 1
    refused = typed("validate", "--points", "x" * 300, check=False)
    assert refused.returncode == 1 and "File name too long" in refused.stderr and refused.stderr.count("\n") == 1
    refused = typed("validate", "--point", check=False)
    assert refused.stderr.startswith("offramp: validate --point: usage: ")

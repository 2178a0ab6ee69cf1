"""The record of what made an out names what its bytes depend on, and nothing that differs between equal runs."""

import re

import pytest
import yaml

from stages.files.artifacts import ROOT, write_json
from stages.run import provenance

EPYC = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC
cpu MHz\t\t: 2596.148
flags\t\t: fpu sse2 avx avx2 fma avx512f avx512_bf16 hypervisor

processor\t: 1
vendor_id\t: another
"""
GRAVITON = """processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd evtstrm sve bf16 i8mm
CPU implementer\t: 0x41
CPU architecture: 8
CPU part\t: 0xd40
"""


@pytest.mark.parametrize(
    ("cpuinfo", "kind", "instructions"),
    [
        (EPYC, "AuthenticAMD family 25 model 17", "avx avx2 avx512_bf16 avx512f fma"),
        (GRAVITON, "implementer 0x41 architecture 8 part 0xd40", "asimd bf16 i8mm sve"),
    ],
)
def test_a_processor_is_its_kind_and_the_instructions_that_kernels_are_chosen_by(cpuinfo, kind, instructions):
    assert provenance.processor(cpuinfo) == {"processor": kind, "instructions": instructions}


def test_a_processor_that_linux_does_not_describe_still_has_a_name():
    assert provenance.processor("")["processor"]


def test_a_variable_that_chooses_other_kernels_is_a_condition_and_any_other_is_not(monkeypatch):
    before = provenance.machine_conditions()
    monkeypatch.setenv("HOSTNAME", "elsewhere")
    assert provenance.machine_conditions() == before
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert provenance.machine_conditions() == before | {"ATEN_CPU_CAPABILITY": "avx2"}


@pytest.fixture
def repository(tmp_path):
    """Three stages in a row with a word of code each, as a run has left them."""
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": {
        "config": {"deps": ["params.yaml"], "outs": [{"resolved.yaml": {"cache": False}}]},
        "make": {
            "deps": ["stages/make.py"], "params": [{"resolved.yaml": ["size"]}],
            "outs": ["artifacts/made", "measurements/make.json", "provenance/make.json"],
        },
        "use": {
            "deps": ["artifacts/made/one.txt", "measurements/make.json", "stages/use.py"],
            "params": [{"resolved.yaml": ["seed"]}],
            "outs": ["artifacts/used.txt"], "metrics": [{"metrics/use.json": {"cache": False}}],
        },
    }}))  # fmt: skip
    (tmp_path / "resolved.yaml").write_text("{seed: 1, size: 2, other: 3}")
    (tmp_path / "artifacts/made").mkdir(parents=True)
    (tmp_path / "measurements").mkdir()
    (tmp_path / "stages").mkdir()
    code, data = ("stages/make.py", "stages/use.py"), ("artifacts/made/one.txt", "artifacts/used.txt")
    for name in (*code, *data, "measurements/make.json"):
        (tmp_path / name).write_text(name)
    write_json(tmp_path / "metrics/use.json", {"models": {"student": {"bits_per_byte": 1.5, "parameters": 7}}})
    return tmp_path


def test_a_record_names_what_was_read_and_written_and_the_figures_that_people_compare(repository):
    own = {"conditions": {"ranks": 2}, "inputs": {"corpus": "ab"}}
    record = provenance.record("use", own, repository)
    assert record["conditions"]["ranks"] == 2 and record["conditions"]["torch"].startswith("2.")
    assert record["inputs"].keys() == {"corpus", "artifacts/made/one.txt"}, "no timings: no two runs share them"
    assert record["outs"].keys() == {"artifacts/used.txt", "metrics/use.json"}
    assert record["metrics"] == {"models.student.bits_per_byte": 1.5}
    made = provenance.record("make", {}, repository)["outs"].keys()
    assert made == {"artifacts/made"}, "neither itself nor timings"
    assert provenance.record("use", own, repository) == record


@pytest.mark.parametrize(
    ("path", "content", "changed"),
    [
        ("stages/use.py", "other code", {"use"}),
        ("stages/make.py", "other code", {"make", "use"}),
        ("resolved.yaml", "{seed: 1, size: 9, other: 3}", {"make", "use"}),
        ("resolved.yaml", "{seed: 1, size: 2, other: 9}", set()),
        ("artifacts/made/one.txt", "other bytes", set()),
    ],
)
def test_a_recipe_is_the_settings_and_code_of_a_stage_and_of_those_before_it(repository, path, content, changed):
    stages = yaml.safe_load((repository / "dvc.yaml").read_text())["stages"]
    before = {stage: provenance.recipe(stage, stages, repository) for stage in ("make", "use")}
    (repository / path).write_text(content)
    assert {stage for stage in before if provenance.recipe(stage, stages, repository) != before[stage]} == changed


def test_every_stage_but_config_and_report_declares_its_record_and_git_keeps_them_all_in_one_file():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for stage, entry in stages.items():
        assert (provenance.record_path(stage) in entry["outs"]) == (stage not in ("config", "report")), stage
    assert {provenance.RECORDS: {"cache": False}} in stages["report"]["outs"]


def test_conditions_hold_no_host_path_clock_or_frequency():
    import platform

    told = str(provenance.machine_conditions())
    assert platform.node() not in told and str(ROOT) not in told and not re.search("[MG]Hz", told)

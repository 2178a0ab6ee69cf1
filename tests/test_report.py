"""The report shows the metrics' numbers, escapes what models wrote, loads nothing, refuses missing files by name."""

import functools
import hashlib
import html
import json
import math
import random
import re
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages import plan, report
from stages.data import shards
from stages.files.artifacts import ROOT, Refusal, read_json, write_json
from stages.reporting import charts, claims, controls, drawing, figures, wording
from stages.settings.compose import compose
from stages.settings.schema import validate


def place_in(root: Path):
    def write(path):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        return root / path

    return SimpleNamespace(root=root, out=root, read=lambda path: root / path, write=write)


class SilentRun:
    def artifact(self, path):
        pass

    def metrics(self, values):
        pass

    def text(self, name, text):
        pass


def model(bits, parameters, active, flops, accuracy):
    return {
        "bits_per_byte": bits,
        "bits_per_byte_low": bits - 0.021,
        "bits_per_byte_high": bits + 0.019,
        "top1_accuracy": accuracy,
        "top1_accuracy_low": accuracy - 0.006,
        "top1_accuracy_high": accuracy + 0.007,
        "parameters": parameters,
        "active_parameters": active,
        "flops_per_token": flops,
        "counted_flops_per_token": flops,
        "agreement_with_teacher": 0.713,
        "agreement_with_teacher_low": 0.704,
        "agreement_with_teacher_high": 0.722,
        "calibration_error": 0.0312,
        "calibration_error_low": 0.0279,
        "calibration_error_high": 0.0347,
    }


def ahead(value, error=0.005):
    bounds = {"difference_low": value - 2 * error, "difference_high": value + 2 * error}
    return {"difference": value, "standard_error": error} | bounds


FLOPS = {
    "teacher": 34e12, "student": 9e12, "control": 6e12, "warm_control": 6.2e12, "cold_student": 8.8e12,
    "sparse_teacher": 4e12, "continued_teacher": 3.8e12, "sparse_student": 2e12, "continued_student": 1.7e12,
    "scratch_student": 42.9e12, "scratch_sparse_teacher": 37.9e12, "scratch_sparse_student": 44.9e12,
}  # fmt: skip
ALONE = {"teacher", "control", "scratch_student", "scratch_sparse_teacher", "scratch_sparse_student"}
CHALLENGE = {
    "training_flops": FLOPS,
    "whole_training_flops": {name: own if name in ALONE else own + FLOPS["teacher"] for name, own in FLOPS.items()},
}
SAMPLES = {
    "teacher": "def open(self, path):\n    if path is None:\n        raise ValueError('no path')\n",
    "student": "def open(self, path):\n    return self.path.get(name, None)\n",
    "control": "def open(self, path):\n    <script>alert(1)</script> & self._self = None\n",
}


def evaluation(documents=40):
    return {
        "test": {"documents": documents, "tokens": 98_304, "bytes": 337_716, "split_tokens": 350_742},
        "models": {
            "teacher": model(1.6912, 11_843_072, 5_214_000, 14_210_000, 0.447),
            "student": model(1.7634, 4_102_144, 4_102_144, 8_380_000, 0.431),
            "control": model(1.8751, 4_102_144, 4_102_144, 8_380_000, 0.409),
            "sparse_teacher": model(1.7142, 7_912_000, 3_604_000, 9_430_000, 0.442),
            "sparse_student": model(1.7981, 2_911_000, 2_911_000, 5_640_000, 0.424),
            "continued_teacher": model(1.6821, 11_843_072, 5_214_000, 14_210_000, 0.449),
            "continued_student": model(1.7509, 4_102_144, 4_102_144, 8_380_000, 0.434),
            "warm_control": model(1.7912, 4_102_144, 4_102_144, 8_380_000, 0.425),
            "cold_student": model(1.8411, 4_102_144, 4_102_144, 8_380_000, 0.415),
            "scratch_student": model(1.7834, 4_102_144, 4_102_144, 8_380_000, 0.427),
            "scratch_sparse_teacher": model(1.7342, 7_912_000, 3_604_000, 9_430_000, 0.438),
            "scratch_sparse_student": model(1.8281, 2_911_000, 2_911_000, 5_640_000, 0.419),
        },
        "controls": {
            "student": {
                "control": ahead(0.1117),
                "warm_control": ahead(0.0278),
                "cold_student": ahead(0.0777),
                "scratch_student": ahead(0.02),
            },
            "sparse_teacher": {"continued_teacher": ahead(-0.0321), "scratch_sparse_teacher": ahead(0.02)},
            "sparse_student": {"continued_student": ahead(-0.0472), "scratch_sparse_student": ahead(0.03)},
        },
        "comparisons": {
            "student": {
                "quality_kept": 0.95906,
                "quality_kept_low": 0.9552,
                "quality_kept_high": 0.9631,
                "control_quality_kept": 0.90193,
                "gap_closed": 0.6074,
                "gap_closed_low": 0.571,
                "gap_closed_high": 0.642,
                "gap_closed_reason": None,
            },
            "teacher_over_control": {"difference": 0.1839, "standard_error": 0.0093},
            "sparse_teacher": {
                "quality_lost": 0.0136,
                "quality_lost_low": 0.0101,
                "quality_lost_high": 0.0172,
                "flops_cut": 0.3364,
                "continued_quality_lost": -0.0054,
                "quality_lost_to_continued": 0.0191,
                "quality_lost_to_continued_low": 0.0154,
                "quality_lost_to_continued_high": 0.0228,
            },
            "sparse_student": {
                "quality_lost": 0.0197,
                "quality_lost_low": 0.0152,
                "quality_lost_high": 0.0243,
                "flops_cut": 0.327,
                "continued_quality_lost": 0.0071,
                "quality_lost_to_continued": 0.0125,
                "quality_lost_to_continued_low": 0.0081,
                "quality_lost_to_continued_high": 0.0171,
            },
        },
        "checkpointing_layers": 4,
        "checkpointing": [
            {
                "policy": policy,
                "activation_bytes": int(91e6 * (1 - saved)),
                "peak_bytes": int(120e6 * (1 - saved)),
                "memory_saved": saved,
                "recomputed_flops_share": again,
                "gradients_equal": True,
            }
            for policy, saved, again in (
                ("none", 0.0, 0.0),
                ("every_4", 0.19, 0.07),
                ("every_2", 0.41, 0.15),
                ("every_1", 0.83, 0.31),
                ("selective", 0.52, 0.04),
            )
        ],
    }


def curve_rows(steps, start, end, seed):
    noise = random.Random(seed)
    yield "step,loss,validation_bits_per_byte"
    for step in range(1, steps + 1):
        bits = end + (start - end) * math.exp(-4.5 * step / steps)
        shown = f"{bits:.4f}" if step % (steps // 8) == 0 else ""
        yield f"{step},{bits * 1.6 + noise.gauss(0, 0.05):.4f},{shown}"


def write_fixture(root: Path):
    """A checkout after a run of about the default scale's shape."""
    write_json(root / "artifacts/evaluation.json", evaluation())
    write_json(root / "artifacts/samples.json", SAMPLES)
    distilled = {"validation_bits_per_byte": 1.77, "temperature": 1.0, "tokens": 307_200}
    write_json(root / "metrics/distill.json", distilled)
    write_json(root / "metrics/sparsify.json", {})
    write_json(root / "metrics/challenge.json", CHALLENGE)
    noise = random.Random(3)
    raw = [[1 + noise.gauss(0, 0.13) for _ in range(16)] for _ in range(4)]
    loads = [[value / sum(layer) for value in layer] for layer in raw]
    write_json(
        root / "metrics/pretrain.json",
        {
            "validation_bits_per_byte": 1.70,
            "tokens": 819_200,
            "expert_load": loads,
            "max_violation": [max(layer) * 16 - 1 for layer in loads],
        },
    )
    fits = {
        "pretrain": (("teacher", 400, 5.2, 1.70),),
        "distill": (
            ("student", 300, 4.8, 1.77),
            ("control", 300, 5.2, 1.88),
            ("warm_control", 300, 4.9, 1.80),
            ("cold_student", 300, 5.1, 1.85),
        ),
        "sparsify": (
            ("sparse_teacher", 80, 2.2, 1.72),
            ("continued_teacher", 80, 1.70, 1.69),
            ("sparse_student", 80, 2.4, 1.80),
            ("continued_student", 80, 1.77, 1.75),
        ),
        "challenge": (
            ("scratch_student", 900, 5.2, 1.79),
            ("scratch_sparse_teacher", 600, 5.2, 1.74),
            ("scratch_sparse_student", 1200, 5.2, 1.83),
        ),
    }
    for stage, curves in fits.items():
        (root / "plots" / stage).mkdir(parents=True)
        for index, (name, *fit) in enumerate(curves):
            (root / f"plots/{stage}/{name}.csv").write_text("\n".join(curve_rows(*fit, seed=index)) + "\n")
    split = {
        "documents": 1203,
        "bytes": 10_482_113,
        "tokens": 3_004_118,
        "bytes_per_token": 3.489,
        "shards": [{"file": "train-00000.bin", "tokens": 3_004_118, "sha256": "ab" * 32}],
    }
    shards.write_card(
        root / "artifacts/data",
        {
            "vocab_size": 4096,
            "end_of_text": 0,
            "tokenizer": "bpe",
            "tokenizer_sha256": "cd" * 32,
            "dtype": "uint16",
            "splits": {"train": split, "val": split, "test": split},
            "duplicates_dropped": 17,
            "corpus": {"source": "stdlib", "name": "the standard library of Python 3.11.2"},
        },
    )
    for stage in ("prepare", "pretrain", "distill", "sparsify", "challenge", "evaluate", "profile", "plan"):
        threads, ranks = stage in ("evaluate", "profile"), stage in ("pretrain", "distill", "sparsify", "challenge")
        own = {"threads": 2} if threads else {"ranks": 2} if ranks else {}
        write_json(root / f"provenance/{stage}.json", {"conditions": {"torch": "2.13.0+cpu", **own}})
    write_json(root / "measurements/profile.json", timings())
    for path, content in planned().items():
        write_json(root / path, content)


@functools.cache
def planned() -> dict[str, dict]:
    """What the stage `plan` writes after such a run."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shutil.copytree(ROOT / "conf/plan", root / "conf/plan")
        write_json(root / "artifacts/evaluation.json", evaluation())
        write_json(root / "measurements/profile.json", timings())
        write_json(root / "metrics/pretrain.json", {"tokens": 819_200})
        write_json(root / "metrics/distill.json", {"tokens": 307_200})
        plan.main(validate(compose(["scale=tiny"])), place_in(root), SilentRun())
        return {path: read_json(root / path) for path in ("artifacts/plan.json", "measurements/plan.json")}


def timings():
    def timed(name, seconds):
        return {name: seconds, f"{name}_quartile_low": seconds * 0.95, f"{name}_quartile_high": seconds * 1.1}

    return {
        "latency": {
            name: timed("prefill_seconds", 0.031 * speed)
            | timed("decode_seconds_per_token", 0.0021 * speed)
            | {"weight_bytes": 47_000_000, "prefill_peak_bytes": 61_000_000}
            for name, speed in (
                ("teacher", 1.0),
                ("student", 0.55),
                ("sparse_teacher", 0.7),
                ("sparse_student", 0.41),
                ("control", 0.55),
            )
        },
        "training": {
            name: timed("step_seconds", 0.12 * speed)
            for name, speed in (
                ("teacher", 1.0),
                ("student", 0.6),
                ("sparse_teacher", 0.7),
                ("sparse_student", 0.45),
            )
        },
        "workload": {"prefill_tokens": 256, "training_tokens": 1024},
        "checkpointing": {
            row["policy"]: slowed(1 + row["recomputed_flops_share"] / 2.5) for row in evaluation()["checkpointing"]
        },
        "router": router(3.12, 3.05, 3.2),
        "machine": {"threads": 2, "torch": "2.13.0", "device": "cpu"},
    }


def slowed(ratio, repetitions=21):
    bounds = {"step_seconds_ratio_low": ratio - 0.02, "step_seconds_ratio_high": ratio + 0.02}
    return {"step_seconds_ratio": ratio, "repetitions": repetitions} | bounds


def router(ratio, low, high, repetitions=21):
    return {
        "repetitions": repetitions,
        "ratio": ratio,
        "ratio_low": low,
        "ratio_high": high,
        "plain_microseconds": 2810.0,
        "ours_microseconds": 900.0,
        "tokens": 4096,
        "experts": 64,
        "experts_per_token": 6,
        "width": 256,
    }


@pytest.fixture
def checkout(tmp_path):
    write_fixture(tmp_path)
    report.main(SimpleNamespace(seed=1), place_in(tmp_path), SilentRun())
    return tmp_path


@pytest.fixture
def measured(tmp_path):
    write_fixture(tmp_path)
    return tmp_path


def page_of(root):
    report.main(SimpleNamespace(seed=1), place_in(root), SilentRun())
    return (root / "report/index.html").read_text(encoding="utf-8")


def test_the_reports_numbers_are_those_of_the_metrics_files(checkout):
    evaluated = read_json(checkout / "artifacts/evaluation.json")
    stated = {claim["name"]: claim for claim in read_json(checkout / "report/claims.json")["claims"]}
    page = (checkout / "report/index.html").read_text(encoding="utf-8")
    student = evaluated["comparisons"]["student"]
    for name in DISTILLATION:
        for key in ("quality_kept", "quality_kept_low", "quality_kept_high"):
            assert stated[name]["values"][key] == student[key]
            assert wording.percent(student[key]) in page
    for name in ("teacher", "student"):
        sparse, values = evaluated["comparisons"][f"sparse_{name}"], stated[f"sparsity_{name}"]["values"]
        assert values["flops_cut"] == sparse["flops_cut"]
        lost = sparse["quality_lost_to_continued" if name == "teacher" else "quality_lost"]
        assert values["quality_lost"] == lost
        assert wording.signed(lost) in page and wording.percent(sparse["flops_cut"]) in page
    for claim in stated.values():
        if "control" in claim["values"]:
            model = "student" if claim["name"] in DISTILLATION else claim["name"].replace("sparsity", "sparse")
            figures = evaluated["controls"][model][claim["values"]["control"]]
            assert claim["values"]["ahead_of_control"] == figures["difference"]
            assert claim["values"]["ahead_of_control_low"] == pytest.approx(figures["difference_low"])
            assert claim["values"]["documents"] == evaluated["test"]["documents"]
    for model in evaluated["models"].values():
        assert f"{model['bits_per_byte']:.4f}" in page and wording.number(model["parameters"]) in page
        assert f"{model['bits_per_byte_low']:.4f} to {model['bits_per_byte_high']:.4f}" in page
        for key in ("agreement_with_teacher", "calibration_error"):
            low, high = (wording.percent(model[f"{key}_{end}"]) for end in ("low", "high"))
            assert wording.percent(model[key]) in page and f"{low} to {high}" in page
    for flops in CHALLENGE["whole_training_flops"].values():
        assert wording.number(flops) in page
    for row in evaluated["checkpointing"]:
        assert wording.policy_words(row["policy"]) in page and wording.signed(-row["memory_saved"]) in page


def test_the_page_says_where_its_numbers_were_made(checkout):
    page = page_of(checkout)
    assert "<td>torch</td><td>2.13.0+cpu</td>" in page
    assert "<td>ranks</td><td>2 (pretrain, distill, sparsify, challenge)</td>" in page


def test_what_a_model_wrote_cannot_become_markup(checkout):
    page = (checkout / "report/index.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; self._self" in page


def test_the_page_loads_nothing_from_anywhere(checkout):
    page = (checkout / "report/index.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    page = re.sub(r'<a (rel="noreferrer" )?href="(#row-[\w.-]+|https://[^"]+)">', "", page)  # followed by a click only
    assert not re.search(r"https?:|\bsrc=|\bhref=|url\(|@import|<link|<iframe|<img", page)


def test_every_number_of_the_planner_links_to_its_row_with_date_and_source(checkout):
    page = (checkout / "report/index.html").read_text(encoding="utf-8")
    links, rows = set(re.findall(r'href="#(row-[^"]+)"', page)), re.findall(r'<tr id="(row-[^"]+)"', page)
    assert {"row-S1-512", "row-coreweave-h100-2026-03", "row-aws-h100-2026-03", "row-power-h100"} <= links <= set(rows)
    assert len(rows) == len(set(rows))
    ledger = read_json(checkout / "artifacts/plan.json")["ledger"]
    for row in ledger["rents"]:
        assert row["source"] and f'<tr id="row-{row["id"]}">' in page


def test_the_planners_answers_on_the_page_are_those_of_its_file(checkout):
    page = html.unescape((checkout / "report/index.html").read_text(encoding="utf-8"))
    planned = read_json(checkout / "artifacts/plan.json")
    assert planned["sentence"] in page
    for answer in planned["answers"]:
        assert f"${wording.number(answer['dollars'][0])}" in page
    for cell in planned["circulated"]["cells"]:
        assert cell["why"] in page
    for change in (each["change"] for each in planned["leaving"]):
        assert wording.signed(change[0]) in page


def test_a_heat_map_tells_both_sides_apart(checkout):
    drawn = charts.heat_map("t", ["a", "b"], ["r"], [[-0.5, 0.25]], "x", "y", wording.signed)
    assert drawn.count("<rect") == 2 and "var(--series-0)" in drawn and "var(--series-1)" in drawn
    assert "−50.0%" in drawn and "+25.0%" in drawn


def test_a_missing_file_is_refused_by_name(measured):
    made = "measurements/profile.json", "artifacts/evaluation.json", "plots/sparsify/sparse_student.csv"
    for path in ("metrics/distill.json", *made):
        content = (measured / path).read_bytes()
        (measured / path).unlink()
        with pytest.raises(Refusal, match=f"{path} is missing: run the stage"):
            page_of(measured)
        (measured / path).write_bytes(content)


def metrics_of(evaluated, tokens=819_200, **distilled):
    distilled = {"temperature": 2.0, "init": "teacher"} | distilled
    return {"evaluate": evaluated, "distill": distilled, "challenge": CHALLENGE, "pretrain": {"tokens": tokens}}


@pytest.mark.parametrize(
    ("equal", "control"), [("same tokens", "warm_control"), ("same operations", "scratch_student")]
)
def test_distillation_is_held_against_the_strongest_control_of_each_kind(equal, control):
    claim = claims.distillation_claim(metrics_of(evaluation()), equal, None)
    assert (claim.values["control"], claim.verdict) == (control, "beaten")
    assert f"better than {wording.words(control)}" in claim.measured


@pytest.mark.parametrize(
    ("value", "verdict", "word"),
    [(-0.02, "control not beaten", "worse"), (0.005, "control not beaten", "better"), (0.02, "beaten", "better")],
)
def test_a_control_that_is_not_beaten_beyond_its_interval_is_a_miss_in_its_row_alone(value, verdict, word):
    evaluated = evaluation()
    evaluated["controls"]["student"]["scratch_student"] = ahead(value)
    there, trained = (
        claims.distillation_claim(metrics_of(evaluated), equal, None) for equal in ("same tokens", "same operations")
    )
    assert there.verdict == "beaten" and trained.verdict == verdict
    assert f"bits per byte {word} than scratch student" in trained.measured
    assert ("better beyond the interval" in trained.why) == (value < -0.01)


def test_one_control_of_the_same_tokens_that_is_stronger_is_enough_for_a_miss():
    for name in ("control", "warm_control", "cold_student"):
        evaluated = evaluation()
        evaluated["controls"]["student"][name] = ahead(-0.03)
        claim = claims.distillation_claim(metrics_of(evaluated), "same tokens", None)
        assert (claim.values["control"], claim.verdict) == (name, "control not beaten")


def test_a_student_with_a_random_start_is_not_held_against_itself():
    evaluated = evaluation()
    evaluated["controls"]["student"]["cold_student"] = ahead(0.0, 0.0)
    claim = claims.distillation_claim(metrics_of(evaluated, init="random"), "same tokens", None)
    assert (claim.values["control"], claim.verdict) == ("warm_control", "beaten")
    shown = {control.name for control in controls.controls_of("student", metrics_of(evaluated, init="random"))}
    assert shown == {"control", "warm_control", "scratch_student"}


def test_the_loss_of_pruning_is_held_against_the_better_of_the_dense_model_and_the_same_trained_on():
    evaluated = evaluation()
    teacher, student = (claims.sparsity_claim(metrics_of(evaluated), name, None) for name in ("teacher", "student"))
    compared = evaluated["comparisons"]
    assert teacher.values["quality_lost"] == compared["sparse_teacher"]["quality_lost_to_continued"]
    assert "and the loss is against that one" in teacher.why
    assert student.values["quality_lost"] == compared["sparse_student"]["quality_lost"]


@pytest.mark.parametrize("value", [-0.02, 0.005])
def test_a_pruned_model_that_training_from_nothing_equals_has_not_beaten_its_control(value):
    evaluated = evaluation()
    evaluated["controls"]["sparse_teacher"]["scratch_sparse_teacher"] = ahead(value)
    claim = claims.sparsity_claim(metrics_of(evaluated), "teacher", None)
    assert claim.verdict == "control not beaten" and "scratch sparse teacher" in claim.measured
    assert claims.sparsity_claim(metrics_of(evaluated), "student", None).verdict == "beaten"


def test_the_page_tells_at_once_what_was_beaten_by_which_control_and_what_was_not(measured):
    evaluated = evaluation()
    evaluated["controls"]["student"]["scratch_student"] = ahead(-0.02)
    write_json(measured / "artifacts/evaluation.json", evaluated)
    page = page_of(measured)
    top = page[page.index("<header>") : page.index("</header>")]
    stated = read_json(measured / "report/claims.json")["claims"]
    assert top.count('class="card tile"') == len(stated) == 6
    assert "less than the same shape trained without a teacher for the cost of both; 5 of 6 claims are beaten" in top
    missed = top[top.index("teacher to be trained") :].split("card tile")[0]
    assert '<span class="verdict fails">✕ control not beaten</span>' in missed
    assert "0.02 bits per byte worse than scratch student" in missed
    table = page[page.index('<table class="controls">') :].split("</table>")[0]
    assert table.count("<tr>") == 1 + sum(map(len, evaluated["controls"].values()))
    assert table.count("stronger</span>") == 3 and table.count("beaten</span>") == 5


@pytest.mark.parametrize(
    ("cut", "low", "high", "verdict"),
    [
        (0.35, 0.01, 0.02, "beaten"),
        (0.35, 0.04, 0.07, "holds"),
        (0.35, 0.09, 0.11, "fails"),
        (0.35, 0.07, 0.09, "not testable here"),
        (0.2, 0.01, 0.02, "not testable here"),
        (0.6, 0.09, 0.11, "not testable here"),
    ],
)
def test_the_sparsity_verdict_follows_the_interval_not_the_point(cut, low, high, verdict):
    evaluated = evaluation()
    evaluated["comparisons"]["sparse_teacher"] |= {
        "flops_cut": cut,
        "quality_lost": (low + high) / 2,
        "quality_lost_low": low,
        "quality_lost_high": high,
        "continued_quality_lost": 0.01,
    }
    assert claims.sparsity_claim(metrics_of(evaluated), "teacher", None).verdict == verdict


def test_the_best_checkpointing_policy_is_the_one_that_saves_most_within_the_time():
    policies = evaluation()["checkpointing"]

    def claimed(ratio_of_all, ratio_of_others):
        ratios = {row["policy"]: ratio_of_all if row["policy"] == "every_1" else ratio_of_others for row in policies}
        return claims.checkpointing_claim(policies, {name: slowed(ratio) for name, ratio in ratios.items()}, 4)

    assert claimed(1.2, 1.1).values["policy"] == "every_1" and claimed(1.2, 1.1).verdict == "beaten"
    assert claimed(1.4, 1.1).values["policy"] == "selective"
    assert claimed(1.24, 1.4).verdict == "not testable here"  # the interval reaches beyond 25%
    assert claimed(1.26, 1.4).verdict == "not testable here"  # and begins below it
    assert claimed(1.24, 1.2).values["policy"] == "selective", "surely within beats perhaps within"
    assert claimed(1.4, 1.4).verdict == "fails"


def test_a_policy_surely_in_time_that_saves_too_little_does_not_hide_one_perhaps_in_time_that_saves_enough():
    policies = [row for row in evaluation()["checkpointing"] if row["policy"] in ("none", "every_4", "every_2")]
    claim = claims.checkpointing_claim(policies, {"every_4": slowed(1.1), "every_2": slowed(1.24)}, 4)
    assert (claim.values["policy"], claim.verdict) == ("every_2", "not testable here")
    claim = claims.checkpointing_claim(policies, {"every_4": slowed(1.1), "every_2": slowed(1.4)}, 4)
    assert (claim.values["policy"], claim.verdict) == ("every_4", "fails")


def test_a_policy_with_other_gradients_is_never_recommended():
    policies = [row | {"gradients_equal": row["policy"] == "none"} for row in evaluation()["checkpointing"]]
    assert claims.checkpointing_claim(policies, {}, 4).verdict == "fails"


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(3.0, 3.3, "beaten"), (2.8, 3.1, "not testable here"), (1.4, 1.6, "fails")]
)
def test_routers_are_compared_by_ratio(low, high, verdict):
    assert claims.router_claim(router((low + high) / 2, low, high)).verdict == verdict


def test_a_temperature_other_than_the_claims_is_stated():
    def why(temperature):
        metrics = metrics_of(evaluation(), temperature=temperature)
        return claims.distillation_claim(metrics, "same tokens", None).why

    assert "T = 1, not T = 2" in why(1.0) and "T = 2" not in why(2.0)


def claims_of(evaluated, measured, tokens=819_200):
    return {claim.name: claim for claim in claims.make_claims(metrics_of(evaluated, tokens), measured)}


DISTILLATION = ("distillation_teacher_there", "distillation_teacher_trained")
QUALITY = (*DISTILLATION, "sparsity_teacher", "sparsity_student")
TIMED = ("checkpointing", "router")


@pytest.mark.parametrize("documents", [1, 3, claims.MIN_DOCUMENTS - 1, claims.MIN_DOCUMENTS, 500])
def test_a_verdict_on_quality_needs_a_minimum_of_documents(documents):
    evaluated = evaluation(documents)
    if documents == 1:  # no resample differs from another: no interval
        for compared in evaluated["comparisons"].values():
            compared |= {name: None for name in compared if name.endswith(("_low", "_high"))}
        for figures in (figures for of_model in evaluated["controls"].values() for figures in of_model.values()):
            figures |= {"difference_low": None, "difference_high": None, "standard_error": None}
    for name in QUALITY:
        claim = claims_of(evaluated, timings())[name]
        assert f"{wording.count(documents, 'document')}" in claim.interval
        assert claim.values["documents"] == documents
        if documents < claims.MIN_DOCUMENTS:
            assert claim.verdict == "too few documents"
            assert f"{documents} document" in claim.why and f"a verdict needs {claims.MIN_DOCUMENTS}" in claim.why
        else:
            assert claim.verdict == "beaten"


@pytest.mark.parametrize("repetitions", [3, claims.MIN_REPETITIONS - 1, claims.MIN_REPETITIONS])
def test_a_verdict_on_time_needs_a_minimum_of_repetitions(repetitions):
    measured = timings()
    measured["router"]["repetitions"] = repetitions
    measured["checkpointing"]["every_2"]["repetitions"] = repetitions  # the least of all policies compared
    for name in TIMED:
        claim = claims_of(evaluation(), measured)[name]
        assert f"{repetitions} repetitions" in claim.interval and claim.values["repetitions"] == repetitions
        if repetitions < claims.MIN_REPETITIONS:
            assert claim.verdict == "too few repetitions"
            assert f"{repetitions} repetitions; a verdict needs {claims.MIN_REPETITIONS}" in claim.why
        else:
            assert claim.verdict == "beaten"


def test_models_trained_as_little_as_at_scale_tiny_are_too_small_to_claim_anything(tiny_settings):
    recipe = tiny_settings.pretrain
    tokens = recipe.steps * recipe.batch_sequences * tiny_settings.sequence_tokens
    found = claims_of(evaluation(), timings(), tokens)
    for name in QUALITY:
        assert found[name].verdict == "too small to claim anything"
        assert f"{tokens:,} tokens; a verdict needs {claims.MIN_TRAINING_TOKENS:,}" in found[name].why
    measured = {policy: slowed(1.1, tiny_settings.profile.repetitions) for policy in timings()["checkpointing"]}
    assert claims.checkpointing_claim(evaluation()["checkpointing"], measured, 4).verdict == "too few repetitions"


def test_of_a_teacher_from_a_folder_nothing_is_claimed_that_needs_what_it_cost(tmp_path):
    write_fixture(tmp_path)
    of_folder = {"source": "folder", "tokens": 0, "expert_load": [], "max_violation": []}
    write_json(tmp_path / "metrics/pretrain.json", of_folder | {"validation_bits_per_byte": 1.7})
    own = FLOPS | {"teacher": 0}
    whole = {name: own[name] for name in FLOPS}
    write_json(
        tmp_path / "metrics/challenge.json",
        {"training_flops": own, "whole_training_flops": whole, "teacher_cost_known": False},
    )
    (tmp_path / "plots/pretrain/teacher.csv").write_text("step,loss,validation_bits_per_byte\n0,,1.7\n")
    page = page_of(tmp_path)
    found = {claim["name"]: claim for claim in read_json(tmp_path / "report/claims.json")["claims"]}
    assert found["distillation_teacher_there"]["verdict"] == "beaten", "the student was trained on enough tokens"
    for name in ("distillation_teacher_trained", "sparsity_teacher", "sparsity_student"):
        assert found[name]["verdict"] == "not testable here" and "took to train is not known" in found[name]["why"]
    assert found["sparsity_teacher"]["claim"].endswith("(teacher from a folder)")
    assert "without what the teacher took elsewhere" in found["sparsity_teacher"]["why"]
    assert "<td class=n>0 here</td>" in page and "and unknown</td>" in page and "Expert load" not in page
    assert "what its training took before is unknown" in page and "in neither" in page
    assert "for what is known of the cost" in page and "for the whole cost" not in page
    assert "A verdict needs a student trained on" in page and "The unpruned teacher with the same extra" in page
    evaluated = evaluation()
    evaluated["controls"]["student"]["scratch_student"] = ahead(-0.02)
    write_json(tmp_path / "artifacts/evaluation.json", evaluated)
    assert "the same shape trained without a teacher for what the student alone cost" in page_of(tmp_path)
    write_json(tmp_path / "artifacts/evaluation.json", evaluation())
    distilled = read_json(tmp_path / "metrics/distill.json") | {"tokens": 99_999}
    write_json(tmp_path / "metrics/distill.json", distilled)
    page_of(tmp_path)
    there = read_json(tmp_path / "report/claims.json")["claims"][0]
    assert there["why"].startswith("The student was trained on 99,999 tokens; a verdict needs 100,000.")


def test_the_page_and_the_table_show_how_much_is_behind_each_interval_and_leave_the_question_open(tmp_path):
    write_fixture(tmp_path)
    write_json(tmp_path / "artifacts/evaluation.json", evaluation(documents=3))
    page = page_of(tmp_path)
    table = (tmp_path / "report/claims.md").read_text(encoding="utf-8")
    for name, text in (("page", page), ("table", table)):
        assert text.count("3 documents; a verdict needs 20") == 4, name
        assert text.count("21 repetitions") >= 2, name
    assert page.count('<span class="verdict open">? too few documents</span>') == 2 * 4, "on top and in the table"
    assert "<h1>Too few documents: a student with" in page
    assert "interval over 3 test documents" in page and "(95% interval, 3 documents)" in page
    stated = {claim["name"]: claim for claim in read_json(tmp_path / "report/claims.json")["claims"]}
    assert all(stated[name]["values"]["documents"] == 3 for name in QUALITY)


def test_claims_markdown_is_one_row_per_claim(checkout):
    lines = (checkout / "report/claims.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 + 6
    assert all(line.count(" | ") == 3 for line in lines)


def test_every_chart_has_a_title_of_its_own_and_stays_inside_its_frame(checkout):
    page = (checkout / "report/index.html").read_text(encoding="utf-8")
    names = re.findall(r'<title id="([^"]+)"', page)
    assert len(names) == len(set(names)) == page.count("<desc ")
    for svg in re.findall(r"<svg.*?</svg>", page, re.S):
        width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', svg).groups())
        for x, y in re.findall(r'cx="([^"]+)" cy="([^"]+)"', svg):
            assert 0 <= float(x) <= width and 0 <= float(y) <= height


def test_twelve_models_of_four_costs_have_marks_and_labels_of_their_own(checkout):
    page = (checkout / "report/index.html").read_text(encoding="utf-8")
    (drawn,) = [svg for svg in re.findall(r"<svg.*?</svg>", page, re.S) if "Quality against compute" in svg]
    marks = re.findall(r'<circle cx="([^"]+)" cy="([^"]+)"', drawn)
    assert len(set(marks)) == len(evaluation()["models"]) == 12
    labels = re.findall(r'class="name halo" x="([^"]+)" y="([^"]+)">([^<]+)<', drawn)
    boxes = [(float(x), float(y) - 12, float(x) + 7.1 * len(text), float(y) + 4) for x, y, text in labels]
    assert len(boxes) == 12 and all(0 < box[0] and box[2] < charts.SCATTER[0] for box in boxes)
    overlaps = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if drawing._overlap(a, b)]
    assert not overlaps


def test_ticks_are_round_and_cover_the_range():
    assert drawing.ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert drawing.log_ticks(3, 300) == [5, 10, 20, 50, 100, 200]


def test_numbers_read_as_people_write_them():
    assert [wording.number(value) for value in (12_345_678, 999_999, 1.5, 0.031, 0, None, float("nan"))] == [
        "12.3M",
        "1M",
        "1.5",
        "0.031",
        "0",
        "–",
        "–",
    ]


def test_charts_survive_empty_single_and_unbounded_data():
    nothing = float("nan")
    for drawn in (
        charts.scatter("a", [], "x", "y"),
        charts.curves("b", [], "x", "y"),
        charts.bars("c", [], "y"),
    ):
        assert "no data" in drawn
    alone = drawing.Point("alone", 3.0, 0.0)
    assert "nan" not in charts.scatter("a", [alone, drawing.Point("bad", 1.0, nothing)], "x", "y")
    assert "nan" not in charts.curves("b", [drawing.Line("flat", [(1, 2.0), (1, nothing)])], "x", "y")
    assert "nan" not in charts.bars("c", [("zero", 0.0)], "y")
    assert "nan" not in charts.curves("d", [drawing.Line("one", [(3, 2.0), (0, 1.0), (1, -1.0)])], "x", "y", log=True)


def test_figures_that_dvc_did_not_record_are_refused_by_name(tmp_path):
    (tmp_path / "metrics").mkdir()
    metrics = tmp_path / "metrics/evaluate.json"
    metrics.write_text('{"bits_per_byte": 1.25}\n')
    out = {"path": "metrics/evaluate.json", "md5": hashlib.md5(metrics.read_bytes()).hexdigest()}
    (tmp_path / "dvc.lock").write_text(json.dumps({"stages": {"evaluate": {"outs": [out]}}}))
    report.refuse_altered(tmp_path)
    metrics.write_text('{"bits_per_byte": 1.15}\n')
    with pytest.raises(Refusal, match="metrics/evaluate.json is not the file that dvc.lock records"):
        report.refuse_altered(tmp_path)
    (tmp_path / "dvc.lock").write_text("stages: {evaluate")
    with pytest.raises(Refusal, match="dvc.lock is damaged"):
        report.refuse_altered(tmp_path)


@pytest.mark.parametrize(
    ("saved", "ratio", "said"),
    [
        (0.65, 1.10, "+15.0% time: reached, “all but last” gives −65.0% for +10.0%."),
        (0.65, 1.19, "+15.0% time: missed, “all but last” gives −65.0% for +19.0%."),
        (0.55, 1.05, "+15.0% time: missed, no policy saves so much."),
    ],
)
def test_a_missed_target_of_activation_memory_is_printed_as_a_miss(saved, ratio, said):
    row = {"policy": "all_but_last", "memory_saved": saved, "gradients_equal": True}
    wrong = {"policy": "every_1", "memory_saved": 0.9, "gradients_equal": False}
    time = dict.fromkeys(("step_seconds_ratio", "step_seconds_ratio_low", "step_seconds_ratio_high"), ratio)
    measured = {"all_but_last": time, "every_1": dict.fromkeys(time, 1.0)}
    assert figures.memory_target({"checkpointing": [row, wrong]}, measured).endswith(said)


@pytest.mark.parametrize(
    ("cut", "time", "lost", "verdict"),
    [
        (0.32, 0.7, 0.005, "reached"),
        (0.32, 0.8, 0.005, "missed"),
        (0.32, 0.7, 0.02, "missed"),
        (0.2, 0.7, 0.0, "missed"),
    ],
)
def test_a_pruned_model_reaches_its_target_only_in_operations_time_and_quality_together(cut, time, lost, verdict):
    def latency(factor):
        parts = {"attention": 0.01 * factor, "head": 0.002}
        both = {"prefill_seconds": 0.03 * factor, "decode_seconds_per_token": 0.002}
        return both | {"prefill_seconds_by_part": parts}

    evaluated = {"comparisons": {"sparse_teacher": {"flops_cut": cut, "quality_lost": lost}}}
    table = figures.speed_table(evaluated, {"latency": {"teacher": latency(1), "sparse_teacher": latency(time)}})
    prefill, decode = table.rows
    assert prefill[0] == "teacher, prefill" and prefill[4] == verdict and decode[4] == "missed"
    assert f"attention 10 → {10 * time:g}, head 2 → 2" in prefill[5] and decode[5] == "–"

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
from stages.reporting import charts, claims, drawing, wording
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
            },
            "sparse_student": {
                "quality_lost": 0.0197,
                "quality_lost_low": 0.0152,
                "quality_lost_high": 0.0243,
                "flops_cut": 0.327,
                "continued_quality_lost": -0.0071,
            },
        },
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
        "distill": (("student", 300, 4.8, 1.77), ("control", 300, 5.2, 1.88)),
        "sparsify": (
            ("sparse_teacher", 80, 2.2, 1.72),
            ("continued_teacher", 80, 1.70, 1.69),
            ("sparse_student", 80, 2.4, 1.80),
            ("continued_student", 80, 1.77, 1.75),
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
    for stage in ("prepare", "pretrain", "distill", "sparsify", "evaluate", "profile", "plan"):
        threads, ranks = stage in ("evaluate", "profile"), stage in ("pretrain", "distill", "sparsify")
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
            row["policy"]: slowed(1 + row["recomputed_flops_share"] / 2.5)
            for row in evaluation()["checkpointing"]
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
    for key in (
        "quality_kept",
        "quality_kept_low",
        "quality_kept_high",
        "control_quality_kept",
        "gap_closed",
    ):
        assert stated["distillation"]["values"][key] == student[key]
        assert wording.percent(student[key]) in page
    for name in ("teacher", "student"):
        sparse, values = evaluated["comparisons"][f"sparse_{name}"], stated[f"sparsity_{name}"]["values"]
        assert values.pop("documents") == evaluated["test"]["documents"]
        assert all(values[key] == sparse[key] for key in values)
        assert wording.signed(sparse["quality_lost"]) in page and wording.percent(sparse["flops_cut"]) in page
    for model in evaluated["models"].values():
        assert f"{model['bits_per_byte']:.4f}" in page and wording.number(model["parameters"]) in page
        assert f"{model['bits_per_byte_low']:.4f} to {model['bits_per_byte_high']:.4f}" in page
    for row in evaluated["checkpointing"]:
        assert wording.policy_words(row["policy"]) in page and wording.signed(-row["memory_saved"]) in page


def test_the_page_says_where_its_numbers_were_made(checkout):
    page = page_of(checkout)
    assert "<td>torch</td><td class=n>2.13.0+cpu</td>" in page
    assert "<td>ranks</td><td class=n>2 (pretrain, distill, sparsify)</td>" in page


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


def test_a_gap_inside_its_noise_is_not_stated_and_the_reason_is(measured):
    evaluated = evaluation()
    reason = "control - teacher is not more than two standard errors"
    for key in ("gap_closed", "gap_closed_low", "gap_closed_high"):
        evaluated["comparisons"]["student"][key] = None
    evaluated["comparisons"]["student"]["gap_closed_reason"] = reason
    write_json(measured / "artifacts/evaluation.json", evaluated)
    assert reason in page_of(measured)
    assert (
        claims.distillation_claim(evaluated, {}, None).verdict == "holds"
    )  # kept, but no proof that the teacher helped


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
    }
    assert claims.sparsity_claim(evaluated, "teacher", None).verdict == verdict


def test_the_best_checkpointing_policy_is_the_one_that_saves_most_within_the_time():
    policies = evaluation()["checkpointing"]

    def claimed(ratio_of_all, ratio_of_others):
        ratios = {
            row["policy"]: ratio_of_all if row["policy"] == "every_1" else ratio_of_others for row in policies
        }
        return claims.checkpointing_claim(policies, {name: slowed(ratio) for name, ratio in ratios.items()})

    assert claimed(1.2, 1.1).values["policy"] == "every_1" and claimed(1.2, 1.1).verdict == "beaten"
    assert claimed(1.4, 1.1).values["policy"] == "selective"
    assert claimed(1.24, 1.4).verdict == "not testable here"  # the interval reaches beyond 25%
    assert claimed(1.26, 1.4).verdict == "not testable here"  # and begins below it
    assert claimed(1.24, 1.2).values["policy"] == "selective", "surely within beats perhaps within"
    assert claimed(1.4, 1.4).verdict == "fails"


def test_a_policy_surely_in_time_that_saves_too_little_does_not_hide_one_perhaps_in_time_that_saves_enough():
    policies = [row for row in evaluation()["checkpointing"] if row["policy"] in ("none", "every_4", "every_2")]
    claim = claims.checkpointing_claim(policies, {"every_4": slowed(1.1), "every_2": slowed(1.24)})
    assert (claim.values["policy"], claim.verdict) == ("every_2", "not testable here")
    claim = claims.checkpointing_claim(policies, {"every_4": slowed(1.1), "every_2": slowed(1.4)})
    assert (claim.values["policy"], claim.verdict) == ("every_4", "fails")


def test_a_policy_with_other_gradients_is_never_recommended():
    policies = [row | {"gradients_equal": row["policy"] == "none"} for row in evaluation()["checkpointing"]]
    assert claims.checkpointing_claim(policies, {}).verdict == "fails"


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(3.0, 3.3, "beaten"), (2.8, 3.1, "not testable here"), (1.4, 1.6, "fails")]
)
def test_routers_are_compared_by_ratio(low, high, verdict):
    assert claims.router_claim(router((low + high) / 2, low, high)).verdict == verdict


def test_a_temperature_other_than_the_claims_is_stated():
    assert "T = 1, not T = 2" in claims.distillation_claim(evaluation(), {"temperature": 1.0}, None).why
    assert "T = 2" not in claims.distillation_claim(evaluation(), {"temperature": 2.0}, None).why


def claims_of(evaluated, measured, tokens=819_200):
    metrics = {"evaluate": evaluated, "distill": {"temperature": 2.0}, "pretrain": {"tokens": tokens}}
    return {claim.name: claim for claim in claims.make_claims(metrics, measured)}


QUALITY = ("distillation", "sparsity_teacher", "sparsity_student")
TIMED = ("checkpointing", "router")


@pytest.mark.parametrize("documents", [1, 3, claims.MIN_DOCUMENTS - 1, claims.MIN_DOCUMENTS, 500])
def test_a_verdict_on_quality_needs_a_minimum_of_documents(documents):
    evaluated = evaluation(documents)
    if documents == 1:  # no resample differs from another: no interval
        for compared in evaluated["comparisons"].values():
            compared |= {name: None for name in compared if name.endswith(("_low", "_high"))}
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
    assert claims.checkpointing_claim(evaluation()["checkpointing"], measured).verdict == "too few repetitions"


def test_the_page_and_the_table_show_how_much_is_behind_each_interval_and_leave_the_question_open(tmp_path):
    write_fixture(tmp_path)
    write_json(tmp_path / "artifacts/evaluation.json", evaluation(documents=3))
    page = page_of(tmp_path)
    table = (tmp_path / "report/claims.md").read_text(encoding="utf-8")
    for name, text in (("page", page), ("table", table)):
        assert text.count("3 documents; a verdict needs 20") == 3, name
        assert text.count("21 repetitions") >= 2, name
    assert page.count('<span class="verdict open">? too few documents</span>') == 3
    assert "<h1>Too few documents: a student with" in page
    assert "interval over 3 test documents" in page and "(95% interval, 3 documents)" in page
    stated = {claim["name"]: claim for claim in read_json(tmp_path / "report/claims.json")["claims"]}
    assert all(stated[name]["values"]["documents"] == 3 for name in QUALITY)


def test_claims_markdown_is_one_row_per_claim(checkout):
    lines = (checkout / "report/claims.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 + 5
    assert all(line.count(" | ") == 3 for line in lines)


def test_every_chart_has_a_title_of_its_own_and_stays_inside_its_frame(checkout):
    page = (checkout / "report/index.html").read_text(encoding="utf-8")
    names = re.findall(r'<title id="([^"]+)"', page)
    assert len(names) == len(set(names)) == page.count("<desc ")
    for svg in re.findall(r"<svg.*?</svg>", page, re.S):
        width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', svg).groups())
        for x, y in re.findall(r'cx="([^"]+)" cy="([^"]+)"', svg):
            assert 0 <= float(x) <= width and 0 <= float(y) <= height


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

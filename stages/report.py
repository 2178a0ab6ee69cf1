"""Writes the report: circulated claims beside what this machine measured, pictures first, readable offline.

    dvc repro report
    python -m stages.report            # by hand, into outputs/

The same metrics and the same timings (measurements/profile.json) give the same page, table and claims.
"""

import csv
import hashlib
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from stages import charts
from stages.artifacts import Refusal, read_json, write_atomically, write_json
from stages.charts import Line, Point, number
from stages.provenance import RECORDS, record_path
from stages.runs import run_stage

SECTIONS = ("seed",)

STAGES = ("pretrain", "distill", "sparsify", "evaluate")
MODELS = {  # the reading order, and the colour, of the models
    "teacher": 0,
    "sparse_teacher": 0,
    "continued_teacher": 5,
    "student": 1,
    "sparse_student": 1,
    "continued_student": 6,
    "control": 2,
}
SPLITS = ("train", "val", "test")
NOT_MEASURED = "not measured in this checkout"
ELSEWHERE = "by the clock: see report/claims.md"  # what claims.json says, which is blind to the clock
NOT_TESTABLE = "not testable here"
NO_INTERVAL = "Too few test documents for an interval."
CHECKPOINTING_SAVES, CHECKPOINTING_COSTS = 0.3, 0.25  # of the activations' memory, and of a step's time
ROUTER_RATIO = 3.2 / 1.1  # milliseconds before and after; only their ratio travels between machines


class Interval(NamedTuple):
    """A figure and the ends of its 95% interval, each a float or None where it could not be had."""

    value: Any
    low: Any = None
    high: Any = None


class Claim(NamedTuple):
    """A row of the table; `values` are the raw figures behind the words, for claims.json and the tests."""

    name: str
    claim: str
    measured: str
    interval: str
    verdict: str  # beaten | holds | fails | not testable here
    why: str
    values: dict


def main(settings, place, run) -> None:
    refuse_altered(place.root)
    metrics = {stage: read_json(place.read(f"metrics/{stage}.json")) for stage in STAGES}
    curves = {stage: read_curves(place.read(f"plots/{stage}.csv")) for stage in STAGES[:-1]}
    card = read_json(place.read("artifacts/data") / "card.json")
    texts = read_json(place.read("artifacts/samples.json"))
    clock = read_json(place.read("measurements/profile.json"))
    records = {stage: read_json(place.read(record_path(stage))) for stage in ("prepare", *STAGES, "profile")}
    made = {stage: record["conditions"] for stage, record in records.items()}

    claims = make_claims(metrics, clock)
    write_json(place.write("report/claims.json"), {"claims": [claim._asdict() for claim in claims]})
    write_atomically(place.write("report/claims.md"), claims_as_markdown(claims))
    page = place.write("report/index.html")
    write_atomically(page, make_page(claims, metrics, curves, texts, card, clock, made, settings.seed))
    write_json(place.write(RECORDS), records)
    run.artifact(page)
    print(f"report: {page}")


def refuse_altered(root: Path) -> None:
    """What stands on the page is what DVC recorded: JSON and CSV carry no checksum of their own."""
    if not (root / "dvc.lock").exists():
        return
    try:
        stages = yaml.safe_load((root / "dvc.lock").read_text(encoding="utf-8"))["stages"]
        recorded = {out["path"]: out["md5"] for name in STAGES if name in stages for out in stages[name]["outs"]}
    except (yaml.YAMLError, ValueError, LookupError, TypeError):
        raise Refusal(f"{root / 'dvc.lock'} is damaged: restore it (git checkout dvc.lock), then dvc repro") from None
    for path, md5 in recorded.items():
        if path.endswith((".json", ".csv")) and (root / path).is_file():
            if hashlib.md5((root / path).read_bytes(), usedforsecurity=False).hexdigest() != md5:
                raise Refusal(f"{root / path} is not the file that dvc.lock records: run dvc repro")


def read_curves(path: Path) -> dict[str, list[dict]]:
    """The rows of a curve file by model; an empty field is None."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [
                {"model": row.pop("model")}
                | {key: float(text) if text else None for key, text in row.items()}
                for row in csv.DictReader(file)
            ]
    except FileNotFoundError:
        raise Refusal(f"{path} is missing: run the stage that writes it (dvc repro)") from None
    models = dict.fromkeys(row["model"] for row in rows)
    return {model: [row for row in rows if row["model"] == model] for model in models}


# --- the claims ---------------------------------------------------------------------------------------


def make_claims(metrics: dict, measurements: dict, absent: str = NOT_MEASURED) -> list[Claim]:
    """Each circulated claim beside what was measured; without measurements, what can be counted."""
    evaluated = metrics["evaluate"]
    return [
        distillation_claim(evaluated, metrics["distill"]),
        sparsity_claim(evaluated, "teacher"),
        sparsity_claim(evaluated, "student"),
        checkpointing_claim(evaluated["checkpointing"], measurements.get("checkpointing", {}), absent),
        router_claim(measurements.get("router"), absent),
    ]


def distillation_claim(evaluated: dict, distilled: dict) -> Claim:
    """The ratio of losses flatters: the control's figure and the share of the gap closed stand beside it."""
    models, compared = evaluated["models"], evaluated["comparisons"]["student"]
    share = models["student"]["parameters"] / models["teacher"]["parameters"]
    kept, gap = _interval(compared, "quality_kept"), _interval(compared, "gap_closed")
    control, temperature = compared["control_quality_kept"], distilled.get("temperature")
    verdict, why = distillation_verdict(share, kept, gap, control)
    if temperature is None:
        why += " The temperature used is not recorded."
    elif temperature != 2:
        why += f" Trained at T = {temperature:g}, not T = 2."
    if distilled.get("copied_from_teacher"):
        why += " The student also starts from the teacher's weights, the control at random."
    if gap is None:
        closed = f"gap closed not stated: {compared['gap_closed_reason']}"
    else:
        closed = f"{percent(gap.value)} of the gap closed"
    values = {"parameter_share": share, "control_quality_kept": control, "temperature": temperature}
    return Claim(
        name="distillation",
        claim="A student of half the size, distilled at T = 2, keeps 90% of the teacher's quality",
        measured=f"keeps {percent(kept.value)} with {percent(share)} of the parameters; {closed}",
        interval=f"kept {_between(kept, percent)}" + (f"; gap {_between(gap, percent)}" if gap else ""),
        verdict=verdict,
        why=why,
        values=values | _figures("quality_kept", kept) | _figures("gap_closed", gap or Interval(None)),
    )


def distillation_verdict(
    share: float, kept: Interval, gap: Interval | None, control: float
) -> tuple[str, str]:
    helped = gap is not None and gap.low is not None and gap.low > 0
    if kept.low is None:
        return NOT_TESTABLE, NO_INTERVAL
    if share > 0.5:
        return NOT_TESTABLE, f"The student has {percent(share)} of the teacher's parameters, not half."
    if kept.high < 0.9:
        return "fails", f"Below 90% beyond its interval; the control keeps {percent(control)}."
    if kept.low < 0.9:
        return NOT_TESTABLE, "The interval straddles 90%: more test documents would settle it."
    why = f"But 90% alone says little: the control, trained without the teacher, keeps {percent(control)}."
    if gap is not None and not helped:
        why += " The student is not better than it beyond the interval."
    return ("beaten" if helped else "holds"), why


def sparsity_claim(evaluated: dict, model: str) -> Claim:
    compared = evaluated["comparisons"][f"sparse_{model}"]
    cut, lost = compared["flops_cut"], _interval(compared, "quality_lost")
    continued = compared["continued_quality_lost"]
    verdict, why = sparsity_verdict(cut, lost)
    kind = "mixture-of-experts teacher" if model == "teacher" else "dense student"
    return Claim(
        name=f"sparsity_{model}",
        claim=f"Structured sparsity cuts 30–40% of compute for 5–8% of quality ({kind})",
        measured=f"{signed(-cut)} forward FLOPs per token for {signed(lost.value)} bits per byte",
        interval=_between(lost, signed),
        verdict=verdict,
        why=f"{why} The dense {model} with the same extra tokens: {signed(continued)} bits per byte.",
        values={"flops_cut": cut, "continued_quality_lost": continued} | _figures("quality_lost", lost),
    )


def sparsity_verdict(cut: float, lost: Interval) -> tuple[str, str]:
    if lost.low is None:
        return NOT_TESTABLE, NO_INTERVAL
    if cut < 0.3:
        return NOT_TESTABLE, f"Only {percent(cut)} is cut at these keep ratios, short of the claim's 30%."
    if lost.high <= 0.08:
        verdict = "beaten" if lost.high < 0.05 else "holds"
        return verdict, "Structures left the tensors, nothing is merely zeroed; recovered by distillation."
    if lost.low <= 0.08:
        return NOT_TESTABLE, "The interval straddles 8%: more test documents would settle it."
    if cut > 0.4:
        return NOT_TESTABLE, "More than 8% is lost, but more than the claim's 40% was cut."
    return "fails", "More than 8% is lost, beyond the interval."


def checkpointing_claim(policies: list[dict], measured: dict, absent: str = NOT_MEASURED) -> Claim:
    """The policy that saves most within 25% more time: by the clock where measured, else by counted FLOPs."""
    claim = "Checkpointing every 4th layer saves 30% of activation memory for 25% more time"
    tried = [row for row in policies if row["policy"] != "none" and row["gradients_equal"]]
    if not tried:
        return Claim(
            "checkpointing", claim, "no policy kept the gradients", "–", "fails", "All were wrong.", {}
        )
    clocked = all(row["policy"] in measured for row in tried)
    slower = {row["policy"]: more_time(row, measured if clocked else {}) for row in tried}
    best = best_policy(tried, slower)
    saved, time = best["memory_saved"], slower[best["policy"]]
    why = "The best of the policies tried; its gradients equal those of plain training."
    if saved < CHECKPOINTING_SAVES or lower_end(time) > CHECKPOINTING_COSTS:
        verdict = "fails"
    elif upper_end(time) <= CHECKPOINTING_COSTS:
        better = saved > CHECKPOINTING_SAVES and upper_end(time) < CHECKPOINTING_COSTS
        verdict = "beaten" if better else "holds"
    else:
        verdict, why = NOT_TESTABLE, why + " Its interval straddles 25% more time: more repetitions would settle it."
    literal = next((row for row in policies if row["policy"] == "every_4"), None)
    why += " One block in four can save at most a quarter of what blocks keep"
    why += f"; here it saves {percent(literal['memory_saved'])}." if literal else "."
    if not clocked:
        why += f" Step time: {absent}."
    return Claim(
        name="checkpointing",
        claim=claim,
        measured=f"“{policy_words(best['policy'])}”: {signed(-saved)} memory for {signed(time.value)} "
        + ("time" if clocked else "FLOPs of a step"),
        interval="memory: counted" + ("" if time.low is None else f"; time {_between(time, signed)}"),
        verdict=verdict,
        why=why,
        values={key: best[key] for key in ("policy", "memory_saved", "recomputed_flops_share")},
    )


def best_policy(policies: list[dict], slower: dict[str, Interval]) -> dict:
    """That which saves most: of those surely within the claim's time that save enough, else of those perhaps within."""

    def within(end: Callable) -> list[dict]:
        return [row for row in policies if end(slower[row["policy"]]) <= CHECKPOINTING_COSTS]

    enough = [row for row in within(upper_end) if row["memory_saved"] >= CHECKPOINTING_SAVES]
    return max(
        enough or within(lower_end) or policies, key=lambda row: (row["memory_saved"], -slower[row["policy"]].value)
    )


def lower_end(interval: Interval) -> float:
    return interval.value if interval.low is None else interval.low


def upper_end(interval: Interval) -> float:
    return interval.value if interval.high is None else interval.high


def more_time(row: dict, measured: dict) -> Interval:
    """How much longer a policy's step takes than one that stores all."""
    if row["policy"] not in measured:
        return Interval(row["recomputed_flops_share"] / 3)  # forward and backward are three forward passes
    ratio = _interval(measured[row["policy"]], "step_seconds_ratio")
    return Interval(*(None if end is None else end - 1 for end in ratio))


def router_claim(measured: dict | None, absent: str = NOT_MEASURED) -> Claim:
    claim = "An optimised router takes 1.1 ms in place of 3.2 ms (2.9×)"
    if not measured:
        why = "It hangs on the clock alone; dvc repro -f -s evaluate measures it."
        return Claim("router", claim, absent, "–", NOT_TESTABLE, why, {})
    ratio = _interval(measured, "ratio")
    low, high = (ratio.value if end is None else end for end in (ratio.low, ratio.high))
    verdict, why = NOT_TESTABLE, f"The interval straddles {number(ROUTER_RATIO)}×: more repetitions would settle it."
    if high < ROUTER_RATIO:
        verdict, why = "fails", "Short of it, beyond the interval."
    elif low > ROUTER_RATIO:
        verdict, why = "beaten", "Above it, beyond the interval."
    plain, ours = (number(measured[f"{which}_microseconds"] / 1e3) for which in ("plain", "ours"))
    return Claim(
        name="router",
        claim=claim,
        measured=f"{number(ratio.value)}×: {plain} ms to {ours} ms, from softmax, top-k and one-hot dispatch",
        interval=_between(ratio, lambda times: f"{number(times)}×"),
        verdict=verdict,
        why=f"{why} {measured['tokens']:,} tokens, {measured['experts_per_token']} of {measured['experts']} "
        f"experts, width {measured['width']}. Only the ratio travels between machines.",
        values=_figures("ratio", ratio),
    )


def claims_as_markdown(claims: list[Claim]) -> str:
    lines = ["| claim in circulation | measured here | 95% interval | verdict |", "| --- | --- | --- | --- |"]
    for claim in claims:
        cells = (claim.claim, claim.measured, claim.interval, f"**{claim.verdict}**. {claim.why}")
        lines.append(
            "| " + " | ".join(cell.strip().replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
        )
    return "\n".join(lines) + "\n"


# --- numbers in words ---------------------------------------------------------------------------------


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def signed(share: float) -> str:
    text = f"{100 * share:+.1f}%".replace("-", "−")
    return "0.0%" if text[1:] == "0.0%" else text


def _interval(figures: dict, name: str):
    """The figure with its bounds where it has them; None where the figure itself is missing."""
    value = figures.get(name)
    return None if value is None else Interval(value, figures.get(f"{name}_low"), figures.get(f"{name}_high"))


def _figures(name: str, interval: Interval) -> dict:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _between(interval: Interval, form) -> str:
    return "–" if interval.low is None else f"{form(interval.low)} to {form(interval.high)}"


# --- the page -----------------------------------------------------------------------------------------

STYLE = """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1120px;margin:0 auto;padding:44px 22px 70px}
.eyebrow{color:var(--series-0);font-weight:700;letter-spacing:.08em;text-transform:uppercase;font-size:12px}
h1{font-size:clamp(26px,3.6vw,40px);line-height:1.16;letter-spacing:-.02em;margin:8px 0 12px;max-width:24em}
h2{font-size:21px;letter-spacing:-.01em;margin:52px 0 4px} h3{font-size:14px;margin:0 0 8px}
p{max-width:86ch} .muted,figcaption,.lead{color:var(--muted)} .lead{margin:0 0 14px}
figcaption{font-size:13px;margin-top:8px}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:18px 20px;margin:0}
.grid{display:grid;gap:16px;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr))}
.tiles{display:grid;gap:14px;grid-template-columns:repeat(auto-fit,minmax(215px,1fr));margin:26px 0 0}
.tile b{display:block;font-size:31px;line-height:1.1;letter-spacing:-.02em;font-weight:680}
.tile span{display:block;color:var(--muted);font-size:13px;margin-top:6px}
.scroll{overflow-x:auto} table{border-collapse:collapse;width:100%;font-size:14px}
th{text-align:left;font-weight:600;color:var(--muted);font-size:12.5px;white-space:nowrap}
th,td{padding:10px 14px 10px 0;border-bottom:1px solid var(--line);vertical-align:top}
tr:last-child td{border-bottom:0} td.n,th.n{
text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.claims td{min-width:130px} .claims td:first-child{width:25%;font-weight:600} .claims td:last-child{width:33%}
.claims .iv{white-space:nowrap;font-variant-numeric:tabular-nums}
svg.strip{width:150px!important;margin-top:6px}
.verdict{display:inline-block;border-radius:99px;padding:1px 11px;font-weight:650;font-size:12.5px;color:#fff;
margin-bottom:5px;white-space:nowrap}
.beaten{background:#0b7a5f}.holds{background:#0868ac}.fails{background:#b3341f}.untestable{background:#66717d}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;
font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,monospace}
pre.sample{max-height:300px;overflow:auto} code{font:13px ui-monospace,SFMono-Regular,Menlo,monospace}
@media (max-width:720px){.wide{min-width:620px}
.claims tr:first-child{display:none}
.claims tr,.claims td{display:block;width:auto!important;border:0;padding:3px 0}
.claims tr+tr+tr{border-top:1px solid var(--line);margin-top:14px;padding-top:14px}}
@media print{.card{break-inside:avoid} pre.sample{max-height:none}}
"""
MARKS = {"beaten": "▲", "holds": "✓", "fails": "✕", NOT_TESTABLE: "?"}
# The page may load nothing, not even by accident.
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def make_page(claims, metrics, curves, texts, card, clock, made, seed) -> str:
    """The whole page; what is clock-dependent shows its absence in words."""
    evaluated = metrics["evaluate"]
    body = [
        hero(claims, evaluated, seed),
        section(
            "Claims, and what this machine measured",
            "A claim as it circulates, beside the same quantity here. "
            "Grey band: the claim; blue: measured, with its 95% interval "
            "(paired bootstrap over documents, or over repetitions where timed).",
            claims_table(claims),
        ),
        section(
            "Quality against compute",
            "Lower is better, further left is cheaper. Dotted lines join a dense model to its pruned self.",
            quality_figure(evaluated) + models_table(evaluated),
        ),
        section(
            "Training",
            "Loss as each model minimises it (a distillation loss is not comparable with a "
            "cross-entropy), and bits per byte on the validation split.",
            training_figures(curves),
        ),
        section(
            "Expert load",
            "The share of routed tokens that each expert of the teacher receives; the dashed "
            "line is perfect balance.",
            expert_figures(metrics["pretrain"]),
        ),
        section(
            "Activation memory against time",
            "One training step of the teacher under each checkpointing policy, "
            "against storing every activation.",
            checkpointing_figure(evaluated, clock),
        ),
        section(
            "Latency",
            "By this machine's clock, and so kept out of every reproducible file.",
            latency_table(clock),
        ),
        section("Samples", "The opening of a test document, continued by each model.", samples(texts)),
        section("Corpus", "", corpus_table(card)),
        section(
            "Where these numbers were made",
            "What the bytes of every file depend on beside settings, code and seed. Under the same conditions they "
            "are the same; under others they may differ, and python -m stages.compare says by how much.",
            conditions_table(made),
        ),
        section("Reproduce", "", reproduce(card, seed)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{PAGE_POLICY}">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>Offramp report</title>\n<style>{charts.STYLE}{STYLE}</style></head>\n"
        f"<body><main>\n{''.join(body)}\n</main></body></html>\n"
    )


def section(title: str, lead: str, content: str) -> str:
    told = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return f"<section><h2>{escape(title)}</h2>{told}{content}</section>\n"


def hero(claims: list[Claim], evaluated: dict, seed: int) -> str:
    figures = {claim.name: claim.values for claim in claims}
    distilled, sparse, memory = (
        figures[name] for name in ("distillation", "sparsity_teacher", "checkpointing")
    )
    models, gap = evaluated["models"], distilled["gap_closed"]
    line = f"A student with {percent(distilled['parameter_share'])} of the teacher’s parameters "
    line += f"keeps {percent(distilled['quality_kept'])} of its quality"
    line += "." if gap is None else f" and closes {percent(gap)} of the gap to it."
    cheaper = 1 - models["student"]["flops_per_token"] / models["teacher"]["flops_per_token"]
    lost = signed(sparse["quality_lost"])
    tiles = [
        ("–" if gap is None else percent(gap), "of the gap from control to teacher closed by distillation"),
        (signed(-cheaper), "forward FLOPs per token, student against teacher"),
        (signed(-sparse["flops_cut"]), f"compute of the pruned teacher, for {lost} bits per byte"),
    ]
    if memory:
        policy = policy_words(memory["policy"])
        tiles.append((signed(-memory["memory_saved"]), f"activation memory, checkpointing “{policy}”"))
    drawn = "".join(
        f'<div class="card tile"><b>{escape(value)}</b><span>{escape(told)}</span></div>'
        for value, told in tiles
    )
    return (
        f'<header><div class="eyebrow">Offramp report</div><h1>{escape(line)}</h1>'
        f'<p class="muted">One run, seed {seed}. Every figure below is read from <code>metrics/</code>, '
        "<code>plots/</code> and, where it hangs on the clock, <code>measurements/</code>.</p>"
        f'<div class="tiles">{drawn}</div></header>'
    )


def claims_table(claims: list[Claim]) -> str:
    rows = []
    for claim in claims:
        style = "untestable" if claim.verdict == NOT_TESTABLE else claim.verdict
        badge = f'<span class="verdict {style}">{MARKS[claim.verdict]} {claim.verdict}</span>'
        rows.append(
            f"<tr><td>{escape(claim.claim)}</td><td>{escape(claim.measured)}</td>"
            f'<td class="iv">{escape(claim.interval).replace("; ", "<br>")}{_strip(claim)}</td>'
            f"<td>{badge}<br>{escape(claim.why)}</td></tr>"
        )
    head = "<tr><th>Claim in circulation</th><th>Measured here</th><th>95% interval</th><th>Verdict</th></tr>"
    return f'<div class="card scroll"><table class="claims">{head}{"".join(rows)}</table></div>'


def _strip(claim: Claim) -> str:
    """The claim and the measurement on one little axis."""
    shown = {  # the figure, the claim's range, the ends of the axis
        "distillation": ("quality_kept", 0.9, 0.9, 0.8, 1.0),
        "sparsity_teacher": ("quality_lost", 0.05, 0.08, -0.02, 0.12),
        "sparsity_student": ("quality_lost", 0.05, 0.08, -0.02, 0.12),
        "checkpointing": ("memory_saved", CHECKPOINTING_SAVES, CHECKPOINTING_SAVES, 0.0, 1.0),
        "router": ("ratio", ROUTER_RATIO, ROUTER_RATIO, 0.0, 6.0),
    }
    name, *axis = shown[claim.name]
    if name not in claim.values:
        return ""
    low, high = (claim.values.get(f"{name}_{end}") for end in ("low", "high"))
    return "<br>" + charts.interval_bar(low, claim.values[name], high, tuple(axis), claim.measured)


def quality_figure(evaluated: dict) -> str:
    points = [
        Point(
            words(name),
            model["flops_per_token"],
            model["bits_per_byte"],
            model["bits_per_byte_low"],
            model["bits_per_byte_high"],
            MODELS.get(name, 7),
            note=f"{number(model['parameters'])} parameters",
        )
        for name, model in in_order(evaluated["models"])
    ]
    drawn = charts.scatter(
        "Quality against compute",
        points,
        "forward FLOPs per token",
        "bits per byte on test (95% interval)",
        y_format=lambda value: number(value, 4),
        links=[("teacher", "sparse teacher"), ("student", "sparse student")],
    )
    return figure(drawn, wide=True)


def models_table(evaluated: dict) -> str:
    rows = []
    for name, model in in_order(evaluated["models"]):
        bits, accuracy = _interval(model, "bits_per_byte"), _interval(model, "top1_accuracy")
        rows.append(
            [
                words(name),
                number(model["parameters"]),
                number(model["active_parameters"]),
                number(model["flops_per_token"]),
                number(model["counted_flops_per_token"]),
                f"{bits.value:.4f}",
                _between(bits, lambda value: f"{value:.4f}"),
                percent(accuracy.value),
                _between(accuracy, percent),
                percent(model["agreement_with_teacher"]) if "agreement_with_teacher" in model else "–",
            ]
        )
    head = [
        "model",
        "parameters",
        "active",
        "FLOPs/token",
        "counted",
        "bits/byte",
        "95%",
        "top-1",
        "95%",
        "agrees",
    ]
    return "<br>" + table(
        head,
        rows,
        "FLOPs per token forward, by the formula and as counted; "
        "agrees: share of tokens on which its first choice is the teacher's.",
    )


def training_figures(curves: dict) -> str:
    drawn = []
    for title, stages in (
        ("teacher, student, control", ("pretrain", "distill")),
        ("recoveries and their controls", ("sparsify",)),
    ):
        for key, label in (
            ("loss", "training loss"),
            ("validation_bits_per_byte", "validation bits per byte"),
        ):
            lines = [
                Line(
                    words(model),
                    [(row["step"], row[key]) for row in rows if row[key] is not None],
                    MODELS.get(model, 7),
                    dashed=model.startswith("continued") or model == "control",
                )
                for stage in stages
                for model, rows in curves[stage].items()
            ]
            drawn.append(
                figure(charts.curves(f"{label}: {title}", lines, "step", label), heading=f"{label}: {title}")
            )
    return f'<div class="grid">{"".join(drawn)}</div>'


def expert_figures(pretrained: dict) -> str:
    loads, violations = pretrained["expert_load"], pretrained["max_violation"]
    highest = max(max(layer) for layer in loads) * 1.12  # one scale for all layers
    drawn = []
    for index, (layer, violation) in enumerate(zip(loads, violations, strict=True), 1):
        chart = charts.bars(
            f"Expert load of MoE layer {index}",
            list(enumerate(layer)),
            "share of tokens",
            1 / len(layer),
            "balanced",
            percent,
            x_label="expert",
            highest=highest,
        )
        drawn.append(
            figure(chart, f"Busiest expert: {signed(violation)} over its fair share.", f"MoE layer {index}")
        )
    return f'<div class="grid">{"".join(drawn)}</div>'


def checkpointing_figure(evaluated: dict, clock: dict) -> str:
    """Time by the clock where every policy was measured, else the FLOPs of a step."""
    policies, measured = evaluated["checkpointing"], clock.get("checkpointing", {})
    clocked = all(row["policy"] in measured for row in policies)
    points, rows = [Point("the claim", 0.7, 1.25, series=2, hollow=True)], []
    for row in policies:
        name, slower = policy_words(row["policy"]), more_time(row, measured if clocked else {})
        low, high = (None if end is None or row["policy"] == "none" else 1 + end for end in slower[1:])
        kept = f"{number(row['activation_bytes'])}B"
        points.append(Point(name, 1 - row["memory_saved"], 1 + slower.value, low, high, series=3, note=kept))
        time = signed(slower.value) if clocked else NOT_MEASURED
        equal = "yes" if row["gradients_equal"] else "no"
        recomputed = percent(row["recomputed_flops_share"])
        rows.append(
            [
                name,
                kept,
                signed(-row["memory_saved"]),
                f"{number(row['peak_bytes'])}B",
                recomputed,
                time,
                equal,
            ]
        )
    chart = charts.scatter(
        "Activation memory against time",
        points,
        "activation memory kept for backward, share of storing all",
        "step time, × storing all" if clocked else "FLOPs of a step, × storing all",
        x_format=lambda value: f"{100 * value:.0f}%",
    )
    note = "" if clocked else f"Step time: {NOT_MEASURED}; counted FLOPs stand in its place."
    head = ["policy", "kept", "memory", "peak", "forward FLOPs again", "step time", "gradients equal"]
    return figure(chart, note, wide=True) + "<br>" + table(head, rows)


def latency_table(clock: dict) -> str:
    if "latency" not in clock:
        return f'<div class="card muted">Latency: {NOT_MEASURED}.</div>'
    rows = []
    for name, figures in in_order(clock["latency"]):
        cells = [words(name)]
        for key in ("prefill_seconds", "decode_seconds_per_token"):
            ends = (figures[f"{key}_quartile_{end}"] for end in ("low", "high"))
            low, high = (number(1e3 * seconds) for seconds in ends)
            cells += [number(1e3 * figures[key]), f"{low} to {high}"]
        cells += [f"{number(figures[key])}B" for key in ("weight_bytes", "prefill_peak_bytes")]
        rows.append(cells)
    head = [
        "model",
        "prefill, ms",
        "quartiles",
        "decode, ms per token",
        "quartiles",
        "weights",
        "prefill peak",
    ]
    machine = clock["machine"]
    note = f"One sequence on {machine['device']}, {machine['threads']} threads, torch {machine['torch']}."
    return table(head, rows, note)


def samples(texts: dict) -> str:
    cards = [
        f'<div class="card"><h3>{escape(words(name))}</h3><pre class="sample">{escape(text)}</pre></div>'
        for name, text in in_order(texts)
    ]
    return f'<div class="grid">{"".join(cards)}</div>'


def corpus_table(card: dict) -> str:
    rows = [
        [
            split,
            *(f"{figures[key]:,}" for key in ("documents", "bytes", "tokens")),
            f"{figures['bytes_per_token']:.3f}",
        ]
        for split, figures in in_order(card["splits"], SPLITS)
    ]
    note = (
        f"Corpus: {card['corpus']['name']}; {card['duplicates_dropped']:,} exact duplicates dropped; "
        f"no document stands in two splits. Tokenizer: {card['tokenizer']}, {card['vocab_size']:,} tokens, "
        f"sha256 {card['tokenizer_sha256'][:16]}…"
    )
    return table(["split", "documents", "bytes", "tokens", "bytes per token"], rows, note)


def conditions_table(made: dict[str, dict]) -> str:
    """Each condition once where all stages share it, else with the stages of each value."""
    rows = []
    for name in dict.fromkeys(name for conditions in made.values() for name in conditions):
        stages_of: dict[str, list[str]] = {}
        for stage, conditions in made.items():
            if name in conditions:
                stages_of.setdefault(str(conditions[name]), []).append(stage)
        everywhere = [*made] in stages_of.values()
        told = [value if everywhere else f"{value} ({', '.join(stages)})" for value, stages in stages_of.items()]
        rows.append([words(name), "; ".join(told)])
    return table(["condition", "value"], rows)


def reproduce(card: dict, seed: int) -> str:
    commands = (
        "make repro             # environment, dependencies and the whole pipeline, on a fresh machine\n"
        "dvc repro              # only what changed\n"
        "dvc metrics show       # the figures of this page\n"
        "make ui                # every run, in MLflow"
    )
    files = "".join(
        f"{shard['sha256']}  artifacts/data/{shard['file']}\n"
        for split in card["splits"].values()
        for shard in split["shards"]
    )
    return (
        f'<div class="card"><pre>{escape(commands)}</pre><p class="muted">Seed {seed}. The same commit, '
        f"machine and params.yaml give the same metrics. They rest on:</p><pre>{escape(files)}</pre></div>"
    )


def table(head: list[str], rows: list[list[str]], note: str = "") -> str:
    """A card with a table; the first column is words, the others numbers."""

    def cells(tag, row):
        return "".join(
            f"<{tag}{' class=n' if index else ''}>{escape(str(cell))}</{tag}>"
            for index, cell in enumerate(row)
        )

    drawn = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    told = f"<figcaption>{escape(note)}</figcaption>" if note else ""
    return f'<div class="card scroll"><table><tr>{cells("th", head)}</tr>{drawn}</table>{told}</div>'


def figure(chart: str, caption: str = "", heading: str = "", wide: bool = False) -> str:
    """A chart on a card; a wide one scrolls on a small screen rather than shrink beyond reading."""
    above = f"<h3>{escape(heading)}</h3>" if heading else ""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    drawn = f'<div class="scroll"><div class="wide">{chart}</div></div>' if wide else chart
    return f'<figure class="card">{above}{drawn}{below}</figure>'


def in_order(by_name: dict, order: Iterable[str] = MODELS) -> list[tuple]:
    """The items in reading order; one that the page does not know comes last."""
    known = [name for name in order if name in by_name]
    return [(name, by_name[name]) for name in known + sorted(set(by_name) - set(known))]


def words(name: str) -> str:
    return name.replace("_", " ")


def policy_words(policy: str) -> str:
    """every_2 recomputes each second block."""
    every = policy.removeprefix("every_")
    if every == policy:
        return words(policy)
    return "every block" if every == "1" else f"one block in {every}"


if __name__ == "__main__":
    run_stage(main, "report", SECTIONS)

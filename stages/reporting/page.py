"""The report's page: one HTML file that loads nothing, readable offline, pictures first."""

from html import escape

from stages.reporting import charts, figures
from stages.reporting.claims import (
    CHECKPOINTING_SAVES,
    MIN_DOCUMENTS,
    MIN_REPETITIONS,
    ROUTER_RATIO,
    TOO_FEW_DOCUMENTS,
    TOO_SMALL,
    Claim,
)
from stages.reporting.wording import percent, policy_words, signed

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
.beaten{background:#0b7a5f}.holds{background:#0868ac}.fails{background:#b3341f}.open{background:#66717d}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;
font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,monospace}
pre.sample{max-height:300px;overflow:auto} code{font:13px ui-monospace,SFMono-Regular,Menlo,monospace}
@media (max-width:720px){.wide{min-width:620px}
.claims tr:first-child{display:none}
.claims tr,.claims td{display:block;width:auto!important;border:0;padding:3px 0}
.claims tr+tr+tr{border-top:1px solid var(--line);margin-top:14px;padding-top:14px}}
@media print{.card{break-inside:avoid} pre.sample{max-height:none}}
"""
MARKS = {"beaten": "▲", "holds": "✓", "fails": "✕"}  # the other verdicts leave the question open
# The page may load nothing, not even by accident.
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def make_page(claims, metrics, curves, texts, card, timings, made, seed) -> str:
    """The whole page; where there are no timings it says so."""
    evaluated = metrics["evaluate"]
    body = [
        hero(claims, evaluated, seed),
        section(
            "Claims, and what this machine measured",
            "A claim as it circulates, beside the same quantity here. "
            "Grey band: the claim; blue: measured, with its 95% interval "
            "(paired bootstrap over test documents, or over repetitions where timed). "
            f"A verdict needs {MIN_DOCUMENTS} documents or {MIN_REPETITIONS} repetitions.",
            claims_table(claims),
        ),
        section(
            "Quality against compute",
            "Lower is better, further left is cheaper. Dotted lines join a dense model to its pruned self.",
            figures.quality_figure(evaluated) + figures.models_table(evaluated),
        ),
        section(
            "Training",
            "Loss as each model minimises it (a distillation loss is not comparable with a "
            "cross-entropy), and bits per byte on the validation split.",
            figures.training_figures(curves),
        ),
        section(
            "Expert load",
            "The share of routed tokens that each expert of the teacher receives; the dashed "
            "line is perfect balance.",
            figures.expert_figures(metrics["pretrain"]),
        ),
        section(
            "Activation memory against time",
            "One training step of the teacher under each checkpointing policy, "
            "against storing every activation.",
            figures.checkpointing_figure(evaluated, timings),
        ),
        section(
            "Latency",
            "Timings of this machine, which differ from run to run.",
            figures.latency_table(timings),
        ),
        section("Samples", "The opening of a test document, continued by each model.", figures.samples(texts)),
        section("Corpus", "", figures.corpus_table(card)),
        section(
            "Where these numbers were made",
            "What the bytes of every file depend on beside settings, code and seed. Under the same conditions they "
            "are the same; under others they may differ, and python -m stages.run.compare says by how much.",
            figures.conditions_table(made),
        ),
        section("Reproduce", "", figures.reproduce(card, seed)),
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
    opening = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return f"<section><h2>{escape(title)}</h2>{opening}{content}</section>\n"


def hero(claims: list[Claim], evaluated: dict, seed: int) -> str:
    by_name = {claim.name: claim for claim in claims}
    verdict, distilled = by_name["distillation"].verdict, by_name["distillation"].values
    sparse, memory = by_name["sparsity_teacher"].values, by_name["checkpointing"].values
    models, gap = evaluated["models"], distilled["gap_closed"]
    line = f"{verdict.capitalize()}: a" if verdict in (TOO_SMALL, TOO_FEW_DOCUMENTS) else "A"
    line += f" student with {percent(distilled['parameter_share'])} of the teacher’s parameters "
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
        f'<div class="card tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>'
        for value, label in tiles
    )
    return (
        f'<header><div class="eyebrow">Offramp report</div><h1>{escape(line)}</h1>'
        f'<p class="muted">One run, seed {seed}. Every figure below is read from <code>metrics/</code>, '
        "<code>artifacts/evaluation.json</code>, <code>plots/</code> and, for timings, <code>measurements/</code>.</p>"
        f'<div class="tiles">{drawn}</div></header>'
    )


def claims_table(claims: list[Claim]) -> str:
    rows = []
    for claim in claims:
        style = claim.verdict if claim.verdict in MARKS else "open"
        badge = f'<span class="verdict {style}">{MARKS.get(claim.verdict, "?")} {claim.verdict}</span>'
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

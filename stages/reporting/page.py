"""The report's page: one HTML file that loads nothing and can be read offline. Its text is templates/page.html."""

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from stages.reporting import charts, figures, leaving
from stages.reporting.claims import (
    CHECKPOINTING_SAVES,
    MIN_DOCUMENTS,
    MIN_REPETITIONS,
    ROUTER_RATIO,
    TOO_FEW_DOCUMENTS,
    TOO_SMALL,
    Claim,
)
from stages.reporting.wording import percent, policy_words, signed, words

MARKS = {"beaten": "▲", "holds": "✓", "fails": "✕"}  # the other verdicts leave the question open


def make_page(
    claims: list[Claim],
    metrics: dict,
    curves: dict,
    texts: dict[str, str],
    card: dict,
    timings: dict,
    plan: dict,
    money: dict,
    conditions: dict[str, dict],
    seed: int,
) -> str:
    """The page as HTML; `conditions` are those of each stage's record."""
    evaluated = metrics["evaluate"]
    line, tiles = headline(claims, evaluated)
    templates = Environment(
        loader=PackageLoader("stages.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return templates.get_template("page.html").render(
        seed=seed,
        headline=line,
        tiles=tiles,
        claims=claims,
        strips={claim.name: strip(claim) for claim in claims},
        marks=MARKS,
        min_documents=MIN_DOCUMENTS,
        min_repetitions=MIN_REPETITIONS,
        quality=figures.quality_figure(evaluated),
        models=figures.models_table(evaluated),
        training=figures.training_figures(curves),
        experts=figures.expert_figures(metrics["pretrain"]),
        checkpointing=figures.checkpointing_figure(evaluated, timings),
        policies=figures.checkpointing_table(evaluated, timings),
        latency=figures.latency_table(timings),
        plan=plan,
        leaving=leaving,
        money=money,
        samples=[(words(name), text) for name, text in figures.in_order(texts)],
        corpus=figures.corpus_table(card),
        conditions=figures.conditions_table(conditions),
        shards=[shard for split in card["splits"].values() for shard in split["shards"]],
        chart_style=Markup(charts.STYLE),
    )


def headline(claims: list[Claim], evaluated: dict) -> tuple[str, list[tuple[str, str]]]:
    """The sentence on top, and the tiles below it: a figure and what it is."""
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
    return line, tiles


def strip(claim: Claim) -> str:
    """The claim and the measurement on one small axis, as SVG; empty where nothing was measured."""
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
    return charts.interval_bar(low, claim.values[name], high, tuple(axis), claim.measured)

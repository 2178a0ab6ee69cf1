"""The report's page: one HTML file that loads nothing and can be read offline. Its text is templates/page.html."""

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from stages.reporting import charts, figures, leaving
from stages.reporting.claims import (
    CHECKPOINTING_SAVES,
    CONTROL_NOT_BEATEN,
    MIN_DOCUMENTS,
    MIN_REPETITIONS,
    MIN_TRAINING_TOKENS,
    ROUTER_RATIO,
    TOO_FEW_DOCUMENTS,
    TOO_SMALL,
    Claim,
    model_that_was_trained,
)
from stages.reporting.controls import STRONGER
from stages.reporting.wording import percent, signed_number, words

MARKS = {"beaten": "▲", "holds": "✓", CONTROL_NOT_BEATEN: "✕", "fails": "✕"}  # the others leave the question open
SHORT = {
    "distillation_teacher_there": "Distillation, teacher already there",
    "distillation_teacher_trained": "Distillation, teacher to be trained",
    "sparsity_teacher": "Pruning the teacher",
    "sparsity_student": "Pruning the student",
    "checkpointing": "Activation checkpointing",
    "router": "Router",
}


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
    evaluated, teacher_cost_known = metrics["evaluate"], metrics["challenge"].get("teacher_cost_known", True)
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
        headline=headline(claims, teacher_cost_known),
        claims=claims,
        short=SHORT,
        signed_number=signed_number,
        strips={claim.name: strip(claim) for claim in claims},
        marks=MARKS,
        min_documents=MIN_DOCUMENTS,
        min_repetitions=MIN_REPETITIONS,
        min_tokens=MIN_TRAINING_TOKENS,
        trained=model_that_was_trained(metrics),
        quality=figures.quality_figure(evaluated),
        controls=figures.control_rows(metrics),
        teacher_cost_known=teacher_cost_known,
        scores=figures.quality_table(evaluated),
        costs=figures.cost_table(metrics),
        training=figures.training_figures(curves, teacher_cost_known),
        experts=figures.expert_figures(metrics["pretrain"]),
        checkpointing=figures.checkpointing_figure(evaluated, timings),
        policies=figures.checkpointing_table(evaluated, timings),
        checkpointing_layers=evaluated["checkpointing_layers"],
        latency=figures.latency_table(timings),
        speed=figures.speed_table(evaluated, timings),
        plan=plan,
        leaving=leaving,
        money=money,
        samples=[(words(name), text) for name, text in figures.in_order(texts)],
        corpus=figures.corpus_table(card),
        conditions=figures.conditions_table(conditions),
        shards=[shard for split in card["splits"].values() for shard in split["shards"]],
        chart_style=Markup(charts.STYLE),
    )


def headline(claims: list[Claim], teacher_cost_known: bool = True) -> str:
    """The sentence on top: what the student keeps, whether its shape alone does better, and how many claims stand."""
    distilled, lacking = claims[0], claims[0].verdict in (TOO_SMALL, TOO_FEW_DOCUMENTS)
    line = f"{distilled.verdict.capitalize()}: a" if lacking else "A"
    line += f" student with {percent(distilled.values['parameter_share'])} of the teacher’s parameters "
    line += f"keeps {percent(distilled.values['quality_kept'])} of its quality"
    if claims[1].values.get("control_outcome") == STRONGER and not lacking:
        cost = "the cost of both" if teacher_cost_known else "what the student alone cost"
        line += f", but less than the same shape trained without a teacher for {cost}"
    beaten = sum(claim.verdict == "beaten" for claim in claims)
    return line + ("." if lacking else f"; {beaten} of {len(claims)} claims are beaten.")


def strip(claim: Claim) -> str:
    """The claim and the measurement on one small axis, as SVG; empty where nothing was measured."""
    shown = {  # the figure, the claim's range, the ends of the axis
        "distillation_teacher_there": ("quality_kept", 0.9, 0.9, 0.8, 1.0),
        "distillation_teacher_trained": ("quality_kept", 0.9, 0.9, 0.8, 1.0),
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

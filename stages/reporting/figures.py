"""The page's pictures and tables below the claims, from the figures in metrics/, plots/ and measurements/."""

from collections.abc import Iterable
from typing import NamedTuple

from markupsafe import Markup

from stages.reporting import charts
from stages.reporting.claims import between, interval_of, more_time
from stages.reporting.controls import SAME_TOKENS, WHAT, Control, controls_of
from stages.reporting.drawing import Line, Point
from stages.reporting.wording import count, number, percent, policy_words, signed, words

MODELS = {  # the reading order, and the colour, of the models
    "teacher": 0,
    "student": 1,
    "control": 2,
    "warm_control": 6,
    "cold_student": 4,
    "scratch_student": 3,
    "sparse_teacher": 0,
    "continued_teacher": 5,
    "scratch_sparse_teacher": 4,
    "sparse_student": 1,
    "continued_student": 6,
    "scratch_sparse_student": 7,
}
FROM_NOTHING = ("control", "scratch_student", "scratch_sparse_teacher", "scratch_sparse_student")
SPLITS = ("train", "val", "test")
SPEED_TIME, SPEED_FLOPS, SPEED_LOSS = 0.25, 0.3, 0.01  # our target for pruned models
TARGET_SAVES, TARGET_COSTS = 0.6, 0.15  # of activation checkpointing: memory saved, time added


class Table(NamedTuple):
    """The columns whose indices `words` names are words, which wrap; the others are numbers."""

    head: list[str]
    rows: list[list[str]]
    note: str = ""
    words: tuple[int, ...] = (0,)


class Figure(NamedTuple):
    chart: Markup
    caption: str = ""
    heading: str = ""
    wide: bool = False


def quality_figure(evaluated: dict) -> Figure:
    points = [
        Point(
            words(name),
            model["flops_per_token"],
            model["bits_per_byte"],
            model["bits_per_byte_low"],
            model["bits_per_byte_high"],
            MODELS.get(name, 7),
            hollow=name in WHAT,
            note=f"{number(model['parameters'])} parameters",
        )
        for name, model in in_order(evaluated["models"])
    ]
    drawn = charts.scatter(
        "Quality against compute",
        points,
        "forward FLOPs per token",
        f"bits per byte on test (95% interval, {count(evaluated['test']['documents'], 'document')})",
        y_format=lambda value: number(value, 4),
        links=[("teacher", "sparse teacher"), ("student", "sparse student")],
    )
    return Figure(drawn, wide=True)


def quality_table(evaluated: dict) -> Table:
    rows = []
    for name, model in in_order(evaluated["models"]):
        bits = interval_of(model, "bits_per_byte")
        cells = [words(name), f"{bits.value:.4f}", between(bits, lambda value: f"{value:.4f}")]
        for key in ("top1_accuracy", "agreement_with_teacher", "calibration_error"):
            share = interval_of(model, key)
            cells += ["–", "–"] if share is None else [percent(share.value), between(share, percent)]
        rows.append(cells)
    head = ["model", "bits/byte", "95%", "top-1", "95%", "agrees", "95%", "calibration", "95%"]
    return Table(
        head,
        rows,
        f"95%: interval over {count(evaluated['test']['documents'], 'test document')}, all of the split, with "
        f"{evaluated['test']['tokens']:,} of their {evaluated['test']['split_tokens']:,} tokens (an even share each); "
        "agrees: share of tokens on which its first choice is the teacher's; "
        "calibration: expected calibration error of the first choice, 15 bins of equal mass.",
    )


def cost_table(metrics: dict) -> Table:
    costs = metrics["challenge"]
    known = costs.get("teacher_cost_known", True)
    rows = [
        [
            words(name),
            *(number(model[key]) for key in ("parameters", "active_parameters")),
            *(number(model[key]) for key in ("flops_per_token", "counted_flops_per_token")),
            number(costs["training_flops"][name]) + ("" if known or name != "teacher" else " here"),
            number(costs["whole_training_flops"][name]) + ("" if known or name in FROM_NOTHING else " and unknown"),
        ]
        for name, model in in_order(metrics["evaluate"]["models"])
    ]
    note = (
        "FLOPs per token: forward, by the formula and as counted; training FLOPs: of its own training, and with those "
        "of the models that it was made from."
    )
    if not known:
        note += " The teacher came from a folder: what its training took before is unknown, and counted nowhere."
    return Table(
        ["model", "parameters", "active", "FLOPs/token", "counted", "training FLOPs", "with all before"], rows, note
    )


def training_figures(curves: dict, teacher_cost_known: bool = True) -> list[Figure]:
    drawn = []
    cost = "the whole cost" if teacher_cost_known else "what is known of the cost"
    for title, stages in (
        ("teacher, student and its controls", ("pretrain", "distill")),
        ("recoveries and their controls", ("sparsify",)),
        (f"trained from nothing for {cost}", ("challenge",)),
    ):
        for key, label in (("loss", "training loss"), ("validation_bits_per_byte", "validation bits per byte")):
            lines = [
                Line(
                    words(model),
                    [(row["step"], row[key]) for row in rows if row[key] is not None],
                    MODELS.get(model, 7),
                    dashed=model in WHAT,
                )
                for stage in stages
                for model, rows in curves[stage].items()
            ]
            heading = f"{label}: {title}"
            drawn.append(Figure(charts.curves(heading, lines, "step", label), heading=heading))
    return drawn


def expert_figures(pretrained: dict) -> list[Figure]:
    loads, violations = pretrained["expert_load"], pretrained["max_violation"]
    highest = max((max(layer) for layer in loads), default=0) * 1.12  # one scale for all layers
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
        caption = f"Busiest expert: {signed(violation)} over its fair share."
        drawn.append(Figure(chart, caption, f"MoE layer {index}"))
    return drawn


def checkpointing_figure(evaluated: dict, timings: dict) -> Figure:
    measured = timings["checkpointing"]
    points = [Point("the claim", 0.7, 1.25, series=2, hollow=True)]
    for row in evaluated["checkpointing"]:
        slower, kept = more_time(measured[row["policy"]]), f"{number(row['activation_bytes'])}B"
        low, high = (None if end is None or row["policy"] == "none" else 1 + end for end in slower[1:])
        label, share = policy_words(row["policy"]), 1 - row["memory_saved"]
        points.append(Point(label, share, 1 + slower.value, low, high, series=3, note=kept))
    chart = charts.scatter(
        "Activation memory against time",
        points,
        "activation memory kept for backward, share of storing all",
        "step time, × storing all",
        x_format=lambda value: f"{100 * value:.0f}%",
    )
    repetitions = count(min(row["repetitions"] for row in measured.values()), "repetition")
    return Figure(chart, f"95% intervals over {repetitions}. {memory_target(evaluated, measured)}", wide=True)


def memory_target(evaluated: dict, measured: dict) -> str:
    """Our own target, and the quickest policy that saves enough for it."""
    target = f"Target: {signed(-TARGET_SAVES)} memory for at most {signed(TARGET_COSTS)} time"
    sound = [row for row in evaluated["checkpointing"] if row["gradients_equal"]]
    enough = [row for row in sound if row["memory_saved"] >= TARGET_SAVES]
    if not enough:
        return f"{target}: missed, no policy saves so much."
    quickest = min(enough, key=lambda row: more_time(measured[row["policy"]]).value)
    time = more_time(measured[quickest["policy"]]).value
    verdict = "reached" if time <= TARGET_COSTS else "missed"
    saved = signed(-quickest["memory_saved"])
    return f"{target}: {verdict}, “{policy_words(quickest['policy'])}” gives {saved} for {signed(time)}."


def checkpointing_table(evaluated: dict, timings: dict) -> Table:
    rows = [
        [
            policy_words(row["policy"]),
            f"{number(row['activation_bytes'])}B",
            signed(-row["memory_saved"]),
            f"{number(row['peak_bytes'])}B",
            percent(row["recomputed_flops_share"]),
            signed(more_time(timings["checkpointing"][row["policy"]]).value),
            "yes" if row["gradients_equal"] else "no",
        ]
        for row in evaluated["checkpointing"]
    ]
    return Table(["policy", "kept", "memory", "peak", "forward FLOPs again", "step time", "gradients equal"], rows)


def latency_table(timings: dict) -> Table:
    rows = []
    for name, figures in in_order(timings["latency"]):
        cells = [words(name)]
        for key in ("prefill_seconds", "decode_seconds_per_token"):
            ends = (figures[f"{key}_quartile_{end}"] for end in ("low", "high"))
            low, high = (number(1e3 * seconds) for seconds in ends)
            cells += [number(1e3 * figures[key]), f"{low} to {high}"]
        cells += [f"{number(figures[key])}B" for key in ("weight_bytes", "prefill_peak_bytes")]
        rows.append(cells)
    head = ["model", "prefill, ms", "quartiles", "decode, ms per token", "quartiles", "weights", "prefill peak"]
    machine = timings["machine"]
    note = f"One sequence on {machine['device']}, {machine['threads']} threads, torch {machine['torch']}."
    return Table(head, rows, note)


def speed_table(evaluated: dict, timings: dict) -> Table:
    """Each pruned model against its dense one: operations, time, quality, and the time of each part."""
    rows = []
    for name in ("teacher", "student"):
        sparse = f"sparse_{name}"
        if not {name, sparse} <= timings["latency"].keys():
            continue
        compared, dense, pruned = evaluated["comparisons"][sparse], timings["latency"][name], timings["latency"][sparse]
        cut, lost = compared["flops_cut"], compared["quality_lost"]
        for key, label in (("prefill_seconds", "prefill"), ("decode_seconds_per_token", "decode")):
            time = pruned[key] / dense[key] - 1
            reached = cut >= SPEED_FLOPS and lost <= SPEED_LOSS and time <= -SPEED_TIME
            parts, before = (one.get(f"{key}_by_part", {}) for one in (pruned, dense))
            spent = ", ".join(
                f"{part} {number(1e3 * before[part])} → {number(1e3 * seconds)}" for part, seconds in parts.items()
            )
            verdict = "reached" if reached else "missed"
            rows.append([f"{words(name)}, {label}", signed(-cut), signed(time), signed(lost), verdict, spent or "–"])
    head = ["pruned", "FLOPs", "time", "bits/byte", "target", "milliseconds by part, dense → pruned"]
    note = (
        f"Target: at least {percent(SPEED_TIME)} less time for at least {percent(SPEED_FLOPS)} fewer FLOPs, with "
        f"at most {percent(SPEED_LOSS)} of the quality lost. Pruning leaves embedding, norms and head as they are."
    )
    return Table(head, rows, note, words=(0, 5))


def control_rows(metrics: dict) -> list[Control]:
    """Every model with every control: those of the same tokens first, the strongest of them on top."""

    def place(control: Control) -> tuple:
        return control.equal != SAME_TOKENS, control.ahead.value

    models = in_order(metrics["evaluate"]["controls"])
    return [control for model, _ in models for control in sorted(controls_of(model, metrics), key=place)]


def corpus_table(card: dict) -> Table:
    rows = [
        [split, *(f"{figures[key]:,}" for key in ("documents", "bytes", "tokens")), f"{figures['bytes_per_token']:.3f}"]
        for split, figures in in_order(card["splits"], SPLITS)
    ]
    note = (
        f"Corpus: {card['corpus']['name']}; {card['duplicates_dropped']:,} exact duplicates dropped; "
        f"no document is in two splits. {near_duplicates(card)}"
        f"Tokenizer: {card['tokenizer']}, {card['vocab_size']:,} tokens, sha256 {card['tokenizer_sha256'][:16]}…"
    )
    return Table(["split", "documents", "bytes", "tokens", "bytes per token"], rows, note)


def near_duplicates(card: dict) -> str:
    near = card.get("near_duplicates")
    if near is None:
        return "Near-duplicates were not looked for. "
    done = f"{near['dropped']:,} dropped" if near["handling"] == "drop" else "each group in one split"
    return (
        f"{near['documents']:,} near-duplicates in {near['groups']:,} groups, {done}; "
        f"{percent(near['share_of_test_seen_in_training'])} of the test split's n-grams of words "
        "stand in the training split. "
    )


def conditions_table(made: dict[str, dict]) -> Table:
    """Each condition once where all stages share it, else with the stages of each value."""
    rows = []
    for name in dict.fromkeys(name for conditions in made.values() for name in conditions):
        stages_of: dict[str, list[str]] = {}
        for stage, conditions in made.items():
            if name in conditions:
                stages_of.setdefault(str(conditions[name]), []).append(stage)
        everywhere = [*made] in stages_of.values()
        values = [value if everywhere else f"{value} ({', '.join(stages)})" for value, stages in stages_of.items()]
        rows.append([words(name), "; ".join(values)])
    return Table(["condition", "value"], rows, words=(0, 1))


def in_order(by_name: dict, order: Iterable[str] = MODELS) -> list[tuple]:
    """The items in reading order; unknown ones come last."""
    known = [name for name in order if name in by_name]
    return [(name, by_name[name]) for name in known + sorted(set(by_name) - set(known))]

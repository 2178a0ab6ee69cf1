"""What the page shows below its claims: pictures and tables from the figures in metrics/, plots/ and measurements/."""

from collections.abc import Iterable
from html import escape

from stages.reporting import charts
from stages.reporting.claims import between, interval_of, more_time
from stages.reporting.drawing import Line, Point
from stages.reporting.wording import count, number, percent, policy_words, signed, words

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
        f"bits per byte on test (95% interval, {count(evaluated['test']['documents'], 'document')})",
        y_format=lambda value: number(value, 4),
        links=[("teacher", "sparse teacher"), ("student", "sparse student")],
    )
    return figure(drawn, wide=True)


def models_table(evaluated: dict) -> str:
    rows = []
    for name, model in in_order(evaluated["models"]):
        bits, accuracy = interval_of(model, "bits_per_byte"), interval_of(model, "top1_accuracy")
        rows.append(
            [
                words(name),
                number(model["parameters"]),
                number(model["active_parameters"]),
                number(model["flops_per_token"]),
                number(model["counted_flops_per_token"]),
                f"{bits.value:.4f}",
                between(bits, lambda value: f"{value:.4f}"),
                percent(accuracy.value),
                between(accuracy, percent),
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
        f"95%: interval over {count(evaluated['test']['documents'], 'test document')}; "
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


def checkpointing_figure(evaluated: dict, timings: dict) -> str:
    policies, measured = evaluated["checkpointing"], timings["checkpointing"]
    points, rows = [Point("the claim", 0.7, 1.25, series=2, hollow=True)], []
    for row in policies:
        name, slower = policy_words(row["policy"]), more_time(measured[row["policy"]])
        low, high = (None if end is None or row["policy"] == "none" else 1 + end for end in slower[1:])
        kept = f"{number(row['activation_bytes'])}B"
        points.append(Point(name, 1 - row["memory_saved"], 1 + slower.value, low, high, series=3, note=kept))
        equal = "yes" if row["gradients_equal"] else "no"
        recomputed = percent(row["recomputed_flops_share"])
        rows.append(
            [
                name,
                kept,
                signed(-row["memory_saved"]),
                f"{number(row['peak_bytes'])}B",
                recomputed,
                signed(slower.value),
                equal,
            ]
        )
    chart = charts.scatter(
        "Activation memory against time",
        points,
        "activation memory kept for backward, share of storing all",
        "step time, × storing all",
        x_format=lambda value: f"{100 * value:.0f}%",
    )
    note = f"95% intervals over {count(min(row['repetitions'] for row in measured.values()), 'repetition')}."
    head = ["policy", "kept", "memory", "peak", "forward FLOPs again", "step time", "gradients equal"]
    return figure(chart, note, wide=True) + "<br>" + table(head, rows)


def latency_table(timings: dict) -> str:
    rows = []
    for name, figures in in_order(timings["latency"]):
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
    machine = timings["machine"]
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
        values = [value if everywhere else f"{value} ({', '.join(stages)})" for value, stages in stages_of.items()]
        rows.append([words(name), "; ".join(values)])
    return table(["condition", "value"], rows)


def reproduce(card: dict, seed: int) -> str:
    commands = (
        "make repro             # environment, dependencies and the whole pipeline, on a fresh machine\n"
        "dvc repro              # only what changed\n"
        "dvc metrics diff       # the headline figures, against the last commit\n"
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
    below = f"<figcaption>{escape(note)}</figcaption>" if note else ""
    return f'<div class="card scroll"><table><tr>{cells("th", head)}</tr>{drawn}</table>{below}</div>'


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

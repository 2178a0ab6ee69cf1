"""What leaving costs, for the page: the planner's answers, rent against own, the circulated tables, what compression
saves. Each number from a ledger links to its row, which has its date and source.
"""

from markupsafe import Markup

from stages.reporting import charts
from stages.reporting.drawing import Line
from stages.reporting.figures import Figure, Table, in_order
from stages.reporting.wording import number, percent, signed, words

KINDS = {"train": "trained on", "read": "read", "write": "written"}
CASES = {True: "✓\u00a0holds", False: "✕\u00a0wrong", None: "–"}  # on one line


def linked(text: str, row: str) -> Markup:
    """The text as a link to a row of a ledger."""
    return Markup('<a href="#row-{}">{}</a>').format(row, text)


def dollars(value: float) -> str:
    return f"${number(value)}"


def spread(ends: list[float] | None, form=number) -> str:
    """Low to high."""
    return "–" if ends is None else f"{form(ends[1])} to {form(ends[2])}"


def answers_table(plan: dict) -> Table:
    rows = []
    for each in plan["answers"]:
        speed, price, total = each["tokens_per_second"], each["dollars_per_chip_hour"], each["dollars"]
        basis = plan["model"]["point"]
        rows.append(
            [
                each["provider"],
                f"{each['chips']:,}",
                linked(number(speed[0]), basis) if basis else number(speed[0]),
                spread(speed),
                percent(each["efficiency"]),
                f"{each['days'][0]:.3g}",
                linked(f"{price[0]:.2f}", each["rows"][-1]) if price else "no dated price",
                spread(price, lambda value: f"{value:.2f}"),
                dollars(total[0]) if total else "–",
                spread(total, dollars),
            ]
        )
    head = ["provider", "chips", "tokens/s", "interval", "of linear", "days", "$/chip-hour", "interval"]
    notes = [note for each in plan["answers"] for note in [f"speed: {each['basis']}", *each["warnings"]]]
    rests = {each["provider"]: each["rows"] for each in plan["answers"] if len(each["rows"]) > 1}
    notes += [
        Markup("{} rests on {}").format(provider, Markup(", ").join(linked(row, row) for row in found))
        for provider, found in rests.items()
    ]
    return Table([*head, "dollars", "interval"], rows, Markup("<br>").join(dict.fromkeys(notes)))


def leaving_table(plan: dict) -> Table:
    rows = []
    for each in plan["leaving"]:
        change, egress = each["change"], each["egress_dollars"]
        rows.append(
            [
                each["to"],
                f"{each['chips']:,}",
                signed(change[0]) if change else "–",
                spread(change, signed),
                each["verdict"],
                f"{number(each['moved_bytes'])}B",
                f"{each['transfer_hours']:.3g} h",
                "–" if each["idle_dollars"] is None else dollars(each["idle_dollars"]),
                "not priced" if egress is None else dollars(egress),
            ]
        )
    head = [
        "to",
        "chips",
        "change of cost",
        "interval",
        "verdict",
        "moved",
        "transfer",
        "idle chips",
        "egress",
    ]
    fall = plan["worst_fall"]
    note = "Both sides have the same chips and speed. Cheaper or dearer: the whole interval is below or above 0. "
    note += "Idle chips: the rent of the new chips while the data moves."
    if fall:
        more, point = percent(1 / (1 - fall["share"]) - 1), linked(fall["point"], fall["point"])
        note += f" If each chip were {percent(fall['share'])} slower there, the largest loss of a published run "
        note = Markup("{}({}), it would cost {} more.").format(note, point, more)
    return Table(head, rows, note, words=(0, 4))


def scaling_figure(plan: dict) -> Figure:
    by_chips = {each["chips"]: each for each in plan["answers"]}
    points = [(chips, each["tokens_per_second"][0]) for chips, each in by_chips.items()]
    band = tuple((chips, *each["tokens_per_second"][1:]) for chips, each in by_chips.items())
    linear = [(chips, each["linear_tokens_per_second"]) for chips, each in by_chips.items()]
    lines = [Line("planner", points, 0, band=band), Line("linear scaling", linear, 2, dashed=True)]
    name = f"{plan['model']['name']} on {plan['question']['chip']}"
    chart = charts.curves("Tokens per second by chips", lines, "chips", "tokens per second")
    return Figure(chart, f"{name}. The band holds 80% of the errors on published runs that were left out.", "Scaling")


def cost_figure(plan: dict) -> Figure:
    lines = []
    for series, provider in enumerate(dict.fromkeys(each["provider"] for each in plan["answers"])):
        found = [each for each in plan["answers"] if each["provider"] == provider and each["dollars"]]
        if found:
            band = tuple((each["nodes"], *(end / 1e6 for end in each["dollars"][1:])) for each in found)
            points = [(each["nodes"], each["dollars"][0] / 1e6) for each in found]
            lines.append(Line(provider, points, series, band=band))
    chart = charts.curves("Cost against nodes", lines, "nodes", "million dollars")
    tokens = number(plan["question"]["tokens"])
    return Figure(
        chart, f"{tokens} tokens. Bands: prices, costs of owning and speed at their ends.", "Cost against nodes"
    )


def heat_figure(plan: dict) -> Figure | None:
    """Own over rent at each utilization and price, over plan.years."""
    if not plan["rent_or_own"]:
        return None
    asked = plan["question"]
    prices, shares, lives = (plan["rent_or_own"]["grid"][key] for key in ("rents", "utilizations", "years"))
    own = [row[lives.index(asked["years"])] for row in plan["rent_or_own"]["grid"]["own_dollars_per_hour"]]
    values = [[cost / price - 1 for price in prices] for cost in own]
    chart = charts.heat_map(
        "Rent against own",
        [f"${price:g}" for price in prices],
        [f"{share:.0%}" for share in shares],
        values,
        "rent per chip-hour",
        "utilization",
        signed,
    )
    chip, years = asked["chip"], asked["years"]
    caption = f"Cost of an owned hour of {chip} over the rent, minus 1, over {years} years. Blue: owning is cheaper."
    return Figure(chart, caption, wide=True)


def break_even_table(plan: dict) -> Table | None:
    if not plan["rent_or_own"]:
        return None
    grid = plan["rent_or_own"]["grid"]
    rows = [
        [
            f"{share:.0%}",
            *(f"${cost:.2f}" for cost in costs),
            *("never" if each is None else number(each) for each in months),
        ]
        for share, costs, months in zip(
            grid["utilizations"], grid["own_dollars_per_hour"], grid["break_even_months"], strict=True
        )
    ]
    head = ["utilization", *(f"{years} years" for years in grid["years"]), *(f"at ${rent:g}" for rent in grid["rents"])]
    note = "Years: dollars for an hour of use of an owned chip that lives so long. At a rent per chip-hour: "
    note += "the months after which buying has cost less than renting."
    return Table(head, rows, note)


def replay_table(plan: dict) -> Table | None:
    """A row for each purchase, a column for the rents of each provider that is asked for."""
    if not plan["rent_or_own"]:
        return None
    found = {(each["row"], each["path"]): each for each in plan["rent_or_own"]["replays"]}
    asked = ("median of providers", *plan["question"]["provider"])
    paths = [path for path in asked if any(path == of for _, of in found)]
    rows = []
    for row in dict.fromkeys(row for row, _ in found):
        cells = [found.get((row, path)) for path in paths]
        first = next((each for each in cells if each), None)
        if first:
            rows.append([linked(first["bought"], row), *map(_returned, cells), percent(first["value_left_share"])])
    until = "; ".join(
        f"{path}: until {found[rows_path]['until']}" for path in paths for rows_path in [_last(found, path)]
    )
    note = f"At {plan['question']['utilization']:.0%} use; dated rents, each until the next. {until}."
    return Table(["bought", *(f"rents: {path}" for path in paths), "value left"], rows, note) if rows else None


def _last(found, path):
    return next(key for key in found if key[1] == path)


def _returned(past):
    if past is None:
        return "–"
    return percent(past["returned_share"]) + ("" if past["months"] is None else f" ({past['months']:.3g})")


def circulated_table(plan: dict) -> Table:
    rows = [
        [
            f"{cell['table']}: {cell['row']}",
            cell["quantity"],
            "–" if cell["claimed"] is None else number(cell["claimed"]),
            number(cell["recomputed"]),
            CASES[cell["holds"]],
            cell["why"],
        ]
        for cell in plan["circulated"]["cells"]
    ]
    return Table(["table and row", "quantity", "claimed", "recomputed", "claim", "why"], rows, words=(0, 1, 4, 5))


def networks_table(plan: dict) -> Table:
    rows = []
    for column, fits in plan["circulated"]["networks"].items():
        for fit in fits:
            latency = fit["fitted"] == "latency_seconds"
            form = (lambda value: f"{1e6 * value:.3g} µs") if latency else (lambda value: f"{value / 1e9:.3g} GB/s")
            rows.append(
                [
                    f"{words(column)}: {fit['algorithm']}",
                    "latency" if latency else "bandwidth",
                    "no value" if fit["needed"] is None else form(fit["needed"]),
                    form(fit["of_chip"]),
                    percent(fit["error"]),
                    "✓" if fit["plausible"] else "✕",
                ]
            )
    assumed = plan["circulated"]["assumed"]
    note = (
        f"Assumed: {assumed['chip']}, {assumed['chips_per_node']} a node, {number(assumed['parameters'])} parameters, "
    )
    note += f"{assumed['tokens_per_chip_step']:,} tokens a chip and step, fully sharded, nothing overlapped."
    head = ["curve", "fitted between nodes", "needed", "of the chip", "error", "plausible"]
    return Table(head, rows, note, words=(0, 1))


def errors_table(plan: dict) -> Table:
    rows = [
        [name, f"{each['points']}", percent(each["planner_error"]), percent(each["linear_error"]), each["verdict"]]
        for name, each in in_order(plan["validation"]["classes"], ("all",))
    ]
    head = ["class of points", "points", "planner", "linear scaling", "verdict"]
    note = "Mean absolute error on published runs, each predicted without the set that it belongs to."
    return Table(head, rows, note, words=(0, 4))


def savings_tables(money: dict) -> list[Table]:
    """Seconds per million tokens on this machine, dollars on the chip at each provider, and break-even."""
    price, machine = money["machine_dollars_per_hour"], money["machine"]
    unit = "dollars" if price else "machine-hours"
    rows = [
        [words(name), *(_cells(kinds, lambda value: number(value / 3600 * 1e6 * (price or 1))))]
        for name, kinds in in_order(machine["seconds_per_token"])
    ]
    note = f"{unit} per million tokens, measured on {money['device']}, one sequence; intervals are quartiles."
    if not price:
        note += " plan.machine_dollars_per_hour names the price of this machine."
    tables = [Table(_head(3), rows, note)]
    on_chip = [
        [f"{words(name)}, {provider}", *_cells(kinds, lambda value: dollars(1e3 * value))]
        for provider, models in money["chip"]["dollars"].items()
        for name, kinds in in_order(models)
    ]
    carried = "Measured on this chip." if money["measured_on_chip"] else "Not measured: see the text above the table."
    kinds = 3 if money["measured_on_chip"] else 2  # writing is not carried to a chip where it was not measured
    tables.append(Table(_head(kinds), on_chip, f"Dollars per billion tokens. {carried}"))
    pays = [
        [case, KINDS[kind], number(found[0]) if found else "not shown", spread(found)]
        for case, kinds in machine["distilling_pays_after_tokens"].items()
        for kind, found in kinds.items()
    ]
    note = "After so many tokens the student has saved what distilling cost; not shown: it is not cheaper beyond the "
    note += "spread of the timings. On one machine this needs no price."
    tables.append(Table(["distilling pays", "tokens", "after", "interval"], pays, note, words=(0, 1)))
    return tables


def _head(kinds):
    return ["model", *(cell for kind in [*KINDS.values()][:kinds] for cell in (kind, "interval"))]


def _cells(kinds, form):
    return [text for kind in KINDS if kind in kinds for text in (form(kinds[kind][0]), spread(kinds[kind], form))]


def contradictions_table(plan: dict) -> Table:
    by_id = {row["id"]: row for row in plan["ledger"]["rents"]}
    rows = []
    for group in plan["ledger"]["contradictions"]:
        cells = [linked(f"{by_id[row]['value']:.4g} ({by_id[row]['date']})", row) for row in group]
        rows.append([by_id[group[0]]["what"], Markup(", ").join(cells)])
    return Table(["price", "dollars per chip-hour, side by side"], rows, words=(0, 1))


def ledger_rows(plan: dict) -> list[dict]:
    """Each row with its anchor, what it says, its date and where that was read."""
    found = []
    for row in [*plan["ledger"]["rents"], *plan["ledger"]["owning"], *plan["ledger"]["runs"]]:
        value = f"{row['value']:g}" + (f" to {row['high']:g}" if row.get("high", row["value"]) != row["value"] else "")
        told = [row.get("note"), "second-hand" if row.get("second_hand") else None]
        found.append(
            {
                "id": row["id"],
                "what": row["what"],
                "value": f"{value} {row.get('metric', '')}".strip(),
                "date": row["date"] or "undated",
                "age": row.get("age", ""),
                "source": row["source"],
                "archived": row.get("archived"),
                "note": "; ".join(filter(None, told)),
            }
        )
    return found

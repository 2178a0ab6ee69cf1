"""The planner's results as plain values for JSON, as CSV for plots, and as text for a person."""

import datetime
from collections.abc import Iterable, Sequence
from typing import Any

from tabulate import tabulate

from stages.planning.ownership import Books
from stages.planning.points import Point
from stages.planning.prices import Ledger, contradictions, is_stale
from stages.planning.validate import Errors, Table

NOT_SHOWN = "not shown, as the student is not cheaper beyond the spread of the timings"


def errors(table: Table) -> dict[str, dict]:
    """The planner's error beside linear scaling's, by class and by set of points."""

    def plain(of: dict[str, Errors]) -> dict[str, dict]:
        return {
            name: {
                "points": each.n,
                "planner_error": each.planner,
                "linear_error": each.linear,
                "verdict": each.verdict,
            }
            for name, each in of.items()
        }

    return {"classes": plain(dict(table.summary)), "sets": plain(dict(table.sets))}


def ledger(prices: Ledger, books: Books, points: Iterable[Point], today: datetime.date, stale_days: int) -> dict:
    """Every row that a number may rest on, with its date and source."""

    def age(row):
        return "undated" if row.date is None else "stale" if is_stale(row, today, stale_days) else "fresh"

    def shown(row, what, value):
        told: dict[str, Any] = {"id": row.id, "what": what, "value": value, "date": row.date, "age": age(row)}
        return told | {"source": row.source, "archived": row.archived, "note": row.note}

    rents = [
        shown(row, f"{row.provider} {row.chip} {row.terms}", prices.dollars_per_chip_hour(row))
        | {"high": prices.dollars_per_chip_hour_high(row), "second_hand": row.second_hand}
        for row in prices.prices
    ]
    costs = [shown(row, f"{row.item}{f' {row.chip}' if row.chip else ''}", row.value) for row in books.costs]
    bought = [shown(row, f"{row.chip} bought", row.dollars_per_chip) for row in books.capital]
    clusters = [shown(row, f"{row.chip} in a cluster of {row.chips:,}", row.dollars_per_chip) for row in books.clusters]
    runs: list[dict[str, Any]] = [
        {"id": point.id, "what": f"{point.model.name} on {point.chips:,} {point.chip.name}", "source": point.source}
        | {"value": point.value, "metric": point.metric, "date": point.date.isoformat() if point.date else None}
        for point in points
    ]
    against = [[row.id for row in rows] for rows in contradictions(prices.prices, stale_days)]
    owned = [*costs, *bought, *clusters]
    return {"rents": rents, "owning": owned, "runs": runs, "contradictions": against}


def headline(content: dict) -> dict[str, Any]:
    """What a person compares runs by: metrics/plan.json."""
    found: dict[str, Any] = {}
    asked = content["question"]["provider"]
    priced = [each for each in content["answers"] if each["dollars"] and each["provider"] in asked]
    if priced:
        best = min(priced, key=lambda each: each["dollars"][0])
        found["cheapest"] = {"chips": best["chips"], "days": best["days"][0]} | _range("dollars", best["dollars"])
        found["cheapest"]["tokens_per_second"] = best["tokens_per_second"][0]
    moves: dict[str, dict] = {}
    for move in content["leaving"]:
        if move["change"]:
            moves.setdefault(move["to"], _range("change", move["change"]))
    everything = content["validation"]["classes"].get("all")
    if everything:
        found["planner"] = {name: everything[name] for name in ("points", "planner_error", "linear_error")}
    cells = [cell for cell in content["circulated"]["cells"] if cell["holds"] is not None]
    found["circulated"] = {"claims": len(cells), "wrong": sum(not cell["holds"] for cell in cells)}
    rents = content["ledger"]["rents"]
    found["ledger"] = {"rents": len(rents)} | {
        age: sum(row["age"] == age for row in rents) for age in ("fresh", "stale", "undated")
    }
    if content["by_flops"]:
        pays = content["by_flops"]["distilling_pays_after_tokens"]["teacher exists"]["read"]
        found |= {"distilling_pays_after_read_tokens_by_flops": pays[0]} if pays else {}
    return found | ({"leaving": moves} if moves else {})


def _range(name, ends):
    return {name: ends[0], f"{name}_low": ends[1], f"{name}_high": ends[2]}


def plots(content: dict) -> dict[str, str]:
    """Text of each CSV by its name in plots/plan/."""
    of_speed = {each["chips"]: each for each in content["answers"]}.values()
    scaling = [[each["chips"], *each["tokens_per_second"], each["linear_tokens_per_second"]] for each in of_speed]
    cost = [
        [each["provider"], each["nodes"], each["chips"], *(each["dollars"] or ["", "", ""]), each["days"][0]]
        for each in content["answers"]
    ]
    grid = content["rent_or_own"]["grid"] if content["rent_or_own"] else {}
    heat = [
        [share, rent, months]
        for share, row in zip(grid.get("utilizations", ()), grid.get("break_even_months", ()), strict=True)
        for rent, months in zip(grid["rents"], row, strict=True)
    ]
    return {
        "scaling": _csv("chips,tokens_per_second,low,high,linear_tokens_per_second", scaling),
        "cost": _csv("provider,nodes,chips,dollars,low,high,days", cost),
        "rent_or_own": _csv("utilization,dollars_per_chip_hour,break_even_months", heat),
    }


def _csv(head: str, rows: Iterable[Sequence]) -> str:
    lines = [",".join(f"{cell:.6g}" if isinstance(cell, float) else _blank(cell) for cell in row) for row in rows]
    return "\n".join([head, *lines]) + "\n"


def _blank(cell):
    return "" if cell is None else str(cell)


def for_people(content: dict, clocked: dict | None) -> str:
    """The answer as tables of text, with what it rests on and what is doubtful."""
    asked, name = content["question"], content["model"]["name"]
    tokens, when = asked["tokens"] / 1e12, "of today" if asked["today"] == "now" else f"as known on {asked['today']}"
    parts = [f"{name}, {tokens:g}T tokens on {asked['chip']}; prices {when}, {asked['terms']}", ""]
    parts += [_answers(content["answers"]), ""]
    parts += [f"speed: {basis}" for basis in dict.fromkeys(each["basis"] for each in content["answers"])]
    notes = dict.fromkeys(note for each in content["answers"] for note in each["warnings"])
    parts += [f"note: {note}" for note in notes]
    if content["leaving"]:
        parts += ["", f"leaving {asked['leave']} (plan.leave) for plan.provider", _moves(content["leaving"])]
        if fall := content["worst_fall"]:
            slower = f"were {fall['share']:.1%} slower at the new place, the largest loss of a published run"
            more = f"{1 / (1 - fall['share']):.3g} times as much"
            parts += [f"note: if each chip {slower} ({fall['point']}), it would cost {more}"]
    if clocked:
        parts += ["", _savings(clocked)]
    return "\n".join([*parts, "", content["sentence"]])


def _table(head: list[str], rows: list[list[str]]) -> str:
    return tabulate(
        rows, headers=head, tablefmt="plain", disable_numparse=True, colalign=["left", *["right"] * (len(head) - 1)]
    )


def _answers(answers):
    head = ["provider", "chips", "nodes", "tokens/s", "low to high", "of linear", "goodput", "days", "$/chip-h"]
    rows = []
    for each in answers:
        speed, price, total = each["tokens_per_second"], each["dollars_per_chip_hour"], each["dollars"]
        row = [each["provider"], f"{each['chips']:,}", f"{each['nodes']:,}", f"{speed[0]:,.0f}"]
        row += [f"{speed[1]:,.0f} to {speed[2]:,.0f}", f"{each['efficiency']:.1%}", f"{each['goodput']:.1%}"]
        row += [f"{each['days'][0]:.3g}", f"{price[0]:.2f}" if price else "-"]
        row += (
            [dollars(total[0]), f"{dollars(total[1])} to {dollars(total[2])}"] if total else ["no dated price", "-"]
        )
        rows.append(row)
    return _table([*head, "dollars", "low to high"], rows)


def dollars(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:,.3g}M"
    return f"{value / 1e3:,.0f}k" if value >= 1e5 else f"{value:,.0f}"


def _moves(moves):
    head = ["to", "chips", "change", "low to high", "verdict", "moved", "transfer", "idle chips, $", "egress, $"]
    rows = []
    for each in moves:
        change = each["change"]
        row = [each["to"], f"{each['chips']:,}"]
        row += [f"{change[0]:+.0%}", f"{change[1]:+.0%} to {change[2]:+.0%}"] if change else ["-", "-"]
        row += [each["verdict"], f"{each['moved_bytes'] / 1e12:.3g} TB", f"{each['transfer_hours']:.3g} h"]
        row += [dollars(each["idle_dollars"]) if each["idle_dollars"] is not None else "-"]
        row += ["not priced" if each["egress_dollars"] is None else dollars(each["egress_dollars"])]
        rows.append(row)
    return _table(head, rows)


def _savings(clocked):
    """Dollars, or machine-hours where this machine has no price, per million tokens."""
    machine, price = clocked["machine"], clocked["machine_dollars_per_hour"]
    unit = "dollars" if price else "machine-hours (plan.machine_dollars_per_hour names its price)"
    rows = []
    for name, kinds in machine["seconds_per_token"].items():
        cells = [name.replace("_", " ")]
        for kind in ("train", "read", "write"):
            value, low, high = (each / 3600 * 1e6 * (price or 1) for each in kinds[kind])
            cells.append(f"{value:.3g} ({low:.3g} to {high:.3g})")
        rows.append(cells)
    lines = [f"measured on {clocked['device']}: {unit} per million tokens, quartiles"]
    lines.append(_table(["model", "trained on", "read", "written"], rows))
    for case, kinds in machine["distilling_pays_after_tokens"].items():
        for kind, found in kinds.items():
            verb = {"read": "read", "write": "written"}[kind]
            after = f"after {found[0]:,.0f} ({found[1]:,.0f} to {found[2]:,.0f}) tokens" if found else NOT_SHOWN
            lines.append(f"distilling pays, {verb}, {case}: {after}")
    return "\n".join(lines)

"""Answers what leaving costs: how long and how much, on how many of whose chips, rented or owned, and what distilling
and pruning save.

    dvc repro plan                                     # the question in conf/base.yaml, under `plan`
    python -m stages.plan plan.model=MPT-13B plan.chips=256 plan.leave=aws plan.provider=own    # your own question
    python -m stages.plan -m plan.chips=512,1024 plan.provider=aws,lambda                   # a sweep
    python -m stages.plan validate                     # the planner's error on every published point
    python -m stages.plan validate --points FILE       # on points of your own; both write it to outputs/plan/ too

What does not depend on the clock (artifacts/plan.json, metrics/plan.json, plots/plan/) is the same in every run. What
the measured times of `profile` lead to is in measurements/plan.json. No network is needed: every price, chip and
published run is a row in conf/plan/ with its date and source.
"""

import dataclasses
import datetime
import re
import sys
from pathlib import Path

from stages.files.artifacts import Refusal, read_json, rounded, write_atomically, write_json
from stages.files.streams import disk_refusals, fill_closed_streams, shield_output
from stages.planning import circulated, question, rent_or_own, savings, tables
from stages.planning.chips import Chip, load_chips
from stages.planning.ownership import Books, load_books, owning, ready_to_own
from stages.planning.points import Point, load_models, load_points
from stages.planning.prices import OWN, Ledger, load_prices, rent_path, require_known
from stages.planning.speed import speed, subject, worst_fall
from stages.planning.validate import validate
from stages.run.entry import Place, run_stage

SECTIONS = ("plan",)
VALIDATIONS = Path("outputs/plan")  # of the folder where the person is, as Hydra's outputs
VALIDATE_USAGE = "python -m stages.plan validate [--points FILE]"
COMPRESSED = ("teacher", "student", "sparse_teacher", "sparse_student")


def main(settings, place: Place, run) -> None:
    plan, today = settings.plan, day_of(settings.plan.today, place)
    ledger, books = load_prices(place.read("conf/plan/prices.yaml")), load_books(place.read("conf/plan/ownership.yaml"))
    chips, points = load_chips(), load_points()
    require_known(ledger, (*plan.provider, plan.leave), plan.chip)
    if plan.chip not in chips:
        raise Refusal(f"plan.chip = {plan.chip}: no peak of it in conf/plan/chips.yaml; there are {', '.join(chips)}")
    evaluated = what_stands(place.read("artifacts/evaluation.json"))
    models = {name: evaluated["models"][name] for name in COMPRESSED} if evaluated else {}

    what = subject(plan.model, plan.chip, load_models(), points, models)
    speeds = {count: speed(what, chips[plan.chip], count, points, plan.mfu) for count in plan.chips}
    providers = dict.fromkeys((plan.leave, *plan.provider))
    rates = {name: question.rate_of(name, plan.chip, plan, today, ledger, books) for name in providers}
    answers = [
        question.answer(what, chips[plan.chip], count, found, rate, plan)
        for count, found in speeds.items()
        for rate in rates.values()
    ]
    old = [answer for answer in answers if answer.provider == plan.leave]
    moves = [
        question.leaving(what, before, after, plan) for before in old for after in answers if is_move(before, after)
    ]
    content = {
        "question": plan.model_dump(mode="json"),
        "model": {"name": what.name, "parameters": what.parameters, "point": what.anchor.id if what.anchor else None},
        "answers": [dataclasses.asdict(answer) for answer in answers],
        "leaving": [dataclasses.asdict(move) for move in moves],
        "sentence": question.sentence(what, old[0], [move for move in moves if move.chips == old[0].chips], plan),
        "worst_fall": {"point": worst[0], "share": worst[1]} if (worst := worst_fall(points)) else None,
        "rent_or_own": rent_against_own(plan, today, ledger, books),
        "circulated": circulated_tables(place, chips, books, points, plan, today),
        "by_flops": saved(savings.flops_as_seconds(models), place) if models else None,
        "validation": tables.errors(validate(points)),
        "ledger": tables.ledger(ledger, books, points, today, plan.stale_days),
    }
    write_json(place.write("artifacts/plan.json"), rounded(content))
    headline = tables.headline(content)
    write_json(place.write("metrics/plan.json"), rounded(headline))
    for name, text in tables.plots(content).items():
        write_atomically(place.write(f"plots/plan/{name}.csv"), text)
    timings = what_stands(place.read("measurements/profile.json"))
    clocked = money_of(timings, models, chips[plan.chip], rates, plan, place) if timings and models else None
    if clocked:
        write_json(place.write("measurements/plan.json"), rounded(clocked))
    answer = tables.for_people(rounded(content), clocked and rounded(clocked))
    run.metrics(headline)
    run.text("answer.txt", answer)
    print(answer, flush=True)


def day_of(today: str, place: Place) -> datetime.date:
    if today != "now":
        return datetime.date.fromisoformat(today)
    if place.out == place.root:
        raise Refusal("plan.today = now: what DVC keeps must not depend on the day: write a date, as YYYY-MM-DD")
    return datetime.date.today()


def what_stands(path: Path) -> dict | None:
    """A question needs no model of ours; under DVC the file is there."""
    return read_json(path) if path.exists() else None


def is_move(before: question.Answer, after: question.Answer) -> bool:
    return after.chips == before.chips and after.provider != before.provider


def rent_against_own(plan, today: datetime.date, ledger: Ledger, books: Books) -> dict | None:
    """The grid, and each dated purchase replayed over the rents that followed it. None: the ledger cannot own it."""
    if not ready_to_own(books, plan.chip, today):
        if OWN in plan.provider:
            owning(books, plan.chip, today, plan.stale_days)  # says what is missing
        return None
    owned = owning(books, plan.chip, today, plan.stale_days)
    paths = {name: rent_path(ledger, plan.chip, plan.terms, plan.stale_days, name) for name in ledger.providers}
    paths = {"median of providers": rent_path(ledger, plan.chip, plan.terms, plan.stale_days)} | paths
    paths = {name: kept for name, path in paths.items() if len(kept := [step for step in path if step[0] <= today]) > 1}
    years = sorted({plan.years, *plan.grid.years})
    grid = rent_or_own.grid(owned, plan.grid.utilization, plan.grid.dollars_per_chip_hour, years)
    replays = []
    for row in (row for row in books.capital if row.chip == plan.chip and row.date is not None):
        bought = dataclasses.replace(owned, capital_dollars=row.dollars_per_chip * owned.network_factor)
        for name, path in paths.items():
            if past := rent_or_own.replay(bought, row.day, path, plan.utilization):
                replays.append({"row": row.id, "path": name} | dataclasses.asdict(past))
    return {
        "owned": dataclasses.asdict(owned),
        "grid": grid,
        "paths": {name: [[day.isoformat(), dollars] for day, dollars in path] for name, path in paths.items()},
        "replays": [each | {key: each[key].isoformat() for key in ("bought", "until")} for each in replays],
    }


def circulated_tables(place: Place, chips: dict[str, Chip], books: Books, points: list[Point], plan, today) -> dict:
    rows, assumed = circulated.load_claims(place.read("conf/plan/circulated.yaml"))
    chip, owned = chips[assumed.chip], owning(books, assumed.chip, today, plan.stale_days)
    cells = circulated.recomputed(rows, assumed, chip, owned, worst_fall(points))
    networks = circulated.networks(rows["throughput"], assumed, chip)
    return {
        "cells": [dataclasses.asdict(cell) for cell in cells],
        "networks": {name: [dataclasses.asdict(fit) for fit in fits] for name, fits in networks.items()},
        "assumed": assumed.model_dump(),
    }


def saved(seconds: dict, place: Place) -> dict:
    """Seconds per token of each model, and after how many tokens distilling has paid for itself."""
    pretrained, distilled = (read_json(place.read(f"metrics/{stage}.json")) for stage in ("pretrain", "distill"))
    trained_here = None if pretrained.get("source") == "folder" else pretrained["tokens"]
    pays = savings.distilling_pays(seconds, trained_here, distilled["tokens"])
    return {"seconds_per_token": seconds, "distilling_pays_after_tokens": pays}


def money_of(timings: dict, models: dict, chip: Chip, rates: dict, plan, place: Place) -> dict:
    """What the measured times cost: on this machine, and carried to the chip that is asked for, at each provider."""
    device = timings["machine"]["device"]
    taken = savings.measured_seconds(timings)
    own = {name: taken[name] for name in COMPRESSED}
    same = chip.name.split("-")[0] in re.split(r"[\s-]", device)
    carried = own if same else savings.on_chip(own, models, chip.peak("bf16"), plan.mfu)
    prices = {name: rate.dollars for name, rate in rates.items() if rate.dollars}
    price = plan.machine_dollars_per_hour
    return {
        "device": device,
        "measured_on_chip": same,
        "machine_dollars_per_hour": price,
        "machine": saved(own, place)
        | {"dollars_per_million_tokens": savings.money(own, savings.exactly(price)) if price else None},
        "chip": {
            "seconds_per_token": carried,
            "dollars": {to: savings.money(carried, at) for to, at in prices.items()},
        },
    }


def listed(arguments: list[str]) -> list[str]:
    """plan.provider=aws,own is a list, as Hydra writes [aws,own]; in a sweep (-m) it is a job for each."""
    if {"-m", "--multirun"} & {*arguments}:
        return arguments
    return [re.sub(r"^(\+*plan\.(?:provider|chips)=)([^\[,]+,[^\[]*)$", r"\1[\2]", word) for word in arguments]


def validate_points(words: list[str]) -> None:
    """Prints the planner's error on each point of the registry, or of a file of rows in its format, and writes the same
    table to outputs/plan/."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--points=") else [word])]
    if words and (words[0] != "--points" or len(words) != 2 or not words[1]):
        raise Refusal(f"validate {' '.join(words)}: usage: {VALIDATE_USAGE}")
    table = validate(load_points(words[1]) if words else load_points()).markdown()
    written = VALIDATIONS / (f"validation-{Path(words[1]).resolve().stem}.md" if words else "validation.md")
    written.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(written, f"{table}\n")
    print(table, flush=True)
    print(f"offramp: the table is in {written}", file=sys.stderr)


def validate_from_command_line(words: list[str]) -> int | str:
    """The exit code of a process, or the line that it ends with."""
    fill_closed_streams()
    shield_output()  # a reader such as `head` may leave early, and the table is in its file
    try:
        with disk_refusals("plan validate", VALIDATIONS):
            if {"-h", "--help"} & {*words}:
                print(f"usage: {VALIDATE_USAGE}")
            else:
                validate_points(words)
    except Refusal as refusal:
        return " ".join(f"offramp: {refusal}".split())
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["validate"]:
        sys.exit(validate_from_command_line(sys.argv[2:]))
    sys.argv[1:] = listed(sys.argv[1:])
    run_stage(main, "plan", SECTIONS)

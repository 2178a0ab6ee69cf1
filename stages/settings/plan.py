"""The settings of the planner: the question, and the figures that it needs beside its ledgers."""

import datetime
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from stages.settings.bounds import Count, Keep, NotStrict, Positive, Section, Word
from stages.settings.reading import refuse

Years = Annotated[int, Field(ge=1, le=30)]
OneOrMore = BeforeValidator(lambda value: [value] if isinstance(value, (str, int, float)) else value)  # one of a sweep
Day = Annotated[str, Field(pattern=r"^(now|\d{4}-\d{2}-\d{2})$")]


class Grid(Section):
    """The table of rent against own."""

    utilization: Annotated[tuple[Keep, ...], NotStrict]
    dollars_per_chip_hour: Annotated[tuple[Positive, ...], NotStrict]
    years: Annotated[tuple[Years, ...], NotStrict]


class Plan(Section):
    """What is asked of the planner; prices, chips and published runs are rows in conf/plan/."""

    model: Word  # a name in conf/plan/models.yaml
    tokens: Annotated[float, Field(gt=0, le=1e18)]  # to train on
    chip: Word
    chips: Annotated[tuple[Count, ...], NotStrict, OneOrMore]
    provider: Annotated[tuple[Word, ...], NotStrict, OneOrMore]  # a name in conf/plan/prices.yaml, or own
    leave: Word  # the provider that is left
    terms: Literal["on_demand", "spot", "1_month", "1_year", "3_years", "capacity_block"]
    today: Day  # from which the age of prices counts
    stale_days: Annotated[int, Field(ge=1, le=100_000)]
    utilization: Keep  # share of the hours in which an owned chip works
    years: Years  # of an owned chip's life
    grid: Grid
    mfu: Keep  # where nothing is measured
    failures_per_node_day: Annotated[float, Field(gt=0, le=1000)]
    restart_seconds: Annotated[float, Field(ge=0, le=1e9)]
    checkpoint_bytes_per_parameter: Annotated[float, Field(gt=0, le=1000)]
    checkpoint_bytes_per_second_per_node: Annotated[float, Field(gt=0, le=1e18)]
    bytes_per_token: Annotated[float, Field(gt=0, le=1000)]
    link_bytes_per_second: Annotated[float, Field(gt=0, le=1e18)]  # between the old place and the new
    egress_dollars_per_gigabyte: Annotated[float, Field(ge=0, le=1e9)] | None
    machine_dollars_per_hour: Positive | None  # of the machine that `profile` ran on


def plan_rules(settings):
    plan = settings.plan
    for key in ("chips", "provider"):
        if not getattr(plan, key):
            refuse(f"plan.{key}", [], "must name at least one")
    for key in ("utilization", "dollars_per_chip_hour", "years"):
        if not getattr(plan.grid, key):
            refuse(f"plan.grid.{key}", [], "must name at least one")
    if plan.today != "now":
        try:
            datetime.date.fromisoformat(plan.today)
        except ValueError:
            refuse("plan.today", plan.today, "must be a day that exists, as YYYY-MM-DD, or now")

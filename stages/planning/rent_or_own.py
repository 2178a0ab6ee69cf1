"""Rent against own: dollars per hour of use, months to break even, and the same replayed over the rents of the past.

`utilization` is the share of the hours in which the chip does work that would otherwise be rented. Rent is paid for
those hours only; an owned chip costs the same whether it works or not.
"""

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from stages.planning.ownership import Owning

HOURS_PER_YEAR = 8760.0
HOURS_PER_MONTH = 730.0


def residual_share(value_kept_per_year: float, years: float) -> float:
    """Share of the price that a chip still fetches after so many years, falling by the same factor each year."""
    return value_kept_per_year**years


def annuity_dollars(capital_dollars: float, cost_of_capital: float, years: float, residual: float) -> float:
    """Equal payments at the end of each year whose present value is the capital less that of its resale.

    A = (C - R C / (1 + r)^n) r / (1 - (1 + r)^-n); straight line (C - R C) / n at r = 0. The capital recovery factor
    of engineering economics (e.g. Newnan et al., "Engineering Economic Analysis"). r is a year's rate.
    """
    if cost_of_capital == 0:
        return capital_dollars * (1 - residual) / years
    discounted = -math.expm1(-years * math.log1p(cost_of_capital))  # 1 - (1 + r)^-n, exact for small r too
    recovery = cost_of_capital / discounted  # first: a tiny rate times dollars would be rounded, a ratio of the two not
    return capital_dollars * (1 - residual * (1 - discounted)) * recovery


def power_dollars_per_hour(owned: Owning) -> float:
    """kW x PUE x dollars per kWh."""
    return owned.kilowatts * owned.pue * owned.dollars_per_kilowatt_hour


def running_dollars_per_hour(owned: Owning) -> float:
    """What an owned chip costs each hour of the year beside its capital: staff, upkeep and power."""
    yearly = owned.staff_dollars_per_year + owned.upkeep_share_per_year * owned.capital_dollars
    return yearly / HOURS_PER_YEAR + power_dollars_per_hour(owned)


def own_dollars_per_hour(owned: Owning, years: float, utilization: float) -> float:
    """Dollars per hour of use over a life of `years`: (annuity / 8760 + running) / utilization."""
    residual = residual_share(owned.value_kept_per_year, years)
    yearly = annuity_dollars(owned.capital_dollars, owned.cost_of_capital_per_year, years, residual)
    return (yearly / HOURS_PER_YEAR + running_dollars_per_hour(owned)) / utilization


def break_even_months(owned: Owning, rent_dollars_per_hour: float, utilization: float) -> float | None:
    """Months after which the rent not paid has returned the capital: C / ((rent u - running) 730).

    Without interest and resale. None where running alone costs what the rent would.
    """
    saved_per_hour = rent_dollars_per_hour * utilization - running_dollars_per_hour(owned)
    return owned.capital_dollars / (saved_per_hour * HOURS_PER_MONTH) if saved_per_hour > 0 else None


def break_even_utilization(owned: Owning, rent_dollars_per_hour: float, years: float) -> float:
    """Share of the hours from which on owning is cheaper; above 1: renting always is."""
    return own_dollars_per_hour(owned, years, 1.0) / rent_dollars_per_hour


def grid(
    owned: Owning, utilizations: Sequence[float], rents: Sequence[float], years: Sequence[float]
) -> dict[str, Sequence]:
    """Tables over utilization (rows): cost of an owned hour by years of life, and months to break even by rent."""
    return {
        "utilizations": utilizations,
        "rents": rents,
        "years": years,
        "own_dollars_per_hour": [[own_dollars_per_hour(owned, n, u) for n in years] for u in utilizations],
        "break_even_months": [[break_even_months(owned, rent, u) for rent in rents] for u in utilizations],
    }


@dataclass(frozen=True)
class Replay:
    """A purchase of the past against the rents that were then paid."""

    bought: datetime.date
    until: datetime.date  # the last day whose rent is known
    returned_share: float  # of the capital, by rent saved less running costs, until then
    value_left_share: float  # of the capital, what the chip still fetches then
    months: float | None  # until all of it was returned; None: not by then


def replay(
    owned: Owning, bought: datetime.date, path: Sequence[tuple[datetime.date, float]], utilization: float
) -> Replay | None:
    """Adds up rent saved less running costs over a path of (day, dollars per chip-hour), each price until the next.

    Starts at the purchase, or at the first day of the path where that is later. None where the path ends before it.
    """
    start = max(bought, path[0][0])
    if start >= path[-1][0]:
        return None
    returned, months = 0.0, None
    for (day, rent), (following, _) in pairwise(path):
        begin = max(day, start)
        if following <= begin:
            continue
        saved_per_day = 24 * (rent * utilization - running_dollars_per_hour(owned))
        days = (following - begin).days
        if months is None and 0 < owned.capital_dollars - returned <= saved_per_day * days:
            until_then = (begin - start).days + (owned.capital_dollars - returned) / saved_per_day
            months = until_then * 24 / HOURS_PER_MONTH
        returned += saved_per_day * days
    age_years = (path[-1][0] - bought).days * 24 / HOURS_PER_YEAR
    left = residual_share(owned.value_kept_per_year, age_years)
    return Replay(bought, path[-1][0], returned / owned.capital_dollars, left, months)


def cheaper(own_low: float, own_high: float, rent_low: float, rent_high: float) -> str:
    """own or rent where the intervals do not meet, else open."""
    if own_high < rent_low:
        return "own"
    return "rent" if rent_high < own_low else "open"

"""A figure with the ends between which it lies, and sums, products and quotients of such figures by their corners."""

from typing import NamedTuple


class Range(NamedTuple):
    value: float
    low: float
    high: float

    def named(self, name: str) -> dict[str, float]:
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


def exactly(value: float) -> Range:
    return Range(value, value, value)


def plus(one: Range, other: Range) -> Range:
    return Range(one.value + other.value, one.low + other.low, one.high + other.high)


def times(one: Range, other: Range) -> Range:
    """Of figures that are not negative."""
    return Range(one.value * other.value, one.low * other.low, one.high * other.high)


def over(one: Range, other: Range) -> Range:
    """Of figures that are not negative; the divisor is above zero."""
    return Range(one.value / other.value, one.low / other.high, one.high / other.low)

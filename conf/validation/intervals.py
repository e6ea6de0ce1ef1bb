"""Intervals of numbers that a key may have."""

from dataclasses import dataclass
from math import inf


@dataclass(frozen=True)
class Interval:
    """The numbers from `low` to `high`; an end is left out where it is open."""

    low: float
    high: float = inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below and value != inf

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.low_open else f"at least {self.low:g}"
        if self.high == inf:
            return low
        return f"{low} and " + ("below" if self.high_open else "at most") + f" {self.high:g}"


COUNT = Interval(1)  # a number of things of which there must be one
COUNT_OR_OFF = Interval(0)
POSITIVE = Interval(0, low_open=True)
SHARE = Interval(0, 1)
SHARE_BELOW_ONE = Interval(0, 1, high_open=True)

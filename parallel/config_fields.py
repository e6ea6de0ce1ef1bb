"""The definition of one config key: default, meaning, unit, range, choices and "off" value.

A field of a configuration's dataclass reads

    layers: int = key(4, "Blocks of the decoder", at_least=1)
    kv_heads: int = key(0, "Key/value heads", off=0, off_means="as many as heads", at_least=0)
    schedule: str = key("cosine", "Learning rate over the steps", choices=("cosine", "constant"))

Validation, `--help` and docs/keys.md read the field's metadata; no table repeats it.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass
from math import inf
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Interval:
    """An interval of finite numbers; `low_open` and `high_open` exclude an end."""

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


@dataclass(frozen=True)
class KeyFacts:
    """The metadata of one config key."""

    meaning: str
    unit: str  # empty = none, or given in `meaning`
    off: Any  # the value that disables the key or leaves it open; None = there is none
    off_means: str  # effect of the "off" value
    choices: dict[str, str]  # allowed values with their meanings; empty = any
    interval: Interval | None  # allowed range of the number, or of each list item; None = any

    def describe_values(self) -> str:
        """Format unit, choices or range, and "off" value; empty = any value."""
        shown = [name for name in self.choices if name != self.off]
        choices = " | ".join(
            f"{name} = {self.choices[name]}" if self.choices[name] else name for name in shown
        )
        values = [self.unit, choices, str(self.interval or "")]
        value = "empty" if self.off in ("", []) else value_text(self.off)
        off = "" if self.off is None else f"{value} = {self.off_means}"
        return "; ".join(filter(None, [", ".join(filter(None, values)), off]))


def key(
    default: T,
    meaning: str,
    *,
    unit: str = "",
    off: T | None = None,
    off_means: str = "off",
    choices: Iterable[str] | Mapping[str, str] = (),
    at_least: float | None = None,
    above: float | None = None,
    at_most: float = inf,
    below: float = inf,
) -> T:
    """Return the dataclass field of one config key.

    `choices` are names, or names with their meanings. The range has a lower bound, `at_least`
    (inclusive) or `above` (exclusive), and optionally an upper one, `at_most` or `below`.
    """
    low = at_least if above is None else above
    interval = None
    if low is not None:
        high, open_ends = min(at_most, below), (above is not None, below < at_most)
        interval = Interval(low, high, *open_ends)
    named = dict(choices) if isinstance(choices, Mapping) else dict.fromkeys(choices, "")
    metadata = {"key": KeyFacts(meaning, unit, off, off_means, named, interval)}
    if isinstance(default, list):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def key_facts(schema: type, name: str) -> KeyFacts:
    """Return the key metadata of the field `name` of a dataclass."""
    return facts_of(next(field for field in fields(schema) if field.name == name))


def facts_of(field: Field) -> KeyFacts:
    """Return the key metadata of a field."""
    facts: KeyFacts = field.metadata["key"]
    return facts


def known_keys(schema: type, prefix: str = "") -> dict[str, Field]:
    """Return all dotted keys of a dataclass with their fields, nested sections last."""
    found: dict[str, Field] = {}
    nested: dict[str, Field] = {}
    for entry in fields(schema):
        if isinstance(entry.type, type) and is_dataclass(entry.type):
            nested |= known_keys(entry.type, f"{prefix}{entry.name}.")
        else:
            found[prefix + entry.name] = entry
    return found | nested


def value_at(config: Any, key: str) -> Any:
    """Return the value of a dotted key."""
    for name in key.split("."):
        config = getattr(config, name)
    return config


def value_text(value: Any) -> str:
    """Format a value as on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ",".join(map(value_text, value)) + "]"
    return str(value)

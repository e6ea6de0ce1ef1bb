"""Read and write what `launch/plan.py calibrate` has measured."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from parallel.errors import ConfigError
from trainer.atomic_files import write_atomically
from trainer.plan.constants import Constants, Fit
from trainer.plan.machine import Machine, host_cores, host_memory

T = TypeVar("T")
FORMAT = 1
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """Rates and constants of one kind of device under one precision."""

    kind: str  # name in ACCELERATORS
    device: str  # as the device calls itself
    precision: str
    ranks_per_host: int
    cores: int  # of a host
    machine: Machine
    fit: Fit
    date: str
    measured: Mapping[str, Any] = field(default_factory=dict)  # against the fitted model, to read


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write a file of measurements; ConfigError if it cannot be written."""
    text = json.dumps({"format": FORMAT} | asdict(calibration), indent=1)
    try:
        write_atomically(path, f"{text}\n")
    except OSError as error:
        raise ConfigError(
            f"calibration={path} cannot be written ({error.strerror}); name another file"
        ) from error


def load_calibration(path: Path) -> Calibration | None:
    """Return what a file says, None if there is none; ConfigError if it is damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        machine = _numbers_of(Machine, values["machine"])
        constants = _numbers_of(Constants, values["fit"]["constants"])
        fit = _numbers_of(Fit, values["fit"] | {"constants": constants})
        found = Calibration(**values | {"machine": machine, "fit": fit})
        rates = machine.products, machine.attention, machine.memory_bandwidth, machine.link
        if min(*rates, machine.network, machine.memory, found.ranks_per_host, found.cores) <= 0:
            raise ValueError("a rate is 0")
        return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{path} is no calibration ({error!r}); make it again with python launch/plan.py "
            "calibrate, or remove it to plan without"
        ) from error


def _numbers_of(kind: type[T], values: Mapping[str, Any]) -> T:
    """Build a dataclass; ValueError naming a number of it that is none."""
    for part in fields(kind):  # type: ignore[arg-type]
        value = values.get(part.name)
        if part.type is float and not (isinstance(value, int | float) and 0 <= value < 1e30):
            raise ValueError(f"{part.name} is {value!r}")
    return kind(**values)


def read_calibration(
    path: Path, kind: str, precision: str, ranks_per_host: int
) -> tuple[Machine, Fit] | None:
    """Return the machine and the constants that were measured on such devices.

    None where there is no file, and, with a line in the log, where it is of another device or
    precision. Raises ConfigError for a damaged file.
    """
    found = load_calibration(path)
    if found is None:
        return None
    if (found.kind, found.precision) != (kind, precision):
        log.warning(
            "%s is of %s in %s, not of %s in %s: not used",
            path,
            found.kind,
            found.precision,
            kind,
            precision,
        )
        return None
    machine = replace(found.machine, linked=max(found.machine.linked, ranks_per_host))
    if kind == "cpu":
        machine = _shared_cores(machine, found, ranks_per_host)
    return machine, found.fit


def _shared_cores(machine: Machine, found: Calibration, ranks: int) -> Machine:
    """Return a CPU's machine for another number of ranks: more of them than cores share these."""
    share = max(1.0, found.ranks_per_host / found.cores) / max(1.0, ranks / host_cores())
    return replace(
        machine,
        products=machine.products * share,
        attention=machine.attention * share,
        memory_bandwidth=machine.memory_bandwidth * share,
        link=machine.link * share,
        network=machine.network * share,
        linked=ranks,
        memory=host_memory() / ranks,
    )

"""List the checks, with what each finds and the band it is expected in; free of torch."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


class SkippedError(Exception):
    """A check that cannot run here; the message says why."""


@dataclass(frozen=True)
class Band:
    """The range that a value is expected in, bounds included; None = open."""

    least: float | None = None
    most: float | None = None
    unit: str = ""
    on_cpu: bool = True  # whether a CPU is held to it too

    def holds(self, value: float | str) -> bool:
        """Return whether a value is inside; text, which says what went wrong, never is."""
        if isinstance(value, str) or math.isnan(value):
            return False
        above = self.least is None or value >= self.least
        return above and (self.most is None or value <= self.most)

    def __str__(self) -> str:
        if self.least is not None and self.least == self.most:
            text = f"{self.least:g}"
        elif self.least is None:
            text = "" if self.most is None else f"≤ {self.most:g}"
        elif self.most is None:
            text = f"≥ {self.least:g}"
        else:
            text = f"{self.least:g} to {self.most:g}"
        return f"{text} {self.unit}".strip()


@dataclass(frozen=True)
class Finding:
    """A value that a check has found; `facts` are further numbers that belong to it."""

    name: str
    value: float | str
    band: Band
    facts: Mapping[str, Any] = field(default_factory=dict)

    def row(self, device: str, seconds: float) -> dict[str, Any]:
        """Return the entry of the report; `ok` is None where this device is not judged."""
        judged = device == "cuda" or self.band.on_cpu
        return {
            "name": self.name,
            "ok": self.band.holds(self.value) if judged else None,
            "value": self.value,
            "expected": str(self.band) if judged else "",
            "unit": self.band.unit,
            "seconds": round(seconds, 2),
            "facts": dict(self.facts),
        }


def failed(name: str, why: str, ok: bool | None = False, seconds: float = 0.0) -> dict[str, Any]:
    """Return the entry of a check that has not come to an end; ok=None: it was not run."""
    row = asdict(Finding(name, why, Band()))
    del row["band"]
    return row | {"ok": ok, "expected": "", "unit": "", "seconds": round(seconds, 2)}


@dataclass(frozen=True)
class Check:
    """A process with its own time limit; those that measure time run alone."""

    seconds: float
    alone: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)  # on a GPU


# In the order of their start. `child.py` has their functions.
CHECKS: dict[str, Check] = {
    "roofline": Check(40, alone=True),
    "compile bf16": Check(150),
    "compile fp8": Check(150),
    "compiled steps": Check(120),
    "fp32": Check(60),
    "half precision": Check(90),
    "overflow": Check(60),
    "deterministic": Check(60, environment={"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}),
    "8-bit memory": Check(60),
    "kernels": Check(120),
    "steps without waiting": Check(120),
    "collectives": Check(60),
    "replicas and shards": Check(90),
    "races": Check(90, environment={"TORCH_CUDA_SANITIZER": "1"}),
    "sleeping kernel": Check(60, alone=True),
    "llama-1b eager": Check(60, alone=True),
    "llama-1b compiled": Check(90, alone=True),
    "llama-1b documents": Check(90, alone=True),
    "llama-1b fp8": Check(100, alone=True),
    "llama-8b width": Check(90, alone=True),
    "gpt2": Check(75, alone=True),
    "vit-l16": Check(75, alone=True),
    "save": Check(100, alone=True),
}

"""Keep what was planned for a run in its folder, to tell it beside what was measured."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.atomic_files import write_atomically

NAME = "plan.json"


@dataclass(frozen=True)
class PlanRecord:
    """The planned memory and step time of a run's fullest rank."""

    device: str
    layout: str  # as words of a command line
    memory_gib: float  # of tensors
    device_gib: float
    terms_gib: dict[str, float]
    step_seconds: float  # 0.0 = the device's rates are not known
    median_error: float  # relative, of the step; 0.0 = not known
    calibrated: bool

    def write(self, run_dir: Path) -> None:
        """Write it into a run's folder."""
        write_atomically(run_dir / NAME, json.dumps(asdict(self), indent=1) + "\n")


def read_plan(run_dir: Path) -> PlanRecord | None:
    """Return what was planned for a run; None if its folder does not say, or nothing readable."""
    try:
        plan = PlanRecord(**json.loads((run_dir / NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    numbers = (plan.memory_gib, plan.device_gib, plan.step_seconds, plan.median_error)
    return plan if all(isinstance(number, int | float) for number in numbers) else None

"""The TensorBoard mirror of metrics.jsonl; imports torch, in the mirror's process only."""

import json
import textwrap
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from trainer.metrics.jsonl import kind_of


def to_tensorboard(record: dict[str, Any]) -> dict[str, float]:
    """Return a record's numbers by TensorBoard tag, whose prefix makes its section."""
    kind = kind_of(record) or "train"
    hidden = ("step", "time")  # the x axis; a number with too many digits for float32
    numbers = {k: v for k, v in record.items() if isinstance(v, int | float)}
    return {f"{kind}/{k}": v for k, v in numbers.items() if k not in hidden}


class TensorBoard:
    """Event files in a folder; steps that an earlier start wrote beyond this one's are purged."""

    def __init__(self, folder: Path, start_step: int, resolved: dict[str, Any]):
        # Records up to the resumed step stay; later ones are written again.
        first = start_step + 1 if start_step else 0
        self._writer = SummaryWriter(str(folder), purge_step=first, flush_secs=10)
        self.finish = self._writer.close
        shown = textwrap.indent(json.dumps(resolved, indent=1), "    ")
        self._writer.add_text("config", shown, first)

    def log_record(self, record: dict[str, Any]) -> None:
        """Log the numbers of a record."""
        for name, value in to_tensorboard(record).items():
            self._writer.add_scalar(name, value, record["step"])

"""wandb as a mirror of metrics.jsonl, in a process of its own that cannot hold up training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.config import MetricsConfig


class Tracker:
    def __init__(self, config: MetricsConfig, run_dir: Path, resolved: dict[str, Any],
                 say: Callable[[str], None]):
        pass

    def poll(self) -> None:
        pass

    def close(self) -> None:
        pass

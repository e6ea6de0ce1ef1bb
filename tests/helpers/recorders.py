"""Recorders on a clock that a test moves, and what they have written."""

import io
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from trainer.config.train import MetricsConfig
from trainer.metrics.recorder import Recorder


class FakeClock:
    """A clock that stands still until told."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def make(run_dir: Path, **changes: Any) -> Recorder:
    options: dict[str, Any] = {
        "config": MetricsConfig(every=2),
        "run_dir": run_dir,
        "first": True,
        "steps": 1000,
        "start_step": 0,
        "resolved": {"seed": 1},
        "flops_per_token": 2e9,
        "devices": 2,
        "device": torch.device("cpu"),
        "precision_name": "fp32",
        "clock": FakeClock(),
        "console": Console(file=io.StringIO()),
    }
    return Recorder(**(options | changes))


def lines(run_dir: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (run_dir / "metrics.jsonl").read_text()
    found = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    return [line for line in found if line.get("event") != "goodput"]


def shown(recorder: Recorder) -> str:
    file = recorder._display._console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()

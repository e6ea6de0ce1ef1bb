"""Recorders on a clock that a test moves, and what they have written."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from trainer.config.train import MetricsConfig
from trainer.metrics.recorder import Recorder, RunInfo


class FakeClock:
    """A clock that stands still until told."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def make(run_dir: Path, **changes: Any) -> Recorder:
    options: dict[str, Any] = {
        "config": MetricsConfig(every=2),
        "first": True,
        "clock": FakeClock(),
        "console": Console(file=io.StringIO()),
    }
    run = RunInfo(
        run_dir,
        steps=1000,
        start_step=0,
        resolved={"seed": 1},
        flops_per_token=2e9,
        unit="tok",
        precision_name="fp32",
        device=torch.device("cpu"),
        devices=2,
    )
    of_run = {key: value for key, value in changes.items() if key not in options}
    options |= {key: value for key, value in changes.items() if key in options}
    return Recorder(run=replace(run, **of_run), **options)


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

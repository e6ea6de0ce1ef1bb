"""Paths of a run's checkpoints, and the retention rule."""

import math
import os
import re
from pathlib import Path


def checkpoint_path(run_dir: str | Path, step: int) -> Path:
    """Return the folder of the checkpoint at `step`."""
    return Path(run_dir) / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(run_dir: str | Path) -> list[tuple[int, Path]]:
    """Return the published checkpoints of a run as (step, folder), oldest first by step.

    The step in the name alone decides which is newest: there is no pointer that could be wrong.
    """
    folder = Path(run_dir) / "checkpoints"
    while True:
        named = [(re.fullmatch(r"step-(\d+)", path.name), path) for path in folder.glob("step-*")]
        found = sorted((int(match[1]), path) for match, path in named if match and path.is_dir())
        # Retention may remove one after it was listed: its successor is published by then.
        if all(os.path.lexists(path) for _, path in named):
            return found


def find_leftovers(run_dir: str | Path) -> list[Path]:
    """Return the folders of checkpoints whose writing or removal was interrupted by a kill."""
    return sorted((Path(run_dir) / "checkpoints").glob(".step-*"))


def steps_to_keep(losses: dict[int, float | None], keep: int, best: bool, every: int) -> set[int]:
    """Return the steps whose valid checkpoints are retained, given the evaluation losses.

    Retained are the newest `keep` (0 = all), every `every`-th step (0 = off) and, with `best`, the
    one with the smallest finite loss; the oldest of equal ones.
    """
    steps = sorted(losses)
    if not keep:
        return set(steps)
    chosen = set(steps[-keep:]) | {step for step in steps if every and step % every == 0}
    measured = {s: loss for s, loss in losses.items() if loss is not None and math.isfinite(loss)}
    if best and measured:
        chosen.add(min(measured, key=lambda step: (measured[step], step)))
    return chosen

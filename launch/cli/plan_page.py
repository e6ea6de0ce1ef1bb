"""A plan as files: JSON, and a page with the frontier of memory and time."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.cli.asked import Asked
from launch.cli.plan_text import layout_words, run_cost
from parallel.errors import ConfigError
from trainer.atomic_files import write_atomically
from trainer.plan.layout import layout_name
from trainer.plan.machine import GIB
from trainer.plan.result import Plan, Planned
from trainer.report.scatter_page import Point, scatter_page

MOST_POINTS = 1500  # layouts in the picture: the fastest, and others evenly


def write_plan(asked: Asked, plans: Sequence[Plan], path: Path) -> None:
    """Write the plan as JSON, and beside it a page of the same name; ConfigError if it cannot be.

    Both are made before either is written.
    """
    text = json.dumps(plan_values(asked, plans), indent=1) + "\n"
    page = _page(asked, plans[0])
    try:
        write_atomically(path, text)
        write_atomically(path.with_suffix(".html"), page)
    except OSError as error:
        raise ConfigError(
            f"json={path} cannot be written ({error.strerror}); name another file"
        ) from error


def plan_values(asked: Asked, plans: Sequence[Plan]) -> dict[str, Any]:
    """Return the plan as plain values: seconds and bytes."""
    planner, fit = asked.planner, asked.planner.fit
    return {
        "model": asked.title,
        "device": planner.machine.title,
        "precision": planner.precision,
        "calibrated": fit.calibrated,
        "median_error": fit.median_error,
        "ninetieth_error": fit.ninetieth_error,
        "plans": [_plan_values(asked, plan) for plan in plans],
    }


def _plan_values(asked: Asked, plan: Plan) -> dict[str, Any]:
    return {
        "ranks": plan.ranks,
        "legal": plan.found.legal,
        "fitting": len(plan.found.candidates),
        "named": None if plan.named is None else _layout_values(asked, plan.named),
        "proposed": None if plan.proposed is None else _layout_values(asked, plan.proposed),
        "fastest": [_layout_values(asked, planned) for planned in plan.fastest],
        "refused": [
            {
                "words": layout_words(refused.layout),
                "memory_bytes": refused.card.total,
                "memory_terms": refused.card.named(),
                "nearest": None if refused.nearest is None else layout_words(refused.nearest),
            }
            for refused in plan.refused
        ],
    }


def _layout_values(asked: Asked, planned: Planned) -> dict[str, Any]:
    planner, seconds = asked.planner, planned.time.total
    days, hours, dollars = run_cost(asked, planned)
    return {
        "words": layout_words(planned.layout),
        "layout": planned.layout._asdict(),
        "fits": planner.fits(planned.layout),
        "memory_bytes": planned.card.total,
        "memory_stage": planned.card.stage,
        "memory_terms": {**planned.card.named(), "reserve": planned.card.reserve},
        "step_seconds": seconds,
        "step_terms": planned.time.terms(),
        "mfu": planner.times.mfu(seconds, planned.layout.ranks),
        "tokens_per_second": planner.work.samples * planner.work.tokens / seconds,
        "days": days,
        "device_hours": hours,
        "dollars": dollars,
    }


def _page(asked: Asked, plan: Plan) -> str:
    """Return the page: every layout a point, the chosen ones named."""
    planner, candidates = asked.planner, plan.found.candidates
    every = max(1, 2 * len(candidates) // MOST_POINTS)
    drawn = candidates[: MOST_POINTS // 2] + candidates[MOST_POINTS // 2 :: every]
    points = [
        Point(planner.memory(c.layout) / GIB, c.seconds, layout_name(c.layout)) for c in drawn
    ]
    chosen = [("proposed", plan.proposed), ("named", plan.named)]
    chosen += [(str(number), planned) for number, planned in enumerate(plan.fastest, 1)]
    marks = [
        Point(p.card.total / GIB, p.time.total, f"{name}: {layout_name(p.layout)}", name)
        for name, p in chosen
        if p is not None
    ]
    ranks = f"{plan.ranks:,} × {planner.machine.title}"
    return scatter_page(
        f"{asked.title} on {ranks}",
        f"{plan.found.legal:,} legal layouts, {len(candidates):,} fit. Times ± "
        f"{planner.fit.median_error:.0%}.",
        ("GiB of a card", "seconds of a step"),
        points,
        marks,
        limit=planner.machine.memory / GIB,
    )

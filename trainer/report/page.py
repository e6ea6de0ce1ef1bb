"""An HTML report of one or several runs: curves, events, wall time, differing configurations.

One self-contained file that needs neither network nor server. The contents of a run's folder are
untrusted text: all of it is escaped.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from trainer.atomic_files import write_atomically
from trainer.config.train import ConfigError
from trainer.metrics.console import format_duration, format_number
from trainer.metrics.goodput import LOST
from trainer.metrics.jsonl import is_number
from trainer.report.run_history import (
    History,
    format_time,
    read_history,
    read_pictures,
    runs_in,
)
from trainer.report.svg_chart import COLOURS, Curve, Mark, curve_figure, event_lanes
from trainer.run.plan_record import read_plan

NAME = "report.html"
TEMPLATES = Environment(
    loader=PackageLoader("trainer.report", "."),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ABSENT = "–"
TITLED = 3  # number of runs named in the title
OWN = ("run_dir",)  # keys that differ between any two runs
KINDS = {"useful": "useful steps", **LOST, "down": "between starts"}
# Key of a training line → title of its chart, how it is drawn, and its scale.
CURVES = {
    "lr": ("Learning rate", "line", "zero"),
    "grad_norm": ("Gradient norm, before clipping", "line", "log"),
    "tokens_per_second": ("Throughput, {unit} per second", "smooth", "zero"),
    "mfu": ("Model FLOPs utilisation, share of the peak", "line", "zero"),
    "memory_gib": ("Peak memory of the first rank, GiB", "line", "zero"),
    "data_wait_share": ("Waiting for data, share of the time", "line", "zero"),
}


@dataclass(frozen=True)
class BarPart:
    """One kind of a run's wall time."""

    kind: str  # of KINDS
    share: float
    text: str


@dataclass(frozen=True)
class Bar:
    """All of a run's wall time."""

    run: int
    time: str
    summary: str
    parts: list[BarPart]


def write_report(folders: Sequence[Path], output: Path | None = None) -> tuple[Path, list[str]]:
    """Write the report of these runs or sweeps, by default into the first folder; return its notes.

    Raises ConfigError if a folder holds no run, or if the page cannot be written.
    """
    run_dirs = dict.fromkeys(run for folder in folders for run in runs_in(folder) or [folder])
    histories = [read_history(run_dir) for run_dir in run_dirs]
    path = output or folders[0] / NAME
    # File names may be any bytes: undecodable ones are replaced.
    text = render_page(histories, time.time()).encode("utf-8", "replace").decode("utf-8")
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        write_atomically(path, text)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror}); name another file with output="
        ) from error
    names = names_of(histories)
    return path, [f"{n}: {note}" for n, h in zip(names, histories, strict=True) for note in h.notes]


def render_page(histories: Sequence[History], now: float) -> str:
    """Return the page as text; `now` in seconds since 1970."""
    names = names_of(histories)
    more = f" and {len(names) - TITLED} more" if len(names) > TITLED else ""
    rows = [run_summary(history) for history in histories]
    different = differing_keys(histories)
    configs = [{k: _format_value(v) for k, v in history.values.items()} for history in histories]
    return TEMPLATES.get_template(f"{NAME}.j2").render(
        title=", ".join(names[:TITLED]) + more,
        written=format_time(now),
        names=names,
        colours=COLOURS,
        absent=ABSENT,
        notes=[(name, n) for name, h in zip(names, histories, strict=True) for n in h.notes],
        columns=list(dict.fromkeys(column for row in rows for column in row)),
        rows=rows,
        configs=configs,
        different=different,
        keys=list(dict.fromkeys([*different, *(key for config in configs for key in config)])),
        figures=_figures(names, histories),
        kinds=KINDS,
        pictures=[(run, p) for run, h in enumerate(histories) for p in read_pictures(h.run_dir)],
        bars=[bar for run, history in enumerate(histories) for bar in _bars(run, history)],
        samples=[(run, h.sample) for run, h in enumerate(histories) if h.sample],
        events=[(run, event) for run, h in enumerate(histories) for event in h.events],
    )


def names_of(histories: Sequence[History]) -> list[str]:
    """Return a short name of each run: its folder's name if unique, otherwise its path."""
    names = [history.run_dir.resolve().name for history in histories]
    if len(set(names)) == len(names):
        return names
    return [str(history.run_dir) for history in histories]


def differing_keys(histories: Sequence[History]) -> list[str]:
    """Return the keys whose values are not the same in all configs, in the order of the configs."""
    keys = dict.fromkeys(key for history in histories for key in history.values)
    values = {key: [history.values.get(key, ABSENT) for history in histories] for key in keys}
    return [key for key in keys if key not in OWN and any(v != values[key][0] for v in values[key])]


def run_summary(history: History) -> dict[str, str]:
    """Return the summary row of a run, by title."""
    status, steps = history.status, [line["step"] for line in history.training]
    row = {"status": _run_state(history)}
    last = status.step if status else max(steps, default=0)
    row["steps"] = f"{last:,} of {status.steps:,}" if status else f"{last:,}"
    if loss := history.metric_curve("loss"):
        row["last loss"] = f"{loss[-1][1]:.4g}"
    if valid := history.metric_curve("eval_loss", "valid"):
        row["valid loss, least"] = f"{min(value for _, value in valid):.4g}"
    for line in [line for line in history.evaluations if line["split"] == "test"][-1:]:
        shown = {key: value for key, value in line.items() if is_number(value) and key != "step"}
        row |= {f"test {key.removeprefix('eval_')}": f"{v:.4g}" for key, v in shown.items()}
    if rates := [rate for _, rate in history.metric_curve("tokens_per_second")]:
        row[f"{history.unit}/s, median"] = format_number(median(rates))
    if mfu := [value for _, value in history.metric_curve("mfu")]:
        row["MFU, median"] = f"{100 * median(mfu):.1f} %"
    if memory := [value for _, value in history.metric_curve("memory_gib")]:
        row["memory"] = f"{max(memory):.2f} GiB"
    row |= _planned(history)
    ledger = history.goodput
    if seconds := sum(ledger.seconds.values()):
        row["time"] = format_duration(seconds + ledger.down_seconds)
        row["starts"] = str(ledger.starts)
        row["goodput"] = f"{100 * ledger.seconds['useful'] / seconds:.1f} %"
    return row


def _planned(history: History) -> dict[str, str]:
    """Return the planned memory and step time, and the measured step time beside it."""
    plan, row = read_plan(history.run_dir), {}
    if plan is not None:
        row["memory, planned for tensors"] = f"{plan.memory_gib:.2f} of {plan.device_gib:.1f} GiB"
    if seconds := [value for _, value in history.metric_curve("step_seconds")]:
        row["step, median"] = f"{median(seconds):.3g} s"
    if plan is not None and plan.step_seconds:
        error = f" ± {plan.median_error:.0%}" if plan.median_error else ""
        known = "" if plan.calibrated else ", not calibrated"
        row["step, planned"] = f"{plan.step_seconds:.3g} s{error}{known}"
    return row


def _run_state(history: History) -> str:
    status = history.status
    if status is None:
        return "unknown: no status.json"
    if status.state == "running":
        return f"running, heard of {format_time(status.updated)}"
    return f"{status.state}: {status.reason}" if status.reason else status.state


def _format_value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "" if value is None else str(value)


def _figures(names: list[str], histories: Sequence[History]) -> list[Markup]:
    """Return the figures that have data."""
    marks = [
        Mark(event.step, run, event.kind, event.text)
        for run, history in enumerate(histories)
        for event in history.events
    ]
    drawn = [line["step"] for history in histories for line in history.training]
    steps = (0, max([*drawn, *(mark.step for mark in marks)], default=0) or 1)
    figures = [_loss_figure(names, histories, marks, steps)]
    unit = {"tok": "tokens", "img": "images", "char": "characters"}.get(
        histories[0].unit, histories[0].unit
    )
    for key, (title, style, scale) in CURVES.items():
        curves = [
            Curve(name, run, history.metric_curve(key), style)
            for run, (name, history) in enumerate(zip(names, histories, strict=True))
        ]
        figures.append(curve_figure(title.format(unit=unit), curves, marks, steps, scale))
    figures += _metric_figures(names, histories, marks, steps)
    figures.append(event_lanes("What happened", names, marks, steps))
    return [figure for figure in figures if figure]


def _loss_figure(
    names: list[str], histories: Sequence[History], marks: list[Mark], steps: tuple[int, int]
) -> Markup:
    curves = []
    for run, (name, history) in enumerate(zip(names, histories, strict=True)):
        curves.append(Curve(name, run, history.metric_curve("loss"), "smooth"))
        curves.append(
            Curve(f"{name}, valid", run, history.metric_curve("eval_loss", "valid"), "dots")
        )
    return curve_figure("Loss, nats; dots: valid split", curves, marks, steps, scale="log")


def _metric_figures(
    names: list[str], histories: Sequence[History], marks: list[Mark], steps: tuple[int, int]
) -> list[Markup]:
    """Return a figure for each of the task's metrics on the valid split."""
    keys = dict.fromkeys(
        key
        for history in histories
        for line in history.evaluations
        if line["split"] == "valid"
        for key in line
        if key not in ("step", "split", "eval_loss")
    )
    return [
        curve_figure(
            f"{key.replace('_', ' ').capitalize()}, valid split",
            [
                Curve(n, run, h.metric_curve(key, "valid"), "dots")
                for run, (n, h) in enumerate(zip(names, histories, strict=True))
            ],
            marks,
            steps,
        )
        for key in keys
    ]


def _bars(run: int, history: History) -> list[Bar]:
    """Return the bar of a run's wall time; none if no time is known."""
    seconds = history.goodput.seconds | {"down": history.goodput.down_seconds}
    total = sum(seconds.values())
    if not total:
        return []
    shares = {kind: spent / total for kind, spent in seconds.items() if spent}
    told = ", ".join(
        f"{KINDS[k]} {_percent(share)}" for k, share in shares.items() if share >= 0.0005
    )
    parts = [
        BarPart(kind, share, f"{KINDS[kind]}: {format_duration(seconds[kind])}, {_percent(share)}")
        for kind, share in shares.items()
    ]
    return [Bar(run, format_duration(total), told, parts)]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"

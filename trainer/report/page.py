"""A page about one run or several: curves, events, where the time went, how their configs differ.

One HTML file that needs nothing else, neither network nor server. What a run's folder says is text
of a stranger: all of it is escaped.
"""

import time
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from trainer.atomic_files import write_atomically
from trainer.config.train import ConfigError
from trainer.metrics.console import duration, short
from trainer.metrics.goodput import LOST
from trainer.metrics.jsonl import is_number
from trainer.report.run_history import History, moment, read_history
from trainer.report.svg_chart import COLOURS, Curve, Mark, chart, lanes

NAME = "report.html"
TEMPLATE = Path(__file__).with_name(NAME)
ABSENT = "–"
TITLED = 3  # runs that the title names
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


def write_report(run_dirs: Sequence[Path], output: Path | None = None) -> tuple[Path, list[str]]:
    """Write the page about these runs, by default into the first one's folder; what was noted.

    Raises ConfigError if a folder holds no run, or if the page cannot be written.
    """
    histories = [read_history(run_dir) for run_dir in dict.fromkeys(run_dirs)]
    path = output or histories[0].run_dir / NAME
    # A name that is no text, as a file system allows it, is shown as far as it is.
    text = page(histories, time.time()).encode("utf-8", "replace").decode("utf-8")
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


def page(histories: Sequence[History], now: float) -> str:
    """Return the page as text; `now` in seconds since 1970."""
    names = names_of(histories)
    more = f" and {len(names) - TITLED} more" if len(names) > TITLED else ""
    title = ", ".join(names[:TITLED]) + more
    body = [
        f"<header><h1>{escape(title)}</h1><p>as of {moment(now)}</p></header>",
        _notes(names, histories),
        _summary(names, histories),
        _differences(names, histories),
        _curves(names, histories),
        _goodput(names, histories),
        _events(names, histories),
        _configs(names, histories),
    ]
    text = TEMPLATE.read_text(encoding="utf-8").replace("<!-- title -->", escape(title))
    return text.replace("<!-- body -->", "\n".join(filter(None, body)))


def names_of(histories: Sequence[History]) -> list[str]:
    """Return a short name of each run: its folder's where that tells them apart, else its path."""
    names = [history.run_dir.resolve().name for history in histories]
    if len(set(names)) == len(names):
        return names
    return [str(history.run_dir) for history in histories]


def differing(histories: Sequence[History]) -> list[str]:
    """Return the keys whose values are not the same in all configs, in the order of the configs."""
    keys = dict.fromkeys(key for history in histories for key in history.values)
    values = {key: [history.values.get(key, ABSENT) for history in histories] for key in keys}
    return [key for key in keys if key not in OWN and any(v != values[key][0] for v in values[key])]


def _notes(names: list[str], histories: Sequence[History]) -> str:
    notes = [
        f"<li>{escape(name)}: {escape(note)}</li>"
        for name, history in zip(names, histories, strict=True)
        for note in history.notes
    ]
    return f'<ul class="notes">{"".join(notes)}</ul>' if notes else ""


def _summary(names: list[str], histories: Sequence[History]) -> str:
    """Return a row for each run, and a column for whatever at least one of them has."""
    rows = [summary(history) for history in histories]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{escape(column)}</th>" for column in ["run", *columns])
    body = ""
    for run, row in enumerate(rows):
        cells = "".join(f"<td>{escape(row.get(column, ABSENT))}</td>" for column in columns)
        body += f"<tr><td>{_key(names, run)}</td>{cells}</tr>"
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def summary(history: History) -> dict[str, str]:
    """Return what is said of a run in one row, by title."""
    status, steps = history.status, [line["step"] for line in history.training]
    row = {"status": _state(history)}
    last = status.step if status else max(steps, default=0)
    row["steps"] = f"{last:,} of {status.steps:,}" if status else f"{last:,}"
    if loss := history.curve("loss"):
        row["last loss"] = f"{loss[-1][1]:.4g}"
    if valid := history.curve("eval_loss", "valid"):
        row["valid loss, least"] = f"{min(value for _, value in valid):.4g}"
    for line in [line for line in history.evaluations if line["split"] == "test"][-1:]:
        shown = {key: value for key, value in line.items() if is_number(value) and key != "step"}
        row |= {f"test {key.removeprefix('eval_')}": f"{v:.4g}" for key, v in shown.items()}
    if rates := [rate for _, rate in history.curve("tokens_per_second")]:
        row[f"{history.unit}/s, median"] = short(median(rates))
    if mfu := [value for _, value in history.curve("mfu")]:
        row["MFU, median"] = f"{100 * median(mfu):.1f} %"
    if memory := [value for _, value in history.curve("memory_gib")]:
        row["memory"] = f"{max(memory):.2f} GiB"
    ledger = history.goodput
    if seconds := sum(ledger.seconds.values()):
        row["time"] = duration(seconds + ledger.down_seconds)
        row["starts"] = str(ledger.starts)
        row["goodput"] = f"{100 * ledger.seconds['useful'] / seconds:.1f} %"
    return row


def _state(history: History) -> str:
    status = history.status
    if status is None:
        return "unknown: no status.json"
    if status.state == "running":
        return f"running, heard of {moment(status.updated)}"
    return f"{status.state}: {status.reason}" if status.reason else status.state


def _differences(names: list[str], histories: Sequence[History]) -> str:
    if len(histories) < 2:
        return ""
    keys = differing(histories)
    if not keys:
        return "<h2>Configuration</h2><p>The same in all runs.</p>"
    return f"<h2>Where the configurations differ</h2>{_values(names, histories, keys)}"


def _configs(names: list[str], histories: Sequence[History]) -> str:
    different = differing(histories)
    keys = dict.fromkeys([*different, *(key for h in histories for key in h.values)])
    table = _values(names, histories, keys)
    return f"<details><summary>The whole configuration</summary>{table}</details>" if keys else ""


def _values(names: list[str], histories: Sequence[History], keys: Iterable[str]) -> str:
    head = "".join(f"<th>{_key(names, run)}</th>" for run in range(len(names)))
    rows = ""
    for key in keys:
        cells = "".join(
            f"<td>{escape(_plain(h.values[key])) if key in h.values else ABSENT}</td>"
            for h in histories
        )
        rows += f"<tr><td><code>{escape(key)}</code></td>{cells}</tr>"
    return f'<div class="wide"><table><tr><th>key</th>{head}</tr>{rows}</table></div>'


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "" if value is None else str(value)


def _curves(names: list[str], histories: Sequence[History]) -> str:
    marks = [
        Mark(event.step, run, event.kind, event.text)
        for run, history in enumerate(histories)
        for event in history.events
    ]
    drawn = [line["step"] for history in histories for line in history.training]
    steps = (0, max([*drawn, *(mark.step for mark in marks)], default=0) or 1)
    figures = [_losses(names, histories, marks, steps)]
    unit = {"tok": "tokens", "img": "images"}.get(histories[0].unit, histories[0].unit)
    for key, (title, style, scale) in CURVES.items():
        curves = [
            Curve(name, run, history.curve(key), style)
            for run, (name, history) in enumerate(zip(names, histories, strict=True))
        ]
        figures.append(chart(title.format(unit=unit), curves, marks, steps, scale))
    figures += _measured(names, histories, marks, steps)
    figures.append(lanes("What happened", names, marks, steps))
    shown = "".join(figures)
    return f'<h2>Curves</h2><div class="charts">{shown}</div>' if shown else ""


def _losses(
    names: list[str], histories: Sequence[History], marks: list[Mark], steps: tuple[int, int]
) -> str:
    curves = []
    for run, (name, history) in enumerate(zip(names, histories, strict=True)):
        curves.append(Curve(name, run, history.curve("loss"), "smooth"))
        curves.append(Curve(f"{name}, valid", run, history.curve("eval_loss", "valid"), "dots"))
    return chart("Loss, nats; dots: valid split", curves, marks, steps, scale="log")


def _measured(
    names: list[str], histories: Sequence[History], marks: list[Mark], steps: tuple[int, int]
) -> list[str]:
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
        chart(
            f"{key.replace('_', ' ').capitalize()}, valid split",
            [
                Curve(n, run, h.curve(key, "valid"), "dots")
                for run, (n, h) in enumerate(zip(names, histories, strict=True))
            ],
            marks,
            steps,
        )
        for key in keys
    ]


def _goodput(names: list[str], histories: Sequence[History]) -> str:
    """Return a bar for each run: what its wall time went into."""
    rows = ""
    for run, history in enumerate(histories):
        seconds = history.goodput.seconds | {"down": history.goodput.down_seconds}
        total = sum(seconds.values())
        if not total:
            continue
        bars = "".join(
            f'<span class="k-{kind}" style="flex-grow:{spent / total:.5f}" title="{KINDS[kind]}: '
            f'{duration(spent)}, {100 * spent / total:.1f} %"></span>'
            for kind, spent in seconds.items()
            if spent
        )
        told = ", ".join(
            f"{KINDS[kind]} {100 * spent / total:.1f} %"
            for kind, spent in seconds.items()
            if spent / total >= 0.0005
        )
        rows += (
            f"<div>{_key(names, run)} <small>{duration(total)}: {told}</small>"
            f'<div class="bar">{bars}</div></div>'
        )
    if not rows:
        return ""
    key = "".join(f'<span><i class="k-{kind}"></i>{name}</span>' for kind, name in KINDS.items())
    return f'<h2>What the time went into</h2><div class="key">{key}</div>{rows}'


def _events(names: list[str], histories: Sequence[History]) -> str:
    rows = "".join(
        f"<tr><td>{_key(names, run)}</td><td>{event.step:,}</td><td>{escape(event.kind)}</td>"
        f"<td>{escape(event.text)}</td></tr>"
        for run, history in enumerate(histories)
        for event in history.events
    )
    head = "<tr><th>run</th><th>step</th><th>what</th><th></th></tr>"
    table = f'<div class="wide"><table>{head}{rows}</table></div>'
    return f"<details><summary>All events</summary>{table}</details>" if rows else ""


def _key(names: list[str], run: int) -> str:
    """Return a run's name beside its colour."""
    dot = f'<b class="c{run % COLOURS}">●</b>'
    return f'<span class="run" data-toggle="{run}">{dot} {escape(names[run])}</span>'

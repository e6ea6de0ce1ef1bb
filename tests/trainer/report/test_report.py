"""The report: what a run's folder tells, in a page that needs nothing else and trusts nothing."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from launch.cli.errors import run_simple_command
from launch.report import main
from trainer.checkpoint.folder import checkpoint_path
from trainer.checkpoint.manifest import Manifest, write_manifest
from trainer.config.train import UserError
from trainer.report.page import differing_keys, render_page, run_summary, write_report
from trainer.report.run_history import read_history
from trainer.report.svg_chart import (
    Axis,
    Curve,
    Mark,
    curve_figure,
    event_lanes,
    round_values,
    smooth_points,
    thin_points,
)
from trainer.run.plan_record import PlanRecord, read_plan

CONFIG = "seed: 1\noptim:\n  lr: {lr}\n  betas: [0.9, 0.95]\nmodel:\n  family: decoder\n"
SECONDS = {
    "useful": 80,
    "restart": 12,
    "save": 1,
    "data_wait": 0,
    "evaluation": 5,
    "repeated": 2,
    "other": 0,
}
STATUS = {
    "state": "stopped",
    "step": 40,
    "steps": 60,
    "checkpoint": 40,
    "reason": "SIGTERM",
    "rank": 0,
    "code": 75,
    "from_step": 20,
    "attempts": 1,
    "pid": 1,
    "host": "here",
    "started": 1.7e9,
    "updated": 1.7e9,
}


def training(step: int, **values: Any) -> dict[str, Any]:
    rest = {"grad_norm": 1.0, "lr": 1e-3, "tokens_per_second": 1000.0 + step, "memory_gib": 0.5}
    return {"step": step, "loss": 5.0 - step / 20} | rest | values


LINES: list[dict[str, Any]] = [
    {"event": "start", "step": 0, "start": 1, "ranks": 1, "time": 1.7e9},
    *(training(step) for step in range(2, 21, 2)),
    {"step": 20, "split": "valid", "eval_loss": 4.5, "perplexity": 90.0},
    {"event": "save", "step": 20, "seconds": 0.4, "gib": 0.01},
    {"event": "start", "step": 20, "start": 2, "ranks": 2, "time": 1.7e9 + 60},
    {"event": "bad_step", "step": 24, "rank": 1, "kind": "loss", "action": "skip", "samples": [3]},
    *(training(step) for step in range(22, 41, 2)),
    {"event": "goodput", "step": 40, "useful_share": 0.8},
    {"event": "of_tomorrow", "step": 40, "what": "<script>alert(1)</script>"},
    {"step": 40, "split": "test", "eval_loss": 3.25, "bleu": 20.5},
]


def run_in(folder: Path, lines: list[dict[str, Any]] | None = None, lr: str = "0.001") -> Path:
    """A run's folder as a run leaves it."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG.format(lr=lr) + f"run_dir: {folder.name}\n")
    told = LINES if lines is None else lines
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    (folder / "status.json").write_text(json.dumps(STATUS))
    ledger = {"seconds": SECONDS, "starts": 2, "down_seconds": 20.0}
    (folder / "goodput.json").write_text(json.dumps(ledger))
    return folder


class Page(HTMLParser):
    """The tags of a page, which must close in order, and its text."""

    VOID = ("meta",)

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["script"], ["style"]):
            self.text += data.strip("\n")

    def charts(self) -> dict[str, dict[str, Any]]:
        """What the script reads, by title."""
        found = [attrs for tag, attrs in self.tags if "data-chart" in attrs]
        return {str(a["aria-label"]): json.loads(str(a["data-chart"])) for a in found}


def test_a_page_shows_all_that_a_run_tells(tmp_path: Path) -> None:
    history = read_history(run_in(tmp_path / "a <b>run</b>"))
    assert history.notes == []
    text = render_page([history], 1.7e9)
    shown = Page(text)
    charts = shown.charts()
    (curve, valid) = charts["Loss, nats; dots: valid split"]["curves"]
    assert [point[0] for point in curve["points"]] == list(range(2, 41, 2))
    assert curve["points"][0] == [2, 4.9] and valid["points"] == [[20, 4.5]]
    assert charts["Perplexity, valid split"]["curves"][0]["points"] == [[20, 90.0]]
    for title in ("Learning rate", "Throughput, tokens per second", "Gradient norm, before clip"):
        assert any(name.startswith(title) for name in charts), title
    assert "Model FLOPs utilisation, share of the peak" not in charts  # nothing to draw
    assert {mark for tag, a in shown.tags if tag == "path" for mark in [a.get("class")]} >= {
        "start",
        "restart",
        "save",
        "evaluation",
        "bad-step",
        "other",
    }
    assert "start 2, from step 20 on 2 ranks" in shown.text
    assert "the loss is bad on rank 1; what was done: skip" in shown.text
    assert "what <script>alert(1)</script>" in shown.text  # as text
    assert text.count("<script") == 1 and "<b>run</b>" not in text
    assert "useful steps 66.7 %, restart 10.0 %" in shown.text  # of 120 s with those between starts
    assert "optim.betas" in shown.text


def test_a_page_needs_nothing_else(tmp_path: Path) -> None:
    text = render_page([read_history(run_in(tmp_path / "run"))], 1.7e9)
    assert "default-src 'none'" in text
    attributes = {name for _, attrs in Page(text).tags for name in attrs}
    assert not attributes & {"src", "href", "srcset", "action"}
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text)


HOSTILE = "a\"'><img src=x onerror=alert(1)><script>alert(2)<script>{{ names }}&amp;"


def test_nothing_that_a_run_tells_is_markup(tmp_path: Path) -> None:
    events = [{"event": HOSTILE, "step": 3, "what": HOSTILE}]
    measured = [{"step": 4, "split": "valid", "eval_loss": 1.0, HOSTILE: 2.0}]
    measured += [{"step": 4, "split": "test", "eval_loss": 1.0, HOSTILE: 2.0}]
    runs = [run_in(tmp_path / name, [*LINES, *events, *measured]) for name in (HOSTILE, "other")]
    for run in runs:
        (run / "status.json").write_text(json.dumps(STATUS | {"reason": HOSTILE}))
    (runs[0] / "config.yaml").write_text(json.dumps({HOSTILE: HOSTILE, "same": HOSTILE}))
    (runs[1] / "config.yaml").write_text(json.dumps({HOSTILE: 3, "same": HOSTILE}))
    histories = [read_history(run) for run in runs]
    histories[0].notes.append(HOSTILE)
    text = render_page(histories, 1.7e9)
    shown = Page(text)
    assert text.count("<script") == 1 and "<img" not in text
    plain = [read_history(run_in(tmp_path / name)) for name in ("plain", "too")]
    plain[0].notes.append("plain")
    known = {(tag, name) for tag, attrs in Page(render_page(plain, 1.7e9)).tags for name in attrs}
    assert {(tag, name) for tag, attrs in shown.tags for name in attrs} <= known
    # As text: the title, notes, states, names, keys, values, events and their texts.
    assert shown.text.count(HOSTILE) > 20
    assert HOSTILE.capitalize() + ", valid split" in shown.charts()
    curves = shown.charts()["Learning rate"]["curves"]
    assert [curve["name"] for curve in curves] == [HOSTILE, "other"]


def test_the_row_of_a_run(tmp_path: Path) -> None:
    row = run_summary(read_history(run_in(tmp_path / "run")))
    assert row == {
        "status": "stopped: SIGTERM",
        "steps": "40 of 60",
        "last loss": "3",
        "valid loss, least": "4.5",
        "test loss": "3.25",
        "test bleu": "20.5",
        "tok/s, median": "1.02k",
        "memory": "0.50 GiB",
        "time": "2:00",
        "starts": "2",
        "goodput": "80.0 %",
    }


def test_what_was_planned_stands_beside_what_was_measured(tmp_path: Path) -> None:
    run = run_in(tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    with (run / "metrics.jsonl").open("w") as file:
        for line in lines:
            more = {"step_seconds": 0.25} if "lr" in line else {}
            file.write(json.dumps(line | more) + "\n")
    plan = PlanRecord("H100 SXM", "strategy=fsdp", 40.0, 79.6, {"weights": 40.0}, 0.2, 0.08, False)
    plan.write(run)
    assert read_plan(run) == plan
    row = run_summary(read_history(run))
    assert row["memory, planned for tensors"] == "40.00 of 79.6 GiB"
    assert row["step, planned"] == "0.2 s ± 8%, not calibrated"
    assert row["step, median"] == "0.25 s"
    (run / "plan.json").write_text((run / "plan.json").read_text().replace("79.6", '"<b>"'))
    assert "memory, planned for tensors" not in run_summary(read_history(run))


def test_several_runs_and_where_they_differ(tmp_path: Path) -> None:
    runs = [run_in(tmp_path / "one"), run_in(tmp_path / "two", lr="0.004")]
    (runs[1] / "config.yaml").write_text((runs[1] / "config.yaml").read_text() + "new: 3\n")
    histories = [read_history(run) for run in runs]
    assert differing_keys(histories) == ["optim.lr", "new"]  # not run_dir
    shown = Page(render_page(histories, 1.7e9))
    table = shown.text[shown.text.index("Where the configurations differ") :]
    assert re.match(r"[^.]*key● one● twooptim\.lr0\.0010\.004new–3", table)
    assert [c["run"] for c in shown.charts()["Learning rate"]["curves"]] == [0, 1]
    same = [read_history(run_in(tmp_path / name / "run")) for name in "ab"]
    text = Page(render_page(same, 1.7e9)).text
    assert "The same in all runs" in text
    assert str(tmp_path / "a" / "run") in text  # folders of one name go by their path


def test_a_folder_of_runs_is_a_sweep(tmp_path: Path) -> None:
    for rate in ("0.004", "0.001"):
        run_in(tmp_path / "sweep" / f"optim.lr={rate}", lr=rate)
    (tmp_path / "sweep" / "empty").mkdir()
    path, notes = write_report([tmp_path / "sweep"])
    assert (path, notes) == (tmp_path / "sweep" / "report.html", [])
    assert "<h1>optim.lr=0.001, optim.lr=0.004</h1>" in path.read_text()


def test_the_door(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = run_in(tmp_path / "one"), run_in(tmp_path / "optim.lr=1" / "two")
    assert run_simple_command(main, [f"run_dir={one}"]) == 0
    assert capsys.readouterr().out == f"report: {one / 'report.html'}\n"
    assert run_simple_command(main, [str(one), str(two), f"output={tmp_path / 'both.html'}"]) == 0
    assert "<h1>one, two</h1>" in (tmp_path / "both.html").read_text()
    for arguments, message in (
        ([f"run_dir={tmp_path / 'oen'}"], rf"holds no run .*did you mean run_dir={one}\?"),
        ([f"run_dri={one}"], rf"the keys are run_dir and output; did you mean run_dir={one}\?"),
        (["output=a.html"], r"no run is named; say run_dir=RUN"),
        ([str(one), f"output={tmp_path}"], r"cannot be written \(it is a folder\); name another"),
        ([str(one), f"output={tmp_path}/no/a.html"], r"cannot be written \(No such file or dir"),
    ):
        assert run_simple_command(main, arguments) == 2
        told = capsys.readouterr().err
        assert re.search(message, told) and told.count("\n") == 1, told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both.html", "one", "optim.lr=1"]


def test_what_is_missing_or_damaged_is_a_note(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_text(CONFIG.format(lr=1))
    history = read_history(empty)
    assert history.notes == ["no metrics yet: metrics.jsonl holds no step"]
    assert run_summary(history) == {"status": "unknown: no status.json", "steps": "0"}
    Page(render_page([history], 0.0))

    bad = run_in(tmp_path / "bad")
    lines = (bad / "metrics.jsonl").read_text().splitlines()
    damaged = ["{", "[1]", '{"loss": 3}', '{"step": Infinity}', '{"step": "a"}', "\0" * 4]
    odd = {"step": 42, "loss": "3", "lr": True, "grad_norm": None, "mfu": float("nan")}
    whole = [lines[0], *damaged, *lines[1:], json.dumps(odd), '{"step": 44, "lo']
    (bad / "metrics.jsonl").write_text("\n".join(whole))
    for name in ("config.yaml", "rollbacks.json", "status.json", "goodput.json"):
        (bad / name).write_text("[")
    checkpoint_path(bad, 20).mkdir(parents=True)
    history = read_history(bad)
    # A last line without an end is being written.
    assert "metrics.jsonl: damaged and passed over: line 2, 3, 4, 5, 6 and 1 more" in history.notes
    for part in ("config.yaml cannot be read", "rollbacks.json is damaged", "manifest.json is mis"):
        assert any(part in note for note in history.notes), part
    assert len(history.metric_curve("loss")) == 20
    assert all(
        note.split("&")[0] in Page(render_page([history], 0.0)).text for note in history.notes
    )


def test_checkpoints_and_rollbacks_are_events(tmp_path: Path) -> None:
    run = run_in(tmp_path / "run")
    for step in (20, 30):  # the line of the second was lost with its run
        folder = checkpoint_path(run, step)
        folder.mkdir(parents=True)
        write_manifest(folder, Manifest("r", step, {}, {}, "", None, {}, {}))
    older = {"step": 30, "data_steps": [35, 36]}
    newer = {"step": 40, "samples": [[640, 656], [900, 916]]}
    (run / "rollbacks.json").write_text(json.dumps([older, newer]))
    history = read_history(run)
    assert history.notes == []
    saves = [(event.step, event.text) for event in history.events if event.kind == "save"]
    assert saves == [(20, "checkpoint saved, 0.4 s"), (30, "checkpoint, there now")]
    texts = [event.text for event in history.events if event.kind == "rollback"]
    assert texts == [
        "back to step 30; left out from then on: steps 35, 36 of data",
        "back to step 40; left out from then on: 640 to 655, 900 to 915 of the order of samples",
    ]
    assert [event.step for event in history.events] == sorted(e.step for e in history.events)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no run \(no config\.yaml\)"):
        read_history(tmp_path)


def test_axes() -> None:
    assert round_values(0, 10) == [0, 2, 4, 6, 8, 10]
    assert round_values(3.1, 4.9) == pytest.approx([3.5, 4.0, 4.5])
    assert round_values(-1e-9, 1e-9)[1] == pytest.approx(-5e-10)
    assert round_values(5, 5) == [5]
    axis = Axis([1.0, 1000.0], 100, 0, log=True)
    assert [axis(1), axis(1000)] == [100, 0] and axis(10) == pytest.approx(200 / 3)
    assert axis.axis_ticks() == pytest.approx([1, 10, 100, 1000])
    assert Axis([3.0, 70.0], 0, 1, log=True).axis_ticks() == pytest.approx([5, 10, 20, 50])
    assert not Axis([0.0, 1000.0], 0, 1, log=True).log
    assert Axis([2.0, 2.0], 0, 100)(2.0) == 50
    assert Axis([], 0, 1).axis_ticks()


def test_long_curves_keep_their_spikes() -> None:
    points = [(float(i), 0.0) for i in range(100_000)]
    points[54_321] = (54_321.0, 9.0)
    few = thin_points(points)
    assert len(few) <= 500 and (54_321.0, 9.0) in few and few == sorted(few)
    assert thin_points(points[:3]) == points[:3]
    line = [(float(i), 2.0 * i) for i in range(100)]
    means = [value for _, value in smooth_points(line)]
    assert means == pytest.approx([value for _, value in line])  # straight stays, ends too
    assert smooth_points(points)[54_321][1] < 9.0


def test_a_chart_places_its_values() -> None:
    curve = Curve("a", 9, [(0, 1.0), (50, 2.0), (100, 3.0)])
    marks = [Mark(50, 9, "restart", "2 < 3"), Mark(50, 9, "save", "")]
    figure = curve_figure("T & U", [curve, Curve("none", 1, [])], marks, (0, 100))
    places = re.search(r'points="([^"]+)"', figure)
    assert places
    (x0, y0), (x1, y1), (x2, y2) = (map(float, p.split(",")) for p in places[1].split())
    assert x1 - x0 == x2 - x1 > 100 and y0 - y1 == y1 - y2 > 50
    assert f"M{x1},10V" in figure and "2 &lt; 3" in figure and "T &amp; U" in figure
    assert 'class="curve c1 dashed"' in figure  # colours come again
    assert figure.count('class="mark') == 1  # a save is in the lanes alone
    assert curve_figure("T", [Curve("none", 1, [])], marks, (0, 100)) == ""
    assert event_lanes("T", ["a"], [], (0, 100)) == ""
    many = [Mark(step, 0, "save", "") for step in range(1000)]
    assert 20 < event_lanes("T", ["a"], many, (0, 1000)).count('class="glyph"') < 160


def test_a_sample_of_the_output_is_shown_as_it_is(tmp_path):
    run_dir = run_in(tmp_path / "run")
    (run_dir / "sample.txt").write_text("> what <b>is</b> said\nwhat is heard\n")
    page = render_page([read_history(run_dir)], 0.0)
    assert "<pre>&gt; what &lt;b&gt;is&lt;/b&gt; said\nwhat is heard</pre>" in page

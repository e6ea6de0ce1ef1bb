"""Sweeps: every point once, whatever happens to the sweep; what they found in one table."""

import csv
import json
import sys

import pytest
from launched import Launched, until

from launch.cli import sweep as module
from launch.cli.errors import JobFailedError
from launch.cli.sweep import Sweep, SweepJob
from trainer.metrics.jsonl import last_values


def rows(folder) -> list[dict]:
    with (folder / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_one_crash_and_a_killed_sweep_cost_one_point_and_none_is_run_twice(tmp_path):
    run = Launched(tmp_path)
    rates = (0.001, 0.002, 1e300, 0.003, 0.004, 0.005)
    words = ("-m", "steps=4", "optim.lr=" + ",".join(map(str, rates)), "optim.warmup_steps=0")
    names = [f"optim.lr={rate}" for rate in rates]
    first = run.start(*words)
    until(lambda: (run.run_dir / names[3]).exists(), first)
    first.kill()
    first.communicate()
    began = {n: (run.run_dir / n / "status.json").read_text() for n in names[:3]}
    second = run.start(*words)
    _, said = second.communicate(timeout=240)
    assert second.returncode == 1, said
    assert "5 finished, 1 failed" in said
    found = rows(run.run_dir)
    assert {row["point"]: row["state"] for row in found} == {
        name: "failed" if name == names[2] else "finished" for name in names
    }
    assert "step 2" in next(row["reason"] for row in found if row["state"] == "failed")
    for name, rate in zip(names, rates, strict=True):
        lines = [json.loads(x) for x in (run.run_dir / name / "metrics.jsonl").open()]
        steps = [line["step"] for line in lines if "lr" in line]
        assert steps == ([1, 2, 3, 4] if rate < 1 else [1]), name
    assert {n: (run.run_dir / n / "status.json").read_text() for n in names[:3]} == began
    report = (run.run_dir / "report.html").read_text()
    assert all(f"</b> {name}</span>" in report for name in names)
    assert "Where the configurations differ" in report and "optim.lr" in report
    assert "step 4/4" in (run.run_dir / names[0] / "log.txt").read_text()


def test_an_unknown_key_is_refused_before_the_first_point(tmp_path):
    run = Launched(tmp_path)
    process = run.start("optim.lrr=1,2", "-m")
    _, said = process.communicate(timeout=240)
    assert process.returncode == 2
    assert said.strip() == "optim.lrr does not exist; did you mean optim.lr?"
    assert not run.run_dir.exists()


def test_a_point_is_named_after_what_is_swept():
    assert (
        SweepJob({"strategy": "ddp", "optim.lr": "0.1"}).folder_name == "optim.lr=0.1,strategy=ddp"
    )
    assert SweepJob({"data.path": "/a b"}).folder_name == "data.path=_a_b"
    assert SweepJob({"compress": "[merge,int4]"}).folder_name == "compress=merge,int4"
    long = [SweepJob({"model.layers": "1" * 200 + end}).folder_name for end in "ab"]
    assert long[0] != long[1] and all(len(name) < 120 for name in long)


@pytest.fixture
def swept(tmp_path, monkeypatch):
    """A function that runs a point of a sweep over seeds in this process."""

    class Hydra:
        class overrides:  # noqa: N801
            task = ["seed=0", "steps=9"]

        sweeper = {"_target_": "an.Optimiser"}

    monkeypatch.setattr(module.HydraConfig, "get", lambda: Hydra)
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "steps=9", "seed=7", "seed=choice(0,1)"])

    def run(sweep, seed, work, objective="eval_loss", retry=False):
        Hydra.overrides.task = ["steps=9", "seed=7", f"seed={seed}"]
        config = module.DictConfig(
            {"run_dir": str(tmp_path / "s"), "retry_failed": retry}
            | {"metrics": {"objective": objective, "wandb_group": ""}}
        )
        return sweep.run(config, lambda cfg, console: work(module.Path(cfg.run_dir)))

    return run


def measures(folder):
    folder.mkdir(exist_ok=True)
    lines = [
        {"step": 1, "loss": 2.0},
        {"step": 1, "split": "valid", "eval_loss": 1.5, "accuracy": 0.5},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def crashes(folder):
    folder.mkdir()
    (folder / "log.txt").write_text("a line\nthe reason\n\n")
    raise SystemExit(1)


def test_an_optimising_sweeper_is_told_the_metric_or_the_failure(swept, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "best.yaml").write_text("best")
    with Sweep(scratch) as sweep:
        assert swept(sweep, 0, measures) == 1.5
        with pytest.raises(JobFailedError, match="the reason"):
            swept(sweep, 1, crashes)
        assert swept(sweep, 0, lambda folder: None, objective="accuracy") == 0.5
        with pytest.raises(JobFailedError, match="there are: accuracy, loss"):
            swept(sweep, 0, lambda folder: None, objective="bleu")
    assert (tmp_path / "s" / "best.yaml").read_text() == "best"
    states = {row["point"]: (row["state"], row["reason"]) for row in rows(tmp_path / "s")}
    assert states["seed=1"] == ("failed", "the reason")


def test_a_metric_that_was_not_finite_the_last_time_has_no_earlier_value(tmp_path):
    lines = [
        {"step": 1, "loss": 3.0, "tokens_per_second": 9.0},
        {"step": 1, "split": "valid", "eval_loss": 1.5, "accuracy": 0.5},
        {"step": 2, "loss": None, "tokens_per_second": 9.0},
        {"step": 2, "split": "valid", "eval_loss": None, "accuracy": 0.1},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert last_values(tmp_path) == {"step": 2, "tokens_per_second": 9.0, "valid_accuracy": 0.1}


def test_an_optimising_sweeper_never_sees_an_earlier_loss(swept, tmp_path):
    def diverges(folder):
        measures(folder)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 2, "split": "valid", "eval_loss": null}\n')

    (tmp_path / "scratch").mkdir()
    expected = pytest.raises(JobFailedError, match="eval_loss was not measured, or is not finite")
    with Sweep(tmp_path / "scratch") as sweep, expected:
        swept(sweep, 0, diverges)


def test_a_failed_point_is_started_again_where_that_is_asked_for(swept, tmp_path):
    (tmp_path / "scratch").mkdir()
    with Sweep(tmp_path / "scratch") as sweep, pytest.raises(JobFailedError):
        swept(sweep, 0, crashes)
    with Sweep(tmp_path / "scratch") as sweep, pytest.raises(JobFailedError, match="the reason"):
        swept(sweep, 0, lambda folder: pytest.fail("it was started"))
    with Sweep(tmp_path / "scratch") as sweep:
        assert swept(sweep, 0, measures, retry=True) == 1.5
    assert [row["state"] for row in rows(tmp_path / "s")] == ["finished"]


def test_last_values_are_read_beside_damaged_lines(tmp_path):
    measures(tmp_path / "a")
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert last_values(tmp_path / "a") == {
        "step": 1,
        "loss": 2.0,
        "valid_loss": 1.5,
        "valid_accuracy": 0.5,
    }
    assert last_values(tmp_path / "b") == {}


def test_a_report_that_cannot_be_written_is_a_warning(swept, tmp_path, caplog):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "s" / "report.html").mkdir(parents=True)

    def configured(folder):
        measures(folder)
        (folder / "config.yaml").write_text("seed: 1\n")

    with Sweep(tmp_path / "scratch") as sweep:
        assert swept(sweep, 0, configured) == 1.5
    assert "report.html cannot be written (it is a folder)" in caplog.text

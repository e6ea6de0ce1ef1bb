"""The report on a compressed run and its baseline."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from launch.cli.preflight import check_compare, check_export, prepare_training
from trainer.compress_report import report as module
from trainer.compress_report.report import RunFigures, comparison_table, write_comparison
from trainer.config.train import (
    CompressConfig,
    CompressReportConfig,
    ExportConfig,
    TrainConfig,
    UserError,
)
from trainer.inference.trained_run import export_run
from trainer.loop import start_run
from trainer.run.run_dir import EXPORTED


@pytest.fixture(scope="module")
def runs(runtime, tmp_path_factory):
    """Two runs on the same data, one of them compressed, each with a line of metrics."""
    folder, made = tmp_path_factory.mktemp("runs"), []
    compress = CompressConfig(pool_after=1, bits=8, sparse_n=2)
    model = replace(tiny.CLASSIFIER, patch_size=2, layers=3)
    for name, asked in (("plain", CompressConfig()), ("small", compress)):
        config = TrainConfig(
            model=model,
            data=tiny.image_data(folder),
            precision="fp32",
            device="cpu",
            batch_size=4,
            run_dir=str(folder / name),
            compress=asked,
        )
        config = prepare_training(config, 1)
        tiny.save(config, start_run(config, runtime))
        line = {"step": 1, "split": "test", "eval_loss": 1.5, "accuracy": 0.25}
        (folder / name / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        made.append(config.run_dir)
    return made


def test_the_table_and_the_figure(runtime, runs, monkeypatch, capsys, tmp_path):
    plain, small = runs
    seen: list[RunFigures] = []
    monkeypatch.setattr(
        module, "comparison_table", lambda found: seen.extend(found) or comparison_table(found)
    )
    config = check_compare(CompressReportConfig(small, plain, rounds=2), 1)
    write_comparison(config, runtime)
    first, second = seen
    assert (first.compress, second.compress) == ("none", "pool_after=1 bits=8 sparse_n=2")
    assert first.metric == second.metric == "accuracy 0.25"
    assert first.parameters == second.parameters
    # 3 blocks with 4 × 16² attention and 2 × 16 × 32 feed-forward weights, 4 + 2 of 32 bits each.
    weights = 3 * (4 * 16 * 16 + 2 * 16 * 32)
    scales = 3 * (4 * 16 + 32 + 16) * 4
    assert first.bytes == 4 * first.parameters
    assert second.bytes == first.bytes - 4 * weights + weights * (8 / 2 + 2 / 2) / 8 + scales
    assert (first.lengths, second.lengths) == ([16, 16, 16], [16, 4, 4])
    assert first.flops > 1.5 * second.flops
    assert (first.zeros, second.zeros) == (0.0, 0.5)
    assert all(
        len(rates) == 2 and min(rates) > 0 for f in seen for rates in (f.training, f.inference)
    )
    if len(os.sched_getaffinity(0)) > 1:
        assert {"1 core", "2 ranks, ddp", "2 ranks, tensor"} < set(first.spread)
    assert all(min(f.spread.values()) > 0 for f in seen)
    said = capsys.readouterr().out
    for word in ("sparse_n=2", "50.0%", "16 4 4", "ratio", *first.spread):
        assert word in said, word
    picture = next(path for path in tmp_path.parent.parent.rglob(module.NAME))
    assert picture.stat().st_size > 5_000


def test_an_export_is_measured_and_exported_like_a_run(runtime, runs, tmp_path, capsys):
    """An export is loaded with float weights, which training and packing need."""
    _, small = runs
    once, twice = str(tmp_path / "once"), str(tmp_path / "twice")
    for run_dir, to in ((small, once), (once, twice)):
        export_run(check_export(ExportConfig(run_dir, to), 1), runtime)
    files = [(Path(folder) / EXPORTED).read_bytes() for folder in (once, twice)]
    assert len(files[0]) == len(files[1])
    write_comparison(check_compare(CompressReportConfig(once, rounds=1), 1), runtime)
    assert "sparse_n=2" in capsys.readouterr().out


def test_runs_that_cannot_be_compared_are_one_message(runtime, runs, tmp_path):
    plain, small = runs
    with pytest.raises(UserError, match="holds no run"):
        check_compare(CompressReportConfig(small, str(tmp_path)), 1)
    with pytest.raises(UserError, match="2 ranks were started, but one measures"):
        check_compare(CompressReportConfig(small, plain), 2)
    model = replace(tiny.CLASSIFIER, patch_size=2)
    config = TrainConfig(
        model=model,
        data=tiny.image_data(tmp_path / "data"),
        precision="fp32",
        device="cpu",
        batch_size=4,
        run_dir=str(tmp_path / "other"),
    )
    config = prepare_training(config, 1)
    tiny.save(config, start_run(config, runtime))
    with pytest.raises(UserError, match="was trained on other data"):
        write_comparison(CompressReportConfig(small, config.run_dir), runtime)

"""launch/checkpoint.py: what it shows, and the statuses that a script can go by."""

import shutil

import pytest
import tiny
import torch
from test_checkpoint import run_in, state_of

from launch.checkpoint import main
from launch.cli.errors import run_simple_command
from parallel.grad_norm import local_tensor
from parallel.strategy import StrategyConfig
from trainer.checkpoint.folder import checkpoint_path
from trainer.loop import open_saver


def two(runtime, folder, strategy) -> None:
    """Two checkpoints, of which the second has one weight changed."""
    state = state_of(runtime, tiny.LLAMA, strategy=strategy)
    with open_saver(run_in(folder, strategy), state) as saver:
        saver.save(state, 1.25)
        saver.wait()
        with torch.no_grad():
            # Of a replica both change it, of shards the first.
            weight = local_tensor(
                dict(state.worker.parameters())["blocks.1.attention.query.weight"]
            )
            if runtime.rank == 0 or strategy.shard == 1:
                weight[0, 0] += 0.5
        state.step = 10
        saver.save(state)


@pytest.fixture
def run_dir(ranks, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    ranks.run(2, two, tmp_path / "run", StrategyConfig(shard=2))
    return tmp_path / "run"


def test_list_and_verify(run_dir, capsys):
    assert (
        run_simple_command(main, ["list", str(run_dir)])
        == run_simple_command(main, ["verify", str(run_dir)])
        == 0
    )
    shown = capsys.readouterr().out
    assert "complete" in shown and "1.2500" in shown and "shard=2 ranks=2" in shown
    assert shown.count(" good: 2 files, ") == 2
    file = checkpoint_path(run_dir, 10) / "rank-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (run_dir / "checkpoints" / ".step-00000020.abc.partial").mkdir()
    assert run_simple_command(main, ["list", str(run_dir)]) == 0  # by size it is whole
    assert "incomplete" in capsys.readouterr().out
    assert run_simple_command(main, ["verify", str(run_dir)]) == 1
    assert run_simple_command(main, ["verify", str(checkpoint_path(run_dir, 0))]) == 0
    assert "step-00000010 damaged: rank-00001.safetensors is not what" in capsys.readouterr().out
    (checkpoint_path(run_dir, 10) / "manifest.json").unlink()
    assert run_simple_command(main, ["list", str(run_dir)]) == 1
    assert "damaged" in capsys.readouterr().out


def test_diff(ranks, run_dir, tmp_path, capsys):
    first = str(checkpoint_path(run_dir, 0))
    assert run_simple_command(main, ["diff", first, first]) == 0
    assert run_simple_command(main, ["diff", first, str(run_dir)]) == 1
    shown = capsys.readouterr().out
    assert "step: 0 and 10" in shown and "66 of 68 tensors are equal to the bit" in shown
    (line,) = [line for line in shown.splitlines() if "attention.query.weight" in line]
    assert "(16, 16) float64" in line and " 0.5 " in line
    # Another layout of the very same state.
    ranks.run(1, two, tmp_path / "single", StrategyConfig())
    assert run_simple_command(main, ["diff", str(run_dir), str(tmp_path / "single")]) == 0
    shutil.rmtree(checkpoint_path(run_dir, 10) / "manifest.json", ignore_errors=True)
    (checkpoint_path(run_dir, 10) / "rank-00000.safetensors").unlink()
    assert run_simple_command(main, ["diff", first, str(run_dir)]) == 2
    assert "step-00000010 is damaged: rank-00000" in capsys.readouterr().err


def test_no_run_there(tmp_path, capsys):
    for command in (["list"], ["verify"], ["diff", str(tmp_path)]):
        assert run_simple_command(main, [*command, str(tmp_path)]) == 2
        assert "is no checkpoint, and no run's folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_simple_command(main, ["lost"])

"""What happens before any rank works: a run is complete in its folder, or a mistake is said."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launch.cli.preflight import check_trained_run, prepare_training
from parallel.strategy import StrategyConfig
from trainer.config.train import ConfigError, DataConfig, EvaluateConfig, ModelConfig, TrainConfig
from trainer.data.tokenizer import Tokenizer
from trainer.run.run_dir import load_config

PLAY = Path(__file__).parents[2] / "trainer/data/bundled/shakespeare/valid.txt"


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    text = tmp_path / "play.txt"
    text.write_text(PLAY.read_text()[:20_000])
    data = DataConfig(path=str(text), vocab_size=300, seq_len=16, cache=str(tmp_path / "cache"))
    model = ModelConfig(layers=1, width=16, heads=2, ffn_width=16)
    return TrainConfig(data=data, model=model, run_dir=str(tmp_path / "run"))


def test_a_run_keeps_its_config_and_tokenizer(config):
    completed = prepare_training(config, 1)
    assert completed.model.vocab_size == 300
    assert load_config(config.run_dir) == completed
    tokenizer = Tokenizer.load(Path(config.run_dir) / "tokenizer.json")
    assert tokenizer.decode(tokenizer.encode("Enter Viola")) == "Enter Viola"
    assert prepare_training(config, 1) == completed  # and may be gone on with


def test_a_folder_says_what_each_start_was(config, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "launch/train.py", "steps=3", "run_dir=a b"])
    prepare_training(config, 1)
    prepare_training(config, 1)
    starts = json.loads((Path(config.run_dir) / "starts.json").read_text())
    assert len(starts) == 2
    assert starts[0]["command"].endswith("launch/train.py steps=3 'run_dir=a b'")
    assert starts[0]["packages"]["torch"] == torch.__version__
    git = ["git", "-C", str(PLAY.parent), "rev-parse", "HEAD"]
    known = subprocess.run(git, capture_output=True, text=True, check=False)
    assert starts[0]["commit"] == (known.stdout.strip() if known.returncode == 0 else "")


def test_more_ranks_than_the_strategy_uses(config):
    with pytest.raises(ConfigError, match="2 ranks"):
        prepare_training(config, 2)
    assert not Path(config.run_dir).exists()


def test_a_pipeline_that_mostly_waits_is_warned_about(config, caplog):
    deep = replace(config.model, layers=2)
    config = replace(config, model=deep, strategy=StrategyConfig(pipeline=-1), batch_size=4)
    with caplog.at_level("WARNING"):
        assert prepare_training(config, 2).micro_batch_size == 1  # two micro-batches a rank
        assert caplog.messages == []
        prepare_training(replace(config, micro_batch_size=4, run_dir=config.run_dir + "2"), 2)
    assert caplog.messages == [
        "strategy.schedule=gpipe: 1 micro-batches (batch_size / (micro_batch_size × ranks that see "
        "different samples)) are fewer than strategy.pipeline=2 ranks, which are idle for 50 % of "
        "a step (bubble); change batch_size or micro_batch_size for 2 or more"
    ]


def test_a_vocabulary_too_small_to_split(config):
    # 300 entries in 23 parts are 14 a rank: the last two would have none.
    wide = replace(config.model, width=23 * 16, heads=23)
    config = replace(config, model=wide, strategy=StrategyConfig(tensor=23))
    with pytest.raises(ConfigError, match="leaves a rank without any"):
        prepare_training(config, 23)
    assert not Path(config.run_dir).exists()


def test_reading_a_run_without_a_checkpoint(config):
    prepare_training(config, 1)
    with pytest.raises(ConfigError, match="no checkpoint yet"):
        check_trained_run(EvaluateConfig(run_dir=config.run_dir), 1)
    with pytest.raises(ConfigError, match="did you mean"):
        check_trained_run(replace(EvaluateConfig(), run_dir=config.run_dir + "s"), 1)

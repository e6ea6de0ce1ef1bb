"""From a Hugging Face folder through a run of two ranks to a folder that transformers reads."""

from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from model_folder import write_model_folder

from launch.cli.preflight import prepare_training
from parallel.errors import ConfigError
from parallel.runtime import Runtime
from parallel.strategy import StrategyConfig
from trainer.config.train import CheckpointConfig, EvaluateConfig, MetricsConfig, TrainConfig
from trainer.data.tokenizer import Tokenizer
from trainer.inference.trained_run import load_trained_run
from trainer.loop import train

TOKENS = list(range(40, 60))


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("runs")
    data = tiny.text_data(folder / "data")
    play = files("trainer.data") / "bundled" / "shakespeare" / "train.txt"
    write_model_folder(folder / "model", play.read_text()[:100_000])
    return TrainConfig(
        data=data,
        strategy=StrategyConfig(shard=2),
        init_from=str(folder / "model"),
        run_dir=str(folder / "run"),
        steps=3,
        batch_size=4,
        checkpoint=CheckpointConfig(every=2, huggingface_every=2),
        metrics=MetricsConfig(sample_tokens=0),
    )


def trained(runtime: Runtime, config: TrainConfig) -> None:
    train(config, runtime)


def logits_of(runtime: Runtime, run_dir: str) -> torch.Tensor:
    run = load_trained_run(EvaluateConfig(run_dir), runtime)
    with run.worker.evaluation_mode():
        return run.worker.forward({"tokens": torch.tensor([TOKENS])}).clone()


def test_a_run_exports_its_checkpoints_as_folders(ranks, config, caplog):
    ranks.run(2, trained, prepare_training(config, 2))
    exports = Path(config.run_dir) / "huggingface"
    assert sorted(path.name for path in exports.iterdir()) == ["step-00000002", "step-00000003"]
    (expected,) = ranks.run(1, logits_of, config.run_dir)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exports / "step-00000003")
    assert not [r for r in caplog.records if r.name.startswith("transformers")]
    torch.testing.assert_close(theirs(torch.tensor([TOKENS])).logits, expected, rtol=0, atol=1e-5)

    (read,) = ranks.run(1, logits_of, str(exports / "step-00000003"))
    assert read.equal(expected)
    (first,) = ranks.run(1, logits_of, config.init_from)
    assert not first.equal(expected)

    tokenizer = transformers.AutoTokenizer.from_pretrained(exports / "step-00000003")
    ours = Tokenizer.load(Path(config.run_dir) / "tokenizer.json")
    assert tokenizer("the quick fox")["input_ids"] == ours.encode("the quick fox")
    assert tokenizer.eos_token_id == theirs.generation_config.eos_token_id == ours.eot_id
    card = (exports / "step-00000003" / "README.md").read_text()
    assert "3 of 3 steps of 4\nsamples" in card


def test_models_without_a_folder_of_transformers_are_refused(config, tmp_path):
    other = replace(config, init_from="", run_dir=str(tmp_path / "run"))
    pooled = replace(other.compress, pool_after=1)
    with pytest.raises(ConfigError, match=r"compress\.pool_after=1 makes a model that"):
        prepare_training(replace(other, compress=pooled), 2)
    odd = replace(other, checkpoint=CheckpointConfig(every=2, huggingface_every=3))
    with pytest.raises(ConfigError, match=r"set checkpoint\.huggingface_every=4"):
        prepare_training(odd, 2)

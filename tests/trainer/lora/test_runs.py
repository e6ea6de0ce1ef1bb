"""Runs with adapters: checkpoints without frozen weights, resumed anywhere; merged elsewhere."""

import shutil
from contextlib import nullcontext
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from unittest import mock

import pytest
import torch

from conf.validation.validate import fill_from_data
from launch.cli.preflight import check_export, prepare_training
from parallel.errors import UserError
from parallel.strategy import StrategyConfig, world_size
from trainer import loop, state
from trainer.checkpoint.folder import checkpoint_path
from trainer.checkpoint.manifest import read_manifest
from trainer.checkpoint.shards import read_whole
from trainer.config.lora import FACTORS, LoraConfig
from trainer.config.train import (
    CheckpointConfig,
    CompressConfig,
    ConfigError,
    DataConfig,
    EvalConfig,
    EvaluateConfig,
    ExportConfig,
    MetricsConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from trainer.data import prepare_data
from trainer.inference.trained_run import export_run, load_trained_run

STEPS = 4
LORA = LoraConfig(rank=3, alpha=6.0, dropout=0.2)


def take_steps(runtime, config: TrainConfig) -> None:
    loop.train(config, runtime)


def run(ranks, config: TrainConfig) -> TrainConfig:
    """Prepare and train on the ranks of its strategy."""
    ready = prepare_training(config, world_size(config.strategy))
    ranks.run(world_size(ready.strategy), take_steps, ready, timeout_seconds=300.0)
    return ready


@pytest.fixture(scope="module")
def base(tmp_path_factory, ranks) -> TrainConfig:
    folder = tmp_path_factory.mktemp("lora")
    play = files("trainer.data") / "bundled" / "shakespeare" / "valid.txt"
    (folder / "play.txt").write_text(play.read_text()[:15_000])
    data = DataConfig(
        path=str(folder / "play.txt"), vocab_size=300, seq_len=16, cache=str(folder / "cache")
    )
    draft = TrainConfig(
        data=data,
        model=ModelConfig(layers=2, width=16, heads=4, ffn_width=32, dropout=0.1, init_std=0.3),
        optim=OptimConfig(lr=1e-2, warmup_steps=1),
        eval=EvalConfig(every=0, samples=8, test=False),
        checkpoint=CheckpointConfig(every=2, keep=0),
        metrics=MetricsConfig(every=1, sample_tokens=0),
        precision="fp64",
        device="cpu",
        steps=STEPS,
        batch_size=8,
        run_dir=str(folder / "base"),
    )
    return run(ranks, fill_from_data(draft, prepare_data(data)))


@pytest.fixture(scope="module")
def adapted(base, ranks) -> TrainConfig:
    run_dir = str(Path(base.run_dir).with_name("adapted"))
    return run(ranks, replace(base, init_from=base.run_dir, lora=LORA, run_dir=run_dir))


def saved_tensors(config: TrainConfig, step: int) -> dict[str, torch.Tensor]:
    path = checkpoint_path(config.run_dir, step)
    manifest = read_manifest(path)
    return {name: read_whole(path, manifest, name) for name in manifest.tensors}


def test_a_checkpoint_holds_adapters_moments_and_digests_alone(adapted):
    tensors, path = saved_tensors(adapted, STEPS), checkpoint_path(adapted.run_dir, STEPS)
    weights = {n for n in tensors if n.startswith("model.")}
    assert weights and all(name.endswith(FACTORS) for name in weights)
    moments = {n.removeprefix("optimizer.") for n in tensors if n.startswith("optimizer.")}
    assert {n.rpartition(".")[0] for n in moments} == {n.removeprefix("model.") for n in weights}
    base = read_manifest(path).base
    assert "embed.tokens.weight" in base and not any(n.endswith(FACTORS) for n in base)


@pytest.mark.parametrize(
    "strategy",
    [
        StrategyConfig(replicate=2),
        StrategyConfig(shard=2),
        StrategyConfig(tensor=2),
        StrategyConfig(pipeline=2),
    ],
    ids=["ddp 2", "fsdp 2", "tensor 2", "pipeline 2"],
)
def test_a_run_goes_on_under_another_layout(adapted, ranks, tmp_path, strategy):
    shutil.copytree(adapted.run_dir, tmp_path / "run")
    config = replace(adapted, run_dir=str(tmp_path / "run"), resume_step=2, strategy=strategy)
    config = run(ranks, replace(config, micro_batch_size=2))
    theirs = saved_tensors(adapted, STEPS)
    for name, tensor in saved_tensors(config, STEPS).items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-10)


def test_another_base_is_refused(base, adapted, ranks, tmp_path):
    for name in ("run", "base"):
        shutil.copytree(adapted.run_dir if name == "run" else base.run_dir, tmp_path / name)
    shutil.rmtree(checkpoint_path(tmp_path / "base", STEPS))  # the weights of step 2 are others
    config = replace(
        adapted, run_dir=str(tmp_path / "run"), steps=STEPS + 1, init_from=str(tmp_path / "base")
    )
    with pytest.raises(ConfigError, match=r"set init_from=.*resume_changed=\[init_from\]"):
        run(ranks, config)
    with pytest.raises(
        Exception, match=r"adapters of another model: embed\.tokens\.weight differs"
    ):
        run(ranks, replace(config, resume_changed=["init_from"]))
    with pytest.raises(Exception, match="adapters of another model"):
        ranks.run(1, merged_logits, str(tmp_path / "run"), StrategyConfig())
    with pytest.raises(ConfigError, match=r"lora\.rank"):
        run(ranks, replace(adapted, run_dir=str(tmp_path / "run"), lora=replace(LORA, rank=4)))


def test_random_frozen_weights_are_drawn_again(base, ranks, tmp_path):
    config = replace(base, lora=LORA, run_dir=str(tmp_path / "run"), steps=2)
    config = run(ranks, config)
    logits = ranks.run(1, merged_logits, config.run_dir, StrategyConfig())[0]
    torch.testing.assert_close(logits, ranks.run(1, unmerged_logits, config)[0])
    run(ranks, replace(config, steps=3, resume_changed=["seed"]))
    with pytest.raises(Exception, match="adapters of another model"):
        run(ranks, replace(config, steps=4, seed=1, resume_changed=["seed"]))


def unmerged_logits(runtime, config: TrainConfig) -> torch.Tensor:
    return logits_of(loop.start_run(config, runtime).worker)


def merged_logits(runtime, run_dir: str, strategy: StrategyConfig) -> torch.Tensor:
    config = EvaluateConfig(run_dir, strategy=strategy, precision="fp64", device="cpu")
    return logits_of(load_trained_run(config, runtime).worker)


def logits_of(worker) -> torch.Tensor:
    with worker.evaluation_mode():
        return worker.forward({"tokens": torch.arange(16)[None]})


@pytest.mark.parametrize("name", ["single", "tensor 2", "fsdp 2"])
def test_adapters_are_merged_to_use_the_model(adapted, ranks, name):
    strategy = {
        "single": StrategyConfig(),
        "tensor 2": StrategyConfig(tensor=2),
        "fsdp 2": StrategyConfig(shard=2),
    }[name]
    expected = ranks.run(1, unmerged_logits, adapted)[0]
    logits = ranks.run(world_size(strategy), merged_logits, adapted.run_dir, strategy)[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


def test_adapters_of_rounded_weights_are_merged_into_these(base, ranks, tmp_path):
    compress = CompressConfig(bits=4, input_bits=0)
    config = replace(base, init_from=base.run_dir, lora=LORA, compress=compress, steps=2)
    config = run(ranks, replace(config, run_dir=str(tmp_path / "run")))
    expected = ranks.run(1, unmerged_logits, config)[0]
    logits = ranks.run(2, merged_logits, config.run_dir, StrategyConfig(tensor=2))[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


def train_in_bf16(runtime, config: TrainConfig, narrows: bool) -> list[torch.dtype]:
    with nullcontext() if narrows else mock.patch.object(state, "narrow_frozen"):
        loop.train(config, runtime)
        worker = loop.start_run(config, runtime).worker
    return [p.dtype for p in worker.parameters().values() if not p.requires_grad]


def test_frozen_weights_in_the_dtype_of_computation_change_no_number(base, ranks, tmp_path):
    config = replace(base, lora=LORA, precision="bf16", steps=2)
    made = []
    for narrows in (True, False):
        config = prepare_training(replace(config, run_dir=str(tmp_path / str(narrows))), 1)
        kinds = ranks.run(1, train_in_bf16, config, narrows)[0]
        assert set(kinds) == {torch.bfloat16 if narrows else torch.float32}
        made.append(saved_tensors(config, 2))
    assert all(tensor.equal(made[1][name]) for name, tensor in made[0].items())


def export(runtime, config: ExportConfig) -> None:
    export_run(config, runtime, say=False)


@pytest.mark.parametrize("name", ["native", "huggingface"])
def test_exports_hold_merged_weights(adapted, ranks, tmp_path, name):
    config = ExportConfig(adapted.run_dir, str(tmp_path / "out"), format=name)
    ranks.run(1, export, check_export(config, 1))
    expected = ranks.run(1, unmerged_logits, adapted)[0]
    logits = ranks.run(1, merged_logits, str(tmp_path / "out"), StrategyConfig())[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)  # float32


def test_training_begins_with_the_merged_weights_of_another_run(adapted, ranks, tmp_path):
    expected = ranks.run(1, unmerged_logits, adapted)[0]
    for lora in (LoraConfig(), LoraConfig(rank=2)):
        config = replace(adapted, init_from=adapted.run_dir, lora=lora)
        config = prepare_training(replace(config, run_dir=str(tmp_path / str(lora.rank))), 1)
        logits = ranks.run(1, unmerged_logits, config)[0]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


def test_a_written_adapter_is_begun_with(base, adapted, ranks, tmp_path):
    """In float32, under the same names; that of another model is refused by its digests."""
    out = str(tmp_path / "adapter")
    config = ExportConfig(adapted.run_dir, out, format="peft")
    ranks.run(1, export, check_export(config, 1))
    expected = ranks.run(1, unmerged_logits, adapted)[0]
    config = replace(adapted, lora=LoraConfig(adapter=out), run_dir=str(tmp_path / "run"))
    ready = prepare_training(config, 1)
    assert (ready.lora.rank, ready.lora.alpha) == (LORA.rank, LORA.alpha)
    logits = ranks.run(1, unmerged_logits, ready)[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    other = replace(config, init_from=adapted.run_dir, run_dir=str(tmp_path / "other"))
    with pytest.raises(Exception, match="adapters of another model"):
        ranks.run(1, unmerged_logits, prepare_training(other, 1))
    with pytest.raises(UserError, match=r"lora\.rank=7, but lora\.adapter="):
        prepare_training(replace(config, lora=LoraConfig(rank=7, adapter=out)), 1)
    with pytest.raises(UserError, match="set init_from"):
        prepare_training(replace(config, init_from=""), 1)
    with pytest.raises(UserError, match="has no adapters"):
        check_export(ExportConfig(base.run_dir, str(tmp_path / "no"), format="peft"), 1)

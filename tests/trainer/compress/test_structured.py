"""Structured pruning: the choice of units, training with them masked, removal on export."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from conf.validation.compression import compress_problems
from launch.cli.preflight import check_export
from parallel.runtime import JobQueue, process_group
from parallel.strategy import StrategyConfig, world_size
from trainer.compress.compression import Compression
from trainer.compress.structured_pruning import Pruning, find_prunable_units, remove_pruned
from trainer.config.train import (
    CompressConfig,
    EvaluateConfig,
    ExportConfig,
    ModelConfig,
    TrainConfig,
)
from trainer.data import open_split
from trainer.inference.trained_run import export_run, load_trained_run
from trainer.loop import start_run
from trainer.model import Transformer
from trainer.nn.init import init_rows
from trainer.run.run_dir import EXPORTED, load_config
from trainer.tasks.evaluate import evaluate_model
from trainer.verify.cases import FAMILIES, make_batch, scale_down
from trainer.verify.features import FEATURES

HALF = CompressConfig(prune_heads=0.5, prune_ffn=0.5)
LAYOUTS = {
    "single": StrategyConfig(),
    "fsdp 2": StrategyConfig(shard=2),
    "tensor 2": StrategyConfig(tensor=2),
    "tensor 2 × pipeline 2": StrategyConfig(tensor=2, pipeline=2),
}


def built(config: ModelConfig, compress: CompressConfig = HALF) -> tuple[Transformer, Compression]:
    model = Transformer(config, torch.float64).double()
    for name, parameter in model.named_parameters():
        rows = init_rows(config, 0, name, parameter.shape, 0, len(parameter))
        parameter.data.copy_(rows * 4 + torch.sin(torch.arange(rows.numel())).view_as(rows) / 10)
    compression = Compression(compress)
    compression.reshape_model(model)
    return model, compression


def gradients(model: Transformer, batch) -> dict[str, torch.Tensor]:
    logits = model(batch).flatten(0, -2)
    torch.nn.functional.cross_entropy(logits, batch["targets"].flatten()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


PRUNABLE = FAMILIES | {name: FEATURES[name] for name in ("decoder (Gemma 3)",)}


@pytest.mark.parametrize("family", PRUNABLE)
def test_a_pruned_model_trains_like_the_smaller_one(family):
    """Logits and gradients are equal; gradients of pruned units are zero."""
    config = replace(scale_down(PRUNABLE[family]), dropout=0.0)
    model, compression = built(config)
    compression.prepare_step(1, 1)
    shape, weights = remove_pruned(config, HALF, model)
    small = Transformer(shape, torch.float64).double()
    small.load_state_dict(weights, strict=False)  # tied weights have one name
    groups = config.kv_heads or config.heads
    assert shape.kv_heads == groups // 2 and shape.heads == config.heads // 2
    assert shape.ffn_width == config.ffn_width // 2
    batch = make_batch(config, 3, 0)
    torch.testing.assert_close(small(batch), model(batch))
    ours, theirs = gradients(model, batch), gradients(small, batch)
    squares = [sum(float(g.square().sum()) for g in grads.values()) for grads in (ours, theirs)]
    assert squares[0] == pytest.approx(squares[1], rel=1e-12)


def test_the_least_important_are_pruned_and_stay_pruned():
    config = replace(scale_down(FAMILIES["decoder (Llama)"]), kv_heads=4)
    model, compression = built(config, CompressConfig(prune_ffn=0.5, prune_heads=0.25))
    layer = model.blocks["0"].feed_forward
    norms = layer.down.weight.norm(dim=0) * layer.up.weight.norm(dim=1)
    norms = norms * layer.gate.weight.norm(dim=1)
    dead = []
    for step in (0, 9, 10, 29, 50, 100):
        with torch.no_grad():
            layer.down.weight[:, dead] += 1e-9  # momentum goes on changing pruned weights
        compression.prepare_step(step, 100)
        gone = (layer.down.weight == 0).all(0).nonzero().flatten().tolist()
        ramp = {0: 0, 9: 0, 10: 0, 29: 1 - (1 - 7 / 16) ** 3, 50: 1, 100: 1}[step]
        assert len(gone) == round(0.5 * ramp * config.ffn_width)
        assert set(dead) <= set(gone)
        assert set(gone) == set(norms.argsort()[: len(gone)].tolist())
        dead = gone
    attention = model.blocks["1"].attention
    heads = attention.output.weight.unflatten(1, (4, -1)).abs().amax((0, 2))
    assert (heads == 0).sum() == 1


def test_a_resumed_run_keeps_its_pruned_units():
    config = scale_down(FAMILIES["encoder (ViT)"])
    model, compression = built(config)
    compression.prepare_step(30, 100)
    masks = [units.reader.alive for units in find_prunable_units(model.blocks, HALF)]
    pruning = Pruning(HALF)
    pruning.register_masks(model.blocks)
    pruning.prune_due(0.3)
    again = [units.reader.alive for units in find_prunable_units(model.blocks, HALF)]
    assert len(masks) > 3 and all(map(torch.equal, masks, again))
    assert {0.0, 1.0} == set(torch.cat(masks).tolist())


def values(runtime, run_dir: str, strategy: StrategyConfig) -> dict[str, float]:
    reader = EvaluateConfig(run_dir, strategy=strategy, precision="fp64", device="cpu")
    run = load_trained_run(reader, runtime)
    return evaluate_model(run.worker, open_split(run.config.data, "test"), micro_batch_size=4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of a pruned run, its export, and the export of a plain run pruned at export."""
    folder = tmp_path_factory.mktemp("runs")
    with process_group("cpu", JobQueue.single_process()) as runtime:
        config = TrainConfig(
            model=tiny.CLASSIFIER,
            data=tiny.image_data(folder),
            precision="fp64",
            device="cpu",
            batch_size=4,
            run_dir=str(folder / "run"),
            compress=HALF,
        )
        config = tiny.prepare_training(config, 1)
        state = start_run(config, runtime)
        state.compression.prepare_step(1, 1)
        tiny.save(config, state)
        plain = replace(config, compress=CompressConfig(), run_dir=str(folder / "plain"))
        tiny.save(tiny.prepare_training(plain, 1), start_run(plain, runtime))
        exports = []
        for name, asked in (("run", CompressConfig()), ("plain", HALF)):
            small = str(folder / f"{name}-small")
            export = ExportConfig(str(folder / name), small, compress=asked)
            export_run(check_export(export, 1), runtime)
            exports.append(small)
        return config.run_dir, *exports


def test_sixteen_bits_halve_the_export(runs, runtime, tmp_path):
    """Exporting in 16 bits halves the weights of a pruned model, and the file can be read."""
    run_dir, small, _ = runs
    half = check_export(ExportConfig(run_dir, str(tmp_path / "half"), dtype="bf16"), 1)
    export_run(half, runtime)
    sizes = [Path(folder, EXPORTED).stat().st_size for folder in (small, half.output_dir)]
    assert sizes[1] < 0.8 * sizes[0]  # names and shapes take the same space
    whole, rounded = (
        values(runtime, small, LAYOUTS["single"]),
        values(runtime, half.output_dir, LAYOUTS["single"]),
    )
    assert whole != rounded
    assert rounded["eval_loss"] == pytest.approx(whole["eval_loss"], rel=0.02)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_export_without_pruned_units_is_smaller_and_equal(ranks, runs, layout):
    run_dir, small, at_once = runs
    strategy, config = LAYOUTS[layout], load_config(small)
    assert (config.model.heads, config.model.head_width, config.model.ffn_width) == (2, 4, 16)
    assert config.compress == CompressConfig()
    expected = ranks.run(1, values, run_dir, StrategyConfig())[0]
    for folder in (small, at_once):
        assert ranks.run(world_size(strategy), values, folder, strategy)[0] == pytest.approx(
            expected, rel=1e-6
        )


VIT = ModelConfig(family="encoder", width=128, heads=4, ffn_width=512, image_size=28, patch_size=7)
BAD = {
    "compress.prune_heads=0.1 of 4 heads is 0: set compress.prune_heads=0.25, or 0": (
        CompressConfig(prune_heads=0.1),
        VIT,
    ),
    "compress.prune_heads=0.5 of 1 key/value heads is 0: set compress.prune_heads=0": (
        CompressConfig(prune_heads=0.5),
        replace(VIT, kv_heads=1),
    ),
    "set compress.prune_end=0.4 or more": (
        CompressConfig(prune_ffn=0.5, prune_start=0.4, prune_end=0.2),
        VIT,
    ),
    "would have new neighbours in compress.group=32; set compress.group=0": (
        CompressConfig(prune_ffn=0.5, bits=4, group=32),
        VIT,
    ),
    "would have new neighbours in compress.sparse_m=4; set compress.sparse_n=0": (
        CompressConfig(prune_ffn=0.5, sparse_n=2),
        VIT,
    ),
    "compress.group=64 does not divide the 32 inputs of a head that compress.prune_heads removes; "
    "set compress.group=32": (
        CompressConfig(prune_heads=0.5, bits=4, group=64),
        VIT,
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_an_unsupported_pruning_is_one_message(message):
    compress, model = BAD[message]
    (found,) = compress_problems(compress, model, StrategyConfig())
    assert message in found

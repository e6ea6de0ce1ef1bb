"""Exported models: their size, and equality with the trained model under every layout."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from launch.cli.preflight import check_export, check_trained_run
from parallel.runtime import JobQueue, process_group
from parallel.strategy import StrategyConfig, world_size
from trainer.compress.packing import pack_bits, pack_weight, unpack_bits, unpack_weight
from trainer.compress.quantized_linear import CompressedLinear, QuantizationSpec
from trainer.config.train import (
    CompressConfig,
    EvaluateConfig,
    ExportConfig,
    TrainConfig,
    UserError,
)
from trainer.data import open_split
from trainer.inference.export import IntegerLinear, compute_with_integers
from trainer.inference.trained_run import export_run, load_trained_run
from trainer.loop import start_run
from trainer.run.run_dir import EXPORTED, AlreadyFinishedError, load_config, open_run_dir
from trainer.tasks.evaluate import evaluate_model

LENSES = {
    "int8": QuantizationSpec(bits=8, input_bits=8),
    "int8, weights alone": QuantizationSpec(bits=8),
    "int4 in groups": QuantizationSpec(bits=4, group=8, input_bits=8),
    "int3": QuantizationSpec(bits=3),
    "int2 in groups": QuantizationSpec(bits=2, group=16),
    "2:4": QuantizationSpec(n=2, m=4),
    "1:8, int8": QuantizationSpec(n=1, m=8, bits=8),
    "3:16, int4": QuantizationSpec(n=3, m=16, bits=4, group=16),
}
COMPRESSIONS = {
    "none": CompressConfig(),
    "int8, merge": CompressConfig(bits=8, merge=1),
    "int4, 2:4": CompressConfig(bits=4, group=8, sparse_n=2),
}
LAYOUTS = {
    "single": StrategyConfig(),
    "ddp 2": StrategyConfig(replicate=2),
    "fsdp 2": StrategyConfig(shard=2),
    "tensor 2": StrategyConfig(tensor=2),
    "tensor 2 × pipeline 2": StrategyConfig(tensor=2, pipeline=2),
}


def layer(lens: QuantizationSpec, inputs: int = 64, outputs: int = 24) -> CompressedLinear:
    made = CompressedLinear(inputs, outputs)
    made.lens = lens
    return made


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_integers_are_packed_into_bytes(bits):
    numbers = torch.randint(0, 2**bits, (3, 21))
    small = pack_bits(numbers, bits)
    assert small.shape == (3, -(-21 * {3: 4}.get(bits, bits) // 8))
    assert torch.equal(unpack_bits(small, bits, 21), numbers)


@pytest.mark.parametrize("name", LENSES)
def test_unpacking_returns_the_weight_of_the_forward(name):
    made = layer(LENSES[name])
    weight = made.weight.detach()
    parts = pack_weight(weight, made.lens)
    made.lens = replace(made.lens, input_bits=0)
    seen = made(torch.eye(64)) - made.bias
    torch.testing.assert_close(unpack_weight(parts, made.lens, 64).T, seen, rtol=1e-6, atol=1e-7)
    size = sum(part.nbytes for part in parts.values())
    stored = {3: 4}.get(made.lens.bits, made.lens.bits) or 32
    share = made.lens.n / made.lens.m if made.lens.n else 1
    places = share * (made.lens.m - 1).bit_length() if made.lens.n else 0
    scales = 32 / (made.lens.group or 64) if made.lens.bits else 0
    assert size * 8 == pytest.approx(weight.numel() * (share * stored + places + scales), rel=0.1)


def test_integer_kernels_equal_the_trained_layers():
    made = layer(LENSES["int8"]).double()
    x = torch.randn(2, 5, 64, dtype=torch.float64)
    trained = made(x)
    stack = torch.nn.Sequential(made, layer(LENSES["int4 in groups"]))
    compute_with_integers(stack)
    assert [type(module) for module in stack] == [IntegerLinear, CompressedLinear]
    assert made.weight is None and made.numbers.dtype == torch.int8
    torch.testing.assert_close(made(x), trained)


def trained_run(folder: Path, runtime, compress: CompressConfig) -> TrainConfig:
    """A run of an image classifier with a checkpoint of its initial weights."""
    config = TrainConfig(
        model=tiny.CLASSIFIER,
        data=tiny.image_data(folder),
        precision="fp32",
        device="cpu",
        batch_size=4,
        run_dir=str(folder / "run"),
        compress=compress,
    )
    config = tiny.prepare_training(config, runtime.world_size)
    tiny.save(config, start_run(config, runtime))
    return config


def values(runtime, run_dir: str, strategy: StrategyConfig) -> tuple[dict[str, float], str]:
    config = EvaluateConfig(run_dir, strategy=strategy, precision="fp32", device="cpu")
    run = load_trained_run(config, runtime)
    kinds = {type(module).__name__ for module in run.worker.model.modules()}
    found = evaluate_model(run.worker, open_split(run.config.data, "test"), micro_batch_size=4)
    return found, "integers" if "IntegerLinear" in kinds else "floats"


@pytest.fixture(scope="module", params=COMPRESSIONS)
def runs(request, tmp_path_factory):
    """A run and its export."""
    folder = tmp_path_factory.mktemp("runs")
    with process_group("cpu", JobQueue.single_process()) as runtime:
        config = trained_run(folder, runtime, COMPRESSIONS[request.param])
        small = str(folder / "small")
        export_run(check_export(ExportConfig(config.run_dir, small), 1), runtime)
        return (
            request.param,
            config.run_dir,
            small,
            values(runtime, config.run_dir, LAYOUTS["single"]),
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_exported_model_has_the_runs_values(ranks, runs, layout):
    compress, _, small, (expected, _) = runs
    strategy = LAYOUTS[layout]
    found, kernels = ranks.run(world_size(strategy), values, small, strategy)[0]
    assert found == pytest.approx(expected, rel=1e-5)
    whole = compress == "int8, merge" and layout in ("single", "ddp 2")
    assert kernels == ("integers" if whole else "floats")


def test_invalid_exports_are_one_message(runs, tmp_path):
    _, run_dir, small, _ = runs
    for config, ranks, message in (
        (
            ExportConfig(run_dir, small),
            1,
            f"output_dir={small} is there already; name a new folder",
        ),
        (
            ExportConfig(run_dir),
            1,
            f"output_dir is empty; name a new folder, e.g. output_dir={run_dir}-exported",
        ),
        (ExportConfig(run_dir, str(tmp_path / "to")), 2, "2 ranks were started, but one exports"),
        (ExportConfig(str(tmp_path), str(tmp_path / "to")), 1, "holds no run"),
    ):
        with pytest.raises(UserError, match=message.replace("(", r"\(")):
            check_export(config, ranks)
    trained = replace(load_config(run_dir), run_dir=small)
    with pytest.raises((UserError, AlreadyFinishedError), match="holds an exported model"):
        open_run_dir(trained)
    assert check_trained_run(EvaluateConfig(small), 1).run_dir == small
    with process_group("cpu", JobQueue.single_process()) as runtime:
        copy = tmp_path / "copy"
        copy.mkdir()
        for name in ("config.yaml", EXPORTED):
            (copy / name).write_bytes(Path(small, name).read_bytes())
        (copy / EXPORTED).write_bytes((copy / EXPORTED).read_bytes()[:-9])
        with pytest.raises(UserError, match="is damaged"):
            values(runtime, str(copy), LAYOUTS["single"])


def begun(runtime, config: TrainConfig) -> dict[str, torch.Tensor]:
    """Return the weights with which a run starts or resumes."""
    worker = start_run(config, runtime).worker
    return {name: tiny.whole(p).clone() for name, p in worker.parameters().items()}


@pytest.mark.parametrize("layout", ["single", "fsdp 2", "tensor 2"])
def test_a_run_starts_from_the_weights_of_another(ranks, runs, tmp_path, layout):
    compress, run_dir, small, _ = runs
    strategy, config = LAYOUTS[layout], load_config(run_dir)
    other = replace(
        config,
        seed=5,
        compress=CompressConfig(),
        strategy=strategy,
        init_from=run_dir,
        micro_batch_size=0,
        run_dir=str(tmp_path / "new"),
    )
    other = tiny.prepare_training(other, world_size(strategy))
    theirs = ranks.run(1, begun, config)[0]
    ours = ranks.run(world_size(strategy), begun, other)[0]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    drawn = ranks.run(world_size(strategy), begun, replace(other, init_from=""))[0]
    assert not torch.equal(drawn["head.output.weight"], theirs["head.output.weight"])
    exported = ranks.run(world_size(strategy), begun, replace(other, init_from=small))[0]
    gap = max(float((exported[name] - theirs[name]).abs().max()) for name in theirs)
    assert (gap == 0) == (compress == "none")


def test_a_resumed_run_keeps_its_own_weights(ranks, runs, tmp_path):
    _, run_dir, _, _ = runs
    config = replace(load_config(run_dir), seed=5, run_dir=str(tmp_path / "new"))
    config = tiny.prepare_training(config, 1)

    ranks.run(1, save_a_step, config)
    drawn = ranks.run(1, begun, config)[0]
    again = ranks.run(1, begun, replace(config, init_from=run_dir))[0]
    assert all(torch.equal(again[name], drawn[name]) for name in drawn)


def save_a_step(runtime, config: TrainConfig) -> None:
    state = start_run(config, runtime)
    state.step = 1
    tiny.save(config, state)


def test_weights_of_another_model_are_rejected_at_the_start(runs, tmp_path):
    _, run_dir, _, _ = runs
    config = load_config(run_dir)
    wider = replace(
        config,
        model=replace(config.model, ffn_width=48, layers=3),
        init_from=run_dir,
        run_dir=str(tmp_path / "new"),
    )
    with pytest.raises(UserError) as raised:
        tiny.prepare_training(wider, 1)
    assert raised.value.problems == [
        f"init_from={run_dir} holds a model with model.{key}={theirs}, not {ours}; set "
        f"model.{key}={theirs}, or init_from another run"
        for key, theirs, ours in (("layers", 2, 3), ("ffn_width", 32, 48))
    ]
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match=f"init_from={tmp_path} holds no run"):
        tiny.prepare_training(replace(config, init_from=str(tmp_path), run_dir=wider.run_dir), 1)

"""Compare float8 layers with torchao's and layouts with one process; slowly, on a CPU."""

from copy import deepcopy
from dataclasses import replace
from itertools import pairwise

import pytest
import tiny
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy
from torchao.float8 import Float8LinearConfig
from torchao.float8.float8_linear import Float8Linear as TorchaoLinear

from launch.cli import preflight as before
from launch.cli.preflight import check_trained_run, prepare_training
from parallel.activation_checkpointing import _KeepProducts
from parallel.errors import UserError
from parallel.runtime import Runtime
from parallel.strategy import StrategyConfig, world_size
from trainer import build
from trainer.config.train import (
    CompressConfig,
    EvaluateConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from trainer.inference.trained_run import load_trained_run
from trainer.loop import start_run, take_step
from trainer.nn import float8
from trainer.nn.float8 import Float8Linear, check_float8, multiply_in_float8
from trainer.nn.layers import Linear
from trainer.verify.cases import make_batch, samples_per_step, split_batch

MODEL = ModelConfig(
    layers=2,
    width=64,
    heads=4,
    kv_heads=2,
    ffn_width=96,
    vocab_size=61,
    max_positions=12,
    norm="layernorm",
    bias=True,
)
LAYERS = MODEL.layers * 7  # linear layers of attention and gated feed-forward
TOKENS = 13  # not a multiple of 16, which the kernels require


def layer(bias: bool) -> Linear:
    torch.manual_seed(0)
    return Linear(64, 96, bias=bias)


def ours(plain: Linear) -> nn.Module:
    blocks = nn.Sequential(deepcopy(plain))
    multiply_in_float8(blocks)
    return blocks


def torchaos(plain: Linear) -> nn.Module:
    """Return torchao's layer; it multiplies the rounded operands in float32."""
    casts = replace(Float8LinearConfig.from_recipe_name("rowwise"), emulate=True)
    return TorchaoLinear.from_float(deepcopy(plain).bfloat16(), casts)


def results(made: nn.Module) -> list[torch.Tensor]:
    """Return the output and the gradients of the input and the parameters."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, TOKENS, 64, generator=draw).bfloat16().requires_grad_()
    y = made(x)
    y.backward(torch.randn(y.shape, generator=draw).bfloat16())
    return [y, x.grad, *(parameter.grad for parameter in made.parameters())]


@pytest.mark.parametrize("bias", [False, True])
def test_output_and_gradients_equal_torchaos(bias):
    plain = layer(bias)
    found, due = results(ours(plain)), results(torchaos(plain))
    assert found[0].dtype == torch.bfloat16 and found[2].dtype == torch.float32  # master weights
    for mine, theirs in zip(found, due, strict=True):
        # Sums may be rounded differently; without float8 they differ by 1e-1.
        torch.testing.assert_close(mine, theirs.to(mine.dtype), rtol=1e-2, atol=1e-3)


def test_products_meet_the_requirements_of_gpus(monkeypatch):
    """Check what torch checks only on a GPU: sizes, and which dim is contiguous."""
    seen, multiply = [], torch._scaled_mm

    def spied(a, b, **options):
        seen.append((a, b, options))
        return multiply(a, b, **options)

    monkeypatch.setattr(torch, "_scaled_mm", spied)
    results(ours(layer(bias=True)))
    shapes = [(*a.shape, *b.shape) for a, b, _ in seen]
    rows = 2 * TOKENS
    assert shapes == [(rows, 64, 64, 96), (rows, 96, 96, 64), (96, 32, 32, 64)]
    for a, b, options in seen:
        assert a.dtype == b.dtype == torch.float8_e4m3fn
        assert a.stride(1) == b.stride(0) == 1
        assert options["out_dtype"] == torch.bfloat16


def test_a_tokens_output_does_not_depend_on_other_tokens():
    made, (x, other) = ours(layer(bias=True)), torch.randn(2, 5, 64).bfloat16()
    alone = made(x)
    assert torch.equal(made(torch.cat([x, 1e4 * other]))[:5], alone)


def job(strategy: StrategyConfig, precision: str = "fp8", **changes) -> TrainConfig:
    return TrainConfig(
        model=MODEL,
        strategy=strategy,
        precision=precision,
        device="cpu",
        steps=20,
        optim=OptimConfig(lr=3e-3, warmup_steps=0),
        run_dir="none",
        **changes,
    )


def trained(runtime, config: TrainConfig, steps: int) -> tuple[list[float], int]:
    """Return each step's loss, on the same samples in any layout, and the number of fp8 layers."""
    state = start_run(config, runtime)
    batch = make_batch(MODEL, 0, 0, samples_per_step(StrategyConfig(pipeline=2)) - 1)
    losses = []
    for _ in range(steps):
        step = take_step(config, state, split_batch(batch, state.worker))
        losses.append(state.worker.sum_over_data(step.loss).item())
    return losses, sum(isinstance(m, Float8Linear) for m in state.worker.model.modules())


@pytest.fixture(scope="module")
def alone(runtime) -> list[float]:
    losses, layers = trained(runtime, job(StrategyConfig()), 8)
    assert layers == LAYERS
    return losses


def test_the_loss_falls_as_in_bf16(runtime, alone):
    due, layers = trained(runtime, job(StrategyConfig(), "bf16"), 8)
    assert layers == 0
    assert all(later < earlier - 0.05 for earlier, later in pairwise(alone))
    assert abs(alone[0] - due[0]) > 1e-4
    torch.testing.assert_close(torch.tensor(alone), torch.tensor(due), rtol=0, atol=0.02)


@pytest.mark.parametrize("name", tiny.TWO_RANKS)
def test_a_layout_has_the_losses_of_one_process(ranks, alone, name):
    """The first loss is equal, except that tensor ranks round partial sums.

    Later updates differ by the rounding of gradients that are summed in another order.
    """
    strategy = tiny.TWO_RANKS[name]
    results = ranks.run(world_size(strategy), trained, job(strategy), 4)
    assert {layers for _, layers in results} == {LAYERS // strategy.pipeline}
    for losses, _ in results:
        assert losses[0] == pytest.approx(alone[0], abs=1e-3 if strategy.tensor > 1 else 1e-5)
        assert losses == pytest.approx(alone[:4], abs=1e-2)


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that the host has GPUs of these capabilities."""

    def pretend(*found: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: found[number])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"GPU {number}")

    return pretend


NEEDS = "precision=fp8 needs NVIDIA GPUs of compute capability 8.9 or more (Ada, Hopper), but "


def test_hardware_without_float8_is_rejected(gpus):
    gpus()
    for device in ("cpu", "auto"):
        with pytest.raises(UserError) as raised:
            check_float8(device, 1)
        assert str(raised.value) == (
            f"{NEEDS}the ranks compute on a CPU; set precision=fp32, or bf16"
        )
    gpus((9, 0), (8, 6))
    check_float8("auto", 1)
    with pytest.raises(UserError) as raised:
        check_float8("cuda", 2)
    assert str(raised.value) == f"{NEEDS}GPU 1 has 8.6; set precision=bf16"
    for capability in ((8, 9), (9, 0), (10, 0)):
        gpus(capability)
        check_float8("cuda", 1)


def test_without_torchao_the_extra_is_named(gpus, monkeypatch):
    gpus((9, 0))
    monkeypatch.setattr(float8, "find_spec", lambda name: None)
    with pytest.raises(UserError) as raised:
        check_float8("cuda", 1)
    assert str(raised.value) == (
        'precision=fp8 needs `torchao`: pip install "samestep[torchao]"; or set precision=bf16'
    )


def test_a_run_is_rejected_before_it_starts_but_loads_anywhere(runtime, monkeypatch, tmp_path):
    open_sizes = replace(MODEL, vocab_size=0, max_positions=0)
    config = job(StrategyConfig(), batch_size=4, data=tiny.text_data(tmp_path / "data"))
    config = replace(config, model=open_sizes, run_dir=str(tmp_path / "run"))
    with pytest.raises(UserError, match="the ranks compute on a CPU"):
        prepare_training(config, 1)
    assert not (tmp_path / "run").exists()
    with monkeypatch.context() as patch:
        patch.setattr(float8, "check_float8", lambda device, ranks: None)
        config = prepare_training(config, 1)
    state = start_run(config, runtime)
    tiny.save(config, state)
    reader = EvaluateConfig(config.run_dir, strategy=StrategyConfig(), device="cpu")
    model = load_trained_run(check_trained_run(reader, 1), runtime).worker.model
    assert not any(isinstance(m, Float8Linear) for m in model.modules())
    weights = state.worker.parameters()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    with pytest.raises(UserError, match="the ranks compute on a CPU"):
        check_trained_run(replace(reader, precision="fp8"), 1)
    small = replace(config, compress=CompressConfig(bits=8))
    monkeypatch.setattr(float8, "check_float8", lambda device, ranks: None)
    monkeypatch.setattr(before, "load_config", lambda run_dir: small)
    with pytest.raises(UserError, match=r"precision=fp8 and compress\.bits=8"):
        check_trained_run(replace(reader, precision="fp8"), 1)


def test_selective_keeps_the_products_of_a_gpu():
    """A CPU multiplies what is rounded to 8 bits by `mm`."""
    product = torch.ops.aten._scaled_mm.default
    assert _KeepProducts()(None, product) is CheckpointPolicy.MUST_SAVE


def test_float8_without_a_compiler_is_warned_about(caplog):
    config, gpu = TrainConfig(precision="fp8"), Runtime(0, 1, 0, 1, torch.device("cuda"))
    build._warn_of_slow_layouts(replace(config, compile=True), config.strategy, gpu)
    assert not caplog.messages
    build._warn_of_slow_layouts(config, config.strategy, gpu)
    (message,) = caplog.messages
    assert "set compile=true, or precision=bf16" in message

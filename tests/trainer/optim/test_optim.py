"""AdamW and its schedule against torch, and the loss scale of fp16."""

import math

import pytest
import torch
from torch import nn

from trainer.config.train import OptimConfig
from trainer.optim.lr_schedule import learning_rate_at, lr_jump_message, schedule_warnings
from trainer.optim.parameter_groups import has_weight_decay
from trainer.optim.registry import build_optimizer
from trainer.precision import PRECISIONS, LossScale, resolve_precision

CPU = torch.device("cpu")


def test_cosine_equals_torch():
    config = OptimConfig(lr=0.5, warmup_steps=10, min_lr_ratio=0.1)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90, eta_min=0.05)
    for step in range(10, 100):
        assert learning_rate_at(step, 100, config) == pytest.approx(
            reference.get_last_lr()[0], rel=1e-9
        )
        optimizer.step()
        reference.step()


def test_warm_up_is_linear_and_reaches_the_peak():
    config = OptimConfig(lr=0.5, warmup_steps=10, schedule="constant")
    assert [learning_rate_at(step, 100, config) for step in (0, 4, 9, 10, 99)] == [
        0.05,
        0.25,
        0.5,
        0.5,
        0.5,
    ]


def test_wsd_is_stable_and_then_falls_to_the_floor():
    config = OptimConfig(lr=1.0, warmup_steps=0, schedule="wsd", decay_share=0.2, min_lr_ratio=0.1)
    assert [learning_rate_at(step, 100, config) for step in (0, 50, 80)] == [1.0, 1.0, 1.0]
    assert learning_rate_at(90, 100, config) == pytest.approx(0.55)
    assert learning_rate_at(100, 100, config) == pytest.approx(0.1)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 4)
        self.norm = nn.LayerNorm(4)


def gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_optimizer_equals_torch_and_decays_matrices_only():
    config = OptimConfig(weight_decay=0.3)
    ours, theirs = Small(), Small()
    theirs.load_state_dict(ours.state_dict())
    reference = torch.optim.AdamW(
        [
            {"params": [theirs.layer.weight], "weight_decay": 0.3},
            {"params": [theirs.layer.bias, *theirs.norm.parameters()], "weight_decay": 0.0},
        ],
        lr=0.01,
        betas=(0.9, 0.95),
        eps=1e-8,
        foreach=False,
    )
    optimizer = build_optimizer(dict(ours.named_parameters()), config)
    for step in range(4):
        gradients(ours, step)
        gradients(theirs, step)
        optimizer.step(0.01, torch.zeros(()))
        reference.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other)
    state = optimizer.state()["layer.weight"]
    torch.testing.assert_close(state["exp_avg"], reference.state[theirs.layer.weight]["exp_avg"])


def test_a_skipped_update_changes_nothing():
    model = Small()
    optimizer = build_optimizer(dict(model.named_parameters()), OptimConfig())
    gradients(model, 0)
    optimizer.step(0.1, torch.zeros(()))
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    moments = {n: s["exp_avg"].clone() for n, s in optimizer.state().items()}
    for parameter in model.parameters():
        parameter.grad.fill_(math.nan)
    optimizer.step(0.1, torch.ones(()))
    assert optimizer.update_count().item() == 1
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert all(torch.equal(s["exp_avg"], moments[n]) for n, s in optimizer.state().items())


def test_decays():
    matrix, vector = torch.Size((2, 2)), torch.Size((2,))
    assert has_weight_decay("blocks.0.attention.query.weight", matrix)
    assert has_weight_decay("embed.tokens.weight", matrix)
    assert not has_weight_decay("head.norm.weight", vector)
    assert not has_weight_decay("embed.positions.weight", matrix)
    assert not has_weight_decay("embed.class_token", matrix)


def test_loss_scale_follows_overflows():
    scale = LossScale(PRECISIONS["fp16"], CPU)
    start = scale.scale.item()
    scale.update(torch.ones(()))
    assert scale.scale.item() == start / 2
    for _ in range(LossScale.growth_interval - 1):
        scale.update(torch.zeros(()))
    assert scale.scale.item() == start / 2
    scale.update(torch.zeros(()))
    assert scale.scale.item() == start
    scale.update(torch.ones(()))
    for _ in range(LossScale.growth_interval - 1):  # an overflow starts the count anew
        scale.update(torch.zeros(()))
    assert scale.scale.item() == start / 2


def test_loss_scale_is_one_elsewhere():
    scale = LossScale(PRECISIONS["bf16"], CPU)
    scale.update(torch.ones(()))
    assert scale.scale.item() == 1.0


def test_automatic_precision():
    assert resolve_precision("auto", CPU).name == "fp32"
    assert resolve_precision("auto", torch.device("cuda")).name == "bf16"
    assert PRECISIONS["bf16"].parameters == torch.float32


def schedule(**optim) -> OptimConfig:
    return OptimConfig(lr=1e-2, **optim)


@pytest.mark.parametrize(
    ("steps", "optim", "parts"),
    [
        (60, {"warmup_steps": 60}, ("optim.warmup_steps=60", "steps=60", "0.01 of optim.lr=0.01")),
        (4, {"warmup_steps": 100}, ("optim.warmup_steps=100", "0.0004 of", "optim.warmup_steps=0")),
        (
            100,
            {"warmup_steps": 60, "schedule": "wsd", "decay_share": 0.5},
            (
                "optim.warmup_steps=60",
                "step 50",
                "from 0.01 to 0.0082",
                "set optim.warmup_steps=50",
            ),
        ),
        (100, {"warmup_steps": 99}, ()),
        (100, {"warmup_steps": 50, "schedule": "wsd", "decay_share": 0.5}, ()),
        (100, {"warmup_steps": 0, "schedule": "wsd", "decay_share": 1.0}, ()),
        (1, {"warmup_steps": 0}, ()),
    ],
)
def test_a_schedule_that_never_falls_or_leaps_is_told(steps, optim, parts):
    warnings = schedule_warnings(steps, schedule(**optim))
    assert len(warnings) == (len(parts) > 0)
    assert all(part in warnings[0] for part in parts)


@pytest.mark.parametrize(
    ("steps", "optim"),
    [
        (120, {}),
        (40, {}),
        (60, {"schedule": "constant"}),
        (60, {"min_lr_ratio": 0.5}),
        (60, {"warmup_steps": 100}),
        (60, {"schedule": "wsd"}),
    ],
)
def test_a_leap_of_the_learning_rate_is_told_with_both_numbers(steps, optim):
    before = learning_rate_at(50, 60, OptimConfig(lr=1e-2, warmup_steps=5))
    config = schedule(**{"warmup_steps": 5} | optim)
    now = learning_rate_at(50, steps, config)
    told = lr_jump_message(50, steps, before, config)
    assert f"step 51 is {now:.3g}" in told and f"had {before:.3g}" in told


@pytest.mark.parametrize("before", [None, 1e-2, 0.995e-2])
def test_a_learning_rate_that_goes_on_is_not_mentioned(before):
    assert lr_jump_message(20, 120, before, schedule(warmup_steps=5, schedule="wsd")) == ""

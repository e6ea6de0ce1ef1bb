"""Copies of one tensor: the same bits under every strategy, and the odd one is named."""

from dataclasses import replace

import pytest
import torch

from parallel.grad_norm import local_tensor
from parallel.health.replica_check import (
    CHUNK,
    digest_weights,
    find_replica_mismatches,
    tensor_digest,
)
from parallel.pipeline.schedules import stage_to_rank
from parallel.strategy import StrategyConfig, world_size
from trainer.build import parallel_model
from trainer.config.train import VerifyConfig
from trainer.optim.registry import build_optimizer
from trainer.precision import PRECISIONS
from trainer.verify.cases import (
    FAMILIES,
    STRATEGIES,
    make_batch,
    samples_per_step,
    scale_down,
    split_batch,
)

WEIGHTS = digest_weights(torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_any_bit_and_any_order_changes_the_digest(dtype):
    generator = torch.Generator().manual_seed(0)
    tensor = (100 * torch.randn(3, 700, generator=generator)).to(dtype)
    known = tensor_digest(tensor, WEIGHTS)
    assert known == tensor_digest(tensor.clone(), WEIGHTS)
    size = 8 * tensor.element_size()
    bits = tensor.view(-1).view({16: torch.int16, 32: torch.int32, 64: torch.int64}[size])
    for _ in range(100):
        place = int(torch.randint(bits.numel(), (), generator=generator))
        bit = int(torch.randint(size - 1, (), generator=generator))
        bits[place] ^= 1 << bit
        assert tensor_digest(tensor, WEIGHTS) != known
        bits[place] ^= 1 << bit
    assert tensor_digest(tensor, WEIGHTS) == known
    for other in (tensor.flip(0), tensor.roll(1), tensor[:, torch.randperm(700)]):
        assert tensor_digest(other, WEIGHTS) != known


def test_a_large_tensor_is_digested_in_order_too():
    tensor = torch.arange(2 * CHUNK + 3, dtype=torch.float32)
    swapped = torch.cat((tensor[CHUNK : 2 * CHUNK], tensor[:CHUNK], tensor[2 * CHUNK :]))
    assert tensor_digest(tensor, WEIGHTS) != tensor_digest(swapped, WEIGHTS)
    changed = tensor.clone()
    changed[-1] += 1
    assert tensor_digest(tensor, WEIGHTS) != tensor_digest(changed, WEIGHTS)
    assert tensor_digest(torch.zeros(2), WEIGHTS) != tensor_digest(-torch.zeros(2), WEIGHTS)
    assert tensor_digest(torch.zeros(0), WEIGHTS) == 0


def tensors_after(runtime, strategy: StrategyConfig, family: str) -> dict[str, torch.Tensor]:
    """Weights and moments after two steps in float32, where rounding would show."""
    stages = len(stage_to_rank(strategy, strategy.pipeline))
    model = scale_down(FAMILIES[family], strategy.tensor, stages)
    worker = parallel_model(model, strategy, runtime, PRECISIONS["fp32"])
    optimizer = build_optimizer(worker.parameters(), replace(VerifyConfig().optim, eps=1e-8))
    for step in range(2):
        batch = make_batch(model, 0, step, samples_per_step(strategy))
        batch = {k: v.float() if v.is_floating_point() else v for k, v in batch.items()}
        worker.zero_grad()
        worker.forward_backward(split_batch(batch, worker))
        worker.clip_grad_norm(0.5)
        optimizer.step(1e-2, torch.zeros(()))
    found = dict(worker.parameters())
    for name, moments in optimizer.state().items():
        found |= {f"{name}, {moment}": tensor for moment, tensor in moments.items()}
    return found


def compared(runtime, strategy, family, name="", rank=0) -> list[tuple]:
    """What differs after two steps, where one rank has changed a number in a tensor."""
    tensors = tensors_after(runtime, strategy, family)
    if name and runtime.rank == rank:
        local_tensor(tensors[name].detach()).view(-1)[-1] += 1e-3
    found = find_replica_mismatches(tensors, runtime.device)
    return [(odd.name, odd.ranks, odd.copies) for odd in found]


GPT, PAIRS = "decoder (GPT-2)", "encoder-decoder"
AGREE = [
    ("ddp 4", GPT),
    ("fsdp 4", GPT),
    ("hsdp 2×2", PAIRS),
    ("tensor 4", GPT),
    ("tensor 2, whole sequences", PAIRS),
    ("ddp 2 × tensor 2", GPT),
    ("fsdp 2 × tensor 2", GPT),
    ("pipeline 4", GPT),
    ("pipeline 2, zbv", GPT),
    ("ddp 2 × context 2", GPT),
    ("context 2 × tensor 2", GPT),
    ("fsdp 2 × pipeline 2", GPT),
    ("tensor 2 × pipeline 2", PAIRS),
]


@pytest.mark.parametrize(("strategy", "family"), AGREE)
def test_copies_are_the_same_bits(ranks, strategy, family):
    strategy = STRATEGIES[strategy]
    assert not any(ranks.run(world_size(strategy), compared, strategy, family))


@pytest.mark.parametrize(
    ("strategy", "name", "rank", "odd", "copies"),
    [
        ("ddp 4", "blocks.1.attention.query.weight", 2, [2], 4),
        ("ddp 4", "blocks.0.attention_norm.bias, exp_avg_sq", 0, [0], 4),
        ("ddp 2", "blocks.0.attention_norm.bias", 1, [0, 1], 2),
        ("hsdp 2×2", "blocks.1.attention.query.weight", 3, [1, 3], 2),
        ("tensor 4", "blocks.0.attention_norm.bias", 1, [1], 4),
        ("fsdp 2 × tensor 2", "blocks.0.attention_norm.bias, exp_avg", 2, [2, 3], 2),
        ("ddp 2 × context 2", "embed.tokens.weight", 2, [2], 4),
        ("pipeline 2", "embed.tokens.weight", 1, [0, 1], 2),
        ("tensor 2 × pipeline 2", "embed.tokens.weight", 3, [1, 3], 2),
        ("tensor 2 × pipeline 2", "head.norm.weight", 2, [2, 3], 2),  # not known to rank 0
    ],
)
def test_the_odd_rank_and_tensor_are_named(ranks, strategy, name, rank, odd, copies):
    strategy = STRATEGIES[strategy]
    found = ranks.run(world_size(strategy), compared, strategy, GPT, name, rank)
    assert found == [[(name, odd, copies)]] * world_size(strategy)

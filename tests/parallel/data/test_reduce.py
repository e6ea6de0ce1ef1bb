"""Gradients that are rounded or compressed before they are summed, against plain references."""

from dataclasses import replace
from itertools import pairwise
from unittest import mock

import pytest
import tiny
import torch
from summed import BUCKET_MIB, MODEL, STEPS, Gradients, sums
from torch.nn import functional as F

from parallel.data.comm_hook import CompressedAllReduce, compressed_allreduce_hook
from parallel.strategy import StrategyConfig, world_size
from trainer.build import parallel_model
from trainer.checkpoint import restore as checkpoint
from trainer.config.train import OptimConfig, TrainConfig
from trainer.loop import start_run, take_step
from trainer.optim.registry import build_optimizer
from trainer.precision import PRECISIONS
from trainer.verify.cases import make_batch, samples_per_step, split_batch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("reduce", DTYPES)
def test_ddp_rounds_what_a_rank_has_accumulated(ranks, reduce):
    strategy = StrategyConfig(replicate=2, reduce=reduce, bucket_mib=BUCKET_MIB)
    for steps in ranks.run(2, sums, strategy, STEPS):
        for total, own in steps:
            for name, gradient in total.items():
                first, second = ((a[name] + b[name]).to(DTYPES[reduce]) for a, b in own)
                assert torch.equal(gradient, (first + second).float()), name


@pytest.mark.parametrize("reduce", DTYPES)
def test_fsdp_rounds_each_micro_batch(ranks, reduce):
    for steps in ranks.run(2, sums, StrategyConfig(shard=2, reduce=reduce), STEPS):
        for total, own in steps:
            for name, gradient in total.items():
                due = torch.zeros(())
                for first, second in zip(*own, strict=True):
                    rounded = (share[name].to(DTYPES[reduce]) for share in (first, second))
                    due = due + sum(rounded, torch.zeros((), dtype=DTYPES[reduce])).float()
                assert torch.equal(gradient, due), name


def in_8_bits(row: torch.Tensor) -> torch.Tensor:
    """A row of whole blocks as its receivers read it."""
    read = []
    for block in row.split(128):
        scale = block.abs().max() / 127
        read.append(torch.round(block / scale) * scale if scale else torch.zeros(128))
    return torch.cat(read)


def test_int8_equals_a_plain_one_with_error_feedback_on_both_ways(ranks):
    strategy = StrategyConfig(replicate=3, reduce="int8", bucket_mib=BUCKET_MIB)
    results = ranks.run(3, sums, strategy, STEPS)
    for name in results[0][0][0]:
        sent_lost, sum_lost = [0.0] * 3, [0.0] * 3
        for step in range(STEPS):
            own = [sum(shares[name] for shares in rank) for rank in results[0][step][1]]
            size = own[0].numel()
            padded = -(-size // (3 * 128)) * 128 * 3
            own = [
                F.pad(g.flatten(), (0, padded - size)) + lost
                for g, lost in zip(own, sent_lost, strict=True)
            ]
            read = [torch.cat([in_8_bits(part) for part in g.chunk(3)]) for g in own]
            sent_lost = [g - r for g, r in zip(own, read, strict=True)]
            total = []
            for rank in range(3):
                part = sum((r.chunk(3)[rank] for r in read), torch.zeros(()) + sum_lost[rank])
                total.append(in_8_bits(part))
                sum_lost[rank] = part - total[-1]
            due = torch.cat(total)[:size]
            for result in results:
                assert torch.equal(result[step][0][name].flatten(), due), (name, step)


class Told(CompressedAllReduce):
    """An exchange that tells what is done when."""

    def __init__(self, model: torch.nn.Module):
        super().__init__(model, mock.Mock())
        self.told: list[str] = []

    def sum_over_ranks(self, gradients):
        for collective in ("first", "second"):
            self.told.append(f"{collective} of {', '.join(gradients)}")
            yield
        self.told.append(f"end of {', '.join(gradients)}")

    def end_step(self):
        self.told.append("step")


def test_second_collectives_start_in_the_order_of_the_buckets():
    """Whichever first one is done first, on whichever rank."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, bias=False))
    exchange = Told(model)
    futures = []
    for part, last in ((model[1], False), (model[0], True)):
        bucket = mock.Mock()
        bucket.parameters.return_value = bucket.gradients.return_value = list(part.parameters())
        bucket.buffer.return_value, bucket.is_last.return_value = torch.zeros(1), last
        futures.append(compressed_allreduce_hook(exchange, bucket))
    names = ("1.weight", "0.weight, 0.bias")
    order = [f"{what} of {name}" for what in ("first", "second", "end") for name in names]
    assert exchange.told == [*order, "step"]
    assert all(future.done() for future in futures)


LEARNING = {
    "bf16": StrategyConfig(replicate=2, reduce="bf16"),
    "fp16": StrategyConfig(replicate=2, reduce="fp16"),
    "int8": StrategyConfig(replicate=2, reduce="int8"),
    "powersgd": StrategyConfig(
        replicate=2, reduce="powersgd", powersgd_rank=2, powersgd_start_step=2
    ),
    "bf16, context": StrategyConfig(context=2, reduce="bf16"),
    "bf16, fsdp": StrategyConfig(shard=2, reduce="bf16"),
    "fp16, hsdp": StrategyConfig(replicate=2, shard=2, reduce="fp16"),
    "bf16, ddp × tensor": StrategyConfig(replicate=2, tensor=2, reduce="bf16"),
    "bf16, ddp × pipeline": StrategyConfig(replicate=2, pipeline=2, reduce="bf16"),
}


def learn(runtime, strategy: StrategyConfig) -> tuple[list[float], Gradients]:
    worker = parallel_model(MODEL, strategy, runtime, PRECISIONS["fp32"])
    optimizer = build_optimizer(worker.parameters(), OptimConfig())
    losses = []
    micro_batches = split_batch(make_batch(MODEL, 0, 0, samples_per_step(strategy)), worker)
    for _ in range(12):
        worker.zero_grad()
        loss, _ = worker.forward_backward(micro_batches)
        worker.clip_grad_norm(1.0)
        optimizer.step(1e-2, torch.zeros(()))
        losses.append(worker.sum_over_data(loss).item())
    return losses, {n: tiny.whole(p) for n, p in worker.parameters().items()}


@pytest.mark.parametrize("name", LEARNING)
def test_ranks_learn_and_stay_equal(ranks, name):
    results = ranks.run(world_size(LEARNING[name]), learn, LEARNING[name])
    losses, weights = results[0]
    assert losses[-1] < losses[0] - 0.5
    for other, theirs in results[1:]:
        assert other == losses
        for key in weights.keys() & theirs.keys():
            assert torch.equal(theirs[key], weights[key]), key


def poisoned(runtime, strategy: StrategyConfig) -> list[bool]:
    """Whether each step's sums are finite; before the second this rank 1 has lost its mind."""
    worker = parallel_model(MODEL, strategy, runtime, PRECISIONS["fp32"])
    found = []
    for step in range(3):
        worker.zero_grad()
        bad = torch.tensor(torch.nan if (step, runtime.rank) == (1, 1) else 1.0)
        worker.forward_backward(split_batch(make_batch(MODEL, 0, step), worker), bad)
        found.append(bool(worker.clip_grad_norm(1.0).isfinite()))
    return found


@pytest.mark.parametrize("name", ["bf16", "int8", "powersgd"])
def test_a_step_that_is_not_finite_is_seen_by_all_and_leaves_no_trace(ranks, name):
    strategy = replace(LEARNING[name], powersgd_start_step=0)
    assert ranks.run(2, poisoned, strategy) == [[True, False, True]] * 2


def trained(runtime, config: TrainConfig, stops: list[int]) -> Gradients:
    """Weights and what is kept at the end, of a run that is saved and started at each stop."""
    for first, last in pairwise([0, *stops]):
        state = start_run(config, runtime)
        assert state.step == first
        micro_batches = [split_of(config, state, step) for step in range(first, last)]
        for own in micro_batches:
            take_step(config, state, own)
        tiny.save(config, state)
    found = {n: p.detach().clone() for n, p in state.worker.parameters().items()}
    return found | {n: t.clone() for n, t in state.worker.error_feedback_state().items()}


def split_of(config, state, step: int) -> list[dict]:
    return split_batch(make_batch(MODEL, 0, step, samples_per_step(config.strategy)), state.worker)


KEEPING = {
    "int8": StrategyConfig(replicate=2, reduce="int8", bucket_mib=BUCKET_MIB),
    "powersgd": StrategyConfig(
        replicate=2,
        reduce="powersgd",
        powersgd_rank=2,
        powersgd_start_step=1,
        bucket_mib=BUCKET_MIB,
    ),
}


def job(folder, strategy: StrategyConfig) -> TrainConfig:
    return TrainConfig(
        model=MODEL,
        strategy=strategy,
        precision="fp32",
        device="cpu",
        steps=4,
        optim=OptimConfig(lr=1e-2, warmup_steps=0),
        run_dir=str(folder),
    )


@pytest.mark.parametrize("name", KEEPING)
def test_a_run_that_goes_on_keeps_what_was_lost_to_the_bit(ranks, tmp_path, name):
    unbroken = ranks.run(2, trained, job(tmp_path / "unbroken", KEEPING[name]), [4])
    broken = ranks.run(2, trained, job(tmp_path / "broken", KEEPING[name]), [2, 4])
    for ours, theirs in zip(broken, unbroken, strict=True):
        assert ours.keys() == theirs.keys() and any(".lost" in k or ".sent" in k for k in ours)
        for key, tensor in theirs.items():
            assert torch.equal(ours[key], tensor), key
    assert any(not torch.equal(broken[0][k], broken[1][k]) for k in broken[0])  # each has its own


def begun_anew(runtime, config: TrainConfig) -> tuple[list[str], int, list[float]]:
    """What is said when a run goes on, its step, and how much of what is kept is not zero."""
    with mock.patch.object(checkpoint.log, "warning") as warning:
        state = start_run(config, runtime)
    said = [call.args[0] % call.args[1:] for call in warning.call_args_list]
    kept = [
        t.abs().sum().item()
        for n, t in state.worker.error_feedback_state().items()
        if "right" not in n
    ]
    take_step(config, state, split_of(config, state, 2))
    return said, state.step, kept


@pytest.mark.parametrize("name", KEEPING)
def test_under_another_layout_error_feedback_begins_anew_and_says_so(ranks, tmp_path, name):
    ranks.run(2, trained, job(tmp_path, KEEPING[name]), [2])
    others = [replace(KEEPING[name], replicate=4), replace(KEEPING[name], reduce="bf16")]
    for strategy, remembers in zip(others, (True, False), strict=True):
        config = job(tmp_path, strategy)
        (said, *rest), *more = ranks.run(world_size(strategy), begun_anew, config)
        assert rest == [3, [0.0] * len(rest[1])] and bool(rest[1]) == remembers
        assert [one[0] for one in more] == [[]] * len(more)
        assert len(said) == remembers
        assert not remembers or f"feedback of strategy.reduce={name} begins anew" in said[0]


def scaled(runtime, config: TrainConfig) -> tuple[float, float]:
    """The loss scale that a run goes on with, and the largest gradient after a step, unscaled."""
    state = start_run(config, runtime)
    scale = state.loss_scale.scale.item()
    take_step(config, state, split_of(config, state, state.step))
    return scale, max(g.abs().max().item() for g in state.worker.gradients())


def test_sums_in_fp16_scale_the_loss_from_their_first_step_on(ranks, tmp_path):
    """A run may go on with or without them: the scale of the other one is of no use."""
    for reduce, scale in {"auto": 1.0, "fp16": 2.0**14, "bf16": 1.0}.items():
        config = job(tmp_path, StrategyConfig(replicate=2, reduce=reduce))
        for found, largest in ranks.run(2, scaled, config):
            assert found == scale and largest < 10
        ranks.run(2, trained_on, config)


def trained_on(runtime, config: TrainConfig) -> None:
    state = start_run(config, runtime)
    take_step(config, state, split_of(config, state, state.step))
    tiny.save(config, state)

"""PowerSGD against the power method on the sum, and against torch's own hook."""

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from summed import BUCKET_MIB, MODEL, STEPS, Gradients, sums
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from parallel.axis import find_axis
from parallel.data import ddp
from parallel.data.data_parallel import DataParallel
from parallel.strategy import StrategyConfig
from trainer.build import parallel_model
from trainer.precision import PRECISIONS
from trainer.verify.cases import make_batch, split_batch


def low_rank(runtime, strategy: StrategyConfig, steps: int) -> tuple[list, dict]:
    """As `sums`, with the factors that the first step begins with."""
    first: dict[str, torch.Tensor] = {}
    built = ddp.build_comm_hook

    def watched(*args):
        exchange = built(*args)
        first.update(
            {name: tensor.clone() for name, tensor in exchange.error_feedback_state().items()}
        )
        return exchange

    ddp.build_comm_hook = watched
    try:
        return sums(runtime, strategy, steps), first
    finally:
        ddp.build_comm_hook = built


def test_powersgd_is_the_power_method_on_the_sum(ranks):
    strategy = StrategyConfig(
        replicate=2,
        reduce="powersgd",
        powersgd_rank=2,
        powersgd_start_step=1,
        bucket_mib=BUCKET_MIB,
    )
    results = ranks.run(2, low_rank, strategy, STEPS + 1)
    compressed = 0
    for name in results[0][0][0][0]:
        right, lost = results[0][1].get(f"{name}.right"), torch.zeros(())
        for step in range(STEPS + 1):
            own = results[0][0][step][1]
            due = sum(share[name] for rank in own for share in rank).double()
            if right is not None and step >= 1:
                due = due + lost
                left, _ = torch.linalg.qr(due @ right.double())
                right = due.T @ left
                due, lost = left @ right.T, due - left @ right.T
                compressed += 1
            for result in results:
                found = result[0][step][0][name].double()
                assert torch.allclose(found, due, rtol=1e-4, atol=1e-5 * due.abs().max()), name
    assert compressed > 10


def of_torch(runtime, strategy: StrategyConfig, steps: int) -> tuple[list[Gradients], Gradients]:
    """The sums that torch's own hook makes, and the factors that it begins with."""
    worker = parallel_model(MODEL, replace(strategy, reduce="auto"), runtime, PRECISIONS["fp32"])
    group, ranks = worker.data_group, worker.data_degree
    state = PowerSGDState(group, strategy.powersgd_rank, start_powerSGD_iter=2)
    names = {parameter: name for name, parameter in worker.parameters().items()}
    order: list[str] = []

    def hook(state, bucket):
        if state.iter == 2:
            shapes: dict = {}
            for parameter in bucket.parameters():
                rank = strategy.powersgd_rank
                n, m = parameter.shape[0], parameter.numel() // parameter.shape[0]
                if rank * (n + m) * 2 < n * m:
                    shapes.setdefault((n, m), []).append(names[parameter])
            order.extend(name for same in shapes.values() for name in same)
        return powerSGD_hook(state, bucket)

    wrapped = torch.nn.parallel.DistributedDataParallel(worker.model, process_group=group)
    wrapped.register_comm_hook(state, hook)
    find_axis(worker.axes, DataParallel).wrapped = wrapped
    found = []
    for step in range(steps):
        worker.zero_grad()
        worker.forward_backward(split_batch(make_batch(MODEL, 0, step), worker))
        found.append({n: p.grad * ranks for n, p in worker.parameters().items()})
    torch.manual_seed(np.random.RandomState(0).randint(1_000_000_000))
    shapes = {name: parameter.shape for parameter, name in names.items()}
    right = {n: torch.randn(1, shapes[n][1], strategy.powersgd_rank)[0] for n in order}
    return found, right


def from_factors(runtime, strategy: StrategyConfig, steps: int, right: Gradients) -> list:
    worker = parallel_model(MODEL, strategy, runtime, PRECISIONS["fp32"])
    for name, tensor in worker.error_feedback_state().items():
        if name.endswith(".right"):
            tensor.copy_(right[name.removesuffix(".right")])
    found = []
    for step in range(steps):
        worker.zero_grad()
        worker.forward_backward(split_batch(make_batch(MODEL, 0, step), worker))
        found.append({n: p.grad.clone() for n, p in worker.parameters().items()})
    return found


def test_powersgd_equals_torchs_hook(ranks):
    strategy = StrategyConfig(
        replicate=2, reduce="powersgd", powersgd_rank=3, powersgd_start_step=2
    )
    theirs, right = ranks.run(2, of_torch, strategy, 5)[0]
    assert len(right) > 5
    for ours in ranks.run(2, from_factors, strategy, 5, right):
        for step, gradients in enumerate(theirs):
            for name, gradient in gradients.items():
                largest = gradient.abs().max().item()
                assert torch.allclose(ours[step][name], gradient, rtol=0, atol=1e-4 * largest), name


class Matrices(torch.nn.Module):
    """Two matrices and a vector, as buckets of an exchange."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(torch.zeros(40, n)) for n in (30, 50))
        self.c = torch.nn.Parameter(torch.zeros(7))


def exchanged(runtime, gradients: list[Gradients]) -> Gradients:
    model = Matrices()
    exchange = ddp.PowerSGDAllReduce(model, torch.distributed.group.WORLD, rank=4, start_step=0)
    own = {name: g.clone() for name, g in gradients[runtime.rank].items()}
    for _ in exchange.sum_over_ranks(own):
        pass
    return own


def test_powersgd_sums_matrices_of_low_rank_exactly(ranks):
    draw = torch.Generator().manual_seed(3)
    rand = partial(torch.randn, generator=draw)
    own = [
        {"a": rand(40, 2) @ rand(2, 30), "b": rand(40, 2) @ rand(2, 50), "c": rand(7)}
        for _ in range(2)
    ]
    for result in ranks.run(2, exchanged, own):
        for name in "abc":
            torch.testing.assert_close(result[name], own[0][name] + own[1][name], rtol=0, atol=1e-4)

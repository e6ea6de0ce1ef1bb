"""NCCL with a single rank: every collective, DDP with each reduction, FSDP, and the end."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from gpu_checks.findings import Band, Finding
from gpu_checks.jobs import Job, rank_of, run_config, small_llama, start_job
from gpu_checks.numerics import cosine, farthest
from parallel import collectives as wire
from parallel import parallelize as apply
from parallel.data.ddp import wrap_in_ddp
from parallel.data.fsdp import shard_with_fsdp
from parallel.runtime import Runtime, all_gather_objects, broadcast_from_rank0
from parallel.strategy import StrategyConfig

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64)
# Reductions, with the least cosine of the gradients; that of low rank is another vector.
REDUCTIONS = {"auto": 0.999999, "bf16": 0.999, "fp16": 0.999, "int8": 0.99, "powersgd": 0.1}


def collectives(device: str) -> Iterator[Finding]:
    """Call every collective of the product with one rank, which returns its input; end the group.

    With autograd functions the gradient returns too.
    """
    with rank_of(device) as runtime:
        group = dist.group.WORLD
        assert group is not None
        for dtype in DTYPES:
            x = torch.arange(24, device=runtime.device).view(4, 6).to(dtype)
            wrong = [name for name, call in _calls(group) if not torch.equal(call(x), x)]
            name = f"collectives, {str(dtype).removeprefix('torch.')}"
            yield Finding(name, ", ".join(wrong) or 0, Band(0, 0))
        yield Finding("collectives with a backward", _wrong_gradients(runtime, group), Band(0, 0))
        objects = [broadcast_from_rank0("a"), *all_gather_objects("a")]
        yield Finding("collectives of objects", sum(o != "a" for o in objects), Band(0, 0))
        counted = torch.ones((), dtype=torch.int64, device=runtime.device)
        dist.all_reduce(counted)
        dist.all_reduce(counted.cpu(), op=dist.ReduceOp.MAX)
        dist.barrier()
        yield Finding("collectives in place", counted.item(), Band(1, 1))
        began = time.perf_counter()
    seconds = time.perf_counter() - began
    yield Finding("end of the process group", seconds, Band(most=5, unit="s"))


def _calls(group: dist.ProcessGroup) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    yield "all_reduce", lambda x: wire.all_reduce(x, group)
    yield "all_reduce max", lambda x: wire.all_reduce(x, group, "max")
    yield "started all_reduce", lambda x: wire.wait_tensor(wire.start_all_reduce(x, group))
    yield "all_to_all", lambda x: wire.all_to_all(x, group)
    for dim in (0, 1):
        yield f"all_gather {dim}", partial(_along, wire.all_gather, group, dim)
        yield f"reduce_scatter {dim}", partial(_along, wire.reduce_scatter, group, dim)


def _along(call: Callable[..., Tensor], group: dist.ProcessGroup, dim: int, x: Tensor) -> Tensor:
    return call(x, group, dim)


def _wrong_gradients(runtime: Runtime, group: dist.ProcessGroup) -> str | int:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "Copy": lambda x: wire.Copy.apply(x, group),
        "Sum": lambda x: wire.Sum.apply(x, group),
        "Mean": lambda x: wire.Mean.apply(x, group),
        "Gather": lambda x: wire.Gather.apply(x, 4, group, 0),
        "GatherRepeated": lambda x: wire.GatherRepeated.apply(x, 4, group, 0),
        "Scatter": lambda x: wire.Scatter.apply(x, group, 0),
        "Exchange": lambda x: wire.Exchange.apply(x, group),
    }
    wrong = []
    for name, function in functions.items():
        x = torch.randn(4, 6, device=runtime.device, requires_grad=True)
        y = function(x)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        if not (torch.equal(y, x) and torch.equal(gradient, 2 * x)):
            wrong.append(name)
    return ", ".join(wrong) or 0


def replicas_and_shards(device: str) -> Iterator[Finding]:
    """Take steps under DDP with each reduction, and under FSDP, on a mesh of one rank."""
    config = run_config(small_llama(device), micro_batch_size=2)
    with rank_of(device) as runtime:
        plain = start_job(config, runtime)
        _, truth = plain.gradient()
        weights = _after_steps(plain)
        for reduce, least in REDUCTIONS.items():
            job = _replicated(config, runtime, reduce)
            _, gradient = job.gradient()
            name, alike = f"DDP, reduce={reduce}", cosine(gradient, truth)
            yield Finding(f"{name}: cosine of the gradients", alike, Band(least, 1.000001))
            bad = sum(not t.isfinite().all() for t in _after_steps(job).values())
            yield Finding(f"{name}: tensors that are not finite", bad, Band(0, 0))
        for frees in (True, False):
            job = _sharded(config, runtime, frees)
            job.gradient()
            moved = farthest(weights, _after_steps(job)) / config.optim.lr
            name = f"fully_shard, reshard_after_forward={frees}"
            yield Finding(f"{name}: a weight, in learning rates", moved, Band(most=0.1))


def _after_steps(job: Job) -> dict[str, Tensor]:
    job.losses(3)
    found = job.weights().items()
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in found}


def _replicated(config: Any, runtime: Runtime, reduce: str) -> Job:
    """Build a run whose model is wrapped in DDP, though it has one copy."""
    strategy = StrategyConfig(reduce=reduce, powersgd_start_step=0)
    mesh = init_device_mesh(runtime.device.type, (1,), mesh_dim_names=("replicate",))

    def wrap(model: nn.Module, _copies: Any, strategy: StrategyConfig) -> tuple[nn.Module, Any]:
        return wrap_in_ddp(model, mesh, strategy)

    parallelize = partial(apply.parallelize, wrap=wrap)
    return start_job(replace(config, strategy=strategy), runtime, parallelize=parallelize)


def _sharded(config: Any, runtime: Runtime, frees: bool) -> Job:
    """Build a run whose model is sharded by FSDP over one rank."""
    mesh = init_device_mesh(runtime.device.type, (1,), mesh_dim_names=("shard",))

    def materialize(model: nn.Module, *args: Any) -> None:
        shard_with_fsdp(model, mesh, torch.float32, torch.float32, frees)
        apply.materialize_parameters(model, *args)

    parallelize = partial(apply.parallelize, materialize=materialize)
    return start_job(config, runtime, parallelize=parallelize)

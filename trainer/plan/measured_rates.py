"""Rates of the ranks there are: products, attention, copies, collectives; all ranks at once."""

# T tokens, D and F widths, B samples, H heads, S positions, K width of a head.

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import distributed as dist
from torch.nn import functional as F

from parallel.collectives import (
    all_gather,
    all_reduce,
    reduce_scatter,
    start_all_reduce,
    wait_tensor,
)
from parallel.runtime import Runtime, all_gather_objects
from trainer.plan.measurements import (
    BETWEEN,
    INSIDE,
    Collective,
    FusedAttention,
    Overlap,
    Product,
    Rates,
)

TRIES, LEAST_SECONDS = 7, 0.01  # of a rate, and of each try
SIZES = {"cpu": (2**14, 2**18, 2**22), "cuda": (2**20, 2**24, 2**28)}  # bytes of collectives
COPIED = {"cpu": 2**24, "cuda": 2**30}  # bytes


def measure_rates(
    runtime: Runtime,
    dtype: torch.dtype,
    tokens: int,
    widths: tuple[int, int],
    attention: tuple[int, int, int, int],
    advance: Callable[[str], None],
) -> Rates:
    """Measure on all ranks at once; a collective call, which returns the slowest rank's seconds.

    `widths` are those of a block and of its feed-forward layer, `attention` the samples, heads,
    positions and head width; `advance` hears what comes next.
    """
    device, layer = runtime.device, (tokens, widths, dtype, runtime.device)
    advance("products")
    products = list(_products(*layer))
    advance("attention")
    scores = list(_attention(attention, dtype, device))
    advance("copies")
    source = torch.ones(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = _of_slowest(_least_seconds(lambda: target.copy_(source), device))
    advance("collectives")
    collectives = list(_collectives(runtime))
    advance("a product beside a collective")
    overlap = _overlap(*layer) if runtime.world_size > 1 else None
    return Rates(products, scores, 2 * source.numel() / copied, collectives, overlap)


def _products(
    tokens: int, widths: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Iterator[Product]:
    D, inner = widths
    for T in (tokens, max(1, tokens // 4)):
        for N in (inner, D, max(1, D // 4)):  # the last as narrow as a split layer
            yield Product(T, D, N, _of_slowest(_product_seconds(T, D, N, dtype, device)))


def _attention(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> Iterator[FusedAttention]:
    B, H, S, K = sizes
    for length in (S, 2 * S):
        seconds = _attention_seconds(B, H, length, K, dtype, device)
        yield FusedAttention(B, H, length, K, *seconds)


def _collectives(runtime: Runtime) -> Iterator[Collective]:
    device = runtime.device
    for where, group in _groups(runtime):
        for size in SIZES[device.type]:
            for name, seconds in _collective_seconds(group, size, device):
                yield Collective(name, where, group.size(), size, seconds)


def _least_seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Return the least time of a call, of several tries with as many calls as a clock needs."""
    once, calls = _seconds_of(work, 1, device), 1
    once = min(once, _seconds_of(work, 1, device))
    calls = max(1, min(200, int(LEAST_SECONDS / max(once, 1e-9))))
    return min(_seconds_of(work, calls, device) for _ in range(TRIES))


def _seconds_of(work: Callable[[], Any], calls: int, device: torch.device) -> float:
    _wait_for(device)
    began = time.perf_counter()
    for _ in range(calls):
        work()
    _wait_for(device)
    return (time.perf_counter() - began) / calls


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _of_slowest(seconds: float) -> float:
    return max(all_gather_objects(seconds))


def _product_seconds(T: int, D: int, N: int, dtype: torch.dtype, device: torch.device) -> float:
    x_TD, gradient_TN = torch.randn(T, D, device=device), torch.randn(T, N, device=device)
    x_TD, gradient_TN = x_TD.to(dtype), gradient_TN.to(dtype)
    weight_ND = torch.randn(N, D, device=device).to(dtype)

    def multiply() -> None:
        torch.mm(x_TD, weight_ND.t())
        torch.mm(gradient_TN, weight_ND)
        torch.mm(gradient_TN.t(), x_TD)

    dist.barrier()
    return _least_seconds(multiply, device)


def _attention_seconds(
    B: int, H: int, S: int, K: int, dtype: torch.dtype, device: torch.device
) -> tuple[float, float]:
    """Return the seconds of the forward, and of the backward."""
    q, k, v = (torch.randn(B, H, S, K, device=device).to(dtype).requires_grad_() for _ in range(3))
    attend = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
    dist.barrier()
    mixed_BHSK = attend()
    gradient = torch.ones_like(mixed_BHSK)
    derive = partial(torch.autograd.grad, mixed_BHSK, (q, k, v), gradient, retain_graph=True)
    return _of_slowest(_least_seconds(attend, device)), _of_slowest(_least_seconds(derive, device))


def _groups(runtime: Runtime) -> Iterator[tuple[str, dist.ProcessGroup]]:
    """Yield this rank's groups with more than one rank: inside its host, and between hosts."""
    local, world = runtime.local_world_size, runtime.world_size
    hosts, mine = world // local, runtime.rank // local
    if local > 1:
        inside = [list(range(host * local, (host + 1) * local)) for host in range(hosts)]
        yield INSIDE, [dist.new_group(ranks) for ranks in inside][mine]
    if hosts > 1:
        between = [list(range(place, world, local)) for place in range(local)]
        yield BETWEEN, [dist.new_group(ranks) for ranks in between][runtime.rank % local]


def _collective_seconds(
    group: dist.ProcessGroup, size: int, device: torch.device
) -> Iterator[tuple[str, float]]:
    """Yield the names and seconds of collectives whose whole tensor has so many bytes."""
    ranks = dist.get_world_size(group)
    part = torch.ones(size // 4 // ranks, device=device)
    whole = torch.ones(part.numel() * ranks, device=device)
    for name, call in (
        ("all_reduce", partial(all_reduce, whole, group)),
        ("all_gather", partial(all_gather, part, group, 0)),
        ("reduce_scatter", partial(reduce_scatter, whole, group, 0)),
    ):
        yield name, _of_slowest(_usual_seconds(call, device))


def _usual_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Return the median time of a collective, which waits for its slowest rank."""
    for _ in range(2):
        call()
    tries = sorted(_seconds_of(call, 3, device) for _ in range(3 * TRIES))
    return tries[len(tries) // 2]


def _overlap(
    tokens: int, widths: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Overlap:
    """Return the times of products and of an all-reduce that takes about as long."""
    x_TD = torch.randn(tokens, widths[0], device=device).to(dtype)
    weight_FD = torch.randn(widths[1], widths[0], device=device).to(dtype)
    whole = torch.ones(SIZES[device.type][2] // 4, device=device)
    group = dist.group.WORLD
    assert group is not None
    moved = _of_slowest(_usual_seconds(partial(all_reduce, whole, group), device))
    once = _of_slowest(_least_seconds(lambda: torch.mm(x_TD, weight_FD.t()), device))
    calls = max(1, int(moved / once))

    def multiply() -> None:
        for _ in range(calls):
            torch.mm(x_TD, weight_FD.t())

    def both() -> None:
        started = start_all_reduce(whole, group)
        multiply()
        wait_tensor(started)

    together = _of_slowest(_usual_seconds(both, device))
    return Overlap(calls * once, moved, together)

"""The rates of the device: matrix products, copies in its memory, copies to the host."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from gpu_checks.findings import Band, Finding, SkippedError
from gpu_checks.jobs import synchronise

WARM_UP, TIMED = 3, 10


def rates(device: str) -> Iterator[Finding]:
    """Find the rates of a device, the median of ten calls each."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SkippedError("there is no CUDA device here")
    gpu = device == "cuda"
    N = 8192 if gpu else 256
    a_NN, b_NN = (torch.randn(N, N, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = median_seconds(lambda: torch.mm(a_NN, b_NN), device)
    yield Finding("product", 2e-12 * N**3 / seconds, Band(600, None, "TFLOP/s", on_cpu=False))
    source = torch.ones(2**31 if gpu else 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), device)
    least = 3.8 if gpu and "H200" in torch.cuda.get_device_name() else 2.6
    moved = 2e-12 * source.numel() / seconds
    yield Finding("copy", moved, Band(least, None, "TB/s", on_cpu=False))
    host = torch.empty(source.numel() // 2, dtype=torch.uint8, pin_memory=gpu)
    half = source[: host.numel()]
    seconds = median_seconds(lambda: host.copy_(half, non_blocking=True), device)
    yield Finding(
        "pinned copy to the host",
        1e-9 * host.numel() / seconds,
        Band(45, None, "GB/s", on_cpu=False),
    )


def median_seconds(work: Callable[[], Any], device: str) -> float:
    """Return the median time of a call; the device is idle before and after each."""
    seconds = []
    for _ in range(WARM_UP + TIMED):
        synchronise(device)
        began = time.perf_counter()
        work()
        synchronise(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[WARM_UP:])

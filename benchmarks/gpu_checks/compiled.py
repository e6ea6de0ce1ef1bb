"""Compiled blocks: one graph for all of them, no breaks, and the numbers of eager ones."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch._dynamo.utils import counters

from gpu_checks.findings import Band, Finding
from gpu_checks.jobs import rank_of, run_config, small_llama, start_job, without_torchao
from gpu_checks.numerics import cosine
from parallel.activation_checkpointing import MODES

STEPS = 3


def bf16_blocks(device: str) -> Iterator[Finding]:
    """Check blocks in bf16, under every activation checkpointing."""
    return _blocks(device, "bf16")


def fp8_blocks(device: str) -> Iterator[Finding]:
    """Check blocks whose products are in float8."""
    return _blocks(device, "fp8")


def _blocks(device: str, precision: str) -> Iterator[Finding]:
    base = run_config(small_llama(device), precision=precision)
    with rank_of(device) as runtime:
        for mode in MODES:
            config = replace(base, activation_checkpointing=mode)
            try:
                eager = start_job(config, runtime)
            except ImportError as error:
                raise without_torchao(error) from error
            _, plain = eager.gradient()
            losses = eager.losses(STEPS)
            torch._dynamo.reset()
            counters.clear()
            job = start_job(replace(config, compile=True), runtime)
            _, gradient = job.gradient()
            gap = max(abs(a / b - 1) for a, b in zip(job.losses(STEPS), losses, strict=True))
            graphs, breaks = counters["stats"]["unique_graphs"], counters["graph_break"]
            name = f"compile, {precision}, activation checkpointing {mode}"
            yield Finding(f"{name}: graphs", graphs, Band(1, 1))
            yield Finding(f"{name}: breaks", sum(breaks.values()), Band(0, 0), dict(breaks))
            yield Finding(f"{name}: losses against eager", gap, Band(most=5e-3))
            alike = cosine(gradient, plain)
            yield Finding(f"{name}: cosine of the gradients", alike, Band(0.999, 1.001))

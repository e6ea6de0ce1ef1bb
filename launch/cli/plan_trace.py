"""A layout's real code, traced on fake tensors: exact memory and traffic, as text."""

from collections import Counter
from dataclasses import replace

from launch.cli.asked import Asked
from trainer.plan.layout import Layout, with_layout
from trainer.plan.machine import GIB


def why_not_traced(asked: Asked) -> str:
    """Return what keeps a job from being traced; empty = nothing."""
    if asked.training.compress.teacher:
        return "a teacher (compress.teacher) is in no trace"
    if asked.planner.precision == "fp8":
        return "products in float8 (precision=fp8) are in no trace"
    return ""


def trace_lines(asked: Asked, layout: Layout) -> list[str]:
    """Trace a step on a layout's fullest pipeline rank, and return what it needs and issues.

    Loads torch.
    """
    from trainer.plan.extrapolate import trace_stages
    from trainer.plan.in_flight import held_micro_batches
    from trainer.plan.inputs import longest_inputs

    planner, training = asked.planner, asked.training
    config = replace(with_layout(training, layout), precision=planner.precision)
    inputs = longest_inputs(config, layout.micro_batch)
    count = planner.micro_batches(layout)
    rank = planner.card(layout, held_micro_batches(config.strategy, count)).stage
    (fullest,) = trace_stages(config, layout.ranks, inputs, count, "cuda", [rank])
    kinds = " · ".join(f"{name} {size / GIB:.3g}" for name, size in fullest.kinds.items())
    wire: Counter[str] = Counter()
    for (axis, collective, _), size in fullest.wire_bytes.items():
        wire[f"{axis} {collective}"] += size
    moved = " · ".join(f"{name} {size / GIB:.3g}" for name, size in sorted(wire.items()))
    return [
        f"traced, rank {fullest.rank}: {kinds} GiB = {fullest.peak_bytes / GIB:.2f} GiB",
        f"  a step sends: {moved or 'nothing'} GiB, in {fullest.collectives:,} collectives; "
        f"{fullest.operators:,} kernels, {fullest.host_reads:,} numbers that the host waits for",
    ]

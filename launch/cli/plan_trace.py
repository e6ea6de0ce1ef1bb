"""A layout's real code, traced on fake tensors: exact memory and traffic, as text."""

from collections import Counter
from dataclasses import replace

from launch.cli.asked import Asked
from trainer.plan.layout import Layout, strategy_of
from trainer.plan.machine import GIB


def trace_lines(asked: Asked, layout: Layout) -> list[str]:
    """Trace a step of a layout and return what it needs and issues; loads torch."""
    from trainer.plan.extrapolate import trace_stages
    from trainer.plan.inputs import longest_inputs

    planner, training = asked.planner, asked.training
    config = replace(
        training,
        strategy=strategy_of(layout, training.strategy),
        micro_batch_size=layout.micro_batch,
        activation_checkpointing=layout.recomputed,
        loss=replace(training.loss, chunks=layout.chunks),
        precision=planner.precision,
    )
    inputs = longest_inputs(config, layout.micro_batch)
    count = planner.micro_batches(layout)
    traces = trace_stages(config, layout.ranks, inputs, count, "cuda")
    fullest = max(traces, key=lambda trace: trace.peak_bytes)
    terms = " · ".join(f"{name} {size / GIB:.3g}" for name, size in fullest.kinds.items())
    wire: Counter[str] = Counter()
    for (axis, collective, _), size in fullest.wire_bytes.items():
        wire[f"{axis} {collective}"] += size
    moved = " · ".join(f"{name} {size / GIB:.3g}" for name, size in sorted(wire.items()))
    return [
        f"traced, rank {fullest.rank}: {terms} GiB = {fullest.peak_bytes / GIB:.2f} GiB",
        f"  a step sends: {moved or 'nothing'} GiB, in {fullest.collectives:,} collectives; "
        f"{fullest.operators:,} kernels, {fullest.host_reads:,} numbers that the host waits for",
    ]

"""Trace the real training step of one rank on fake tensors: memory, traffic, operators.

Nothing is computed and no other rank exists: the step of `trainer/loop.py` runs on tensors without
data and on a process group without ranks, of any size. Memory is what the allocator of a CPU would
count; compiled blocks are traced as eager ones, which keep more.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh

from parallel.grad_norm import local_tensor
from parallel.parallelize import parallelize
from parallel.runtime import Runtime
from trainer.build import build_worker
from trainer.compress.compression import Compression
from trainer.config.train import TrainConfig
from trainer.inference.trained_run import unwrap_transformer
from trainer.loop import take_step
from trainer.plan.fake_ranks import fake_materialize, fake_ranks, visible_memory
from trainer.plan.inputs import Shapes
from trainer.plan.live_bytes import LiveBytes
from trainer.plan.traced_replicas import wrap_traced
from trainer.state import TrainState, untrained_state
from trainer.tasks.registry import task_of

WEIGHTS, GRADIENTS, MOMENTS = "weights", "gradients", "moments"
STEPS = 3  # buffers have settled in the third


Wire = Mapping[tuple[str, str, str], int]  # payload bytes by (axis, collective, dtype)


@dataclass(frozen=True)
class StepTrace:
    """Memory and operations of one rank's step; bytes are exact, as the allocator counts."""

    rank: int
    peak_bytes: int
    kinds: Mapping[str, int]  # at the peak: weights, gradients, moments, gathered, rest
    wire_bytes: Wire
    collectives: int
    operators: int  # that write memory: about the kernels of a GPU
    host_reads: int  # numbers that the host waits for


class Window(NamedTuple):
    """A part of a step, from the start of a block's forward or backward to the next start."""

    action: str  # F, "F end" (behind a forward) or B; empty = in front of all
    block: str = ""
    micro_batch: int = 0


@dataclass(frozen=True)
class WindowTrace:
    """Peak memory and operations of a window."""

    peak_bytes: int
    kinds: Mapping[str, int]  # at its peak
    wire_bytes: Wire
    collectives: int
    operators: int
    host_reads: int


def trace_step(
    config: TrainConfig,
    world_size: int,
    micro_batches: list[Shapes],
    rank: int = 0,
    device: str = "cpu",
) -> StepTrace:
    """Trace one rank's step, whole: all blocks and all these micro-batches.

    `config` is complete, with resolved degrees. With device=cuda RMSNorm is one kernel, as there.
    The process must have no process group. `trace_stages` (extrapolate.py) takes large models.
    """
    windows = trace_windows(config, world_size, micro_batches, rank, device).values()
    highest = max(windows, key=lambda window: window.peak_bytes)
    wire: Counter[tuple[str, str, str]] = Counter()
    for window in windows:
        wire.update(window.wire_bytes)
    return StepTrace(
        rank,
        highest.peak_bytes,
        highest.kinds,
        wire,
        sum(window.collectives for window in windows),
        sum(window.operators for window in windows),
        sum(window.host_reads for window in windows),
    )


def trace_windows(
    config: TrainConfig,
    world_size: int,
    micro_batches: list[Shapes],
    rank: int = 0,
    device: str = "cpu",
) -> dict[Window, WindowTrace]:
    """Trace one rank's step by its windows."""
    mode, live = FakeTensorMode(allow_non_fake_inputs=True), LiveBytes(gloo=device == "cpu")
    with fake_ranks(rank, world_size) as runtime, visible_memory(live, device):
        state = _fake_state(config, runtime, mode, live)
        axes = _axis_names(state.worker.mesh)
        seen: Counter[tuple[str, str]] = Counter()
        with mode, live:
            _mark_blocks(unwrap_transformer(state.worker), live, seen)
            for _ in range(STEPS):
                seen.clear()
                inputs = [_fake_inputs(shapes) for shapes in micro_batches]
                live.window = Window("")
                live.begin_step()
                take_step(config, state, inputs)
            live.follow(state.worker.gradients(), GRADIENTS)
        windows = [window for window in live.peaks if isinstance(window, Window)]
        found = {window: _window_trace(live, window, axes) for window in windows}
        state.worker.zero_grad()
    return found


def _window_trace(live: LiveBytes, window: Window, axes: Mapping[str, str]) -> WindowTrace:
    peak, counts = live.peaks[window], live.counts[window]
    wire: Counter[tuple[str, str, str]] = Counter()
    for collective in counts.collectives:
        dtype = str(collective.dtype).removeprefix("torch.")
        wire[axes[collective.group], collective.name, dtype] += collective.payload_bytes
    return WindowTrace(
        peak.live_bytes,
        live.kinds_at(peak),
        wire,
        len(counts.collectives),
        counts.operators,
        counts.reads,
    )


def _fake_state(
    config: TrainConfig, runtime: Runtime, mode: FakeTensorMode, live: LiveBytes
) -> TrainState:
    """Build a run's state of fake tensors, all of them counted."""
    compression = Compression(config.compress)
    build = partial(parallelize, materialize=fake_materialize(mode), wrap=wrap_traced)
    with live:
        worker = build_worker(
            config, runtime, compression, task_of(config.data, config.model), build
        )
    # Of targets without data as many are valid as there are: each position has logits.
    worker.count_valid = lambda targets: torch.tensor(targets.numel())
    with mode, live:
        state = untrained_state(config, runtime, worker, compression, {})
        live.follow(worker.error_feedback_state().values(), MOMENTS)
        live.follow([m for of in state.optimizer.state().values() for m in of.values()], MOMENTS)
        live.follow(map(local_tensor, worker.model.parameters()), WEIGHTS)
    return state


def _fake_inputs(shapes: Shapes) -> dict[str, Tensor]:
    return {name: torch.zeros(shape.sizes, dtype=shape.dtype) for name, shape in shapes.items()}


def _axis_names(mesh: DeviceMesh) -> dict[str, str]:
    """Return the axis, or the axes, of each process group by its name."""
    names: dict[str, str] = {}
    for axis in mesh.mesh_dim_names or ():
        names[mesh.get_group(axis).group_name] = axis
    for name, flat in mesh._get_root_mesh()._flatten_mapping.items():
        names.setdefault(flat.get_group().group_name, name)
    return names


def _mark_blocks(model: nn.Module, live: LiveBytes, seen: Counter[tuple[str, str]]) -> None:
    """Begin a window with each block's forward, and with each block's backward.

    `seen` counts them: a schedule takes the micro-batches of a block in order.
    """

    def mark(action: str, block: str) -> None:
        live.window = Window(action, block, seen[action, block])
        seen[action, block] += 1

    def forward_starts(block: str, *_args: object) -> None:
        mark("F", block)

    def forward_ends(block: str, _module: object, _args: object, out: tuple) -> None:
        mark("F end", block)
        flows = [flow for flow in out if isinstance(flow, Tensor) and flow.requires_grad]
        for flow in flows[:1]:
            flow.register_hook(lambda _gradient: mark("B", block))

    for name, block in model.get_submodule("blocks").named_children():
        block.register_forward_pre_hook(partial(forward_starts, name))
        block.register_forward_hook(partial(forward_ends, name))

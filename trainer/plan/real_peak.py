"""The peak memory of real steps on CPU ranks, as torch's allocator sees it: a trace's truth."""

import time
from bisect import bisect_right
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.comm_volume.counter import collectives_of
from parallel.runtime import Runtime
from trainer.build import build_worker
from trainer.compress.compression import Compression
from trainer.config.loss import IGNORED, NO_CHARACTER
from trainer.config.train import ModelConfig, TrainConfig
from trainer.loop import take_step
from trainer.plan.fake_ranks import targets_of_vectors
from trainer.plan.inputs import Shapes
from trainer.plan.trace import STEPS
from trainer.state import untrained_state
from trainer.tasks.registry import task_of

MARK = "measured step"
SETTLED_SECONDS, SLOWEST = 0.002, 5e8  # SLOWEST: bytes per second of a collective


class Settled(TorchDispatchMode):
    """A dispatch mode that lets each collective end before the step goes on.

    What is freed last by a transport's thread is freed at an arbitrary time, and the profiler,
    which follows one thread, does not see it.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for issued in collectives_of(func, args):
            if issued.name != "send":
                dist.barrier(_resolve_process_group(issued.group))  # type: ignore[arg-type]
            time.sleep(SETTLED_SECONDS + issued.payload_bytes / SLOWEST)
        return out


def real_peaks(
    runtime: Runtime, config: TrainConfig, micro_batches: list[Shapes], steps: int = 4
) -> list[int]:
    """Return the most bytes that this rank has allocated at once in each of `steps` steps.

    They follow as many as a trace runs before the one it reports. The least is a step's need: on a
    busy machine a transport's threads hold what they have sent until they run.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, Settled():
        compression = Compression(config.compress)
        worker = build_worker(config, runtime, compression, task_of(config.data, config.model))
        state = untrained_state(config, runtime, worker, compression, {})
        for step in range(STEPS - 1 + steps):
            inputs = [draw_inputs(shapes, config.model, step) for shapes in micro_batches]
            with record_function(MARK if step >= STEPS - 1 else "step"):
                take_step(config, state, inputs)
    events = profiler.profiler.kineto_results.events()
    begins = sorted(event.start_ns() for event in events if event.name() == MARK)
    memory = [event for event in events if event.name() == "[memory]"]
    total, peaks = 0, [0] * len(begins)
    for event in sorted(memory, key=lambda event: event.start_ns()):
        total += event.nbytes()
        if step := bisect_right(begins, event.start_ns()):
            peaks[step - 1] = max(peaks[step - 1], total)
    return peaks


def draw_inputs(shapes: Shapes, model: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Return random inputs of these shapes that a model can be trained on."""
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        top = {"seeds": 1 << 62}.get(name, model.vocab_size or model.classes)
        if shape.dtype.is_floating_point:
            drawn[name] = torch.randn(shape.sizes, generator=generator).to(shape.dtype)
        elif shape.dtype == torch.bool:
            drawn[name] = torch.ones(shape.sizes, dtype=torch.bool)
            drawn[name][:, -1] = False
        else:
            drawn[name] = torch.randint(top, shape.sizes, generator=generator)
    targets = drawn["targets"]
    if targets.dim() == 1:
        targets %= model.classes
    elif "frames" in drawn:
        drawn["targets"] = torch.full_like(targets, NO_CHARACTER)
        length = targets_of_vectors(targets.shape[1])
        drawn["targets"][:, :length] = 1 + torch.arange(length) % 2  # none repeats
    elif targets.is_floating_point():
        corners = torch.tensor([1.0, 0.1, 0.2, 0.7, 0.6, 0.0]).expand_as(targets)
        drawn["targets"] = corners.contiguous()
    else:
        targets[0, 0] = IGNORED
    if "documents" in drawn:
        drawn["documents"].zero_()
        length = drawn["positions"].shape[1]
        drawn["positions"] = torch.arange(length).expand_as(drawn["positions"]).contiguous()
    return drawn

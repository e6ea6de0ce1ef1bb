"""The state of a training run."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch import distributed as dist

from parallel.grad_norm import local_tensor
from parallel.parallel_model import ParallelModel
from parallel.runtime import Runtime, all_gather_objects
from trainer.checkpoint.contents import KEPT
from trainer.compress.compression import Compression
from trainer.config.train import CompressConfig, TrainConfig
from trainer.inference.trained_run import unwrap_transformer
from trainer.lora.adapter import narrow_frozen
from trainer.optim.optimizer import Optimizer
from trainer.optim.registry import build_optimizer
from trainer.precision import LossScale, resolve_precision
from trainer.resilience.bad_steps import BadStepGuard, BadStepPolicy


@dataclass
class TrainState:
    """The full state of a training run, under any layout.

    Learning rate, sample order and dropout are functions of the seed, the step and the samples: the
    two counters are the whole state of schedule, data and random numbers.
    """

    worker: ParallelModel
    optimizer: Optimizer
    loss_scale: LossScale
    guard: BadStepGuard
    tokens: Tensor  # valid targets trained on so far, int64 on the device
    step: int = 0  # optimizer steps done
    samples: int = 0  # samples of these steps: the data's position under any batch_size
    order_batch_size: int = 0  # batch_size when the run started (sampler.py); 0 = the current one
    run: str = ""  # id of the run in all of its checkpoints
    base: Mapping[str, str] = field(default_factory=dict)  # digests of the frozen weights
    compression: Compression = field(default_factory=lambda: Compression(CompressConfig()))

    @property
    def weight_shapes(self) -> Mapping[str, torch.Size]:
        """Return the shape of each weight of a checkpoint, all but frozen ones, by its name."""
        whole = self.worker.whole
        return {name: shape for name, shape in whole.shapes.items() if name not in whole.frozen}

    def state_tensors(self) -> dict[str, Tensor]:
        """Return every tensor of the state by its canonical name; no frozen weights."""
        weights, saved = self.worker.parameters(), self.weight_shapes
        found: dict[str, Tensor] = {f"model.{n}": p for n, p in weights.items() if n in saved}
        for name, moments in self.optimizer.state().items():
            found |= {f"optimizer.{name}.{moment}": tensor for moment, tensor in moments.items()}
        found |= {f"loss_scale.{name}": tensor for name, tensor in self.loss_scale.state().items()}
        found |= {f"guard.{name}": tensor for name, tensor in self.guard.state().items()}
        own = f"{KEPT}{dist.get_rank()}."
        found |= {
            f"{own}{name}": tensor for name, tensor in self.worker.error_feedback_state().items()
        }
        found["updates"] = self.optimizer.update_count()
        found["tokens"] = self.tokens
        found["step"] = torch.tensor(self.step)
        return found

    def after_load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the non-tensor state from tensors that a checkpoint has filled."""
        self.loss_scale.reset_if_incompatible()
        self.optimizer.set_update_count(tensors["updates"].item())
        self.guard.load({name: tensors[f"guard.{name}"] for name in self.guard.state()})
        self.step = int(tensors["step"].item())

    def read_rollbacks(self, run_dir: str, batch_size: int) -> None:
        """Restore which samples the run has skipped."""
        self.guard.read_rollbacks(run_dir, batch_size)


def not_finite(state: TrainState) -> str:
    """Return the name of the first tensor of a state with NaN or infinity; empty if there is none.

    All ranks must call it and get the same. One reduction per tensor, read back together: for use
    where the host waits anyway.
    """
    frozen = {f"model.{name}": tensor for name, tensor in state.worker.parameters().items()}
    every = frozen | state.state_tensors()
    own = {name: local_tensor(tensor.detach()) for name, tensor in every.items()}
    own = {name: t for name, t in own.items() if t.is_floating_point() and t.numel()}
    largest = torch._foreach_norm(list(own.values()), torch.inf)
    finite = torch.stack([norm.isfinite() for norm in largest]).tolist()
    first = next((name for name, good in zip(own, finite, strict=True) if not good), "")
    return next(filter(None, all_gather_objects(first)), "")


def untrained_state(
    config: TrainConfig,
    runtime: Runtime,
    worker: ParallelModel,
    compression: Compression,
    base: Mapping[str, str],
) -> TrainState:
    """Return the state of a run before its first step; `base` are digests of frozen weights."""
    precision = resolve_precision(config.precision, runtime.device)
    policy = BadStepPolicy(
        config.on_bad_step, config.max_bad_steps, config.spike_sigma, config.spike_window
    )
    state = TrainState(
        worker,
        build_optimizer(worker.parameters(), config.optim),
        LossScale(precision, runtime.device, config.strategy.reduce),
        BadStepGuard(policy, config.run_dir, runtime.device),
        tokens=torch.zeros((), dtype=torch.int64, device=runtime.device),
        compression=compression,
        order_batch_size=config.batch_size,
        base=base,
    )
    compression.pack_frozen(unwrap_transformer(worker))
    narrow_frozen(unwrap_transformer(worker), precision.compute)
    return state

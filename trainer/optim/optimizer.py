"""AdamW on what this rank holds of each parameter, and the learning rate as a function of step."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainer.config.train import OptimConfig, TrainConfig
from trainer.optim.adamw8bit import AdamW8bit, block_size

LEAP = 0.01  # share by which a learning rate may differ from what it was, unsaid


def lr_at(step: int, steps: int, config: OptimConfig) -> float:
    """Learning rate of `step` (from 0) in a run of `steps`.

    Linear warm-up, then cosine (arXiv 1608.03983), or stable and a linear decay at the end (wsd,
    arXiv 2404.06395), or constant.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    floor = config.lr * config.min_lr_ratio
    if config.schedule == "cosine":
        done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        return floor + (config.lr - floor) * (1 + math.cos(math.pi * min(1.0, done))) / 2
    if config.schedule == "wsd":
        decay_steps = max(1, round(steps * config.decay_share))
        left = min(1.0, max(0.0, (steps - step) / decay_steps))
        return floor + (config.lr - floor) * left
    return config.lr


def lr_leap(step: int, before: float | None, config: TrainConfig) -> str:
    """Return a warning, if the learning rate of `step` (from 0) is not what it was `before`.

    Else empty.

    A run that goes on with other steps or another schedule leaps there. None = not known.
    """
    now = lr_at(step, config.steps, config.optim)
    if before is None or abs(now - before) <= LEAP * max(now, before):
        return ""
    return (
        f"the learning rate of step {step + 1} is {now:.3g}, where the run that is gone on with "
        f"had {before:.3g}: steps={config.steps}, or optim.*, was another; to go on smoothly set "
        "them as they were, or optim.schedule=constant with an optim.lr of your choice"
    )


def schedule_warnings(config: TrainConfig) -> list[str]:
    """Return what a schedule does that its keys do not say at once; empty = nothing."""
    optim, steps = config.optim, config.steps
    last, warmup = lr_at(steps - 1, steps, optim), optim.warmup_steps
    if warmup >= steps:
        return [
            f"optim.warmup_steps={warmup} is not below steps={steps}: the learning rate rises to "
            f"the end, where it is {last:.3g} of optim.lr={optim.lr:g}, and never falls; set "
            f"optim.warmup_steps={steps // 10}"
        ]
    decay_steps = round(steps * optim.decay_share)
    if optim.schedule == "wsd" and warmup + decay_steps > steps and warmup:
        return [
            f"optim.warmup_steps={warmup} ends behind step {steps - decay_steps}, where "
            f"optim.decay_share={optim.decay_share:g} of steps={steps} begin to fall: the learning "
            f"rate leaps from {optim.lr:.3g} to {lr_at(warmup, steps, optim):.3g} there; set "
            f"optim.warmup_steps={steps - decay_steps}"
        ]
    return []


def decays(name: str, parameter: Tensor) -> bool:
    """Return whether weight decay applies: to matrices, never to norms, biases or positions."""
    return parameter.dim() >= 2 and not name.endswith(("positions.weight", "class_token"))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Optimizer:
    """AdamW (arXiv 1711.05101), torch's fused or in 8 bits, on the local part of every parameter.

    Working on plain local tensors, it never meets a DTensor's dispatch, mixes sharded and whole
    parameters freely, and skips an update on the device when told that a gradient is not finite.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: OptimConfig):
        self.parameters = dict(parameters)  # by canonical name
        # Detached views of the same memory: what AdamW changes, the model sees.
        self._local = {name: _local(p.detach()) for name, p in self.parameters.items()}
        groups: dict[float, list[Tensor]] = {config.weight_decay: [], 0.0: []}
        for name, tensor in self._local.items():
            decay = config.weight_decay if decays(name, self.parameters[name]) else 0.0
            groups[decay].append(tensor)
        self._adamw = self._begun(
            [{"params": tensors, "weight_decay": decay} for decay, tensors in groups.items()],
            config,
        )

    def _begun(self, groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
        betas = (config.betas[0], config.betas[1])
        if config.name == "adamw8bit":
            blocks = {self._local[name]: block_size(p) for name, p in self.parameters.items()}
            return AdamW8bit(groups, blocks, betas, config.eps)
        adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=config.eps, fused=True)
        for tensor in self._local.values():
            adamw.state[tensor] = {
                "step": torch.zeros((), device=tensor.device),
                "exp_avg": torch.zeros_like(tensor),
                "exp_avg_sq": torch.zeros_like(tensor),
            }
        return adamw

    def step(self, lr: float, skip: Tensor) -> None:
        """One update from the parameters' gradients; none where `skip` (float32 scalar) is 1."""
        for name, tensor in self._local.items():
            gradient = self.parameters[name].grad
            # A rank may hold no rows of a small parameter: the kernel refuses empty tensors.
            tensor.grad = None if gradient is None or not tensor.numel() else _local(gradient)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.grad_scale, self._adamw.found_inf = None, skip  # type: ignore[attr-defined]
        self._adamw.step()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Moments by canonical parameter name, laid out as the parameters: what a checkpoint holds.

        The tensors share the optimizer's memory, so that a checkpoint loads into them in place.
        """
        return {
            name: {
                moment: self._like(self.parameters[name], content)
                for moment, content in self._adamw.state[tensor].items()
                if moment != "step"
            }
            for name, tensor in self._local.items()
        }

    @staticmethod
    def _like(parameter: Tensor, tensor: Tensor) -> Tensor:
        if not isinstance(parameter, DTensor):
            return tensor
        shape, part = parameter.shape, parameter.to_local()
        if tensor.shape != part.shape:  # scales: a row has fewer, by one factor in every part of it
            scales = shape[-1] * tensor.shape[-1] // part.shape[-1]
            shape = torch.Size([*shape[:-1], scales])
        return DTensor.from_local(
            tensor,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=shape,
            stride=torch.empty(shape, device="meta").stride(),
        )

    def updates(self) -> Tensor:
        """Updates made so far, as a float32 scalar; skipped ones do not count."""
        # A rank's empty tensors never count an update. Nothing is read back from the device.
        return torch.stack([state["step"] for state in self._adamw.state.values()]).max()

    def set_updates(self, updates: float) -> None:
        """Go on counting from `updates`: AdamW's bias correction depends on it."""
        for state in self._adamw.state.values():
            state["step"].fill_(updates)

"""Mixed precision: dtypes of parameters and computation, and the loss scale of fp16."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Precision:
    """The dtypes of a precision mode.

    `parameters`: master weights, gradients and optimizer state; `compute`: the model's forward and
    backward. `float8`: linear layers between embedding and head multiply in float8 (float8.py).
    """

    name: str
    parameters: torch.dtype
    compute: torch.dtype
    float8: bool = False


PRECISIONS = {
    "fp64": Precision("fp64", torch.float64, torch.float64),
    "fp32": Precision("fp32", torch.float32, torch.float32),
    "bf16": Precision("bf16", torch.float32, torch.bfloat16),
    "fp16": Precision("fp16", torch.float32, torch.float16),
    "fp8": Precision("fp8", torch.float32, torch.bfloat16, float8=True),
}


def resolve_precision(name: str, device: torch.device) -> Precision:
    """Return the precision mode by name; `auto` is bf16 on CUDA and fp32 on a CPU."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    return PRECISIONS[name]


class LossScale:
    """Dynamic loss scale of fp16 (arXiv 1710.03740) on the device; constant 1 otherwise.

    It is also dynamic, under any layout, if only the gradient reduction is in fp16 (`reduce`, as
    strategy.reduce): values below 6e-8 would underflow there, and most gradients are that small.
    The decision to skip an update follows from the global gradient norm, which is identical on
    every rank, so that it needs no communication under any strategy.
    """

    growth_interval = 1000  # good steps until the scale doubles
    first = 2.0**14  # initial scale

    def __init__(self, precision: Precision, device: torch.device, reduce: str = "auto"):
        self.dynamic = precision.compute == torch.float16 or reduce == "fp16"
        self.scale = torch.full((), self.first if self.dynamic else 1.0, device=device)
        self.good_steps = torch.zeros((), device=device)

    def update(self, skipped: Tensor) -> None:
        """Halve the scale after a skipped update (1); double it after 1000 good steps (0)."""
        if not self.dynamic:
            return
        self.good_steps = (self.good_steps + 1) * (1 - skipped)
        grow = self.good_steps >= self.growth_interval
        self.scale = self.scale * torch.where(grow, 2.0, 1.0) * torch.where(skipped > 0, 0.5, 1.0)
        self.good_steps = torch.where(grow, 0.0, self.good_steps)

    def state(self) -> dict[str, Tensor]:
        """Return the state for a checkpoint; not copied, so that it can be loaded in place."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def reset_if_incompatible(self) -> None:
        """Reset the loaded state unless this run and the checkpoint's both scale dynamically."""
        if not self.dynamic or (self.scale == 1.0 and self.good_steps == 0):
            self.scale.fill_(self.first if self.dynamic else 1.0)
            self.good_steps.fill_(0.0)

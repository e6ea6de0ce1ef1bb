"""The interface of an optimizer, and a combination of several."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Optimizer(Protocol):
    """Updates the parameters that it was built for from their gradients, under any layout.

    A parameter that is split over ranks is a DTensor, and so is its gradient. An optimizer whose
    updates need no other part works on this rank's (`local_optimizer.py`); one that needs whole
    matrices gathers them (`DTensor.full_tensor`). All ranks of a parameter's mesh step together,
    through their parameters in the same order.
    """

    def step(self, lr: float, skip: Tensor) -> None:
        """Update once from the gradients, but not where `skip` (float32 scalar on the device) is 1.

        Nothing is read back from the device.
        """

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return what a checkpoint holds: tensors by name, by canonical name of the parameter.

        Each is a DTensor where its parameter is one, and shares the optimizer's memory, so that a
        checkpoint loads into it in place. It has them before the first step.
        """

    def update_count(self) -> Tensor:
        """Return the number of updates so far as a float32 scalar; skipped ones do not count."""

    def set_update_count(self, count: float) -> None:
        """Set the number of updates to `count`, read from a checkpoint."""


class CompositeOptimizer:
    """Several optimizers on disjoint parameters, combined into one."""

    def __init__(self, parts: Sequence[Optimizer]):
        self._parts = tuple(parts)

    def step(self, lr: float, skip: Tensor) -> None:
        """Step each optimizer, in order."""
        for part in self._parts:
            part.step(lr, skip)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return the state of all parameters."""
        return {name: tensors for part in self._parts for name, tensors in part.state().items()}

    def update_count(self) -> Tensor:
        """Return the number of updates so far, equal in all optimizers."""
        return torch.stack([part.update_count() for part in self._parts]).max()

    def set_update_count(self, count: float) -> None:
        """Set the number of updates to `count` in all optimizers."""
        for part in self._parts:
            part.set_update_count(count)

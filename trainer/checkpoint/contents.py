"""The interface of a training state that a checkpoint saves or restores."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

KEPT = "kept."  # prefix of a rank's error-feedback state, before its number


class Checkpointed(Protocol):
    """A training state under some layout."""

    step: int
    samples: int
    order_batch_size: int
    run: str
    base: Mapping[str, str]

    @property
    def weight_shapes(self) -> Mapping[str, torch.Size]:
        """Return the shape of each weight by its canonical name."""

    def state_tensors(self) -> dict[str, Tensor]:
        """Return every tensor of the state by its canonical name."""

    def after_load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the non-tensor state from tensors that a checkpoint has filled."""

    def read_rollbacks(self, run_dir: str, batch_size: int) -> None:
        """Restore which samples the run has skipped."""

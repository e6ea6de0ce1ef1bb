"""What parallel/ asks of a model, and what it gives the model to ask in return.

A model imports nothing of this: it fits by its shape, which mypy checks where `trainer/build.py`
hands one to `parallelize`. A model is an `nn.Module` as well.
"""

# B batch, S positions of a sequence, D width, H query heads, G key/value heads, K width of a head.

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor]
Flow = tuple[Tensor | None, ...]  # what travels between blocks


class SequenceLayout(Protocol):
    """How the positions between split layers lie on the ranks of the tensor axis."""

    def part_length(self, length: int) -> int:
        """Return how many of `length` positions this rank has between blocks."""

    def gather_sequence(self, x_BSD: Tensor, length: int) -> Tensor:
        """Return all `length` positions, each rank with a gradient of its own."""

    def local_positions(self, x_BSD: Tensor) -> Tensor:
        """Return this rank's positions of all."""

    def gather_replicated(self, x_BSD: Tensor, length: int) -> Tensor:
        """Return all `length` positions, for what every rank computes alike."""

    def gradient_contribution(self, gradient_BSD: Tensor) -> Tensor:
        """Return what this rank adds to the gradient of a `whole` that every rank knows."""


class SequenceContext(Protocol):
    """Which positions of a sequence this rank has, and attention over those of all ranks."""

    shares: bool
    first: bool  # of the ranks that share a sequence

    def local_length(self, length: int) -> int:
        """Return how many of `length` positions this rank has."""

    def local_positions(self, length: int, device: torch.device | None = None) -> Tensor:
        """Return which they are, (share,)."""

    def take_local(self, x: Tensor) -> Tensor:
        """Return this rank's rows of (B, length, …)."""

    def gather_sequence(self, x: Tensor, length: int) -> Tensor:
        """Undo `take_local`."""

    def attend_global(
        self,
        query_BHSK: Tensor,
        key_BGTK: Tensor,
        value_BGTK: Tensor,
        key_length: int,
        visible: Callable,
        causal: bool,
    ) -> Tensor:
        """Return attention from this rank's queries to all keys."""


class ParallelizableModel(Protocol):
    """A Transformer that can be cut, split and shared."""

    blocks: nn.ModuleDict  # "0", "1", …; they keep their names when others are taken out
    embed: nn.Module | None  # None where the first stage is another rank's
    head: nn.Module | None  # None where the last stage is another rank's
    layout: SequenceLayout
    context: SequenceContext
    # Lent for a training step to what learns from other things than logits, an auxiliary loss: it
    # returns what to go back from for a sum over valid targets, and counts it in the loss.
    scale_auxiliary_loss: Callable[[Tensor], Tensor] | None
    training: bool

    def __call__(
        self,
        inputs: Inputs,
        cache: Any = None,
        flow: Any = None,
        blocks: Sequence[str] | None = None,
    ) -> Any:
        """Return logits, or what flows out of the last of `blocks`."""

    def flow_like(self, inputs: Inputs, block: int, cache: Any = None) -> Flow:
        """Return what flows into a block, as meta tensors; behind the last one, the logits."""

    def local_targets(self, targets: Tensor) -> Tensor:
        """Return the targets of a micro-batch that this rank trains on."""

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As torch's module does."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """As torch's module does."""

    def modules(self) -> Iterator[nn.Module]:
        """As torch's module does."""

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """As torch's module does."""

    def get_submodule(self, target: str) -> nn.Module:
        """As torch's module does."""

    def train(self, mode: bool = True) -> Self:
        """As torch's module does."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's module does."""

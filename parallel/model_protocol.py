"""The protocols between parallel/ and a model, in both directions.

A model imports none of them: typing is structural, and mypy checks it where `trainer/build.py`
passes a model to `parallelize`. A model is an `nn.Module` as well.
"""

# B batch, S positions of a sequence, D width, H query heads, G key/value heads, K width of a head.

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor]
Flow = tuple[Tensor | None, ...]  # activations passed between blocks


class SequenceLayout(Protocol):
    """The distribution of positions between split layers over the ranks of the tensor axis."""

    def part_length(self, length: int) -> int:
        """Return the number of local positions of a sequence of `length`, between blocks."""

    def gather_sequence(self, x_BSD: Tensor, length: int) -> Tensor:
        """Gather all `length` positions; the ranks' gradients differ and are summed."""

    def local_positions(self, x_BSD: Tensor) -> Tensor:
        """Return the local positions of a replicated tensor."""

    def gather_replicated(self, x_BSD: Tensor, length: int) -> Tensor:
        """Gather all `length` positions for a computation that every rank repeats."""

    def gradient_contribution(self, gradient_BSD: Tensor) -> Tensor:
        """Return this rank's term of the gradient of a gathered tensor, known on every rank."""


class PackedAttention(Protocol):
    """Attention within the documents of packed rows, without a mask; H is a multiple of G."""

    ends_BM: Tensor  # the position behind each document; the last is the sequence's length
    window: int  # how many keys a causal query sees at most, its own the last; 0 = all

    def forward(
        self,
        query_BHRK: Tensor,
        key_BGCK: Tensor,
        value_BGCK: Tensor,
        rows_BM: Tensor,
        columns_BM: Tensor,
        causal: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return output and log-sum-exp, given how many rows and columns each end is behind.

        Causal: the documents' last queries are at the positions of their last keys.
        """

    def backward(
        self,
        grad_BHRK: Tensor,
        query_BHRK: Tensor,
        key_BGCK: Tensor,
        value_BGCK: Tensor,
        out_BHRK: Tensor,
        lse_BHR: Tensor,
        rows_BM: Tensor,
        columns_BM: Tensor,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value gradients, from the merged output and log-sum-exp."""


class SequenceContext(Protocol):
    """The local positions of a sequence, and attention over the positions of all ranks."""

    shares: bool  # whether several ranks share a sequence
    first: bool  # whether this is the first of the ranks that share a sequence

    def local_length(self, length: int) -> int:
        """Return the number of local positions of a sequence of `length`."""

    def local_positions(self, length: int, device: torch.device | None = None) -> Tensor:
        """Return the indices of the local positions, (local_length,)."""

    def take_local(self, x: Tensor) -> Tensor:
        """Return the local positions of (B, length, …)."""

    def gather_sequence(self, x: Tensor, length: int) -> Tensor:
        """Invert `take_local`."""

    def attend_global(
        self,
        query_BHSK: Tensor,
        key_BGTK: Tensor,
        value_BGTK: Tensor,
        key_length: int,
        visible: Callable,
        causal: bool,
        bias: Callable[[Tensor, Tensor], Tensor] | None = None,
        packed: Any = None,
    ) -> Tensor:
        """Return attention of the local queries to the keys of all ranks."""


class ParallelizableModel(Protocol):
    """A Transformer that `parallelize` can split, shard and replicate."""

    blocks: nn.ModuleDict  # "0", "1", …; names are kept when other blocks are removed
    embed: nn.Module | None  # None if another rank holds the first stage
    head: nn.Module | None  # None if another rank holds the last stage
    layout: SequenceLayout
    context: SequenceContext
    # Set during a training step, for auxiliary losses: takes a sum over valid targets, adds it to
    # the reported mean loss and returns the scaled loss to call `backward` on.
    scale_auxiliary_loss: Callable[[Tensor], Tensor] | None
    training: bool

    def __call__(
        self,
        inputs: Inputs,
        cache: Any = None,
        flow: Any = None,
        blocks: Sequence[str] | None = None,
    ) -> Any:
        """Return the logits, or the activations after the last of `blocks`."""

    def flow_like(self, inputs: Inputs, block: int, cache: Any = None) -> Flow:
        """Return a block's inputs as meta tensors; for an index after the last, the logits."""

    def output_length(self, inputs: Inputs) -> int | None:
        """Return the number of positions that logits are of; None = of the sequence as a whole."""

    def local_targets(self, targets: Tensor) -> Tensor:
        """Return the targets of a micro-batch at the local positions."""

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Iterate over (name, parameter), as nn.Module does."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Iterate over the parameters, as nn.Module does."""

    def modules(self) -> Iterator[nn.Module]:
        """Iterate over all submodules, as nn.Module does."""

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Iterate over (name, submodule), as nn.Module does."""

    def get_parameter(self, target: str) -> nn.Parameter:
        """Return the parameter by its dotted name, as nn.Module does."""

    def get_submodule(self, target: str) -> nn.Module:
        """Return a submodule by its dotted name, as nn.Module does."""

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode, as nn.Module does."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients, as nn.Module does."""

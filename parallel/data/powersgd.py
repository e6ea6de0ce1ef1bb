"""PowerSGD: gradient matrices summed as low-rank factors (arXiv 1905.13727).

Unlike torch's DDP hook, this one stores its state per parameter, so that it can be saved and
resumed from the first step of a process, and issues all collectives in one order, on gloo too.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch import distributed as dist

from parallel.collectives import start_all_reduce, wait_tensor
from parallel.data.comm_hook import CompressedAllReduce, drop_nonfinite, learned_parameters
from parallel.data.compressed_sizes import factor_sizes


class PowerSGDAllReduce(CompressedAllReduce):
    """An all-reduce by one power iteration per training step, on the sum over the ranks.

    M ≈ P Qᵀ, with P an orthonormal basis of M Q and the next Q = Mᵀ P. Each rank's approximation
    error is added to its gradient of the next step (section 3 of the paper).
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup, rank: int, start_step: int):
        super().__init__(model, group)
        self._start_step = start_step
        self._steps = torch.zeros((), dtype=torch.int64)  # steps of the run so far
        self._lost: dict[str, Tensor] = {}  # approximation error, (rows, columns)
        self._right: dict[str, Tensor] = {}  # Q, (columns, rank), identical on every rank
        for number, (name, parameter) in enumerate(learned_parameters(model)):
            rows = parameter.shape[0]
            if any(factor_sizes(parameter.shape, rank)):
                self._lost[name] = parameter.new_zeros(rows, parameter.numel() // rows)
                draw = torch.Generator().manual_seed(number)
                first = torch.randn(parameter.numel() // rows, rank, generator=draw)
                self._right[name] = first.to(parameter.device, parameter.dtype)

    def sum_over_ranks(self, gradients: Mapping[str, Tensor]) -> Iterator[None]:
        """Replace gradients by their sums, those of large matrices by low-rank approximations."""
        starts = self._steps >= self._start_step
        names = [name for name in gradients if starts and name in self._lost]
        others = [gradient for name, gradient in gradients.items() if name not in names]
        lost, right = ([kept[n] for n in names] for kept in (self._lost, self._right))
        own = [gradients[n].reshape(k.shape) + k for n, k in zip(names, lost, strict=True)]
        for q in right:
            q.copy_(_orthonormal_basis(q))  # against rounding of the small directions
        left = [m @ q for m, q in zip(own, right, strict=True)]
        flat = start_all_reduce(_flatten_tensors(left + others), self.group)
        yield
        sums = _unflatten_like(wait_tensor(flat), left + others)
        left = [_orthonormal_basis(p) for p in sums[: len(left)]]
        for gradient, total in zip(others, sums[len(left) :], strict=True):
            gradient.copy_(total)
        parts = [m.T @ p for m, p in zip(own, left, strict=True)]
        for kept, m, p, q in zip(lost, own, left, parts, strict=True):
            kept.copy_(drop_nonfinite(m - p @ q.T))
        if parts:
            flat = start_all_reduce(_flatten_tensors(parts), self.group)
        yield
        if not parts:
            return
        for name, p, q in zip(names, left, _unflatten_like(wait_tensor(flat), parts), strict=True):
            gradients[name].copy_((p @ q.T).view(gradients[name].shape))
            self._right[name].copy_(drop_nonfinite(q))

    def end_step(self) -> None:
        """Count the step."""
        self._steps += 1

    def error_feedback_state(self) -> dict[str, Tensor]:
        """Return this rank's compression errors, the next step's factors, and the step count."""
        return (
            {f"{name}.lost": lost for name, lost in self._lost.items()}
            | {f"{name}.right": q for name, q in self._right.items()}
            | {"steps": self._steps}
        )


def _orthonormal_basis(x: Tensor) -> Tensor:
    """Return an orthonormal basis of the column space, arbitrary for zero columns."""
    return torch.linalg.qr(x).Q


def _flatten_tensors(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _unflatten_like(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    parts = flat.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]

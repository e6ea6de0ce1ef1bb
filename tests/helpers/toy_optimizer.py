"""An optimizer as one adds it: momentum, and an update that takes the whole matrix."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.grad_norm import local_tensor
from parallel.parallelize import local_slices
from parallel.runtime import Runtime
from trainer.config.train import OptimConfig
from trainer.optim.parameter_groups import ParameterGroup, torch_groups
from trainer.optim.registry import OPTIMIZERS, OptimizerKind

MOMENTUM = 0.9


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be split over ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def towards_orthogonal(matrix: Tensor) -> Tensor:
    """One Newton-Schulz step from a matrix to the orthogonal one nearest to it."""
    x = matrix / matrix.norm()
    return 1.5 * x - 0.5 * x @ x.T @ x


class WholeMatrixMomentum:
    """The optimizer; `gather` makes a whole matrix of this rank's part."""

    def __init__(
        self,
        gather: Callable[[Tensor], Tensor],
        parameters: Mapping[str, nn.Parameter],
        groups: Sequence[ParameterGroup],
        config: OptimConfig,
    ):
        self._gather, self._parameters = gather, dict(parameters)
        self._decay = {name: group.weight_decay for group in groups for name in group.names}
        self._momentum = {name: torch.zeros_like(p.detach()) for name, p in parameters.items()}
        self._count = torch.zeros(())

    @torch.no_grad()
    def step(self, lr: float, skip: Tensor) -> None:
        keep = skip > 0
        for name, parameter in self._parameters.items():
            assert parameter.grad is not None
            part, momentum = local_tensor(parameter), local_tensor(self._momentum[name])
            new = MOMENTUM * momentum + local_tensor(parameter.grad)
            momentum.copy_(torch.where(keep, momentum, new))
            matrix = towards_orthogonal(self._gather(self._momentum[name]))
            update = matrix if matrix.shape == part.shape else matrix[local_slices(parameter)]
            new = part * (1 - lr * self._decay[name]) - lr * update
            part.copy_(torch.where(keep, part, new))
        self._count += 1 - skip

    def state(self) -> dict[str, dict[str, Tensor]]:
        return {name: {"momentum": tensor} for name, tensor in self._momentum.items()}

    def update_count(self) -> Tensor:
        return self._count

    def set_update_count(self, count: float) -> None:
        self._count.fill_(count)


class Reference(torch.optim.Optimizer):
    """The same in one process, of torch's own momentum."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        groups: Sequence[ParameterGroup],
        config: OptimConfig,
    ):
        super().__init__(torch_groups(groups, parameters), {"lr": 0.0})
        sgd = torch.optim.SGD(parameters.values(), lr=0.0, momentum=MOMENTUM)
        self._sgd, self._parameters = sgd, list(parameters.values())

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self._sgd.step()
        for group in self.param_groups:
            for matrix in group["params"]:
                momentum = self._sgd.state[matrix]["momentum_buffer"]
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.sub_(group["lr"] * towards_orthogonal(momentum))


TOYS = {
    "toy": OptimizerKind(partial(WholeMatrixMomentum, full), Reference, rest="adamw"),
    # Takes what the rank holds for the whole.
    "local toy": OptimizerKind(partial(WholeMatrixMomentum, local_tensor), Reference, rest="adamw"),
}


def with_toys(runtime: Runtime, function: Callable, *args: Any) -> Any:
    """Call a function on a rank where the toys are registered."""
    with mock.patch.dict(OPTIMIZERS, TOYS):
        return function(runtime, *args)

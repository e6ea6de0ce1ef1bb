"""A torch optimizer on the local shard of each parameter."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def local_parts(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return detached views of the local shards, through which the model's weights are updated."""
    return {name: _local_view(parameter.detach()) for name, parameter in parameters.items()}


def laid_out_as(parameter: Tensor, part: Tensor) -> Tensor:
    """Wrap a local state tensor as a DTensor with its parameter's layout.

    Its last dim may be shorter than the parameter's, by one factor on every rank.
    """
    if not isinstance(parameter, DTensor):
        return part
    shape, own = parameter.shape, parameter.to_local()
    if part.shape != own.shape:
        shorter = shape[-1] * part.shape[-1] // own.shape[-1]
        shape = torch.Size([*shape[:-1], shorter])
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )


class LocalOptimizer:
    """An optimizer that needs no other rank's shard: it works per element, or per block of a row.

    Working on plain local tensors, it avoids DTensor's dispatch, mixes sharded and replicated
    parameters, and skips an update on the device if a gradient is not finite.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        local: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
    ):
        """Step `optimizer`, whose parameters are `local`: the `local_parts` of `parameters`.

        It has its whole state already, with `step` among it, and heeds `found_inf`.
        """
        self._parameters, self._local = dict(parameters), dict(local)
        self._optimizer = optimizer

    def step(self, lr: float, skip: Tensor) -> None:
        """Update once from the parameters' gradients; not where `skip` (float32 scalar) is 1."""
        for name, tensor in self._local.items():
            gradient = self._parameters[name].grad
            # A rank may hold no rows of a small parameter: the kernel refuses empty tensors.
            tensor.grad = None if gradient is None or not tensor.numel() else _local_view(gradient)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.grad_scale, self._optimizer.found_inf = None, skip  # type: ignore[attr-defined]
        self._optimizer.step()
        for tensor in self._local.values():
            tensor.grad = None  # it would outlive the model's, until the next update

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return the moments by canonical parameter name, laid out as the parameters."""
        return {
            name: {
                moment: laid_out_as(self._parameters[name], content)
                for moment, content in self._optimizer.state[tensor].items()
                if moment != "step"
            }
            for name, tensor in self._local.items()
        }

    def update_count(self) -> Tensor:
        """Return the number of updates so far, as a float32 scalar; skipped ones do not count."""
        # A rank's empty tensors never count an update. Nothing is read back from the device.
        return torch.stack([state["step"] for state in self._optimizer.state.values()]).max()

    def set_update_count(self, count: float) -> None:
        """Set the number of updates to `count`; AdamW's bias correction depends on it."""
        for state in self._optimizer.state.values():
            state["step"].fill_(count)


def _local_view(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

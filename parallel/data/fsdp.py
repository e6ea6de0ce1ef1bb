"""FSDP2 (`fully_shard`): parameters, gradients and optimizer state are sharded over ranks."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard


def shard_with_fsdp(
    model: nn.Module,
    mesh: DeviceMesh,
    compute: torch.dtype,
    reduce: torch.dtype,
    reshard_after_forward: bool,
) -> None:
    """Apply `fully_shard` to every block, then to embedding and head as one group, in place.

    `mesh` is (shard) or, for hybrid sharding, (replicate, shard). Weights are gathered in
    `compute`, gradients reduced in `reduce`; both as in ZeRO (arXiv 1910.02054).
    """
    policy = MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=reduce, cast_forward_inputs=False
    )
    # An encoder block returns the decoder's activations unchanged, as a view; the warning is about
    # writing to it in place, which nothing does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    for block in model.get_submodule("blocks").children():
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    # The head runs last in the forward and first in the backward: resharded in between, it would
    # be gathered again immediately.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is already divided by the global number of targets: gradients are summed.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


@contextmanager
def one_reduction(model: object) -> Iterator[None]:
    """Keep weights gathered and gradients unreduced inside; reduce the gradients once on exit.

    Runs FSDP's post-backward as torch's pipeline stage does. Does nothing without FSDP.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    _reduces_in_backward(model, False)
    yield
    _reduces_in_backward(model, True)
    root = model._get_fsdp_state()
    for state in root._state_ctx.all_states:
        groups = getattr(state, "_fsdp_param_groups", None)  # one group before torch 2.12
        for group in [state._fsdp_param_group] if groups is None else groups:
            if group is not None:
                group.post_backward()
    root._root_post_backward_final_callback()


def _reduces_in_backward(model: FSDPModule, reduces: bool) -> None:
    model.set_is_last_backward(reduces)
    model.set_reshard_after_backward(reduces)
    model.set_requires_gradient_sync(reduces)

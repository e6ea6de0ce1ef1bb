"""AdamW (Loshchilov and Hutter, arXiv 1711.05101): torch's fused one, and its reference."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from trainer.config.train import OptimConfig
from trainer.optim.local_optimizer import LocalOptimizer, local_parts
from trainer.optim.parameter_groups import ParameterGroup, torch_groups


def build_adamw(
    parameters: Mapping[str, nn.Parameter], groups: Sequence[ParameterGroup], config: OptimConfig
) -> LocalOptimizer:
    """Return torch's fused AdamW on the local shard of every parameter."""
    local = local_parts(parameters)
    adamw = torch.optim.AdamW(
        torch_groups(groups, local),
        lr=0.0,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        fused=True,
    )
    for tensor in local.values():
        adamw.state[tensor] = {
            "step": torch.zeros((), device=tensor.device),
            "exp_avg": torch.zeros_like(tensor),
            "exp_avg_sq": torch.zeros_like(tensor),
        }
    return LocalOptimizer(parameters, local, adamw)


def reference_adamw(
    parameters: Mapping[str, nn.Parameter], groups: Sequence[ParameterGroup], config: OptimConfig
) -> torch.optim.Optimizer:
    """Return torch's single-process AdamW, a for-loop over full parameters."""
    return torch.optim.AdamW(
        torch_groups(groups, parameters),
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        foreach=False,
        fused=False,
    )

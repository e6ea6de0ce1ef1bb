"""The optimizers by `optim.name`: how each is built, and its reference for `verify`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from trainer.config.train import ConfigError, OptimConfig
from trainer.optim.adamw import build_adamw, reference_adamw
from trainer.optim.adamw8bit import build_adamw8bit
from trainer.optim.optimizer import CompositeOptimizer, Optimizer
from trainer.optim.parameter_groups import ParameterGroup, parameter_groups

Parameters = Mapping[str, nn.Parameter]  # by canonical name


@dataclass(frozen=True)
class OptimizerKind:
    """A registered optimizer."""

    build: Callable[[Parameters, Sequence[ParameterGroup], OptimConfig], Optimizer]
    # The same updates in one process by plain torch, which `verify` holds every layout to at its
    # tolerance; None = there are none that are equal to it, only close.
    reference: (
        Callable[[Parameters, Sequence[ParameterGroup], OptimConfig], torch.optim.Optimizer] | None
    )
    # The optimizer of all but the hidden matrices, which are its own; empty = it has them all.
    rest: str = ""


OPTIMIZERS = {
    "adamw": OptimizerKind(build_adamw, reference_adamw),
    # Rounding to codes depends on the order of sums, so layouts are close but not equal.
    "adamw8bit": OptimizerKind(build_adamw8bit, reference=None),
}


def build_optimizer(parameters: Parameters, config: OptimConfig) -> Optimizer:
    """Build the optimizer of these parameters (DTensors if sharded) by config.name.

    Frozen ones have none.
    """
    parts = []
    for name, groups in _groups_by_optimizer(parameters, config).items():
        names = {member for group in groups for member in group.names}
        own = {n: p for n, p in parameters.items() if n in names}  # in the model's order
        parts.append(OPTIMIZERS[name].build(own, groups, config))
    return parts[0] if len(parts) == 1 else CompositeOptimizer(parts)


def reference_optimizers(
    parameters: Parameters, config: OptimConfig
) -> list[torch.optim.Optimizer]:
    """Return optimizers in plain torch that take the same steps on full parameters.

    Raises ConfigError if there are none.
    """
    found = []
    for name, groups in _groups_by_optimizer(parameters, config).items():
        check_reference(name)
        reference = OPTIMIZERS[name].reference
        assert reference is not None
        found.append(reference(parameters, groups, config))
    return found


def check_reference(name: str) -> None:
    """Raise ConfigError if this optimizer cannot be verified."""
    if OPTIMIZERS[name].reference is None:
        exact = ", ".join(n for n, kind in OPTIMIZERS.items() if kind.reference is not None)
        raise ConfigError(
            f"optim.name={name} has no reference that it equals, as layouts are close but not "
            f"equal under it: nothing to verify; set optim.name to one of {exact}"
        )


def _groups_by_optimizer(
    parameters: Parameters, config: OptimConfig
) -> dict[str, list[ParameterGroup]]:
    shapes = {name: p.shape for name, p in parameters.items() if p.requires_grad}
    found: dict[str, list[ParameterGroup]] = {}
    for group in parameter_groups(shapes, config, OPTIMIZERS[config.name].rest):
        found.setdefault(group.optimizer, []).append(group)
    return found

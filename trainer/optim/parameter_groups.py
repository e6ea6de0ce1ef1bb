"""Assignment of parameters to optimizers and weight decay, by name and shape."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Size, Tensor

from trainer.config.lora import FACTORS
from trainer.config.train import OptimConfig


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters, by canonical name, that one optimizer updates with the same weight decay."""

    optimizer: str  # its name in the registry
    weight_decay: float
    names: tuple[str, ...]


def has_weight_decay(name: str, shape: Size) -> bool:
    """Return whether weight decay applies: to matrices, never to norms, biases or positions.

    Nor to the factors of an adapter, whose decay would not be that of their product.
    """
    if name.startswith("relative_bias."):
        return False
    kept = ("positions.weight", "class_token", *FACTORS)
    return len(shape) >= 2 and not name.endswith(kept)


def is_hidden_matrix(name: str, shape: Size) -> bool:
    """Return whether a parameter is a matrix of a block: no embedding, head, norm or adapter."""
    return name.startswith("blocks.") and len(shape) == 2 and not name.endswith(FACTORS)


def parameter_groups(
    shapes: Mapping[str, Size], config: OptimConfig, rest: str = ""
) -> list[ParameterGroup]:
    """Return the groups of these parameters, given their full shapes by canonical name.

    config.name optimizes all of them or, if `rest` names another optimizer for the rest, the hidden
    matrices alone. A parameter's group depends on no other parameter, so that ranks with different
    parameters agree.
    """
    names: dict[tuple[str, float], list[str]] = {}
    for name, shape in shapes.items():
        optimizer = rest if rest and not is_hidden_matrix(name, shape) else config.name
        weight_decay = config.weight_decay if has_weight_decay(name, shape) else 0.0
        names.setdefault((optimizer, weight_decay), []).append(name)
    return [ParameterGroup(*key, tuple(members)) for key, members in names.items()]


def torch_groups(
    groups: Sequence[ParameterGroup], tensors: Mapping[str, Tensor]
) -> list[dict[str, Any]]:
    """Return the groups as torch.optim takes them, of the tensors by these names."""
    return [
        {"params": [tensors[name] for name in group.names], "weight_decay": group.weight_decay}
        for group in groups
    ]

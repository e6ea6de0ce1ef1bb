"""A layer of which a rank may hold a part: how it gets at its parameters."""

from typing import Any

from torch import nn


class LocalLayer(nn.Module):
    """A layer that computes with the `local_part` of each of its parameters."""

    def local_part(self, name: str) -> Any:
        """Return the part of a parameter that this rank computes with; overridden if sharded.

        None if the layer has no such parameter, as a bias.
        """
        return getattr(self, name)

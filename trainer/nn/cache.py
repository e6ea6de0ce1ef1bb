"""Keys and values that generation keeps of the tokens processed so far."""

# B batch, S sequence, G key/value heads, K width of a head.

from dataclasses import dataclass

from torch import Tensor


class AttentionCache:
    """Key/value cache of the tokens processed so far, (B,G,S,K); holds up to `capacity` tokens."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.length = 0
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def append(self, key_BGSK: Tensor, value_BGSK: Tensor) -> tuple[Tensor, Tensor]:
        """Append the given keys and values, and return all cached ones."""
        B, G, S, K = key_BGSK.shape
        if self.key is None or self.value is None:
            self.key = key_BGSK.new_empty(B, G, self.capacity, K)
            self.value = value_BGSK.new_empty(B, G, self.capacity, K)
        end = self.length + S
        self.key[:, :, self.length : end] = key_BGSK
        self.value[:, :, self.length : end] = value_BGSK
        self.length = end
        return self.key[:, :, :end], self.value[:, :, :end]

    def reorder(self, rows_B: Tensor) -> None:
        """Select the given rows of the batch: the beams that beam search continues."""
        if self.key is not None and self.value is not None:
            self.key, self.value = self.key[rows_B], self.value[rows_B]


@dataclass
class BlockCache:
    """Key/value caches of one decoder block during generation."""

    attention: AttentionCache
    cross: AttentionCache  # keys and values of the memory, set by the first token

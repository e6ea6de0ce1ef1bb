"""Keys and values that generation keeps of the tokens processed so far."""

# B batch, S sequence, G key/value heads, K width of a head.

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from trainer.nn.sequence import Inputs, Resize


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


class CachingModel(Protocol):
    """The model that generates."""

    blocks: nn.ModuleDict
    resizes: dict[int, Resize]


class DecodingCache:
    """Cache of generation: keys and values of each decoder block, and the encoder's memory."""

    def __init__(self, model: CachingModel, capacity: int):
        self.length = 0  # tokens cached so far
        self.memory: Tensor | None = None
        self.marks: Tensor | None = None  # marks of the memory
        self.resizes: dict[int, dict[str, Tensor]] = {place: {} for place in model.resizes}
        self.blocks = {
            name: BlockCache(AttentionCache(capacity), AttentionCache(0))
            for name, block in model.blocks.items()
            if block.stream == "target"
        }

    def advance(self, inputs: Inputs) -> None:
        """Advance the length by the tokens of these inputs; call it after the last block."""
        self.length += inputs["tokens"].shape[1]

    def reorder_rows(self, rows_B: Tensor) -> None:
        """Select the given rows of the batch."""
        self.memory = None if self.memory is None else self.memory[rows_B]
        self.marks = None if self.marks is None else self.marks[rows_B]
        for remembered in self.resizes.values():
            remembered.update({name: tensor[rows_B] for name, tensor in remembered.items()})
        for block in self.blocks.values():
            block.attention.reorder(rows_B)
            block.cross.reorder(rows_B)


def token_positions(inputs: Inputs, cache: DecodingCache | None) -> Tensor:
    """Return the positions of the target's tokens, (B or 1, S)."""
    if "positions" in inputs:
        return inputs["positions"]
    start = 0 if cache is None else cache.length
    length = inputs["tokens"].shape[1]
    return torch.arange(start, start + length, device=inputs["tokens"].device)[None]

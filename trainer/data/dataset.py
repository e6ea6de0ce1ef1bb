"""What every kind of data offers: the interface of a split, and the facts a model needs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

Sample = dict[str, np.ndarray]
IGNORED = -100  # target that no loss is taken of


@dataclass(frozen=True)
class DataFacts:
    """What the model must know of the data."""

    vocab_size: int = 0  # text, pairs: entries of the tokenizer
    classes: int = 0  # images
    image_size: int = 0  # images: pixels a side
    channels: int = 0  # images
    class_names: tuple[str, ...] = ()
    splits: dict[str, int] = field(default_factory=dict)  # samples of train, valid and test


class Dataset(Protocol):
    """One split."""

    characters: int = 0  # text: of the whole split, for bits per character
    targets: int = 0  # text: predicted tokens of the whole split

    def __len__(self) -> int:
        """Samples per epoch."""
        ...

    def sample(self, index: int, seed: int | None) -> Sample:
        """One sample; `seed` is the epoch's (offset, augmentation), None = evaluation."""
        ...

    def collate(self, samples: Sequence[Sample]) -> Sample:
        """One micro-batch of the samples."""
        ...

    def lengths(self) -> np.ndarray | None:
        """(len,): the size of each sample where sizes differ, for batches of like samples."""
        return None

    def reference(self, index: int) -> str:
        """Pairs: the target text."""
        raise AssertionError("only pairs have a target text")

    def source_text(self, index: int) -> str:
        """Pairs: the text to translate."""
        raise AssertionError("only pairs have a text to translate")

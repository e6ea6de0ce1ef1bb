"""The interface of a data split, and the facts that a model needs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

Sample = dict[str, np.ndarray]


@dataclass(frozen=True)
class SplitFacts:
    """Sources and sizes of one split."""

    sources: tuple[str, ...] = ()  # files or folders, relative to data.path
    samples: int = 0
    tokens: int = 0  # text, pairs: of the whole split
    characters: int = 0  # text
    lost: int = 0  # text, pairs: characters that decoding the tokens does not give back
    left_out: dict[str, int] = field(default_factory=dict)  # why samples are not learned from
    digest: str = ""  # of a part of its samples, as a model reads them


@dataclass(frozen=True)
class DataFacts:
    """Facts that a model needs of its data, and a record of what was read.

    A run keeps it in its folder (trainer/data/record.py): with the tokenizer it is all that using
    the trained model needs.
    """

    kind: str = ""  # as data.kind
    path: str = ""  # as data.path
    vocab_size: int = 0  # text, pairs: entries of the tokenizer
    classes: int = 0  # images
    image_size: int = 0  # images: pixels a side
    channels: int = 0  # images
    class_names: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()  # images: of each channel, of pixels from 0 to 1
    std: tuple[float, ...] = ()
    splits: dict[str, SplitFacts] = field(default_factory=dict)  # train, valid and test
    left_out: dict[str, str] = field(default_factory=dict)  # files or folders not read, and why
    notes: tuple[str, ...] = ()  # what else a reader of the table should know

    @property
    def samples(self) -> dict[str, int]:
        """Samples of each split."""
        return {name: split.samples for name, split in self.splits.items()}


class Dataset(Protocol):
    """One split."""

    characters: int = 0  # text: of the whole split, for bits per character
    targets: int = 0  # text: predicted tokens of the whole split
    lost: int = 0  # text: characters of the split that decoding its tokens does not give back

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

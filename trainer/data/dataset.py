"""The interface of a data split, and the facts that a model needs about its data."""

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
    tokens: int = 0  # text, pairs, chat, speech: of the full split
    characters: int = 0  # text
    lost: int = 0  # text, pairs: characters that decoding the tokens loses
    left_out: dict[str, int] = field(default_factory=dict)  # reason -> samples not trained on
    mean_length: int = 0  # of a sequence, in tokens or frames; 0 = all are equal
    digest: str = ""  # of a subset of its samples, as a model reads them


@dataclass(frozen=True)
class DataFacts:
    """Facts that a model needs about its data, and a record of what was read.

    Stored in a run's folder (trainer/data/record.py): together with the tokenizer it is all that
    inference needs of the data.
    """

    kind: str = ""  # data.kind
    path: str = ""  # data.path
    vocab_size: int = 0  # text, pairs, chat: entries of the tokenizer
    classes: int = 0  # images
    image_size: int = 0  # images: pixels per side
    channels: int = 0  # images
    class_names: tuple[str, ...] = ()
    # Images: per channel, of pixels in [0, 1]. Speech: per mel.
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    mels: int = 0  # speech: values of a frame
    splits: dict[str, SplitFacts] = field(default_factory=dict)  # train, valid and test
    left_out: dict[str, str] = field(default_factory=dict)  # file or folder not read -> reason
    notes: tuple[str, ...] = ()  # remarks that the table shows

    @property
    def sample_counts(self) -> dict[str, int]:
        """Return the number of samples of each split."""
        return {name: split.samples for name, split in self.splits.items()}


class Dataset(Protocol):
    """One split of a data set."""

    characters: int = 0  # text: of the full split, for bits per character
    targets: int = 0  # text, chat, speech: predicted tokens of the full split
    # Chat, speech: tokens or frames that a model reads for them; 0 = as many.
    positions: int = 0
    lost: int = 0  # text: characters of the split that decoding its tokens loses

    def __len__(self) -> int:
        """Return the samples per epoch."""
        ...

    def sample(self, index: int, seed: int | None) -> Sample:
        """Return one sample; `seed` is the epoch's (offset, augmentation), None = evaluation."""
        ...

    def collate(self, samples: Sequence[Sample]) -> Sample:
        """Return one micro-batch of the samples."""
        ...

    def sample_lengths(self) -> np.ndarray | None:
        """Return each sample's length (len,), by which batches are grouped; None = all equal."""
        return None

    def mean_length(self) -> int:
        """Return the mean length of a sequence, without its padding; 0 = all are equal."""
        lengths = self.sample_lengths()
        return 0 if lengths is None else round(float(lengths.mean()))

    def target_text(self, index: int) -> str:
        """Return the target text; pairs and speech only."""
        raise AssertionError("only pairs and speech have a target text")

    def opening(self, index: int) -> list[dict[str, str]]:
        """Return the messages before the first answer of a sample; chat only."""
        raise AssertionError("only chats have messages")

    def source_text(self, index: int) -> str:
        """Return the text to translate; pairs only."""
        raise AssertionError("only pairs have a text to translate")

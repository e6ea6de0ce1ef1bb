"""Masked language modelling: windows of a text, in which some tokens are to be guessed.

B samples of a micro-batch · S tokens of a sample
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from trainer.config.loss import IGNORED
from trainer.config.train import ConfigError, DataConfig
from trainer.data import text
from trainer.data.dataset import DataFacts, Sample
from trainer.data.sampler import hash_to_seed
from trainer.data.tokenized import load_tokenizer
from trainer.data.tokenizer import MASK_NAMES, Tokenizer

# Of the tokens to be guessed, these shares are shown as the mask and as a random token; the others
# as they are (BERT, arXiv 1810.04805, section 3.1).
MASKED, RANDOM = 0.8, 0.1


def prepare_splits(config: DataConfig, root: Path, progress: bool = False) -> DataFacts:
    """Tokenise the splits into `data.cache`, unless already done; raises UserError."""
    facts = text.prepare_splits(config, root, progress)
    mask_of(load_tokenizer(config, root, text.SUFFIXES), config)
    return facts


def mask_of(tokenizer: Tokenizer, config: DataConfig) -> int:
    """Return the id of the tokenizer's mask token; raises ConfigError if it has none."""
    if tokenizer.mask_id is None:
        raise ConfigError(
            f"data.tokenizer={config.tokenizer or config.processor} has no mask token "
            f"({', '.join(MASK_NAMES)}), which data.kind=masked_text puts in the place of what is "
            "guessed; name another tokenizer, or none for one that is trained with a mask token"
        )
    return tokenizer.mask_id


def open_split(config: DataConfig, root: Path, split: str) -> "MaskedText":
    """Return a prepared split."""
    tokenizer = load_tokenizer(config, root, text.SUFFIXES)
    found = text.open_split(config, root, split)
    return MaskedText(found, mask_of(tokenizer, config), tokenizer.vocab_size, config.mask_share)


class MaskedText(text.Text):
    """A split of a text; what is masked is a function of the epoch's seed and the sample alone."""

    def __init__(self, windows: text.Text, mask_id: int, vocab_size: int, share: float):
        vars(self).update(vars(windows))
        self._mask_id, self._vocab_size, self._share = mask_id, vocab_size, share

    def sample(self, index: int, seed: int | None) -> Sample:
        """Return tokens (S,) and targets (S,), IGNORED unless masked, and source_valid (S,)."""
        window = super().sample(index, seed)
        tokens_S, valid_S = window["tokens"], window["targets"] != IGNORED
        draw = np.random.default_rng(hash_to_seed(0 if seed is None else seed, index))
        text_S = np.flatnonzero(valid_S & (tokens_S != self._start_id))
        count = min(len(text_S), max(1, round(self._share * len(text_S))))
        guessed_N = draw.permutation(text_S)[:count]
        targets_S = np.full(len(tokens_S), IGNORED, np.int64)
        targets_S[guessed_N] = tokens_S[guessed_N]
        kind_N, random_N = draw.random(count), draw.integers(0, self._vocab_size, count)
        tokens_S[guessed_N[kind_N < MASKED]] = self._mask_id
        as_random_N = (kind_N >= MASKED) & (kind_N < MASKED + RANDOM)
        tokens_S[guessed_N[as_random_N]] = random_N[as_random_N]
        return {"tokens": tokens_S, "targets": targets_S, "source_valid": valid_S}

    def collate(self, samples: Sequence[Sample]) -> Sample:
        """Return tokens and targets (B,S); source_valid if padded; documents as for text."""
        batch = super().collate(samples)
        if batch["source_valid"].all():
            del batch["source_valid"]
        return batch


READER = replace(
    text.READER,
    kind="masked_text",
    families=("encoder",),
    prepare=prepare_splits,
    open_split=open_split,
)

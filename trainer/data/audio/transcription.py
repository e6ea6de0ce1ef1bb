"""Speech for encoder-decoders: features of utterances, and the tokens of what is said in them.

B utterances of a micro-batch · F frames · M mels · T vectors of the longest · S tokens
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from trainer.config.loss import IGNORED
from trainer.config.train import ConfigError, DataConfig, DataError
from trainer.data.audio.utterances import (
    FRAMES_PER_SECOND,
    Prepared,
    Rows,
    Utterances,
    pad_frames,
    rows_of,
)
from trainer.data.dataset import Sample
from trainer.data.pairs import pad_rows
from trainer.data.tokenizer import Tokenizer


def rows_that_fit(config: DataConfig, prepared: Prepared, split: str, tokenizer: Tokenizer) -> Rows:
    """Return the rows of at most data.max_seconds, and of at most data.seq_len tokens."""
    rows = rows_of(config, prepared, split, aligned=config.targets == "both")
    longest = config.seq_len - 1 - len(prefix_ids(config, tokenizer))  # with the start token
    fits_N = rows.frames_N <= config.max_seconds * FRAMES_PER_SECOND
    reasons = {
        f"longer than data.max_seconds={config.max_seconds:g}": ~fits_N,
        f"longer than data.seq_len={config.seq_len}": fits_N & (rows.ids_N > longest),
    }
    left_out, kept = dict(rows.left_out), rows.kept
    for reason, rows_N in reasons.items():
        if count := int(rows_N[kept].sum()):
            left_out[reason] = count
        kept = kept[~rows_N[kept]]
    if not len(kept):
        raise DataError(
            f"data.path={config.path}: no utterance of the {split} split can be used: "
            f"{', '.join(f'{n} {why}' for why, n in left_out.items())}"
        )
    return replace(rows, kept=kept, left_out=left_out)


def prefix_ids(config: DataConfig, tokenizer: Tokenizer) -> list[int]:
    """Return the ids between the start token and a transcript, by data.target_prefix.

    If that is empty they are those of generation_config.json. Raises ConfigError if it leaves a
    choice of languages.
    """
    if config.target_prefix:
        return tokenizer.encode_markup(config.target_prefix)
    value = tokenizer.files.generation_value
    forced = [token for _, token in value("forced_decoder_ids") or []]
    silent = value("no_timestamps_token_id")
    if value("is_multilingual") and (not forced or None in forced):
        raise ConfigError(
            "this model transcribes several languages, and its generation_config.json forces none "
            "of them; set data.target_prefix to the tokens that a transcript begins with, e.g. "
            "data.target_prefix='<|en|><|transcribe|><|notimestamps|>'"
        )
    return forced or ([] if silent is None else [silent])


class Transcripts(Utterances):
    """A split of utterances: features as they are, and tokens of transcripts to predict."""

    def __init__(
        self, config: DataConfig, prepared: Prepared, split: str, tokenizer: Tokenizer, rows: Rows
    ):
        super().__init__(config, prepared, split, tokenizer, rows)
        self.prefix = prefix_ids(config, tokenizer)
        self._longest = int(config.max_seconds * FRAMES_PER_SECOND)  # another tempo may be longer

    def sample(self, index: int, seed: int | None) -> Sample:
        """Return source (F, M) float32, tokens (S,) from the end token on and targets (S,)."""
        ids_L, end = self.ids(index), self.tokenizer.eot_id
        frames_FM = self.frames(index, seed)[: self._longest]
        odd = -len(frames_FM) % self.stride  # a zero is no silence
        return {
            "source": np.pad(frames_FM, ((0, odd), (0, 0)), mode="edge"),
            "tokens": np.array([end, *self.prefix, *ids_L], np.int64),
            # What is in front of a transcript is given, not learned.
            "targets": np.array([*(IGNORED for _ in self.prefix), *ids_L, end], np.int64),
        }

    def collate(self, samples: Sequence[Sample]) -> Sample:
        """Return source (B, F, M), tokens and targets (B, S); source_valid (B, T) if padded."""
        batch = pad_frames([sample["source"] for sample in samples], self.stride)
        batch["source"] = batch.pop("frames")
        fill = {"tokens": self.tokenizer.pad_id, "targets": IGNORED}
        padded = {key: pad_rows([s[key] for s in samples], value) for key, value in fill.items()}
        return batch | padded

"""Speech: features of utterances, and the characters or tokens that are said in them.

B utterances of a micro-batch · F frames · M mels · T vectors of the longest · L ids
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trainer.config.loss import BLANK, IGNORED, NO_CHARACTER
from trainer.config.train import DataConfig, DataError
from trainer.data.audio.transcription import Transcripts, rows_that_fit
from trainer.data.audio.transcripts import transcript_parts
from trainer.data.audio.utterances import (
    FRAMES_PER_SECOND,
    Prepared,
    Utterances,
    facts_of,
    open_prepared,
    pad_frames,
    prepare_utterances,
    rows_of,
    split_facts,
)
from trainer.data.dataset import DataFacts, Sample
from trainer.data.reader import DataReader, HubFormat, HubRows
from trainer.data.tokenized import find_tokenizer
from trainer.data.tokenizer import SMALLEST, Tokenizer, too_small


def prepare_splits(config: DataConfig, root: Path, progress: bool = False) -> DataFacts:
    """Compute features and ids into `data.cache`, unless already done; raises UserError."""
    prepared = prepare_utterances(config, root, progress)
    splits = {
        split: split_facts(parts, root, prepared, split, _open_rows(config, prepared, split).rows)
        for split, parts in prepared.parts.items()
    }
    if config.targets != "tokens":
        _refuse_blanks(config, root)
    return facts_of(config, root, prepared, splits)


def _refuse_blanks(config: DataConfig, root: Path) -> None:
    """Raise DataError if a transcript holds the id that CTC reads as no character."""
    dataset = open_split(config, root, "train")
    text = next(
        (dataset.target_text(i) for i in range(len(dataset)) if BLANK in dataset.ids(i)), None
    )
    if text is not None:
        raise DataError(
            f"data.tokenizer={config.tokenizer} has the id {BLANK} for a part of `{text}`, but CTC "
            "reads that id as a blank; name a tokenizer whose first token is a special one, or "
            "leave data.tokenizer empty"
        )


def open_split(config: DataConfig, root: Path, split: str) -> Utterances:
    """Return a prepared split, with the targets that data.targets names."""
    return _open_rows(config, open_prepared(config, root), split)


def _open_rows(config: DataConfig, prepared: Prepared, split: str) -> Utterances:
    tokenizer = Tokenizer.load(find_tokenizer(config, prepared.parts))
    if config.targets == "ctc":
        rows = rows_of(config, prepared, split, aligned=True)
        return Speech(config, prepared, split, tokenizer, rows)
    rows = rows_that_fit(config, prepared, split, tokenizer)
    return Transcripts(config, prepared, split, tokenizer, rows)


def open_tokenizer(config: DataConfig, root: Path) -> Tokenizer:
    """Return the tokenizer of prepared speech."""
    return Tokenizer.load(find_tokenizer(config, transcript_parts(config, root)))


class Speech(Utterances):
    """A split of utterances, with a target for each vector that a model makes of the frames.

    The first ones are the ids of the transcript, those behind them NO_CHARACTER: CTC finds out
    itself which vector says which.
    """

    def sample(self, index: int, seed: int | None) -> Sample:
        """Return frames (F, M) float32 and targets (T,) int64."""
        frames_FM, ids_L = self.frames(index, seed), self.ids(index)
        targets_T = np.full(-(-len(frames_FM) // self.stride), NO_CHARACTER)
        targets_T[: len(ids_L)] = ids_L
        return {"frames": frames_FM, "targets": targets_T}

    def collate(self, samples: Sequence[Sample]) -> Sample:
        """Return frames (B, F, M), targets (B, T), and source_valid (B, T) if padded."""
        batch = pad_frames([sample["frames"] for sample in samples], self.stride)
        targets_BT = np.full((len(samples), batch["frames"].shape[1] // self.stride), IGNORED)
        for row_T, sample in zip(targets_BT, samples, strict=True):
            row_T[: len(sample["targets"])] = sample["targets"]
        return batch | {"targets": targets_BT}


def find_problems(config: DataConfig) -> list[str]:
    """Return the problems of the settings alone."""
    found = []
    if config.vocab_size < SMALLEST and not (config.tokenizer or config.characters):
        found.append(f"{too_small(config.vocab_size)}, or data.characters=true")
    if config.sample_rate % FRAMES_PER_SECOND:
        found.append(
            f"data.sample_rate={config.sample_rate} must be a multiple of {FRAMES_PER_SECOND}; set "
            f"data.sample_rate={round(config.sample_rate, -2) or FRAMES_PER_SECOND}"
        )
    return found


def refuse_rows(config: DataConfig, folder: Path, rows: HubRows) -> None:
    """Raise DataError: the recordings of a Hugging Face data set are not read."""
    raise DataError(
        f"data.path={config.path}: recordings are not read from a Hugging Face data set; write "
        "them to files, and a train.tsv of `path<TAB>transcript` lines"
    )


HUB_FORMAT = HubFormat((("path", "audio"), ("transcript", "sentence", "text")), refuse_rows)
READER = DataReader(
    "speech",
    ("encoder", "encoder_decoder"),
    "audio",
    prepare_splits,
    open_split,
    HUB_FORMAT,
    find_problems=find_problems,
    open_tokenizer=open_tokenizer,
    outputs=("ctc", "tokens"),
)

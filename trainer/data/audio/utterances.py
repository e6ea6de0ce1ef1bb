"""Utterances of a split: their features, and the ids of their transcripts.

B utterances of a micro-batch · F frames · M mels · T vectors of the longest · L ids
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.train import ConfigError, DataConfig, DataError
from trainer.data.audio.augment import augment_frames
from trainer.data.audio.decode import FRAMES_PER_SECOND
from trainer.data.audio.frames import FrameFile, write_frames
from trainer.data.audio.transcripts import list_transcripts, read_utterances, transcript_parts
from trainer.data.cache import Record, build_folder, load_prepared, prepared_folder
from trainer.data.dataset import DataFacts, Dataset, SplitFacts
from trainer.data.files import FilePart, name_of
from trainer.data.folders import Listing
from trainer.data.record import read_record
from trainer.data.sampler import hash_to_seed
from trainer.data.token_file import TokenFile
from trainer.data.tokenized import (
    Parts,
    check_ids,
    find_tokenizer,
    make_tokenizer,
    source_name,
    token_dtype,
    tokenizer_record,
    tokens_folder,
)
from trainer.data.tokenizer import Tokenizer

LINES = 4096  # transcripts encoded together
SHOWN = 10  # characters listed in a note
SUFFIX = ".frames"


@dataclass(frozen=True)
class Prepared:
    """The folders of prepared speech with their records, and what they were made of."""

    frames: Path
    frames_record: Record
    ids: Path
    ids_record: Record
    parts: Parts
    listing: Listing


def prepare_utterances(config: DataConfig, root: Path, progress: bool) -> Prepared:
    """Compute features and ids into `data.cache`, unless already done; raises UserError."""
    listing = list_transcripts(config, root)
    parts = transcript_parts(config, root, listing)
    frames = frames_folder(config, parts)
    frames_record = build_folder(frames, lambda to: write_frames(config, parts, to, progress))
    make_tokenizer(config, parts, lambda: read_transcripts(frames, "train"))
    ids = ids_folder(config, parts, frames)
    ids_record = build_folder(ids, lambda to: _write_ids(config, parts, frames, to))
    check_ids(ids, ids_record)
    return Prepared(frames, frames_record, ids, ids_record, parts, listing)


def open_prepared(config: DataConfig, root: Path) -> Prepared:
    """Return prepared speech; raises ConfigError if its folders are not intact."""
    listing = list_transcripts(config, root)
    parts = transcript_parts(config, root, listing)
    frames = frames_folder(config, parts)
    ids = ids_folder(config, parts, frames)
    return Prepared(frames, load_prepared(frames), ids, load_prepared(ids), parts, listing)


def frames_folder(config: DataConfig, parts: Parts) -> Path:
    """Return the folder of the features, which depends on the files and how they are read."""
    files = {
        split: [part.file_fingerprint() for part in of_split] for split, of_split in parts.items()
    }
    digest = blake2b()
    for utterance in (
        u for of_split in parts.values() for p in of_split for u in read_utterances(p)
    ):
        digest.update(repr(_fingerprint(utterance.path)).encode("utf-8", "surrogateescape"))
    reads: list[Any] = [
        files,
        digest.hexdigest(),
        config.sample_rate,
        config.mels,
        config.on_bad_file,
    ]
    if not config.standardize:
        reads += ["silence behind", config.max_seconds, config.audio_stride]
    return prepared_folder(config, f"{name_of(config)}-audio", reads)


def _fingerprint(path: Path) -> tuple[str, int, int]:
    """Return path, size and modification time of a recording, which change when the file does."""
    try:
        stat = path.stat()
    except OSError:  # reported where it is read
        return str(path), 0, 0
    return str(path), stat.st_size, stat.st_mtime_ns


def ids_folder(config: DataConfig, parts: Parts, frames: Path) -> Path:
    """Return the folder of the transcripts' ids, which depends on the tokenizer too."""
    return tokens_folder(config, parts, [frames.name])


def read_transcripts(frames: Path, split: str) -> Iterator[str]:
    """Yield the transcripts of a split whose features were computed."""
    with (frames / f"{split}.tsv").open(encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            yield line.rstrip("\n").partition("\t")[2]


def _write_ids(config: DataConfig, parts: Parts, frames: Path, folder: Path) -> Record:
    """Write the ids of each split, where each row starts, and the vectors that CTC needs for it."""
    tokenizer = Tokenizer.load(find_tokenizer(config, parts))
    # What Whisper writes begins with a space, as what it has learned.
    whispers = tokenizer.files.generation_value("no_timestamps_token_id") is not None
    splits, begin = {}, " " if whispers else ""
    for split in parts:
        unknown = unknown_characters(tokenizer, read_transcripts(frames, split))
        texts = read_transcripts(frames, split)
        rows, largest = [(0, 0)], 0
        characters = 0
        with (folder / f"{split}.ids").open("wb") as file:
            while batch := list(islice(texts, LINES)):
                for ids in tokenizer.encode_batch([begin + _known(t, unknown) for t in batch]):
                    file.write(np.array(ids, token_dtype(tokenizer)).tobytes())
                    repeats = sum(a == b for a, b in pairwise(ids))
                    rows.append((rows[-1][0] + len(ids), len(ids) + repeats))
                    largest = max(largest, *ids, 0)
                characters += sum(map(len, batch))
        np.save(folder / f"{split}.npy", np.array(rows, np.int64))
        splits[split] = {"largest_id": largest, "characters": characters, "unknown": unknown}
    return tokenizer_record(tokenizer) | {"splits": splits}


def unknown_characters(tokenizer: Tokenizer, texts: Iterable[str]) -> Counter[str]:
    """Count the characters of texts that a tokenizer does not reproduce."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    if tokenizer.is_lossless:
        return Counter()
    found = [character for character in counts if character.strip()]
    decoded = tokenizer.decode_batch(tokenizer.encode_batch(found))
    return Counter({c: counts[c] for c, back in zip(found, decoded, strict=True) if c not in back})


def _known(text: str, unknown: Counter[str]) -> str:
    return "".join(c for c in text if c not in unknown) if unknown else text


def _unknown_notes(record: Record) -> list[str]:
    """Return a note of the characters that the tokenizer does not know, the most frequent first."""
    notes = []
    for split, entry in record["splits"].items():
        unknown = Counter(entry["unknown"])
        if unknown:
            shown = ", ".join(f"{c} ({count:,})" for c, count in unknown.most_common(SHOWN))
            more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
            notes.append(
                f"characters of the {split} split unknown to the tokenizer and left out: "
                f"{shown}{more}"
            )
    return notes


def facts_of(
    config: DataConfig, root: Path, prepared: Prepared, splits: dict[str, SplitFacts]
) -> DataFacts:
    """Return the facts that a model needs about prepared speech, and what was read."""
    mean, std = statistics(config, prepared.frames_record)
    read = prepared.frames_record["notes"].items()
    return DataFacts(
        vocab_size=prepared.ids_record["vocab_size"],
        mels=config.mels,
        mean=tuple(mean),
        std=tuple(std),
        splits=splits,
        left_out=prepared.listing.left_out | prepared.frames_record["left_out"],
        notes=(
            *prepared.listing.notes,
            *(f"{count:,} recordings {what}" for what, count in read),
            *_unknown_notes(prepared.ids_record),
        ),
    )


def split_facts(
    parts: Sequence[FilePart], root: Path, prepared: Prepared, split: str, rows: "Rows"
) -> SplitFacts:
    """Return the sources and sizes of a split, and what is left out of it."""
    return SplitFacts(
        sources=tuple(source_name(part, root) for part in parts),
        samples=len(rows.kept),
        tokens=int(rows.ids_N[rows.kept].sum()),
        characters=prepared.ids_record["splits"][split]["characters"],
        left_out=rows.left_out,
    )


def statistics(config: DataConfig, record: Record) -> tuple[list[float], list[float]]:
    """Return mean and deviation (M,) that features are standardized by.

    They are those of the train split, or of data.processor; 0 and 1 with data.standardize=false.
    """
    if not config.standardize:
        return [0.0] * config.mels, [1.0] * config.mels
    theirs = read_record(config.processor) if config.processor else None
    if theirs is not None and theirs.mels:
        if theirs.mels != config.mels:
            raise ConfigError(
                f"data.mels={config.mels}, but data.processor={config.processor} was made with "
                f"{theirs.mels}; set data.mels={theirs.mels}"
            )
        return list(theirs.mean), list(theirs.std)
    return record["splits"]["train"]["mean"], record["splits"]["train"]["std"]


@dataclass(frozen=True)
class Rows:
    """The rows of a prepared split: their lengths, and which are in use."""

    frames_N: np.ndarray
    ids_N: np.ndarray
    needed_N: np.ndarray  # vectors, for CTC: in front of those that are pooled and merged
    kept: np.ndarray
    left_out: dict[str, int]


def rows_of(config: DataConfig, prepared: Prepared, split: str, aligned: bool) -> Rows:
    """Return the rows of a split; with `aligned`, those with enough vectors for CTC alone.

    Of the train split, those of at most data.max_seconds.
    """
    starts = np.load(prepared.frames / f"{split}.npy")
    ids = np.load(prepared.ids / f"{split}.npy")
    frames_N, ids_N = np.diff(starts[:, 0]), np.diff(ids[:, 0])
    needed_N = (ids[1:, 1] + config.merged_vectors) * config.pooled_vectors
    too_long_N = frames_N > config.max_seconds * FRAMES_PER_SECOND
    too_short_N = -(-frames_N // config.audio_stride) < needed_N
    few = f"with fewer vectors of data.audio_stride={config.audio_stride} frames than characters"
    reasons = {
        "without a known character": ids_N == 0,
        f"longer than data.max_seconds={config.max_seconds:g}": too_long_N & (split == "train"),
        few: too_short_N & aligned,
    }
    kept_N = np.ones(len(frames_N), bool)
    left_out = {}
    for reason, rows_N in reasons.items():
        if count := int((rows_N & kept_N).sum()):
            left_out[reason] = count
        kept_N &= ~rows_N
    if not kept_N.any():
        raise DataError(
            f"data.path={config.path}: none of the {len(kept_N)} utterances of the {split} split "
            f"can be used: {', '.join(f'{n} {why}' for why, n in left_out.items())}"
        )
    return Rows(frames_N, ids_N, needed_N, np.flatnonzero(kept_N), left_out)


class Utterances(Dataset):
    """A split of utterances with features and ids; a kind of data makes samples of them."""

    def __init__(
        self, config: DataConfig, prepared: Prepared, split: str, tokenizer: Tokenizer, rows: Rows
    ):
        self.tokenizer, self._config, self.rows = tokenizer, config, rows
        self.stride = config.audio_stride
        self._frame_starts = np.load(prepared.frames / f"{split}.npy")
        self._id_starts = np.load(prepared.ids / f"{split}.npy")[:, 0]
        frames = prepared.frames / f"{split}{SUFFIX}"
        self._frames = FrameFile(frames, int(self._frame_starts[-1, 0]), config.mels)
        record = prepared.ids_record
        path, count = prepared.ids / f"{split}.ids", int(self._id_starts[-1])
        self._ids = TokenFile(path, record["dtype"], count, record["vocab_size"])
        self._lines = prepared.frames / f"{split}.tsv"
        mean, std = statistics(config, prepared.frames_record)
        self._mean_M, self._std_M = np.array(mean, np.float32), np.array(std, np.float32)
        self.characters = prepared.ids_record["splits"][split]["characters"]
        self.targets = int(rows.ids_N[rows.kept].sum())
        self.positions = int(rows.frames_N[rows.kept].sum())

    def __len__(self) -> int:
        return len(self.rows.kept)

    def frames(self, index: int, seed: int | None) -> np.ndarray:
        """Return the features (F, M), standardized; with a seed, changed at random."""
        row = self.rows.kept[index]
        start, stop = self._frame_starts[row : row + 2, 0].tolist()
        frames_FM = (self._frames.read(start, stop) - self._mean_M) / self._std_M
        if seed is None or not self._config.augment:
            return np.asarray(frames_FM)
        least = int(self.rows.needed_N[row]) * self._config.audio_stride
        least = min(least, len(frames_FM))
        return augment_frames(frames_FM, self._config, hash_to_seed(seed, index), least)

    def ids(self, index: int) -> np.ndarray:
        """Return the ids of the transcript (L,) int64."""
        row = self.rows.kept[index]
        return self._ids.read(*self._id_starts[row : row + 2].tolist())

    def sample_lengths(self) -> np.ndarray:
        """Return the frames of each utterance."""
        return np.asarray(self.rows.frames_N[self.rows.kept])

    def target_text(self, index: int) -> str:
        """Return the transcript, with the characters that the tokenizer does not know."""
        return self._read_line(index)[1]

    def source_text(self, index: int) -> str:
        """Return the path of the recording."""
        return self._read_line(index)[0]

    def _read_line(self, index: int) -> list[str]:
        row = self.rows.kept[index]
        start, end = self._frame_starts[row : row + 2, 1].tolist()
        with self._lines.open("rb") as file:
            file.seek(start)
            return file.read(end - start).decode("utf-8", "surrogateescape")[:-1].split("\t")


def pad_frames(frames: Sequence[np.ndarray], stride: int) -> dict[str, np.ndarray]:
    """Return features (B, F, M) float32, zeros behind each, and which vectors are of it (B, T).

    F is a multiple of `stride`, the frames of a vector; without padding, all vectors are.
    """
    vectors_B = np.array([-(-len(frames_FM) // stride) for frames_FM in frames])
    longest = int(vectors_B.max())
    padded_BFM = np.zeros((len(frames), longest * stride, frames[0].shape[1]), np.float32)
    for padded_FM, frames_FM in zip(padded_BFM, frames, strict=True):
        padded_FM[: len(frames_FM)] = frames_FM
    valid_BT = np.arange(longest) < vectors_B[:, None]
    return {"frames": padded_BFM} | ({} if valid_BT.all() else {"source_valid": valid_BT})

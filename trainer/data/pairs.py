"""Translation: pairs of sentences, one `source<TAB>target` per line.

B pairs of a micro-batch · T tokens of the longest source · S tokens of the longest target
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from trainer.config.loss import IGNORED
from trainer.config.train import ConfigError, DataConfig, DataError
from trainer.data.cache import Record, load_prepared, progress_bar
from trainer.data.dataset import DataFacts, Dataset, Sample, SplitFacts
from trainer.data.files import FilePart, read_text, split_parts
from trainer.data.reader import DataReader, HubFormat, HubRows, text_problems
from trainer.data.token_file import TokenFile
from trainer.data.tokenized import (
    Parts,
    encode_texts,
    find_tokenizer,
    load_tokenizer,
    prepare_tokens,
    rare_characters,
    size_of,
    source_name,
    token_dtype,
    tokenizer_record,
    tokens_folder,
)
from trainer.data.tokenizer import Tokenizer

LINES = 4096  # lines per batch of the tokenizer
COLUMNS = ("source", "target")
SUFFIXES = (".tsv", ".txt")


def prepare_splits(config: DataConfig, root: Path, progress: bool = False) -> DataFacts:
    """Tokenise the splits into `data.cache`, unless already done; raises UserError."""

    def iter_texts(part: FilePart) -> Iterator[str]:
        return (side for pair in read_pairs(part) for side in pair)

    def write_folder(parts: Parts, folder: Path) -> Record:
        return write_splits(config, parts, folder, progress)

    found = prepare_tokens(config, root, SUFFIXES, iter_texts, write_folder, progress)
    splits, notes = {}, _header_notes(found.parts)
    frame = _frame_at(config, root)
    longer = f"longer than data.seq_len={config.seq_len}"
    for split, entry in found.record["splits"].items():
        spans = load_spans(found.folder, split)
        too_long = int((_pair_lengths(spans, frame) > config.seq_len).any(axis=1).sum())
        if too_long and split != "train":
            notes.append(f"{too_long} pairs of the {split} split are {longer} and cut")
        splits[split] = SplitFacts(
            sources=tuple(source_name(part, root) for part in found.parts[split]),
            samples=len(_rows_that_fit(spans, split, config.seq_len, frame)),
            tokens=int(spans[-1, :2].sum()),
            characters=entry["characters"],
            lost=entry["lost"],
            left_out={longer: too_long} if too_long and split == "train" else {},
        )
    if splits["train"].samples == 0:
        longest = _pair_lengths(load_spans(found.folder, "train"), frame)
        raise ConfigError(
            f"data.seq_len={config.seq_len}: every pair of the train split is longer; set "
            f"data.seq_len={int(longest.max())} to keep them all"
        )
    return found.data_facts(splits, notes)


# Words of a header line; a word of two letters counts as a language code.
HEADER = {
    "source",
    "target",
    "src",
    "tgt",
    "trg",
    "input",
    "output",
    "text",
    "sentence",
    "translation",
    "original",
    "english",
    "german",
    "french",
    "spanish",
    "italian",
    "dutch",
    "portuguese",
    "russian",
    "chinese",
    "japanese",
}


def _header_notes(parts: Parts) -> list[str]:
    """Return a note for each file whose first pair looks like a header."""
    notes = []
    for part in (part for of_split in parts.values() for part in of_split if part.start == 0):
        first = next(read_pairs(part), ("", ""))
        words = [re.findall(r"[^\W\d_]+", side.lower()) for side in first]
        if all(found and all(w in HEADER or len(w) == 2 for w in found) for found in words):
            notes.append(
                f"the first line of {part.path.name} ({first[0]}, {first[1]}) is learned as a "
                "pair; remove it if it names the columns"
            )
    return notes


def open_split(config: DataConfig, root: Path, split: str) -> "Pairs":
    """Return a prepared split."""
    folder = tokens_folder(config, split_parts(config, root, SUFFIXES))
    record = load_prepared(folder)
    return Pairs(folder, record, split, config.seq_len, _frame_at(config, root))


@dataclass(frozen=True)
class PairFrame:
    """Token ids around the sentences of a pair, as a pre-trained model has learned them."""

    before_source: tuple[int, ...] = ()
    behind_source: tuple[int, ...] = ()
    before_target: tuple[int, ...] = ()


def frame_of(config: DataConfig, tokenizer: Tokenizer) -> PairFrame:
    """Return the ids that data.source_prefix, source_end and target_prefix stand for."""

    def ids(text: str) -> tuple[int, ...]:
        token = tokenizer.find_token([text]) if text else None
        return tuple(tokenizer.encode(text)) if token is None else (token,)

    end = (tokenizer.eot_id,) if config.source_end else ()
    return PairFrame(ids(config.source_prefix), end, ids(config.target_prefix))


def _frame_at(config: DataConfig, root: Path) -> PairFrame:
    """Return what stands around the sentences of prepared pairs."""
    if not (config.source_prefix or config.source_end or config.target_prefix):
        return PairFrame()
    return frame_of(config, load_tokenizer(config, root, SUFFIXES))


class Pairs(Dataset):
    """A split of sentence pairs; pairs over `seq_len` are left out of train, else cut."""

    def __init__(self, folder: Path, record: Record, split: str, seq_len: int, frame: PairFrame):
        self.frame = frame
        self._eot_id, self._pad_id = record["eot_id"], record["pad_id"]
        self._seq_len = seq_len
        self.lost = record["splits"][split]["lost"]
        self._text = folder / f"{split}.tsv"
        self._spans = load_spans(folder, split)
        self._ids = [
            TokenFile(
                folder / f"{split}.{column}.bin", record["dtype"], int(count), record["vocab_size"]
            )
            for column, count in zip(COLUMNS, self._spans[-1], strict=False)
        ]
        self._kept = _rows_that_fit(self._spans, split, seq_len, frame)

    def __len__(self) -> int:
        return len(self._kept)

    def sample(self, index: int, seed: int | None) -> Sample:
        """Return source (T,), tokens (S,) from BOS on and targets (S,) up to EOS; int64."""
        row = self._kept[index]
        (low, high) = self._spans[row : row + 2, :2].astype(int)
        frame = self.frame
        room_T = self._seq_len - len(frame.before_source) - len(frame.behind_source)
        room_S = self._seq_len - 1 - len(frame.before_target)
        source_T = self._ids[0].read(low[0], min(high[0], low[0] + room_T))
        target_s = self._ids[1].read(low[1], min(high[1], low[1] + room_S))
        target_s = np.concatenate([np.array(frame.before_target, np.int64), target_s])
        return {
            "source": np.concatenate([frame.before_source, source_T, frame.behind_source]).astype(
                np.int64
            ),
            "tokens": np.concatenate([[self._eot_id], target_s]),
            "targets": np.concatenate([target_s, [self._eot_id]]),
        }

    def collate(self, samples: Sequence[Sample]) -> Sample:
        """Return source (B, T), tokens and targets (B, S) int64; source_valid (B, T) if padded."""
        fill = {"source": self._pad_id, "tokens": self._pad_id, "targets": IGNORED}
        batch = {key: pad_rows([s[key] for s in samples], value) for key, value in fill.items()}
        lengths_B = np.array([len(sample["source"]) for sample in samples])
        valid_BT = np.arange(batch["source"].shape[1]) < lengths_B[:, None]
        if not valid_BT.all():
            batch["source_valid"] = valid_BT
        return batch

    def sample_lengths(self) -> np.ndarray:
        """Return the tokens of source and target together (len,)."""
        return np.diff(self._spans[:, :2].astype(np.int64), axis=0).sum(axis=1)[self._kept]

    def mean_length(self) -> int:
        """Return the mean length of a source or a target."""
        return super().mean_length() // 2

    def target_text(self, index: int) -> str:
        """Return the target text."""
        return self._read_line(index)[1]

    def source_text(self, index: int) -> str:
        """Return the text to translate."""
        return self._read_line(index)[0]

    def _read_line(self, index: int) -> list[str]:
        row = self._kept[index]
        start, end = self._spans[row : row + 2, 2].astype(int)
        with self._text.open("rb") as file:
            file.seek(start)
            sides = file.read(end - start).decode().rstrip("\n").split("\t")
        if len(sides) != 2:
            raise DataError(f"{self._text} is damaged: bytes {start} to {end} are not a pair")
        return sides


def pad_rows(rows: Sequence[np.ndarray], value: int) -> np.ndarray:
    """Return rows of unequal lengths as one array, padded with a value."""
    padded = np.full((len(rows), max(map(len, rows))), value, np.int64)
    for padded_row, row in zip(padded, rows, strict=True):
        padded_row[: len(row)] = row
    return padded


def load_spans(folder: Path, split: str) -> np.ndarray:
    """Return the starts of source ids, target ids and text bytes (pairs + 1, 3) int64."""
    spans: np.ndarray = np.load(folder / f"{split}.npy")
    return spans


def _rows_that_fit(spans: np.ndarray, split: str, seq_len: int, frame: PairFrame) -> np.ndarray:
    """Return the rows of the pairs in use: those within `seq_len` in train, else all."""
    if split != "train":
        return np.arange(len(spans) - 1)
    return np.flatnonzero((_pair_lengths(spans, frame) <= seq_len).all(axis=1))


def _pair_lengths(spans: np.ndarray, frame: PairFrame) -> np.ndarray:
    """Return the tokens of source and target (pairs, 2), the EOS of the target included."""
    around = len(frame.before_source) + len(frame.behind_source), len(frame.before_target) + 1
    return np.diff(spans[:, :2], axis=0) + np.array(around)


def write_splits(config: DataConfig, parts: Parts, folder: Path, progress: bool) -> Record:
    """Write the token ids and the text of each split to a folder; return their record."""
    tokenizer = Tokenizer.load(find_tokenizer(config, parts))
    total = sum(map(size_of, parts.values()))
    splits = {}
    with progress_bar("Tokenising", total, progress) as advance:
        for split, of_split in parts.items():
            found = (pair for part in of_split for pair in read_pairs(part))
            splits[split] = _write_split(tokenizer, found, folder, split, advance)
            if splits[split]["pairs"] == 0:
                raise DataError(f"data.path={config.path}: the {split} split holds no pairs")
    return tokenizer_record(tokenizer) | {"splits": splits}


def _write_split(
    tokenizer: Tokenizer,
    found: Iterator[tuple[str, str]],
    folder: Path,
    split: str,
    advance: Callable[[int], None],
) -> Record:
    dtype = token_dtype(tokenizer)
    spans = [np.zeros((1, 3), np.int64)]
    largest_id = lost = characters = 0
    rare = rare_characters([])
    names = [f"{split}.{column}.bin" for column in COLUMNS] + [f"{split}.tsv"]
    files = [(folder / name).open("wb") for name in names]
    while batch := list(islice(found, LINES)):
        lengths = []
        for column, file in enumerate(files[:2]):
            texts = [pair[column] for pair in batch]
            ids, lost_in_batch = encode_texts(tokenizer, texts)
            rare.update(rare_characters(texts))
            lost, characters = lost + lost_in_batch, characters + sum(map(len, texts))
            # Attention needs one token, even if the tokenizer has none for the sentence.
            ids = [sentence or [tokenizer.eot_id] for sentence in ids]
            ids_n = np.array([i for sentence in ids for i in sentence], dtype)
            file.write(ids_n.tobytes())
            largest_id = max(largest_id, int(ids_n.max(initial=0)))
            lengths.append([len(sentence) for sentence in ids])
        lines = ["\t".join(pair).encode() + b"\n" for pair in batch]
        files[2].write(b"".join(lines))
        lengths.append([len(line) for line in lines])
        spans.append(spans[-1][-1] + np.cumsum(np.array(lengths).T, axis=0))
        advance(sum(lengths[2]))
    for file in files:
        file.close()
    np.save(folder / f"{split}.npy", np.concatenate(spans))
    counts = {"pairs": sum(map(len, spans)) - 1, "largest_id": largest_id}
    return counts | {"characters": characters, "lost": lost, "rare": rare}


def read_pairs(part: FilePart) -> Iterator[tuple[str, str]]:
    """Yield the (source, target) of each line; raises DataError naming a malformed line."""
    for number, line in enumerate(read_lines(part)):
        sides = [side.strip() for side in line.split("\t")]
        if len(sides) == 2 and all(sides):
            yield sides[0], sides[1]
            continue
        found = f"{len(sides) - 1} tabs" if len(sides) != 2 else "an empty side"
        raise DataError(
            f"data.path: line {lines_before(part) + number + 1} of {part.path} has {found}; every "
            "line must be `source<TAB>target`"
        )


def read_lines(part: FilePart) -> Iterator[str]:
    """Yield the lines of a part, without their ends."""
    rest = ""
    for block in read_text(part):
        *lines, rest = (rest + block).split("\n")
        yield from lines
    if rest:
        yield rest


def lines_before(part: FilePart) -> int:
    """Return the number of lines of the file in front of a part."""
    with part.path.open("rb") as file:
        return file.read(part.start).count(b"\n")


def write_rows(config: DataConfig, folder: Path, rows: HubRows) -> None:
    """Write one file per split, one pair per line."""
    for split, pairs in rows.splits.items():
        lines = ("\t".join(" ".join(str(side).split()) for side in pair) for pair in pairs)
        (folder / f"{split}.tsv").write_text("\n".join(lines), encoding="utf-8", newline="")


READER = DataReader(
    "pairs",
    ("encoder_decoder",),
    "tokens",
    prepare_splits,
    open_split,
    HubFormat(
        (COLUMNS,), write_rows, cell_types=(str, int, float), skips_blank=True, languages=True
    ),
    find_problems=partial(text_problems, least_tokens=2),  # the target has EOS as well
    open_tokenizer=partial(load_tokenizer, suffixes=SUFFIXES),
)

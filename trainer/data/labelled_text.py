"""Text classification: a label and a text, one `label<TAB>text` per line.

B samples of a micro-batch · S tokens of the longest text
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from trainer.config.train import DataConfig, DataError
from trainer.data import pairs
from trainer.data.cache import Record, load_prepared
from trainer.data.dataset import DataFacts, Dataset, Sample, SplitFacts
from trainer.data.files import FilePart, split_parts
from trainer.data.reader import text_problems
from trainer.data.token_file import TokenFile
from trainer.data.tokenized import (
    Parts,
    load_tokenizer,
    prepare_tokens,
    source_name,
    tokens_folder,
)
from trainer.data.tokenizer import BEGIN_NAMES, Tokenizer

ENDS = 2  # tokens around a text: one in front, which a classifier may read, and the end


def prepare_splits(config: DataConfig, root: Path, progress: bool = False) -> DataFacts:
    """Tokenise the splits into `data.cache`, unless already done; raises UserError."""

    def iter_texts(part: FilePart) -> Iterator[str]:
        return (text for _, text in pairs.read_pairs(part))

    def write_folder(parts: Parts, folder: Path) -> Record:
        return _write_labels(config, parts, folder) | pairs.write_splits(
            config, parts, folder, progress
        )

    found = prepare_tokens(config, root, pairs.SUFFIXES, iter_texts, write_folder, progress)
    splits, notes = {}, []
    for split, entry in found.record["splits"].items():
        lengths = _text_lengths(pairs.load_spans(found.folder, split))
        if cut := int((lengths > config.seq_len).sum()):
            longer = f"longer than data.seq_len={config.seq_len}"
            notes.append(f"{cut} texts of the {split} split are {longer} and cut")
        splits[split] = SplitFacts(
            sources=tuple(source_name(part, root) for part in found.parts[split]),
            samples=len(lengths),
            tokens=int(lengths.sum()),
            characters=entry["characters"],
            lost=entry["lost"],
        )
    names = tuple(found.record["class_names"])
    facts = found.data_facts(splits, notes)
    return replace(facts, classes=len(names), class_names=names)


def _write_labels(config: DataConfig, parts: Parts, folder: Path) -> Record:
    """Write each split's labels as numbers; those of the train split are the classes."""
    labels = {
        split: [label for part in of_split for label, _ in pairs.read_pairs(part)]
        for split, of_split in parts.items()
    }
    names = sorted(set(labels["train"]))
    numbers = {name: number for number, name in enumerate(names)}
    for split, of_split in labels.items():
        if unknown := sorted(set(of_split) - set(names)):
            raise DataError(
                f"data.path={config.path}: the {split} split has the label {unknown[0]}, which no "
                "line of the train split has"
            )
        np.save(folder / f"{split}.labels.npy", np.array([numbers[label] for label in of_split]))
    return {"class_names": names}


def open_split(config: DataConfig, root: Path, split: str) -> "LabelledText":
    """Return a prepared split."""
    folder = tokens_folder(config, split_parts(config, root, pairs.SUFFIXES))
    tokenizer = load_tokenizer(config, root, pairs.SUFFIXES)
    return LabelledText(folder, load_prepared(folder), split, config.seq_len, tokenizer)


class LabelledText(Dataset):
    """A split of labelled texts; longer ones are cut."""

    def __init__(
        self, folder: Path, record: Record, split: str, seq_len: int, tokenizer: Tokenizer
    ):
        self._tokenizer, self._seq_len = tokenizer, seq_len
        spans = pairs.load_spans(folder, split)
        self._starts, self._lengths = spans[:, 1].astype(np.int64), _text_lengths(spans)
        self._labels = np.load(folder / f"{split}.labels.npy")
        name, count = f"{split}.{pairs.COLUMNS[1]}.bin", int(spans[-1, 1])
        self._ids = TokenFile(folder / name, record["dtype"], count, record["vocab_size"])
        self.targets = len(self._labels)

    def __len__(self) -> int:
        return len(self._labels)

    def sample(self, index: int, seed: int | None) -> Sample:
        """Return tokens (S,) and targets (), the number of the label; int64."""
        start, end = self._starts[index : index + 2]
        ids_S = self._ids.read(int(start), int(end))
        tokens_S = frame_text(ids_S, self._tokenizer, self._seq_len)
        return {"tokens": tokens_S, "targets": np.array(self._labels[index])}

    def collate(self, samples: Sequence[Sample]) -> Sample:
        """Return tokens (B,S) and targets (B,) int64; source_valid (B,S) if padded."""
        return pad_texts([sample["tokens"] for sample in samples], self._tokenizer) | {
            "targets": np.stack([sample["targets"] for sample in samples])
        }

    def sample_lengths(self) -> np.ndarray:
        """Return the tokens of each text, those in front and behind included."""
        return np.minimum(self._lengths, self._seq_len)


def frame_text(ids_S: Sequence[int] | np.ndarray, tokenizer: Tokenizer, longest: int) -> np.ndarray:
    """Return a text of at most `longest` tokens, with a first token in front and the end behind."""
    first = tokenizer.find_token(BEGIN_NAMES)
    first = tokenizer.eot_id if first is None else first
    return np.array([first, *ids_S[: longest - ENDS], tokenizer.eot_id], np.int64)


def pad_texts(texts: Sequence[np.ndarray], tokenizer: Tokenizer) -> Sample:
    """Return tokens (B,S) of texts, and source_valid (B,S) if some are shorter."""
    batch = {"tokens": pairs.pad_rows(texts, tokenizer.pad_id)}
    lengths_B = np.array(list(map(len, texts)))
    valid_BS = np.arange(batch["tokens"].shape[1]) < lengths_B[:, None]
    return batch if valid_BS.all() else batch | {"source_valid": valid_BS}


def _text_lengths(spans: np.ndarray) -> np.ndarray:
    lengths: np.ndarray = np.diff(spans[:, 1].astype(np.int64)) + ENDS
    return lengths


READER = replace(
    pairs.READER,
    kind="labelled_text",
    families=("encoder",),
    outputs=("classes",),
    prepare=prepare_splits,
    open_split=open_split,
    find_problems=partial(text_problems, least_tokens=ENDS + 1),
)

"""Language modelling: text as one stream of token ids, cut into windows.

B samples of a micro-batch · S tokens of a sample
"""

from collections.abc import Callable, Iterator, Sequence
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
from trainer.data.sampler import hash_to_seed
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

PIECE = 1 << 16  # characters per string; the tokenizer is slow on longer ones
PIECES = 32  # strings per batch, tokenised on all cores

SUFFIXES = (".txt", ".text", ".md", ".rst")


def prepare_splits(config: DataConfig, root: Path, progress: bool = False) -> DataFacts:
    """Tokenise the splits into `data.cache`, unless already done; raises UserError."""

    def iter_texts(part: FilePart) -> Iterator[str]:
        return (text for _, text in document_pieces(part, config.document_separator))

    def write_folder(parts: Parts, folder: Path) -> Record:
        return _write_splits(config, parts, folder, progress)

    found = prepare_tokens(config, root, SUFFIXES, iter_texts, write_folder, progress)
    tokens = found.record["splits"]["train"]["tokens"]
    if tokens <= config.seq_len:
        raise ConfigError(
            f"data.seq_len={config.seq_len}: the train split holds {tokens} tokens, one window "
            f"takes data.seq_len + 1; set data.seq_len={tokens - 1} or less"
        )
    splits = {
        split: SplitFacts(
            sources=tuple(source_name(part, root) for part in found.parts[split]),
            samples=_count_windows(entry["tokens"], config.seq_len),
            tokens=entry["tokens"],
            characters=entry["characters"],
            lost=entry["lost"],
        )
        for split, entry in found.record["splits"].items()
    }
    return found.data_facts(splits)


def open_split(config: DataConfig, root: Path, split: str) -> "Text":
    """Return a prepared split."""
    folder = tokens_folder(config, split_parts(config, root, SUFFIXES))
    record = load_prepared(folder)
    count = record["splits"][split]["tokens"]
    tokens = TokenFile(folder / f"{split}.bin", record["dtype"], count, record["vocab_size"])
    return Text(tokens, config.seq_len, record, split)


class Text(Dataset):
    """A split of a text: sample i is the window of seq_len tokens at i × seq_len + offset.

    In evaluation the offset is 0 and every token is predicted once. In training each epoch has its
    own offset, and windows that would pass the end are moved back so that they are full.
    """

    def __init__(self, tokens: TokenFile, seq_len: int, record: Record, split: str):
        self.characters = record["splits"][split]["characters"]
        self.targets = len(tokens) - 1
        self.lost = record["splits"][split]["lost"]
        self._tokens = tokens
        self._seq_len = seq_len
        self._pad_id = record["pad_id"]
        self._start_id = record.get("start_id", record["eot_id"])  # begins a document

    def __len__(self) -> int:
        return _count_windows(len(self._tokens), self._seq_len)

    def sample(self, index: int, seed: int | None) -> Sample:
        """Return tokens (S,) and targets (S,) int64."""
        start = index * self._seq_len
        if seed is not None:
            offset = hash_to_seed(seed) % self._seq_len
            start = max(0, min(start + offset, len(self._tokens) - self._seq_len - 1))
        window = self._tokens.read(start, start + self._seq_len + 1)
        tokens_S = np.full(self._seq_len, self._pad_id, np.int64)
        targets_S = np.full(self._seq_len, IGNORED, np.int64)
        tokens_S[: len(window) - 1] = window[:-1]
        targets_S[: len(window) - 1] = window[1:]
        return {"tokens": tokens_S, "targets": targets_S}

    def collate(self, samples: Sequence[Sample]) -> Sample:
        """Return tokens and targets (B, S) int64.

        If a document starts inside a window: also documents, numbered from 0 in each row, and
        positions, counted from the start of the document (B, S).
        """
        batch = {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}
        starts_BS = batch["tokens"] == self._start_id
        starts_BS[:, 0] = True
        if starts_BS[:, 1:].any():
            column_S = np.arange(starts_BS.shape[1])
            last_start_BS = np.maximum.accumulate(np.where(starts_BS, column_S, 0), axis=1)
            batch["documents"] = np.cumsum(starts_BS, axis=1, dtype=np.int64) - 1
            batch["positions"] = column_S - last_start_BS
        return batch


def _count_windows(tokens: int, seq_len: int) -> int:
    return -(-(tokens - 1) // seq_len)


def document_pieces(part: FilePart, separator: str) -> Iterator[tuple[bool, str]]:
    """Yield (begins a document, text): the documents of a part in pieces that fit in memory."""
    begins, rest = True, ""
    for block in read_text(part):
        *ended, rest = (rest + block).split(separator) if separator else [rest + block]
        for document in ended:
            *cut, last = _cut_text(document, 0)
            for text in [*cut, last] if last else cut:
                yield begins, text
                begins = False
            begins = True
        *cut, rest = _cut_text(rest, len(separator))  # its end may be the start of a separator
        for text in cut:
            yield begins, text
            begins = False
    if rest:
        *cut, last = _cut_text(rest, 0)
        for text in [*cut, last]:
            yield begins, text
            begins = False


def _cut_text(text: str, margin: int) -> list[str]:
    """Return the text in pieces of at most PIECE characters; the last has at least `margin`.

    It is cut between a word and white space, where no pre-tokenizer joins, so that the tokens are
    those of the uncut text.
    """
    start, cuts = 0, []
    while len(text) - start > PIECE + margin:
        limit = start + PIECE
        candidates = range(limit, start, -1)
        fit = (i for i in candidates if text[i].isspace() and text[i - 1].isalnum())
        end = next(fit, limit)
        cuts.append(text[start:end])
        start = end
    return [*cuts, text[start:]]


def _write_splits(config: DataConfig, parts: Parts, folder: Path, progress: bool) -> Record:
    tokenizer = Tokenizer.load(find_tokenizer(config, parts))
    total = sum(map(size_of, parts.values()))
    splits = {}
    with progress_bar("Tokenising", total, progress) as advance:
        for split, of_split in parts.items():
            found = (
                piece
                for part in of_split
                for piece in document_pieces(part, config.document_separator)
            )
            splits[split] = _write_split(tokenizer, found, folder / f"{split}.bin", advance)
            if splits[split]["blank"] or splits[split]["tokens"] < 2:
                raise DataError(f"data.path={config.path}: the {split} split holds no text")
    return tokenizer_record(tokenizer) | {"splits": splits}


def _write_split(
    tokenizer: Tokenizer,
    found: Iterator[tuple[bool, str]],
    path: Path,
    advance: Callable[[int], None],
) -> Record:
    dtype = token_dtype(tokenizer)
    # The end token of the previous document is the BOS of the next, unless the model has one.
    begin = [tokenizer.eot_id, *(i for i in tokenizer.bos_ids if i != tokenizer.eot_id)]
    tokens = characters = largest_id = lost = 0
    rare, blank = rare_characters([]), True
    with path.open("wb") as file:
        while batch := list(islice(found, PIECES)):
            texts = [text for _, text in batch]
            ids_of, lost_in_batch = encode_texts(tokenizer, texts)
            lost += lost_in_batch
            rare.update(rare_characters(texts))
            for (begins, text), ids in zip(batch, ids_of, strict=True):
                ids_n = np.array([*begin, *ids] if begins else ids, dtype)
                file.write(ids_n.tobytes())
                tokens += len(ids_n)
                characters += len(text)
                blank = blank and text.isspace()
                largest_id = max(largest_id, int(ids_n.max(initial=0)))
                advance(len(text.encode()))
    counts = {"tokens": tokens, "characters": characters, "largest_id": largest_id}
    return counts | {"lost": lost, "rare": rare, "blank": blank}


def write_rows(config: DataConfig, folder: Path, rows: HubRows) -> None:
    """Write one text file per split, its documents joined by the separator."""
    for split, documents in rows.splits.items():
        text = (config.document_separator or "\n").join(document for (document,) in documents)
        (folder / f"{split}.txt").write_text(text, encoding="utf-8", newline="")


READER = DataReader(
    "text",
    ("decoder",),
    "tokens",
    prepare_splits,
    open_split,
    HubFormat((("text",), ("content",)), write_rows, cell_types=(str,)),
    find_problems=partial(text_problems, least_tokens=1),
    open_tokenizer=partial(load_tokenizer, suffixes=SUFFIXES),
)

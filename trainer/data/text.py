"""Language modelling: text as one stream of token ids, cut into windows.

B samples of a micro-batch · S tokens of a sample
"""

from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from pathlib import Path

import numpy as np

from trainer.config import ConfigError, DataConfig
from trainer.data.dataset import IGNORED, DataFacts, Dataset, Sample
from trainer.data.order import mixed
from trainer.data.prepared import Record, build, opened, prepared_folder, progress_bar
from trainer.data.source import Part, name_of, read_text, split_parts
from trainer.data.tokens import TokenFile
from trainer.tokenizer import Tokenizer

PIECE = 1 << 16  # characters tokenised as one string; the tokenizer is slow on longer ones
PIECES = 32  # tokenised at once, on all cores
TOKENIZER = "tokenizer.json"


def prepare(config: DataConfig, root: Path, progress: bool = False) -> DataFacts:
    """Tokenise the splits into `data.cache`, unless that is done; raises ConfigError."""
    parts = split_parts(config, root)
    folder = folder_of(config, parts)
    record = build(folder, lambda temporary: _write(config, parts, temporary, progress))
    check_ids(folder, record)
    tokens = record["splits"]["train"]["tokens"]
    if tokens <= config.seq_len:
        raise ConfigError(
            f"data.seq_len={config.seq_len}: the train split holds {tokens} tokens, one window "
            f"takes data.seq_len + 1; set data.seq_len={tokens - 1} or less"
        )
    counts = {s: _windows(entry["tokens"], config.seq_len) for s, entry in record["splits"].items()}
    return DataFacts(vocab_size=record["vocab_size"], splits=counts)


def open_split(config: DataConfig, root: Path, split: str) -> "Text":
    """A prepared split."""
    folder = folder_of(config, split_parts(config, root))
    record = opened(folder)
    count = record["splits"][split]["tokens"]
    tokens = TokenFile(folder / f"{split}.bin", record["dtype"], count, record["vocab_size"])
    return Text(tokens, config.seq_len, record, split)


class Text(Dataset):
    """A split of a text: sample i is the window of seq_len tokens at i × seq_len + offset.

    The offset is 0 in evaluation, where every token is predicted once; in training each epoch has
    its own, and windows at the end move back to be whole.
    """

    def __init__(self, tokens: TokenFile, seq_len: int, record: Record, split: str):
        self.characters = record["splits"][split]["characters"]
        self.targets = len(tokens) - 1
        self._tokens = tokens
        self._seq_len = seq_len
        self._eot_id, self._pad_id = record["eot_id"], record["pad_id"]

    def __len__(self) -> int:
        return _windows(len(self._tokens), self._seq_len)

    def sample(self, index: int, seed: int | None) -> Sample:
        """tokens (S,) and targets (S,) int64."""
        start = index * self._seq_len
        if seed is not None:
            offset = mixed(seed) % self._seq_len
            start = max(0, min(start + offset, len(self._tokens) - self._seq_len - 1))
        window = self._tokens.read(start, start + self._seq_len + 1)
        tokens_S = np.full(self._seq_len, self._pad_id, np.int64)
        targets_S = np.full(self._seq_len, IGNORED, np.int64)
        tokens_S[: len(window) - 1] = window[:-1]
        targets_S[: len(window) - 1] = window[1:]
        return {"tokens": tokens_S, "targets": targets_S}

    def collate(self, samples: Sequence[Sample]) -> Sample:
        """tokens and targets (B, S); documents and positions (B, S) if a document starts inside."""
        batch = {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}
        starts_BS = batch["tokens"] == self._eot_id
        starts_BS[:, 0] = True
        if starts_BS[:, 1:].any():
            place_S = np.arange(starts_BS.shape[1])
            last_start_BS = np.maximum.accumulate(np.where(starts_BS, place_S, 0), axis=1)
            batch["documents"] = np.cumsum(starts_BS, axis=1, dtype=np.int64) - 1
            batch["positions"] = place_S - last_start_BS
        return batch


def _windows(tokens: int, seq_len: int) -> int:
    return -(-(tokens - 1) // seq_len)


def folder_of(config: DataConfig, parts: dict[str, list[Part]]) -> Path:
    """The prepared folder of these files under this tokenizer; pairs use it too."""
    tokenizer: str | int = config.vocab_size
    if config.tokenizer:
        path = own_tokenizer(config)
        tokenizer = blake2b(path.read_bytes()).hexdigest() if path.is_file() else "missing"
    files = {split: [part.fingerprint() for part in of_split] for split, of_split in parts.items()}
    ingredients = [files, tokenizer, config.document_separator]
    return prepared_folder(config, name_of(config), ingredients)


def open_tokenizer(config: DataConfig, root: Path) -> Tokenizer:
    """The tokenizer of a prepared text or of prepared pairs."""
    return Tokenizer.load(folder_of(config, split_parts(config, root)) / TOKENIZER)


def own_tokenizer(config: DataConfig) -> Path:
    """The tokenizer.json of `data.tokenizer`, which may also name its folder."""
    path = Path(config.tokenizer).expanduser()
    return path / TOKENIZER if path.is_dir() else path


def make_tokenizer(config: DataConfig, texts: Iterator[str], folder: Path) -> Tokenizer:
    """The tokenizer of `data.tokenizer`, or one trained on the texts, saved in the folder."""
    if config.tokenizer:
        tokenizer = Tokenizer.load(own_tokenizer(config))
    else:
        tokenizer = Tokenizer.train(texts, config.vocab_size)
    tokenizer.save(folder / TOKENIZER)
    return tokenizer


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The smallest type that holds every id."""
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


def describe(tokenizer: Tokenizer) -> Record:
    """What readers of the ids must know of the tokenizer."""
    return {
        "vocab_size": tokenizer.vocab_size,
        "dtype": token_dtype(tokenizer).name,
        "eot_id": tokenizer.eot_id,
        "pad_id": tokenizer.pad_id,
    }


def check_ids(folder: Path, record: Record) -> None:
    """Refuse prepared tokens that the tokenizer beside them does not know."""
    vocab_size = Tokenizer.load(folder / TOKENIZER).vocab_size
    for split, entry in record["splits"].items():
        if entry["largest_id"] >= vocab_size:
            raise ConfigError(
                f"the {split} split in {folder} holds token id {entry['largest_id']} but "
                f"{TOKENIZER} has {vocab_size} entries; delete that folder of data.cache, and set "
                "data.tokenizer to the tokenizer that the ids are of"
            )


def pieces(part: Part, separator: str) -> Iterator[tuple[bool, str]]:
    """(begins a document, text): the documents of a part, in pieces that fit in memory."""
    begins, rest = True, ""
    for block in read_text(part):
        *ended, rest = (rest + block).split(separator) if separator else [rest + block]
        for document in ended:
            *cut, last = _cut(document, 0)
            for text in [*cut, last] if last else cut:
                yield begins, text
                begins = False
            begins = True
        *cut, rest = _cut(rest, len(separator))  # its end may be the start of a separator
        for text in cut:
            yield begins, text
            begins = False
    if rest:
        *cut, last = _cut(rest, 0)
        for text in [*cut, last]:
            yield begins, text
            begins = False


def _cut(text: str, margin: int) -> list[str]:
    """The text in pieces of at most PIECE characters; the last one is at least `margin` long.

    Cut between a word and white space, where no pre-tokenizer joins: the tokens are those of the
    whole.
    """
    start, cuts = 0, []
    while len(text) - start > PIECE + margin:
        limit = start + PIECE
        places = range(limit, start, -1)
        fit = (i for i in places if text[i].isspace() and text[i - 1].isalnum())
        end = next(fit, limit)
        cuts.append(text[start:end])
        start = end
    return [*cuts, text[start:]]


def _write(
    config: DataConfig, parts: dict[str, list[Part]], folder: Path, progress: bool
) -> Record:
    separator = config.document_separator
    texts = (text for part in parts["train"] for _, text in pieces(part, separator))
    tokenizer = make_tokenizer(config, texts, folder)
    total = sum(part.end - part.start for of_split in parts.values() for part in of_split)
    splits = {}
    with progress_bar("Tokenising", total, progress) as advance:
        for split, of_split in parts.items():
            found = (piece for part in of_split for piece in pieces(part, separator))
            splits[split] = _write_split(tokenizer, found, folder / f"{split}.bin", advance)
            if splits[split]["tokens"] < 2:
                raise ConfigError(f"data.path={config.path}: the {split} split holds no text")
    return describe(tokenizer) | {"splits": splits}


def _write_split(
    tokenizer: Tokenizer,
    found: Iterator[tuple[bool, str]],
    path: Path,
    advance: Callable[[int], None],
) -> Record:
    dtype = token_dtype(tokenizer)
    tokens = characters = largest_id = 0
    with path.open("wb") as file:
        while batch := list(islice(found, PIECES)):
            texts = [text for _, text in batch]
            for (begins, text), ids in zip(batch, tokenizer.encode_batch(texts), strict=True):
                # A document begins with the end token of the one before: it is its BOS.
                ids_n = np.array([tokenizer.eot_id, *ids] if begins else ids, dtype)
                file.write(ids_n.tobytes())
                tokens += len(ids_n)
                characters += len(text)
                largest_id = max(largest_id, int(ids_n.max(initial=0)))
                advance(len(text.encode()))
    return {"tokens": tokens, "characters": characters, "largest_id": largest_id}

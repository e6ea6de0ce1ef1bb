"""Prepared token files: the tokenizer that encodes them, and the folder that holds them.

Preparation has two stages, both cached in `data.cache`: the tokenizer, then the tokens of the
splits. A run that reads its data with the tokenizer in its own folder therefore finds the tokens
that were prepared when it started.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from trainer.config.train import ConfigError, DataConfig
from trainer.data.cache import Record, build_folder, load_prepared, prepared_folder, progress_bar
from trainer.data.dataset import DataFacts, SplitFacts
from trainer.data.files import FilePart, Listing, Suffixes, name_of, read_listing, split_parts
from trainer.data.record import TOKENIZER
from trainer.data.tokenizer import Tokenizer, characters_lost
from trainer.data.tokenizer_files import TokenizerFiles

log = logging.getLogger(__name__)

Parts = dict[str, list[FilePart]]


@dataclass(frozen=True)
class TokenizedSplits:
    """The prepared splits: their folder, its record, and the files they were read from."""

    folder: Path
    record: Record
    parts: Parts
    listing: Listing

    def data_facts(self, splits: dict[str, SplitFacts], notes: Sequence[str] = ()) -> DataFacts:
        """Return the facts that a model needs about the data, and what was read."""
        return DataFacts(
            vocab_size=self.record["vocab_size"],
            splits=splits,
            left_out=self.listing.left_out,
            notes=(*self.listing.notes, *_rare_notes(self.record), *notes),
        )


def prepare_tokens(
    config: DataConfig,
    root: Path,
    suffixes: Suffixes,
    texts: Callable[[FilePart], Iterable[str]],
    write: Callable[[Parts, Path], Record],
    progress: bool,
    ingredients: Callable[[Parts], list[str]] = lambda parts: [],
) -> TokenizedSplits:
    """Tokenise the splits into `data.cache`, unless already done; raises UserError.

    `texts` yields the text that a tokenizer is trained on; `write` fills the folder of the tokens;
    `ingredients` are what they depend on besides the files and the tokenizer.
    """
    listing = read_listing(config, root, suffixes)
    parts = split_parts(config, root, suffixes, listing)

    def of_train() -> Iterator[str]:
        size = size_of(parts["train"])
        with progress_bar("Training the tokenizer", size, progress) as advance:
            for part in parts["train"]:
                for text in texts(part):
                    advance(len(text.encode()))
                    yield text

    make_tokenizer(config, parts, of_train)
    folder = tokens_folder(config, parts, ingredients(parts))
    record = build_folder(folder, lambda temporary: write(parts, temporary))
    check_ids(folder, record)
    warn_of_losses(config, record)
    return TokenizedSplits(folder, record, parts, listing)


def make_tokenizer(config: DataConfig, parts: Parts, texts: Callable[[], Iterable[str]]) -> Path:
    """Return the path of the tokenizer.json, trained on `texts()` if none is configured.

    Raises ConfigError if the configured file is not a tokenizer.
    """
    if config.processor:
        return _of_run(config)

    def write_folder(folder: Path) -> Record:
        if config.tokenizer:
            tokenizer = Tokenizer.load(named_tokenizer(config))
        elif config.characters:
            tokenizer = Tokenizer.train_characters(texts())
        else:
            tokenizer = Tokenizer.train(
                texts(), config.vocab_size, masks=config.kind == "masked_text"
            )
        tokenizer.save(folder / TOKENIZER)
        return {}

    folder = _tokenizer_folder(config, parts)
    build_folder(folder, write_folder)
    return folder / TOKENIZER


def load_tokenizer(config: DataConfig, root: Path, suffixes: Suffixes) -> Tokenizer:
    """Return the tokenizer of prepared text or pairs."""
    return Tokenizer.load(find_tokenizer(config, split_parts(config, root, suffixes)))


def find_tokenizer(config: DataConfig, parts: Parts) -> Path:
    """Return the tokenizer.json that `make_tokenizer` made; raises ConfigError if it is missing."""
    if config.processor:
        return _of_run(config)
    folder = _tokenizer_folder(config, parts)
    load_prepared(folder)
    return folder / TOKENIZER


def named_tokenizer(config: DataConfig) -> Path:
    """Return the tokenizer.json of `data.tokenizer`, which is that file or its folder."""
    path = Path(config.tokenizer).expanduser()
    return path / TOKENIZER if path.is_dir() else path


def tokens_folder(config: DataConfig, parts: Parts, ingredients: Sequence[str] = ()) -> Path:
    """Return the folder of the splits' tokens, which depends on the files and the tokenizer."""
    files = {
        split: [part.file_fingerprint() for part in of_split] for split, of_split in parts.items()
    }
    tokenizer = find_tokenizer(config, parts)
    beside = TokenizerFiles.read(tokenizer.parent).meaning()
    digest = blake2b(tokenizer.read_bytes() + beside).hexdigest()
    return prepared_folder(
        config, name_of(config), [files, digest, config.document_separator, *ingredients]
    )


def _of_run(config: DataConfig) -> Path:
    path = Path(config.processor) / TOKENIZER
    if not path.is_file():
        raise ConfigError(
            f"data.processor={config.processor} holds no {TOKENIZER}; name the folder of a run, or "
            f"of an exported model, of data.kind={config.kind}"
        )
    return path


def _tokenizer_folder(config: DataConfig, parts: Parts) -> Path:
    if config.tokenizer:
        path = named_tokenizer(config)
        content = blake2b(path.read_bytes()).hexdigest() if path.is_file() else "missing"
        texts = TokenizerFiles.read(path.parent).texts
        return prepared_folder(config, "tokenizer", ["as it is", content, texts])
    train = [part.file_fingerprint() for part in parts["train"]]
    ingredients = ["bpe", train, config.vocab_size, config.document_separator]
    if config.characters:
        ingredients = ["characters", *ingredients]
    return prepared_folder(config, f"{name_of(config)}-tokenizer", ingredients)


def size_of(parts: Iterable[FilePart]) -> int:
    """Return the size of the parts in bytes."""
    return sum(part.end - part.start for part in parts)


def source_name(part: FilePart, root: Path) -> str:
    """Return a part's file, relative to data.path, with its range in percent unless full."""
    inside = root.is_dir() and part.path.is_relative_to(root)
    name = str(part.path.relative_to(root)) if inside else part.path.name
    size = part.path.stat().st_size
    if (part.start, part.end) == (0, size):
        return name
    return f"{name} ({100 * part.start / size:.3g} % to {100 * part.end / size:.3g} %)"


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """Return the smallest dtype that holds every id."""
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


def tokenizer_record(tokenizer: Tokenizer) -> Record:
    """Return the vocabulary size, dtype, end, padding and first ids of the tokenizer."""
    return {
        "vocab_size": tokenizer.vocab_size,
        "dtype": token_dtype(tokenizer).name,
        "eot_id": tokenizer.eot_id,
        "pad_id": tokenizer.pad_id,
        "start_id": (*tokenizer.bos_ids, tokenizer.eot_id)[0],
    }


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[list[list[int]], int]:
    """Return the ids of each text, and the number of characters that decoding them loses."""
    ids = tokenizer.encode_batch(texts)
    if tokenizer.is_lossless:
        return ids, 0
    decoded = tokenizer.decode_batch(ids)
    return ids, sum(map(characters_lost, texts, decoded))


# Characters that a text rarely contains on purpose.
RARE = {
    "\\r": "carriage returns",  # line ends of Windows or an old Mac
    "[\\x00-\\x08\\x0e-\\x1f\\x7f]": "control characters",  # terminal escapes or ISO-2022
}


def rare_characters(texts: Iterable[str]) -> Counter[str]:
    """Count characters of each kind in RARE, which stay in the text."""
    found: Counter[str] = Counter()
    for text in texts:
        found.update({kind: len(re.findall(pattern, text)) for pattern, kind in RARE.items()})
    return found


def _rare_notes(record: Record) -> list[str]:
    total: Counter[str] = sum((Counter(e["rare"]) for e in record["splits"].values()), Counter())
    return [f"{count:,} {kind}, which are learned unchanged" for kind, count in total.items()]


def check_ids(folder: Path, record: Record) -> None:
    """Raise ConfigError if a prepared token id is outside the tokenizer's vocabulary."""
    for split, entry in record["splits"].items():
        if entry["largest_id"] >= record["vocab_size"]:
            raise ConfigError(
                f"the {split} split in {folder} holds token id {entry['largest_id']} but its "
                f"tokenizer has {record['vocab_size']} entries; delete that folder of data.cache"
            )


def warn_of_losses(config: DataConfig, record: Record) -> None:
    """Warn if the tokenizer does not reproduce all of the text."""
    lost, characters = (
        sum(entry[key] for entry in record["splits"].values()) for key in ("lost", "characters")
    )
    if lost:
        name = config.tokenizer or config.processor
        log.warning(
            "%s loses %.2g %% of the characters (%s of %s), so that bits per character would "
            "be too low; bits per token are reported instead",
            f"data.tokenizer={name}",
            100 * lost / characters,
            f"{lost:,}",
            f"{characters:,}",
        )

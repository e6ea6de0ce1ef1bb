"""Data sets of text, images, pairs, chats or speech, prepared once and read by any layout."""

from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from hashlib import blake2b
from pathlib import Path

from trainer.config.train import ConfigError, DataConfig, UserError
from trainer.data import chat, images, labelled_text, masked_text, pairs, text
from trainer.data import huggingface as hub
from trainer.data.audio import speech
from trainer.data.dataset import DataFacts, Dataset, SplitFacts
from trainer.data.detection import reader as detection
from trainer.data.files import locate_data
from trainer.data.folders import SPLITS
from trainer.data.reader import DataReader
from trainer.data.tokenizer import Tokenizer

__all__ = [
    "DataFacts",
    "Dataset",
    "SplitFacts",
    "data_fingerprint",
    "open_split",
    "open_tokenizer",
    "prepare_data",
]

READERS: dict[str, DataReader] = {
    reader.kind: reader
    for reader in (
        text.READER,
        images.READER,
        pairs.READER,
        chat.READER,
        masked_text.READER,
        labelled_text.READER,
        speech.READER,
        detection.READER,
    )
}
FINGERPRINT_SAMPLES = 64  # read of each split by `data_fingerprint`, at least


def prepare_data(config: DataConfig, progress: bool = False) -> DataFacts:
    """Check the data and write what `open_split` reads to `data.cache`, unless already done.

    Returns the facts that a model needs about the data, and a record of what was read.
    Raises UserError if the settings, the files or their content are invalid.
    """
    problems = _data_problems(config)
    if problems:
        raise ConfigError(*problems)
    try:
        reader, is_hub = reader_of(config), config.path.startswith("hf:")
        root = hub.export_dataset(config, reader.hub) if is_hub else locate_data(config)
        facts = reader.prepare(config, root, progress)
        splits = {
            name: replace(
                split,
                mean_length=open_split(config, name).mean_length(),
                digest=data_fingerprint(config, [name]),
            )
            for name, split in facts.splits.items()
        }
    except OSError as error:
        raise ConfigError(f"data.path={config.path} cannot be read: {error}") from error
    left_out = facts.left_out | (hub.left_out_rows(config) if is_hub else {})
    return replace(facts, kind=config.kind, path=config.path, splits=splits, left_out=left_out)


def reader_of(config: DataConfig) -> DataReader:
    """Return the reader of data.kind."""
    return READERS[config.kind]


def open_split(config: DataConfig, split: str) -> Dataset:
    """Return the train, valid or test split after `prepare_data`; tokens are read lazily."""
    if split not in SPLITS:
        raise ConfigError(f"split={split} must be one of {', '.join(SPLITS)}")
    return reader_of(config).open_split(config, _data_root(config), split)


def data_fingerprint(config: DataConfig, splits: Sequence[str] = SPLITS) -> str:
    """Return a digest of the data that this rank reads: split sizes and evenly spaced samples."""
    digest = blake2b(digest_size=16)
    for split in splits:
        dataset = open_split(config, split)
        digest.update(repr((split, len(dataset), dataset.targets, dataset.characters)).encode())
        for index in range(0, len(dataset), max(1, len(dataset) // FINGERPRINT_SAMPLES)):
            for name, value in sorted(dataset.sample(index, None).items()):
                digest.update(name.encode() + value.tobytes())
    return digest.hexdigest()


def open_tokenizer(config: DataConfig) -> Tokenizer | None:
    """Return the tokenizer that the data were prepared with; None for data without text."""
    opens = reader_of(config).open_tokenizer
    return None if opens is None else opens(config, _data_root(config))


def _data_root(config: DataConfig) -> Path:
    if config.path.startswith("hf:"):
        return hub.exported_path(config, reader_of(config).hub)
    return locate_data(config)


def _data_problems(config: DataConfig) -> list[str]:
    """Return the problems that can be found without reading the data."""
    problems = []
    if config.kind not in READERS:
        near = get_close_matches(config.kind, READERS, 1, 0)[0]
        kinds = ", ".join(READERS)
        problems.append(f"data.kind={config.kind} must be one of {kinds}; set data.kind={near}")
    else:
        problems += reader_of(config).find_problems(config)
    if config.chat_template and config.kind != chat.READER.kind:
        problems.append(
            f"data.chat_template={config.chat_template} is for data.kind=chat, but data.kind="
            f"{config.kind}; leave it empty"
        )
    if not 0.001 <= config.held_out <= 0.9:
        nearest = 0.001 if config.held_out < 0.001 else 0.9
        problems.append(
            f"data.held_out={config.held_out} must be a fraction from 0.001 to 0.9; "
            f"set data.held_out={nearest}, or 0.1 for the last tenth"
        )
    if not config.path.startswith("hf:"):
        try:
            locate_data(config)
        except UserError as error:
            problems += error.problems
        except OSError as error:  # a name that is too long, a folder without permission
            problems.append(f"data.path={config.path} cannot be read: {error.strerror}")
    return problems

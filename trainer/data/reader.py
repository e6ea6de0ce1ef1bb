"""The interface of a kind of data: how its files are checked, prepared and opened."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trainer.config.train import DataConfig
from trainer.data.dataset import DataFacts, Dataset
from trainer.data.tokenizer import SMALLEST, Tokenizer, too_small


class Prepare(Protocol):
    """Check the data and write what `open_split` reads to `data.cache`, unless already done."""

    def __call__(self, config: DataConfig, root: Path, progress: bool = False) -> DataFacts:
        """Return the facts about the data at `root` (that of data.path); raises UserError."""
        ...


@dataclass(frozen=True)
class HubRows:
    """The rows of a Hugging Face data set."""

    splits: Mapping[str, Sequence[tuple[Any, ...]]]  # cells of the selected columns
    class_names: Sequence[str] | None  # of the last column; None = it has none
    left_out: dict[str, str]  # what is left out, and why; a writer adds to it


@dataclass(frozen=True)
class HubFormat:
    """Conversion of the rows of a Hugging Face data set to files that a reader accepts."""

    columns: tuple[tuple[str, ...], ...]  # usual column names, most common first
    write: Callable[[DataConfig, Path, HubRows], None]  # into the folder
    file: str = ""  # read in place of data.path, inside the folder; empty = the folder
    cell_types: tuple[type, ...] = ()  # allowed types of a cell; empty = any
    skips_blank: bool = False  # leave out rows with a blank cell
    languages: bool = False  # a `translation` column of two languages counts as two columns


@dataclass(frozen=True)
class DataReader:
    """The reader of one data.kind, registered in READERS (trainer/data/__init__.py)."""

    kind: str
    families: tuple[str, ...]  # values of model.family that train on it
    inputs: str  # what their first layer embeds: model.inputs
    prepare: Prepare
    open_split: Callable[[DataConfig, Path, str], Dataset]
    hub: HubFormat
    find_problems: Callable[[DataConfig], list[str]] = lambda config: []  # of the settings alone
    open_tokenizer: Callable[[DataConfig, Path], Tokenizer] | None = None  # None = no text
    outputs: tuple[str, ...] = ("tokens",)  # what is predicted: values of model.outputs


def text_problems(config: DataConfig, least_tokens: int) -> list[str]:
    """Return the problems of a data section that apply to every reader of text."""
    problems = []
    if config.seq_len < least_tokens:
        problems.append(f"data.seq_len={config.seq_len} must be at least {least_tokens}")
    if config.vocab_size < SMALLEST and not config.tokenizer:
        problems.append(too_small(config.vocab_size))
    if config.on_bad_file != "stop":
        problems.append(
            f"data.on_bad_file={config.on_bad_file} is for data.kind=images; a damaged "
            f"{config.kind} file always stops the run, set data.on_bad_file=stop"
        )
    return problems

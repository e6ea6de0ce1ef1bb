"""The interface of a kind of data: how its files are checked, prepared and opened."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trainer.config.train import DataConfig
from trainer.data.dataset import DataFacts, Dataset
from trainer.data.tokenizer import SMALLEST, Tokenizer, too_small

Rows = Mapping[str, Sequence[tuple[Any, ...]]]  # by split, the cells of the columns that are read


class Prepare(Protocol):
    """Check the data and write what `open_split` reads to data.cache, unless that is done."""

    def __call__(self, config: DataConfig, root: Path, progress: bool = False) -> DataFacts:
        """Return what was read; `root` is the file or folder of data.path. Raises UserError."""
        ...


@dataclass(frozen=True)
class HubFormat:
    """How the rows of a Hugging Face data set become files that a reader takes."""

    columns: tuple[tuple[str, ...], ...]  # usual names of the columns, the likeliest first
    # (data section, folder, rows, class names of the last column, what is left out and why)
    write: Callable[[DataConfig, Path, Rows, Sequence[str] | None, dict[str, str]], None]
    file: str = ""  # in the folder, which data.path then stands for; empty = the folder
    cell_types: tuple[type, ...] = ()  # that a cell may have; empty = any
    skips_blank: bool = False  # leave out rows in which a cell is white space
    languages: bool = False  # a column `translation` of two languages stands for two columns


@dataclass(frozen=True)
class DataReader:
    """A value of data.kind, listed in READERS (trainer/data/__init__.py)."""

    kind: str
    families: tuple[str, ...]  # values of model.family that learn from it
    prepare: Prepare
    open_split: Callable[[DataConfig, Path, str], Dataset]
    find_problems: Callable[[DataConfig], list[str]]  # without a look at the data
    hub: HubFormat
    open_tokenizer: Callable[[DataConfig, Path], Tokenizer] | None = None  # None = there is none


def text_problems(config: DataConfig, least_tokens: int) -> list[str]:
    """Return the problems of a data section whose reader tokenises text."""
    problems = []
    if config.seq_len < least_tokens:
        problems.append(f"data.seq_len={config.seq_len} must be at least {least_tokens}")
    if config.vocab_size < SMALLEST and not config.tokenizer:
        problems.append(too_small(config.vocab_size))
    if config.on_bad_file != "stop":
        problems.append(
            f"data.on_bad_file={config.on_bad_file} is for data.kind=images; a {config.kind} file "
            "that is damaged always stops the run, set data.on_bad_file=stop"
        )
    return problems

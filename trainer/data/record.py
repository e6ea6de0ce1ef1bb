"""The record of a run's data: facts that inference needs, and a table to read."""

import json
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

from trainer.atomic_files import write_atomically
from trainer.config.train import ConfigError, DataConfig, TrainConfig
from trainer.data.dataset import DataFacts, SplitFacts
from trainer.data.tokenizer_files import SIDE_FILES, TEMPLATE

TOKENIZER = "tokenizer.json"
FACTS = "data.json"
TABLE = "data.txt"
SHOWN = 3  # names listed in a cell of the table; the others are counted


def has_record(folder: str | Path) -> bool:
    """Return whether a folder holds a record of its model's data, or its tokenizer."""
    return any((Path(folder) / name).is_file() for name in (FACTS, TOKENIZER))


def write_record(folder: Path, facts: DataFacts) -> None:
    """Write data.json and data.txt; raises OSError."""
    write_atomically(folder / FACTS, json.dumps(asdict(facts), indent=1) + "\n")
    write_atomically(folder / TABLE, format_record(facts) + "\n")


def read_record(folder: str | Path) -> DataFacts | None:
    """Return a folder's record of its data, None if missing; raises ConfigError if damaged."""
    path = Path(folder) / FACTS
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        for key in ("class_names", "mean", "std", "notes"):
            values[key] = tuple(values[key])
        for name, split in values["splits"].items():
            values["splits"][name] = SplitFacts(**{**split, "sources": tuple(split["sources"])})
        return DataFacts(**values)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{path} is damaged ({error}); restore it, or delete it: the facts about the training "
            "data are then read from data.path"
        ) from error


def copy_record(run_dir: str | Path, to: Path) -> None:
    """Copy the data record and the tokenizer of a run into another folder; raises OSError."""
    for name in (TOKENIZER, *SIDE_FILES, FACTS, TABLE):
        if (source := Path(run_dir) / name).is_file():
            shutil.copy(source, to / name)


def data_of(config: TrainConfig, run_dir: str | Path = "") -> DataConfig:
    """Return the data section of a run, with the tokenizer or the classes in its folder.

    `run_dir` is that folder; empty = `config.run_dir`.
    """
    folder = str(run_dir or config.run_dir)
    if not has_record(folder):
        return config.data
    template = "" if (Path(folder) / TEMPLATE).is_file() else config.data.chat_template
    return replace(config.data, processor=folder, chat_template=template)


def describe_changes(before: DataFacts, now: DataFacts, split: str) -> str:
    """Describe how a split differs from the one trained on; empty if it does not."""
    old, new = before.splits.get(split), now.splits.get(split)
    if old is None or new is None or (old.digest, old.samples) == (new.digest, new.samples):
        return ""
    count = f"{old.samples:,} samples then, {new.samples:,} now"
    if old.samples == new.samples:
        count = f"{new.samples:,} samples, but different ones"
    return f"the {split} split at data.path={now.path} is not that of the training run ({count})"


def format_record(facts: DataFacts) -> str:
    """Return the facts as a text table: a row per split, then notes and what is left out."""
    head = ["split", "read from", "samples", "tokens", "characters"]
    rows = [
        [
            name,
            _format_list(s.sources),
            *(f"{n:,}" if n else "" for n in (s.samples, s.tokens, s.characters)),
        ]
        for name, s in facts.splits.items()
    ]
    shown = [i for i in range(len(head)) if i < 2 or any(row[i] for row in rows)]
    cells = [[row[i] for i in shown] for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    text = "\n".join(
        [f"data.path={facts.path}", *(f"  {line}" for line in lines), *_format_left_out(facts)]
    )
    return text.encode("utf-8", "backslashreplace").decode()  # file names may be any bytes


def _format_left_out(facts: DataFacts) -> Iterable[str]:
    classes = f"classes: {_format_list(facts.class_names, 10)}"
    if facts.image_size:
        size = f"{facts.image_size} × {facts.image_size}"
        yield f"  images: {size} pixels, channels: {facts.channels}, {classes}"
    elif facts.class_names:
        yield f"  {classes}"
    if facts.mels:
        yield f"  audio: {facts.mels} mels"
    if facts.vocab_size:
        yield f"  tokenizer: {facts.vocab_size:,} entries"
    for name, split in facts.splits.items():
        for reason, count in split.left_out.items():
            yield f"  left out of {name}: {count:,} ({reason})"
    reasons = Counter(facts.left_out.values())
    for reason, count in reasons.items():
        first = next(path for path, why in facts.left_out.items() if why == reason)
        more = f" and {count - 1:,} more" if count > 1 else ""
        yield f"  not read: {first}{more} ({reason})"
    for note in facts.notes:
        yield f"  note: {note}"


def _format_list(names: tuple[str, ...], shown: int = SHOWN) -> str:
    more = f", … ({len(names):,} in all)" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more

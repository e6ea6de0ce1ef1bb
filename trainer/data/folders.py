"""What a folder holds: which entries make which split, and which are left out, and why."""

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from trainer.config import ConfigError

SPLITS = ("train", "valid", "test")
SPELLINGS = {
    "train": {"train", "training", "trn"},
    "valid": {
        "valid", "validation", "val", "dev", "devel", "development", "eval", "evaluation"
    },
    "test": {"test", "testing", "tst"},
}  # fmt: skip
FILLERS = {"of", "set", "data", "split", "part", "shard", "fold", "v"}
JOINED = re.compile(r"(set|data|split)$")  # trainset, testdata
FOREIGN = {
    "__macosx", "@eadir", "__pycache__", "lost+found", "$recycle.bin", "thumbs.db", "desktop.ini",
    "system volume information",
}  # fmt: skip
LEFTOVERS = ("~", ".bak", ".orig", ".tmp", ".temp", ".swp", ".part", ".crdownload", ".download")
DOCUMENTS = {
    "readme", "license", "licence", "notice", "changelog", "citation", "copying", "authors",
    "contributing", "metadata",
}  # fmt: skip


@dataclass(frozen=True)
class Listing:
    """What was found at data.path: files of each split, and what is not read, relative to it."""

    splits: dict[str, list[Path]]
    left_out: dict[str, str] = field(default_factory=dict)  # why, by file or folder
    notes: list[str] = field(default_factory=list)


def split_of(name: str) -> str | None:
    """Return the split that a file or folder is named after, None if after none or several.

    The first or the last word counts, in any case and without numbers: train-00000-of-00002.txt,
    x.train.txt, Training, val_2, TestSet.
    """
    stem = name.rpartition(".")[0] or name
    letters = re.findall(r"[^\W\d_]+", stem)
    cased = (re.sub(r"(?<=[a-z])(?=[A-Z])", " ", word).lower().split() for word in letters)
    words = [word for found in cased for word in found if word not in FILLERS]
    found = {
        split for split, spellings in SPELLINGS.items() for word in (words[:1] + words[-1:])
        if word in spellings or JOINED.sub("", word) in spellings
    }  # fmt: skip
    return found.pop() if len(found) == 1 else None


def foreign(name: str) -> str:
    """Say why an entry is no data, by its name; empty where it may be."""
    if name.startswith("."):
        return "hidden"
    if name.lower() in FOREIGN or (name.startswith("#") and name.endswith("#")):
        return "of the operating system or an editor"
    return "a backup or half a download" if name.lower().endswith(LEFTOVERS) else ""


def entries(
    folder: Path, root: Path, left_out: dict[str, str], above: Collection[Path] = ()
) -> list[Path]:
    """Return the files and folders in a folder that may be data, by name; links are followed.

    What is not goes to `left_out`, as do links to folders that the way here has gone through:
    `above`, resolved.
    """
    found, above = [], {*above, root.resolve(), folder.resolve()}
    for entry in sorted(folder.iterdir()):
        why = foreign(entry.name)
        if not why and not entry.exists():
            why = "a link to nothing"
        if not why and entry.is_dir() and entry.resolve() in above:
            why = "a link to a folder that it is in"
        if not why and not entry.is_dir() and not entry.is_file():
            why = "neither a file nor a folder"
        if why:
            left_out[str(entry.relative_to(root))] = why
        else:
            found.append(entry)
    return found


def walk(
    folder: Path, root: Path, left_out: dict[str, str], above: Collection[Path] = ()
) -> Iterator[Path]:
    """Yield the files in a folder and all below it, as `entries`."""
    for entry in entries(folder, root, left_out, above):
        if entry.is_dir():
            yield from walk(entry, root, left_out, {*above, folder.resolve()})
        else:
            yield entry


def unwrapped(
    root: Path, held: Callable[[Path], list[Path]], wraps: Callable[[Path], bool]
) -> Path:
    """Return the folder inside that holds the data: the only entry with data in each around it.

    `held` lists a folder's entries with data; `wraps` says whether one is a folder of others.
    """
    while True:
        found = [entry for entry in held(root) if not is_document(entry.name)]
        if len(found) != 1 or split_of(found[0].name) or not wraps(found[0]):
            return root
        root = found[0]


def refuse_inner_splits(where: str, files: Collection[Path], root: Path) -> None:
    """Raise ConfigError if what is about to be read as one has splits further down."""
    for path in files:
        parts = path.relative_to(root).parts
        if len(parts) > 1 and any(split_of(part) in ("valid", "test") for part in parts):
            raise ConfigError(
                f"{where} can be read in two ways: all of it alike, or {'/'.join(parts)} and "
                "others as splits; for the first, move all of it into a folder train/; for the "
                "second, put the splits of all folders into folders train/, valid/ and test/"
            )


def is_document(name: str) -> bool:
    """Whether a file tells of the data rather than being some: README.md, LICENSE.txt."""
    return bool(set(re.findall(r"[a-z]+", name.lower())[:1]) & DOCUMENTS)


def splits_of(
    where: str, found: Collection[Path], holds_splits: Callable[[Path], bool]
) -> tuple[dict[str, list[Path]], list[Path]]:
    """Return the entries of each split, and those that are of none.

    `holds_splits` says of an entry whether it can be a split. Raises ConfigError, which begins with
    `where`, where entries could be read in two ways.
    """
    named: dict[str, list[Path]] = {}
    others = []
    for entry in found:
        split = split_of(entry.name) if holds_splits(entry) else None
        if split:
            named.setdefault(split, []).append(entry)
        else:
            others.append(entry)
    data = [entry for entry in others if not is_document(entry.name)]
    if not data or not named or ("train" in named and len(named) > 1):
        return named, others
    ours = ", ".join(entry.name for split in named.values() for entry in split)
    theirs = ", ".join(entry.name for entry in data[:3]) + (", …" if len(data) > 3 else "")
    one = next(entry for split in named.values() for entry in split)
    raise ConfigError(
        f"{where} can be read in two ways: {ours} as {' and '.join(named)} split, without "
        f"{theirs}; or all of them alike. For the first, set data.path to a folder with the splits "
        f"alone, or add the others; for the second, move all of them into a folder train/, or "
        f"rename {one.name}"
    )

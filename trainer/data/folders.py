"""Listing of a data folder: the entries of each split, and why others are left out."""

import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.config.train import DataError

SPLITS = ("train", "valid", "test")
SPELLINGS = {
    "train": {"train", "training", "trn"},
    "valid": {
        "valid",
        "validation",
        "validate",
        "val",
        "dev",
        "devel",
        "development",
        "eval",
        "evaluation",
        "newsdev",
    },
    "test": {"test", "testing", "tst", "devtest", "newstest"},
}
FILLERS = {"of", "set", "data", "split", "part", "shard", "fold", "v"}
JOINED = re.compile(r"(set|data|split)$")  # trainset, testdata
FOREIGN = {
    "__macosx",
    "@eadir",
    "__pycache__",
    "lost+found",
    "$recycle.bin",
    "thumbs.db",
    "desktop.ini",
    "system volume information",
}
LEFTOVERS = ("~", ".bak", ".orig", ".tmp", ".temp", ".swp", ".part", ".crdownload", ".download")
DOCUMENTS = {
    "readme",
    "license",
    "licence",
    "notice",
    "changelog",
    "citation",
    "copying",
    "authors",
    "contributing",
    "metadata",
}
DOCUMENT, BESIDE = "documentation", "outside the splits"  # why an entry is left out


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """A file under data.path, or a folder with all entries in it that may be data."""

    location: str
    relative: str  # path relative to data.path
    real: str  # location with links resolved
    linked: bool  # whether it is reached through a link
    size: int = 0
    mtime_ns: int = 0
    inside: tuple["Entry", ...] | None = None  # entries of a folder, sorted by name; None = a file

    @property
    def name(self) -> str:
        """Return the last component of the location."""
        return self.location.rpartition("/")[2]

    @property
    def path(self) -> Path:
        """Return the location as a path."""
        return Path(self.location)

    @property
    def suffix(self) -> str:
        """Return the suffix in lower case, e.g. .txt."""
        stem, dot, last = self.name.rpartition(".")
        return (dot + last).lower() if stem else ""

    @property
    def is_document(self) -> bool:
        """Return whether this file documents the data rather than holding data, e.g. README.md."""
        return self.inside is None and self.name.partition(".")[0].lower() in DOCUMENTS

    def iter_files(self) -> Iterator["Entry"]:
        """Yield the file itself, or all files below the folder, sorted by name."""
        if self.inside is None:
            yield self
        for entry in self.inside or ():
            yield from entry.iter_files()

    def fingerprint(self) -> list[Any]:
        """Return values that change when the file, or the target of its link, does."""
        return [self.relative, self.real, self.size, self.mtime_ns]


@dataclass(frozen=True)
class Listing:
    """The files of each split at data.path, and the entries that are not read."""

    splits: dict[str, list[Path]]
    left_out: dict[str, str] = field(default_factory=dict)  # path relative to data.path -> reason
    notes: list[str] = field(default_factory=list)


def scan_folder(root: Path) -> tuple[Entry, dict[str, str]]:
    """Return a folder with all entries that may be data, and why each of the others is left out.

    Links are followed, except to one of the folders that they are in. Raises OSError.
    """
    left_out: dict[str, str] = {}
    real = os.path.realpath(root)
    inside = _scan_inside(str(root), "", real, False, {real}, left_out)
    return Entry(str(root), "", real, False, inside=inside), left_out


def _scan_inside(
    folder: str, relative: str, real: str, linked: bool, above: set[str], left_out: dict[str, str]
) -> tuple[Entry, ...]:
    with os.scandir(folder) as found:
        inside = sorted(found, key=lambda entry: entry.name)
    entries = []
    for entry in inside:
        name = f"{relative}/{entry.name}" if relative else entry.name
        target = os.path.realpath(entry.path) if entry.is_symlink() else f"{real}/{entry.name}"
        if why := why_not_data(entry.name) or _why_unreadable(entry, target, above):
            left_out[name] = why
            continue
        reached = linked or entry.is_symlink()
        if entry.is_dir():
            below = _scan_inside(entry.path, name, target, reached, {*above, target}, left_out)
            entries.append(Entry(entry.path, name, target, reached, inside=below))
        else:
            stat = entry.stat()
            entries.append(Entry(entry.path, name, target, reached, stat.st_size, stat.st_mtime_ns))
    return tuple(entries)


def _why_unreadable(entry: "os.DirEntry[str]", real: str, above: set[str]) -> str:
    """Return why the type of an entry excludes it; empty if it may be data."""
    if entry.is_symlink() and not Path(entry.path).exists():
        return "a broken link"
    if entry.is_dir():
        return "a link to a parent folder" if real in above else ""
    return "" if entry.is_file() else "neither a file nor a folder"


def why_not_data(name: str) -> str:
    """Return why the name of an entry excludes it; empty if it may be data."""
    if name.startswith("."):
        return "hidden"
    if name.lower() in FOREIGN or (name.startswith("#") and name.endswith("#")):
        return "of the operating system or an editor"
    return "a backup or an incomplete download" if name.lower().endswith(LEFTOVERS) else ""


def split_of(name: str) -> str | None:
    """Return the split that a file or folder is named after; None if after none or several.

    The first or the last word counts, ignoring case and numbers: train-00000-of-00002.txt,
    x.train.txt, Training, val_2, TestSet; or a word between dots: wiki.train.tokens, data.val.
    """
    stem = name.rpartition(".")[0] or name
    fields = {split for part in stem.split(".")[1:-1] for split in _splits_of_word(part)}
    found = _at_the_ends(stem) or fields or _at_the_ends(name)
    return found.pop() if len(found) == 1 else None


def _at_the_ends(stem: str) -> set[str]:
    words = _name_words(stem)
    return {split for word in (words[:1] + words[-1:]) for split in _splits_of_word(word)}


def _name_words(stem: str) -> list[str]:
    """Return the words of a name in lower case, without numbers and FILLERS."""
    letters = re.findall(r"[^\W\d_]+", stem)
    cased = (re.sub(r"(?<=[a-z])(?=[A-Z])", " ", word).lower().split() for word in letters)
    return [word for found in cased for word in found if word not in FILLERS]


def _splits_of_word(word: str) -> set[str]:
    """Return the splits that a word is a spelling of."""
    bare = JOINED.sub("", word.lower())
    return {split for split, known in SPELLINGS.items() if word.lower() in known or bare in known}


def unwrap_folders(
    top: Entry, held: Callable[[Entry], Sequence[Entry]], wraps: Callable[[Entry], bool]
) -> list[Entry]:
    """Return the folders from `top` to the one with the data, each the only entry of the last.

    `held` lists a folder's entries with data; `wraps` returns whether to descend into one.
    """
    chain = [top]
    while True:
        found = held(chain[-1])
        if len(found) != 1 or split_of(found[0].name) or not wraps(found[0]):
            return chain
        chain.append(found[0])


def refuse_inner_splits(where: str, files: Collection[Entry], above: Entry) -> None:
    """Raise DataError if files to be read as one split are in subfolders named valid or test."""
    for file in files:
        parts = Path(file.location).relative_to(above.location).parts
        if len(parts) > 1 and any(split_of(part) in ("valid", "test") for part in parts):
            raise DataError(
                f"{where} can be read in two ways: all of it as train, or {'/'.join(parts)} and "
                "others as splits; for the first, move all of it into a folder train/; for the "
                "second, put the splits of all folders into folders train/, valid/ and test/"
            )


def splits_of(
    where: str, found: Collection[Entry], holds_splits: Callable[[Entry], bool]
) -> tuple[dict[str, list[Entry]], list[Entry]]:
    """Return the entries of each split, and the entries of none.

    `holds_splits` returns whether an entry can be a split. Raises DataError, prefixed by `where`,
    if the entries can be read in two ways.
    """
    named: dict[str, list[Entry]] = {}
    others = []
    for entry in found:
        split = split_of(entry.name) if holds_splits(entry) else None
        if split:
            named.setdefault(split, []).append(entry)
        else:
            others.append(entry)
    data = [entry for entry in others if not entry.is_document]
    if not named:
        _refuse_twins(where, [entry.name for entry in data if holds_splits(entry)])
    if not data or not named or ("train" in named and len(named) > 1):
        return named, others
    ours = ", ".join(entry.name for split in named.values() for entry in split)
    theirs = ", ".join(entry.name for entry in data[:3]) + (", …" if len(data) > 3 else "")
    one = next(entry for split in named.values() for entry in split)
    raise DataError(
        f"{where} can be read in two ways: {ours} as {' and '.join(named)} split, without "
        f"{theirs}; or all of them as train. For the first, set data.path to a folder with the "
        f"splits alone, or add the others; for the second, move all of them into a folder train/, "
        f"or rename {one.name}"
    )


def _refuse_twins(where: str, names: Sequence[str]) -> None:
    """Raise DataError if names outside the splits differ only in the spelling of a split.

    E.g. mytrain.txt and mytest.txt; books_train_en.txt and books_dev_en.txt.
    """
    spelled = {word: split for split, known in SPELLINGS.items() for word in known}
    pattern = re.compile("|".join(sorted(spelled, key=len, reverse=True)))
    twins: dict[str, dict[str, str]] = {}  # name with * for the spelling -> split -> name
    for name in names:
        plain = re.sub(r"\d+", "", name.lower())
        for match in pattern.finditer(plain):
            rest = f"{plain[: match.start()]}*{plain[match.end() :]}"
            twins.setdefault(rest, {}).setdefault(spelled[match[0]], name)
    for of_split in twins.values():
        if len(of_split) > 1:
            ours = ", ".join(of_split.values())
            theirs = ", ".join(sorted(of_split, key=SPLITS.index))
            raise DataError(
                f"{where} can be read in two ways: {ours} as splits ({theirs}), or all of it "
                "as train; for the first, give them the names train, valid and test; for the "
                "second, move all of it into a folder train/"
            )


def unique_files(
    where: str, files: Sequence[tuple[Entry, str]], left_out: dict[str, str], skip: bool = False
) -> set[str]:
    """Return the `relative` of the files to read, each once even if several links lead to it.

    `files` has each file with its role: its split or class. A file with two roles raises
    DataError, prefixed by `where`; with `skip` the first role counts.
    """
    first: dict[str, tuple[Entry, str]] = {}
    for entry, role in sorted(files, key=lambda found: found[0].linked):
        kept, its_role = first.setdefault(entry.real, (entry, role))
        if entry is kept:
            continue
        if role != its_role and not skip:
            raise DataError(
                f"{where}: {kept.relative} ({its_role}) and {entry.relative} ({role}) are the "
                "same file; remove one of the links"
            )
        left_out[entry.relative] = f"the same file as {kept.relative}"
    return {entry.relative for entry, _ in first.values()}

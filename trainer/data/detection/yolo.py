"""YOLO's annotations: a text file for each picture, a line `class x y width height` a box."""

from collections import Counter
from typing import Any

import yaml

from trainer.config.train import DataError
from trainer.data.detection.annotations import (
    SAME_NAME,
    AnnotatedPicture,
    Annotations,
    PictureIndex,
    folder_of,
    read_lines,
    read_number,
    split_of_path,
    stem_of,
)
from trainer.data.folders import Entry

MOST = 1.01  # that a share may be, for the sake of rounding
NAMES = ("classes.txt", "obj.names", "names.txt", "labels.txt")
UNNAMED = "{} classes have no name and are called after their number"
WITHOUT = "{} pictures have no text file and are background"


def label_files(index: PictureIndex, texts: dict[str, Entry]) -> dict[str, Entry]:
    """Return the text file of each picture that has one, by the picture's place.

    It is beside the picture, or in a folder `labels` in place of the folder `images`.
    """
    found, by_stem = {}, {stem_of(place): entry for place, entry in texts.items()}
    owners: dict[str, str] = {}  # the picture of each text file
    for picture in index.files:
        stem = stem_of(picture.relative)
        swapped = "/".join("labels" if part == "images" else part for part in stem.split("/"))
        text = by_stem.get(stem) or by_stem.get(swapped)
        if text is None:
            continue
        found[picture.relative] = text
        first = owners.setdefault(text.relative, picture.relative)
        if first != picture.relative:
            raise DataError(
                f"data.path: {text.path} is of {first} and of {picture.relative}, by their names; "
                "keep one of these pictures, or rename it"
            )
    return found


def read_yolo(index: PictureIndex, labels: dict[str, Entry], names: dict[int, str]) -> Annotations:
    """Return the annotations of all pictures; those without a text file are background."""
    counts: Counter[str] = Counter()
    splits: dict[str, list[AnnotatedPicture]] = {}
    sources: dict[str, dict[str, None]] = {}
    numbers: set[int] = set(names)
    for entry in index.files:
        split = split_of_path(folder_of(entry.relative)) or "train"
        picture = AnnotatedPicture(entry.relative, entry.path, in_sides=True)
        if (text := labels.get(entry.relative)) is None:
            counts[WITHOUT] += 1
        else:
            numbers |= _read_lines(text, picture, names)
        splits.setdefault(split, []).append(picture)
        sources.setdefault(split, {})[f"{folder_of(entry.relative)}/".lstrip("/")] = None
    if unnamed := [number for number in numbers if not names.get(number)]:
        counts[UNNAMED] = len(unnamed)
    every = [_name(number, names) for number in sorted(numbers)]
    unique = list(dict.fromkeys(every))
    counts[SAME_NAME] = len(every) - len(unique)
    found = {split: tuple(folders) for split, folders in sources.items()}
    return Annotations(splits, unique, found, {}, counts)


def _read_lines(text: Entry, picture: AnnotatedPicture, names: dict[int, str]) -> set[int]:
    """Add the boxes of a text file; return the numbers of their classes."""
    numbers = set()
    for place, line in enumerate(read_lines(text), 1):
        if not line.strip():
            continue
        try:
            first, x, y, width, height = map(read_number, line.split())
            if first < 0 or first != int(first):
                raise ValueError(first)
        except (ValueError, OverflowError):
            raise DataError(
                f"data.path: {text.path}:{place} is not a line of a class number and x, y, width "
                f"and height in sides of the picture: {line.strip()[:60]}"
            ) from None
        if max(x, y, width, height) > MOST:
            raise DataError(
                f"data.path: {text.path}:{place} has more than 1 for x, y, width or height, which "
                "must be in sides of the picture, from 0 to 1; divide pixels by its width and "
                f"height: {line.strip()[:60]}"
            )
        corners = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
        picture.add_box(corners, _name(int(first), names))
        numbers.add(int(first))
    return numbers


def _name(number: int, names: dict[int, str]) -> str:
    return names.get(number) or f"class {number}"


def class_names(files: list[Entry]) -> dict[int, str]:
    """Return the names of the classes by number, from data.yaml or classes.txt; empty = none.

    Raises DataError if two files have other names.
    """
    found: dict[str, dict[int, str]] = {}
    for entry in files:
        if entry.suffix in (".yaml", ".yml"):
            found[entry.relative] = _yaml_names(entry)
        elif entry.name.lower() in NAMES:
            lines = enumerate(read_lines(entry))
            found[entry.relative] = {number: line.strip() for number, line in lines if line.strip()}
    named = {place: names for place, names in found.items() if names}
    (first, names), *others = named.items() or [("", {})]
    if different := [place for place, others_names in others if others_names != names]:
        raise DataError(
            f"data.path: {first} and {different[0]} name the classes differently; keep one of them"
        )
    return names


def _yaml_names(entry: Entry) -> dict[int, str]:
    try:
        # Names as they are written: no is not False.
        content: Any = yaml.load(entry.path.read_bytes(), Loader=yaml.BaseLoader)
        named = content.get("names") if isinstance(content, dict) else None
        pairs = named.items() if isinstance(named, dict) else enumerate(named or [])
        if isinstance(named, str) and named:
            raise TypeError("names must be a list, or a table of numbers and names")
        found = {int(number): name for number, name in pairs}
        if wrong := [name for name in found.values() if not isinstance(name, str)]:
            raise TypeError(f"{wrong[0]!r} is no name"[:60])
        return found
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise DataError(
            f"data.path: {entry.path} does not say the names of the classes: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error

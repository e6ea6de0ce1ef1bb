"""YOLO's annotations: a text file for each picture, a line `class x y width height` a box."""

from collections import Counter
from typing import Any

import yaml

from trainer.config.train import DataError
from trainer.data.detection.annotations import (
    AnnotatedPicture,
    Annotations,
    PictureIndex,
    folder_of,
    split_of_path,
)
from trainer.data.folders import Entry

NAMES = ("classes.txt", "obj.names", "names.txt", "labels.txt")
UNNAMED = "{} classes have no name and are called after their number"
WITHOUT = "{} pictures have no text file and are background"


def label_files(index: PictureIndex, texts: dict[str, Entry]) -> dict[str, Entry]:
    """Return the text file of each picture that has one, by the picture's place.

    It is beside the picture, or in a folder `labels` in place of the folder `images`.
    """
    found = {}
    for picture in index.files:
        stem = picture.relative.rpartition(".")[0]
        swapped = "/".join("labels" if part == "images" else part for part in stem.split("/"))
        for place in (f"{stem}.txt", f"{swapped}.txt"):
            if place in texts:
                found[picture.relative] = texts[place]
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
    if unnamed := numbers - set(names):
        counts[UNNAMED] = len(unnamed)
    every = [_name(number, names) for number in sorted(numbers)]
    found = {split: tuple(folders) for split, folders in sources.items()}
    return Annotations(splits, every, found, {}, counts)


def _read_lines(text: Entry, picture: AnnotatedPicture, names: dict[int, str]) -> set[int]:
    """Add the boxes of a text file; return the numbers of their classes."""
    numbers = set()
    lines = text.path.read_text(encoding="utf-8", errors="replace").splitlines()
    for place, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            first, *rest = line.split()
            number, (x, y, width, height) = int(first), map(float, rest)
            if number < 0:
                raise ValueError(number)
        except ValueError:
            raise DataError(
                f"data.path: {text.path}:{place} is not a line of a class number and x, y, width "
                f"and height in sides of the picture: {line.strip()[:60]}"
            ) from None
        corners = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
        picture.add_box(corners, _name(number, names))
        numbers.add(number)
    return numbers


def _name(number: int, names: dict[int, str]) -> str:
    return names.get(number) or f"class {number}"


def class_names(files: list[Entry]) -> dict[int, str]:
    """Return the names of the classes by number, from data.yaml or classes.txt; empty = none."""
    for entry in files:
        if entry.suffix in (".yaml", ".yml"):
            named = _yaml_names(entry)
            if named:
                return named
    for entry in files:
        if entry.name.lower() in NAMES:
            lines = entry.path.read_text(encoding="utf-8", errors="replace").splitlines()
            return {number: line.strip() for number, line in enumerate(lines) if line.strip()}
    return {}


def _yaml_names(entry: Entry) -> dict[int, str]:
    try:
        content: Any = yaml.safe_load(entry.path.read_bytes())
        named = content.get("names") if isinstance(content, dict) else None
        pairs = named.items() if isinstance(named, dict) else enumerate(named or [])
        return {int(number): str(name) for number, name in pairs}
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise DataError(
            f"data.path: {entry.path} does not say the names of the classes: {error}"
        ) from error

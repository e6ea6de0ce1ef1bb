"""Annotated pictures as the readers of COCO, Pascal VOC and YOLO files return them."""

import posixpath
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path

from trainer.config.train import DataError
from trainer.data.files import FilePart, read_text
from trainer.data.folders import Entry, split_of
from trainer.data.image_files import SUFFIXES

SHOWN = 3  # files named in a message
MOVED = "{} pictures are in another folder than their annotation says, and found by their name"
SAME_NAME = "{} classes have the name of another one, and are one class with it"


@dataclass
class AnnotatedPicture:
    """A picture with its boxes as a file states them."""

    name: str  # relative to data.path, for messages
    path: Path | None  # None = there is no such file
    size: tuple[int, int] | None = None  # width and height that the file states
    corners: list[list[float]] = field(default_factory=list)  # in pixels
    classes: list[str] = field(default_factory=list)
    crowd: list[bool] = field(default_factory=list)
    areas: list[float] = field(default_factory=list)
    in_sides: bool = False  # corners are in the picture's sides, from 0 to 1

    def add_box(
        self, corners: list[float], name: str, crowd: bool = False, area: float = 0.0
    ) -> None:
        """Add a box; an area that is no positive number = that of the box."""
        left, top, right, bottom = corners
        self.corners.append(corners)
        self.classes.append(name)
        self.crowd.append(crowd)
        stated = area > 0 and isfinite(area)
        self.areas.append(area if stated else (right - left) * (bottom - top))


@dataclass
class Annotations:
    """The pictures of each split and all classes."""

    splits: dict[str, list[AnnotatedPicture]]
    class_names: list[str]  # of the train split's files, in their order
    sources: dict[str, tuple[str, ...]]
    left_out: dict[str, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)  # note with a place for the count


class PictureIndex:
    """The picture files of a folder, found by the names that annotations use."""

    def __init__(self, top: Entry):
        self.files = [entry for entry in top.iter_files() if entry.suffix in SUFFIXES]
        self.counts: Counter[str] = Counter()  # note with a place for the count
        self._by_place = {entry.relative: entry for entry in self.files}
        self._by_name: dict[str, list[Entry]] = {}
        self._by_stem: dict[str, list[Entry]] = {}
        for entry in self.files:
            self._by_name.setdefault(entry.name, []).append(entry)
            self._by_stem.setdefault(stem_of(entry.relative), []).append(entry)

    def find(self, name: str, *folders: str) -> Entry | None:
        """Return the file of this name, relative to one of the folders or to data.path.

        Else the only file whose path ends in it, or the only one of its last part, which is
        counted where the name says another folder.
        """
        name = posixpath.normpath(name.replace("\\", "/")).lstrip("/")
        for folder in dict.fromkeys((*folders, "", "images")):
            place = posixpath.normpath(posixpath.join(folder, name))
            if place in self._by_place:
                return self._by_place[place]
        alike = self._by_name.get(posixpath.basename(name), [])
        ending = [entry for entry in alike if entry.relative.endswith(f"/{name}")]
        found = ending or alike
        if len(found) != 1:
            return None
        if not ending:
            self.counts[MOVED] += 1
        return found[0]

    def of_stem(self, place: str) -> list[Entry]:
        """Return the files at this place, whatever their suffix."""
        return self._by_stem.get(place, [])


def folder_of(relative: str) -> str:
    """Return the folder of a path relative to data.path; empty = data.path itself."""
    return relative.rpartition("/")[0]


def stem_of(relative: str) -> str:
    """Return a path relative to data.path without the suffix."""
    return posixpath.splitext(relative)[0]


def read_lines(entry: Entry) -> list[str]:
    """Return the lines of a text file in UTF-8; raises DataError."""
    return "".join(read_text(FilePart(entry.path, 0, entry.size))).splitlines()


def read_number(value: object) -> float:
    """Return a number, or a text that is one as files write it; raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is not a number"[:60])
    if isinstance(value, str) and "_" in value:  # Python's own way to write numbers
        raise ValueError(f"{value!r} is not a number"[:60])
    return float(value)


def split_of_path(relative: str) -> str | None:
    """Return the split that the file or the nearest of its folders is named after."""
    return next(
        (split for part in reversed(relative.split("/")) if (split := split_of(part))), None
    )


def first_names(names: Iterable[str]) -> str:
    """Return the first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def require_train(where: str, splits: dict[str, list[AnnotatedPicture]]) -> None:
    """Raise DataError if no picture is to be trained on."""
    if not splits.get("train"):
        splits = {split: pictures for split, pictures in splits.items() if pictures}
        found = f"has pictures of {', '.join(splits)} but not of train" if splits else "has none"
        raise DataError(
            f"{where} {found}; name the annotations of each split, or the folder that they are in, "
            "after it: train, valid, test"
        )

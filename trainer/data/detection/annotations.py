"""Annotated pictures as the readers of COCO, Pascal VOC and YOLO files return them."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path, PurePosixPath

from trainer.config.train import DataError
from trainer.data.folders import Entry, split_of
from trainer.data.image_files import SUFFIXES

SHOWN = 3  # files named in a message


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
        self._by_place = {entry.relative: entry for entry in self.files}
        self._by_name: dict[str, list[Entry]] = {}
        for entry in self.files:
            self._by_name.setdefault(entry.name, []).append(entry)

    def find(self, name: str, beside: str) -> Entry | None:
        """Return the file of this name, relative to the folder `beside` or to data.path.

        Else the only file whose path ends in it, or the only one of its last part.
        """
        name = PurePosixPath(name.replace("\\", "/")).as_posix().lstrip("/")
        for folder in dict.fromkeys((beside, "", "images")):
            place = PurePosixPath(folder, name).as_posix()
            if place in self._by_place:
                return self._by_place[place]
        alike = self._by_name.get(PurePosixPath(name).name, [])
        ending = [entry for entry in alike if entry.relative.endswith(f"/{name}")] or alike
        return ending[0] if len(ending) == 1 else None


def folder_of(relative: str) -> str:
    """Return the folder of a path relative to data.path; empty = data.path itself."""
    return relative.rpartition("/")[0]


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

"""Labelled images in one folder per class, optionally inside one folder per split."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from os import cpu_count
from pathlib import Path

import numpy as np

from trainer.config.train import DataConfig, DataError, UserError
from trainer.data import pictures
from trainer.data.cache import progress_bar
from trainer.data.folders import (
    BESIDE,
    Entry,
    Listing,
    split_of,
    splits_of,
    unique_files,
    unwrap_folders,
)

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
Shape = tuple[int, int, int]  # H, W, C
EMPTY = "a folder without pictures"
SHOWN = 3  # files or folders named in a message


@dataclass(frozen=True)
class ImageTable:
    """The images of a split with their labels, in memory or as paths."""

    labels: np.ndarray  # (N,) int64
    order: np.ndarray  # (N,) row numbers; held-out splits are cut from the end
    class_names: tuple[str, ...]
    shape: Shape
    pixels: np.ndarray | None = None  # from an archive: (N, H, W, C) uint8
    paths: tuple[Path, ...] = ()  # from a folder

    def read_image(self, row: int) -> np.ndarray:
        """Return the pixels of a row (H, W, C) uint8; raises DataError if they have changed."""
        if self.pixels is not None:
            return np.asarray(self.pixels[row])
        pixels = decode_image(self.paths[row], self.shape[2])
        if pixels.shape != self.shape:
            raise DataError(
                f"data.path: {self.paths[row]} was {_format_size(self.shape)} pixels when the run "
                f"began "
                f"and is {_format_size(pixels.shape)}; restore the old image"
            )
        return pixels

    def with_labels(self, rows: np.ndarray) -> "ImageTable":
        """Return a table with the label rows[i] in place of label i."""
        return replace(self, labels=rows[self.labels])

    def select_rows(self, order: np.ndarray) -> "ImageTable":
        """Return a table of these rows, in this order."""
        return replace(
            self,
            labels=self.labels[order],
            order=np.arange(len(order)),
            pixels=None if self.pixels is None else self.pixels[order],
            paths=tuple(self.paths[i] for i in order) if self.paths else (),
        )


def _format_size(shape: Sequence[int]) -> str:
    return f"{shape[1]} × {shape[0]}"


def decode_image(path: Path, channels: int, key: str = "data.path") -> np.ndarray:
    """Return the pixels of a file (H, W, channels) uint8; raises DataError if it is damaged."""
    with pictures.open_image(path, key) as image:
        return pictures.pixels_of(image, channels)


@dataclass(frozen=True)
class ImageFolder:
    """The picture files of each split with their classes, and the folders that hold them."""

    files: dict[str, list[tuple[Entry, str]]]
    listing: Listing  # its splits are the folders that were read

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the classes of the train split, sorted by name."""
        return tuple(sorted({name for _, name in self.files["train"]}))


def list_gallery(config: DataConfig, scanned: tuple[Entry, dict[str, str]]) -> ImageFolder:
    """List the pictures of train/<class>/*.png, ..., or of unsplit <class>/*.png.

    Raises DataError if there are none, or if the folders can be read in two ways.
    """
    where, notes = f"data.path={config.path}", list[str]()
    top, left_out = scanned[0], dict(scanned[1])
    # A folder with pictures directly in it is a class, even if it is the only one.
    *around, inner = unwrap_folders(top, _with_pictures, lambda entry: bool(_with_pictures(entry)))
    if around:
        notes.append(f"all of it is in {inner.relative}/")
    for folder in (*around, inner):
        _leave_out(folder, left_out)
    named = _split_folders(where, inner, left_out)
    files = {}
    for split, folders in named.items():
        files[split] = [p for folder in folders for p in _list_classes(where, folder, left_out)]
    roles = [(p, f"class {name} of the {s} split") for s in files for p, name in files[s]]
    kept = unique_files(where, roles, left_out, skip=config.on_bad_file == "skip")
    files = {s: [found for found in files[s] if found[0].relative in kept] for s in files}
    read_from = {split: [folder.path for folder in named[split]] for split in named}
    gallery = ImageFolder(files, Listing(read_from, left_out, notes))
    _same_classes(where, gallery)
    return gallery


def _split_folders(where: str, inner: Entry, left_out: dict[str, str]) -> dict[str, list[Entry]]:
    """Return the folders of each split; if none is named after one, all are train."""
    tops = _with_pictures(inner)
    nested = {entry for entry in tops if _with_pictures(entry)}
    named, others = splits_of(where, tops, nested.__contains__)
    if not named:  # all are classes
        if nested:
            raise _nested_error(where, next(entry for entry in tops if entry in nested))
        _refuse_flat_splits(where, tops)
        named, others = {"train": [inner]} if tops else {}, []
    for name in list(left_out) if nested else []:
        if left_out[name] == EMPTY and split_of(name):
            raise DataError(f"{where}: {name}/ holds no images in class folders")
    for entry in others:
        left_out[entry.relative] = BESIDE
    if "train" not in named:
        found = (
            f"has {', '.join(named)} but no train split; add"
            if named
            else (
                f"holds no images; data.kind=images reads {', '.join(SUFFIXES[:3])}, ... files in"
            )
        )
        raise DataError(f"{where} {found} a folder train/ with a folder per class, or an .npz")
    return named


def _refuse_flat_splits(where: str, classes: list[Entry]) -> None:
    """Raise DataError if all would-be classes are named after splits, and not all after one."""
    splits = [split_of(entry.name) for entry in classes]
    if None not in splits and len(set(splits)) > 1:
        names = ", ".join(entry.name for entry in classes)
        raise DataError(
            f"{where}: {names} are splits by their names, but hold pictures without class folders; "
            f"move the pictures into a folder per class, {classes[0].name}/<class>/, or, if these "
            "are the classes, move them into a folder train/"
        )


def _holds_pictures(entry: Entry) -> bool:
    return any(file.suffix in SUFFIXES for file in entry.iter_files())


def _with_pictures(folder: Entry) -> list[Entry]:
    """Return the direct subfolders that hold pictures at any depth."""
    inside = folder.inside or ()
    return [entry for entry in inside if entry.inside is not None and _holds_pictures(entry)]


def _leave_out(folder: Entry, left_out: dict[str, str]) -> None:
    """Record in `left_out` the entries of a folder that are not class folders, and why."""
    for entry in folder.inside or ():
        if entry.inside is None:
            left_out[entry.relative] = "outside the class folders"
        elif not _holds_pictures(entry):
            left_out[entry.relative] = EMPTY


def _list_classes(where: str, folder: Entry, left_out: dict[str, str]) -> list[tuple[Entry, str]]:
    """Return the pictures of all class folders in a folder, each with its class name."""
    found = []
    _leave_out(folder, left_out)
    for entry in _with_pictures(folder):
        if _with_pictures(entry):
            raise _nested_error(where, entry)
        for file in (inside for inside in entry.inside or () if inside.inside is None):
            if file.suffix in SUFFIXES:
                found.append((file, entry.name))
            else:
                left_out[file.relative] = "not a picture file"
    if not found:
        raise DataError(f"{where}: {folder.location} holds no images in class folders")
    return found


def _nested_error(where: str, entry: Entry) -> DataError:
    inside = ", ".join(folder.name for folder in _with_pictures(entry)[:SHOWN])
    return DataError(
        f"{where}: {entry.relative} is read as a class, but it holds folders with pictures "
        f"({inside}); if it is a split, name it train, valid or test; if it is a class, move its "
        "pictures up into it"
    )


def _same_classes(where: str, gallery: ImageFolder) -> None:
    known = gallery.class_names
    for split, files in gallery.files.items():
        if other := sorted({name for _, name in files} - set(known)):
            raise DataError(
                f"{where}: {', '.join(other)} of the {split} split is not a class of the train "
                f"split, which has {', '.join(known)}"
            )


@dataclass(frozen=True)
class CheckedImages:
    """The result of decoding every picture once."""

    shape: Shape
    damaged: dict[str, str]  # name -> reason; they are left out
    notes: list[str] = field(default_factory=list)


def check_gallery(config: DataConfig, gallery: ImageFolder, progress: bool) -> CheckedImages:
    """Decode every picture once on all cores.

    Raises DataError if they are not all of one square size, or if one is damaged and
    data.on_bad_file=stop.
    """
    found = [entry for files in gallery.files.values() for entry, _ in files]
    paths = [entry.path for entry in found]
    with (
        progress_bar("Checking images", len(paths), progress) as advance,
        ThreadPoolExecutor(cpu_count()) as pool,
    ):
        looks = []
        for look in pool.map(_check_image, paths):
            looks.append(look)
            advance(1)
    both = list(zip(found, looks, strict=True))
    good = [(entry.path, look) for entry, look in both if not look.problem]
    damaged = {entry.relative: look.problem for entry, look in both if look.problem}
    if damaged and config.on_bad_file == "stop":
        raise _damaged_error(damaged)
    if not good:
        raise DataError(f"data.path={config.path}: no picture of {len(paths)} can be read")
    notes = []
    if animated := sum(look.animated for _, look in good):
        notes.append(f"of {animated} animated files only the first frame is read")
    for split, files in gallery.files.items():
        left = {name for entry, name in files if entry.relative not in damaged}
        lost = sorted({name for _, name in files} - left)
        notes += [f"every picture of class {name} in the {split} split is damaged" for name in lost]
    return CheckedImages(
        _common_shape(good), {name: f"damaged: {why}" for name, why in damaged.items()}, notes
    )


def _common_shape(good: list[tuple[Path, "_ImageCheck"]]) -> Shape:
    """Return the shape of all pictures; raises DataError naming one that differs."""
    sizes = Counter(look.size for _, look in good)
    (width, height), _ = sizes.most_common(1)[0]
    odd = next(((path, look) for path, look in good if look.size != (width, height)), None)
    if odd:
        found = " × ".join(map(str, odd[1].size))
        raise DataError(
            f"data.path: {odd[0]} is {found} pixels but {sizes[width, height]} others are "
            f"{width} × {height}; all images must have one shape"
        )
    if width != height:
        name = good[0][0]
        raise DataError(f"data.path: {name} is {width} × {height} pixels; it must be square")
    return height, width, 1 if all(look.grey for _, look in good) else 3


@dataclass(frozen=True)
class _ImageCheck:
    size: tuple[int, int] = (0, 0)
    grey: bool = False
    animated: bool = False
    problem: str = ""


def _check_image(path: Path) -> _ImageCheck:
    try:
        with pictures.open_image(path) as image:
            grey, animated = pictures.is_grey(image), pictures.is_animated(image)
            pixels = pictures.pixels_of(image, 1 if grey else 3)
    except UserError as error:
        return _ImageCheck(problem=str(error).partition("read as an image: ")[2] or str(error))
    return _ImageCheck((pixels.shape[1], pixels.shape[0]), grey, animated)


def _damaged_error(damaged: dict[str, str]) -> DataError:
    shown = "; ".join(f"{name} ({why})" for name, why in list(damaged.items())[:SHOWN])
    more = f"; and {len(damaged) - SHOWN} more" if len(damaged) > SHOWN else ""
    return DataError(
        f"data.path: {len(damaged)} images cannot be read: {shown}{more}; repair them, or leave "
        "them out with data.on_bad_file=skip"
    )


def tables_of(gallery: ImageFolder, shape: Shape, damaged: dict[str, str]) -> dict[str, ImageTable]:
    """Return a table of each split's undamaged pictures."""
    names, tables = gallery.class_names, {}
    numbers = {name: number for number, name in enumerate(names)}
    for split, files in gallery.files.items():
        kept = [(entry, label) for entry, label in files if entry.relative not in damaged]
        # Ordered by a hash of the name: an image added later hardly changes the held-out ones.
        hashes = [
            blake2b(entry.relative.encode("utf-8", "surrogateescape"), digest_size=8).digest()
            for entry, _ in kept
        ]
        tables[split] = ImageTable(
            labels=np.array([numbers[label] for _, label in kept], np.int64),
            order=np.array(sorted(range(len(kept)), key=hashes.__getitem__), np.int64),
            class_names=names,
            shape=shape,
            paths=tuple(entry.path for entry, _ in kept),
        )
        if not kept:
            raise DataError(f"data.path: every image of the {split} split is damaged")
    return tables

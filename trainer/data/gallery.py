"""Labelled pictures in folders: one folder per class, perhaps inside one per split."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from os import cpu_count
from pathlib import Path

import numpy as np

from trainer.config import ConfigError, DataConfig
from trainer.data import pictures
from trainer.data.folders import Listing, entries, split_of, splits_of, unwrapped
from trainer.data.prepared import progress_bar

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
Shape = tuple[int, int, int]  # H, W, C
EMPTY = "a folder without pictures"
SHOWN = 3  # damaged files that a message names


@dataclass(frozen=True)
class Table:
    """The images of a split with their labels, in memory or as paths."""

    labels: np.ndarray  # (N,) int64
    order: np.ndarray  # (N,) rows in the order of which the last are held out
    class_names: tuple[str, ...]
    shape: Shape
    pixels: np.ndarray | None = None  # of an archive: (N, H, W, C) uint8
    paths: tuple[Path, ...] = ()  # of a folder

    def image(self, row: int) -> np.ndarray:
        """(H, W, C) uint8."""
        if self.pixels is not None:
            return np.asarray(self.pixels[row])
        pixels = decoded(self.paths[row], self.shape[2])
        if pixels.shape != self.shape:
            raise ConfigError(
                f"data.path: {self.paths[row]} was {_size(self.shape)} pixels when the run began "
                f"and is {_size(pixels.shape)}; put the old image back"
            )
        return pixels

    def rows(self, order: np.ndarray) -> "Table":
        """These rows as a table, in this order."""
        return replace(
            self,
            labels=self.labels[order],
            order=np.arange(len(order)),
            pixels=None if self.pixels is None else self.pixels[order],
            paths=tuple(self.paths[i] for i in order) if self.paths else (),
        )


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]} × {shape[0]}"


def decoded(path: Path, channels: int, key: str = "data.path") -> np.ndarray:
    """Return the pixels of a file (H, W, channels) uint8; ConfigError names one that is damaged."""
    with pictures.opened(path, key) as image:
        return pictures.pixels_of(image, channels)


@dataclass(frozen=True)
class Gallery:
    """Picture files with their classes, by split, and where they were found."""

    files: dict[str, list[tuple[Path, str]]]
    listing: Listing  # of each split the folders that it was read from

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes of the train split, by name."""
        return tuple(sorted({name for _, name in self.files["train"]}))


def list_gallery(config: DataConfig, root: Path) -> Gallery:
    """List the pictures of train/<class>/*.png, ..., or of <class>/*.png that is not split yet.

    Raises ConfigError where there are none, or where folders could be read in two ways.
    """
    where, left_out, notes = f"data.path={config.path}", dict[str, str](), list[str]()
    # A folder that holds pictures itself is a class, be it the only one.
    inner = unwrapped(
        root,
        lambda folder: _with_pictures(folder, root, {}),
        lambda entry: bool(_class_folders(entry, root)),
    )
    if inner != root:
        notes.append(f"all of it is in {inner.relative_to(root)}/")
    named = _split_folders(where, inner, root, left_out)
    files = {}
    for split, folders in named.items():
        files[split] = [p for folder in folders for p in _of_classes(where, folder, root, left_out)]
    gallery = Gallery(files, Listing(named, left_out, notes))
    _same_classes(where, gallery)
    return gallery


def _split_folders(
    where: str, inner: Path, root: Path, left_out: dict[str, str]
) -> dict[str, list[Path]]:
    """The folders of each split; without any it is all of train."""
    tops = _with_pictures(inner, root, left_out)
    nested = {entry for entry in tops if _class_folders(entry, root)}
    named, others = splits_of(where, tops, nested.__contains__)
    if not named:  # all are classes
        if nested:
            raise _nested(where, min(nested), root)
        named, others = {"train": [inner]} if tops else {}, []
    for name in list(left_out) if nested else []:
        if left_out[name] == EMPTY and split_of(name):
            raise ConfigError(f"{where}: {name}/ holds no images in class folders")
    for entry in others:
        left_out[_name(entry, root)] = "beside the splits"
    if "train" not in named:
        found = f"has {', '.join(named)} but no train split; add" if named else (
            f"holds no images; data.kind=images reads {', '.join(SUFFIXES[:3])}, ... files in"
        )  # fmt: skip
        raise ConfigError(f"{where} {found} a folder train/ with a folder per class, or an .npz")
    return named


def _name(path: Path, root: Path) -> str:
    return str(path.relative_to(root))


def _with_pictures(folder: Path, root: Path, left_out: dict[str, str]) -> list[Path]:
    """The folders directly in a folder that hold pictures, at any depth."""
    found = []
    for entry in entries(folder, root, left_out):
        if not entry.is_dir():
            left_out[_name(entry, root)] = "beside the class folders"
        elif _holds_pictures(entry, root, {folder.resolve()}):
            found.append(entry)
        else:
            left_out[_name(entry, root)] = EMPTY
    return found


def _pictures_in(folder: Path, root: Path, left_out: dict[str, str]) -> list[Path]:
    """The picture files directly in a folder."""
    found = []
    for entry in entries(folder, root, left_out):
        if entry.is_dir():
            continue
        if entry.suffix.lower() in SUFFIXES:
            found.append(entry)
        else:
            left_out[_name(entry, root)] = "no picture file"
    return found


def _class_folders(folder: Path, root: Path) -> list[Path]:
    """The folders directly in a folder that hold pictures, at any depth."""
    above = {folder.resolve()}
    inside = [entry for entry in entries(folder, root, {}) if entry.is_dir()]
    return [entry for entry in inside if _holds_pictures(entry, root, above)]


def _holds_pictures(folder: Path, root: Path, above: set[Path]) -> bool:
    """Whether there is a picture in a folder or below; `above`: the folders on the way here."""
    below = {*above, folder.resolve()}
    return any(
        _holds_pictures(entry, root, below) if entry.is_dir()
        else entry.suffix.lower() in SUFFIXES
        for entry in entries(folder, root, {}, above)
    )  # fmt: skip


def _of_classes(
    where: str, folder: Path, root: Path, left_out: dict[str, str]
) -> list[tuple[Path, str]]:
    """The pictures of each class folder in a folder, with the class's name."""
    found = []
    for entry in entries(folder, root, left_out):
        if not entry.is_dir():
            left_out[_name(entry, root)] = "beside the class folders"
            continue
        if _class_folders(entry, root):
            raise _nested(where, entry, root)
        paths = _pictures_in(entry, root, left_out)
        if not paths:
            left_out[_name(entry, root)] = EMPTY
        found += [(path, entry.name) for path in paths]
    if not found:
        raise ConfigError(f"{where}: {folder} holds no images in class folders")
    return found


def _nested(where: str, entry: Path, root: Path) -> ConfigError:
    inside = ", ".join(path.name for path in _class_folders(entry, root)[:SHOWN])
    return ConfigError(
        f"{where}: {_name(entry, root)} is read as a class, but it holds folders with pictures "
        f"({inside}); if it is a split, name it train, valid or test; if it is a class, move its "
        "pictures up into it"
    )


def _same_classes(where: str, gallery: Gallery) -> None:
    known = gallery.class_names
    for split, files in gallery.files.items():
        if other := sorted({name for _, name in files} - set(known)):
            raise ConfigError(
                f"{where}: {', '.join(other)} of the {split} split is no class of the train split, "
                f"which has {', '.join(known)}"
            )


@dataclass(frozen=True)
class Checked:
    """What is known of all picture files once each has been decoded."""

    shape: Shape
    damaged: dict[str, str]  # why, by name; they are left out
    notes: list[str] = field(default_factory=list)


def check_gallery(config: DataConfig, root: Path, gallery: Gallery, progress: bool) -> Checked:
    """Decode every picture once, on all cores.

    Raises ConfigError if they are not of one square size, or if one is damaged and
    data.on_bad_file=stop.
    """
    paths = [path for files in gallery.files.values() for path, _ in files]
    with (
        progress_bar("Checking images", len(paths), progress) as advance,
        ThreadPoolExecutor(cpu_count()) as pool,
    ):
        looks = []
        for look in pool.map(_look, paths):
            looks.append(look)
            advance(1)
    both = list(zip(paths, looks, strict=True))
    good = [(path, look) for path, look in both if not look.problem]
    damaged = {_name(path, root): look.problem for path, look in both if look.problem}
    if damaged and config.on_bad_file == "stop":
        raise _damaged(damaged)
    if not good:
        raise ConfigError(f"data.path={config.path}: no picture of {len(paths)} can be read")
    notes = []
    if animated := sum(look.animated for _, look in good):
        notes.append(f"of {animated} animated files the first picture is read")
    return Checked(
        _common_shape(good), {name: f"damaged: {why}" for name, why in damaged.items()}, notes
    )


def _common_shape(good: list[tuple[Path, "_Look"]]) -> Shape:
    """The one shape of all pictures; ConfigError names one that is another."""
    sizes = Counter(look.size for _, look in good)
    (width, height), _ = sizes.most_common(1)[0]
    odd = next(((path, look) for path, look in good if look.size != (width, height)), None)
    if odd:
        found = " × ".join(map(str, odd[1].size))
        raise ConfigError(
            f"data.path: {odd[0]} is {found} pixels but {sizes[width, height]} others are "
            f"{width} × {height}; all images must have one shape"
        )
    if width != height:
        name = good[0][0]
        raise ConfigError(f"data.path: {name} is {width} × {height} pixels; it must be square")
    return height, width, 1 if all(look.grey for _, look in good) else 3


@dataclass(frozen=True)
class _Look:
    size: tuple[int, int] = (0, 0)
    grey: bool = False
    animated: bool = False
    problem: str = ""


def _look(path: Path) -> _Look:
    try:
        with pictures.opened(path) as image:
            grey, animated = pictures.is_grey(image), pictures.is_animated(image)
            pixels = pictures.pixels_of(image, 1 if grey else 3)
    except ConfigError as error:
        return _Look(problem=str(error).partition("read as an image: ")[2] or str(error))
    return _Look((pixels.shape[1], pixels.shape[0]), grey, animated)


def _damaged(damaged: dict[str, str]) -> ConfigError:
    shown = "; ".join(f"{name} ({why})" for name, why in list(damaged.items())[:SHOWN])
    more = f"; and {len(damaged) - SHOWN} more" if len(damaged) > SHOWN else ""
    return ConfigError(
        f"data.path: {len(damaged)} images cannot be read: {shown}{more}; put them right, or leave "
        "them out with data.on_bad_file=skip"
    )


def tables_of(
    gallery: Gallery, root: Path, shape: Shape, damaged: dict[str, str]
) -> dict[str, Table]:
    """Return the pictures of each split as a table, without the damaged ones."""
    names, tables = gallery.class_names, {}
    for split, files in gallery.files.items():
        kept = [(path, label) for path, label in files if _name(path, root) not in damaged]
        # By a hash of the name, so that an image that is added later hardly moves the others.
        hashes = [
            blake2b(str(path.relative_to(root)).encode("utf-8", "surrogateescape"), digest_size=8)
            for path, _ in kept
        ]
        order = sorted(range(len(kept)), key=[h.digest() for h in hashes].__getitem__)
        tables[split] = Table(
            labels=np.array([names.index(label) for _, label in kept], np.int64),
            order=np.array(order, np.int64), class_names=names, shape=shape,
            paths=tuple(path for path, _ in kept),
        )  # fmt: skip
        if not kept:
            raise ConfigError(f"data.path: every image of the {split} split is damaged")
    return tables

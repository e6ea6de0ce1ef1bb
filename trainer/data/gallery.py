"""Labelled images as tables: read from an .npz archive, or from a folder of class folders."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from PIL import Image

from trainer.config import ConfigError, DataConfig
from trainer.data.order import permutation
from trainer.data.prepared import progress_bar
from trainer.data.source import SPLITS, split_entries

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
Shape = tuple[int, int, int]  # H, W, C
GREY_MODES = ("1", "L")  # Pillow's names; images of any other mode are read as RGB


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
        image = _decode(self.paths[row], self.shape[2])
        if image.shape != self.shape:
            raise ConfigError(
                f"data.path: {self.paths[row]} was {_size(self.shape)} pixels when the run began "
                f"and is {_size(image.shape)}; put the old image back"
            )
        return image

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


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except OSError as error:
        raise ConfigError(f"data.path: {path} cannot be read as an image: {error}") from error


def _decode(path: Path, channels: int) -> np.ndarray:
    with _open(path) as image:
        try:
            pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
        except OSError as error:
            raise ConfigError(f"data.path: {path} is damaged: {error}") from error
    return pixels.reshape(*pixels.shape[:2], channels)


def read_archive(config: DataConfig, path: Path) -> dict[str, Table]:
    """The tables of an .npz with x_train, y_train, ... and perhaps `classes`."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive.items())
    except (OSError, EOFError, ValueError, TypeError, BadZipFile) as error:
        raise ConfigError(
            f"data.path={config.path}: {path} is not an .npz archive ({error}); data.kind=images "
            "reads an .npz with x_train and y_train, or a folder of class folders"
        ) from error
    if "x_train" not in arrays or "y_train" not in arrays:
        raise ConfigError(
            f"data.path={config.path} holds {', '.join(sorted(arrays)) or 'nothing'}; it must hold "
            "x_train and y_train, and may hold x_valid, y_valid, x_test, y_test and classes"
        )
    labels = arrays["y_train"]
    count = int(labels.max(initial=0)) + 1 if labels.dtype.kind in "iu" else 0
    class_names = tuple(str(name) for name in arrays.get("classes", range(count)))
    found = [split for split in SPLITS if f"x_{split}" in arrays]
    tables = {split: _table(config, split, arrays, class_names) for split in found}
    shape = tables["train"].shape
    for split, table in tables.items():
        if table.shape != shape or shape[0] != shape[1]:
            raise ConfigError(
                f"data.path={config.path}: images of x_{split} have the shape {table.shape}, those "
                f"of x_train {shape}; all must be square and alike"
            )
    return tables


def _table(
    config: DataConfig, split: str, arrays: dict[str, np.ndarray], class_names: tuple[str, ...]
) -> Table:
    images, labels = arrays[f"x_{split}"], arrays.get(f"y_{split}")
    where = f"data.path={config.path}: x_{split}"
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise ConfigError(
            f"{where} is {images.dtype} of shape {images.shape}; it must be uint8 of shape "
            "(images, rows, columns) or (images, rows, columns, channels)"
        )
    if labels is None or labels.shape != images.shape[:1] or len(labels) == 0:
        found = "is missing" if labels is None else f"has shape {labels.shape}"
        raise ConfigError(f"{where} has shape {images.shape} but y_{split} {found}")
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= len(class_names):
        found = (
            f"holds {labels.min()} to {labels.max()}"
            if labels.dtype.kind in "iu"
            else f"is {labels.dtype}"
        )
        raise ConfigError(
            f"data.path={config.path}: y_{split} {found}; labels must be whole numbers from 0 to "
            f"{len(class_names) - 1} for {len(class_names)} classes"
        )
    images_NHWC = images if images.ndim == 4 else images[..., None]
    return Table(
        labels=labels.astype(np.int64),
        order=permutation(0, 0, len(labels)),
        class_names=class_names,
        shape=images_NHWC.shape[1:],
        pixels=images_NHWC,
    )


def read_folder(
    config: DataConfig, root: Path, shape: Shape | None = None, progress: bool = False
) -> dict[str, Table]:
    """The tables of train/<class>/*.png, ..., or of <class>/*.png that is not split yet.

    Looks at every image, unless their shape is known already.
    """
    entries = {s: [p for p in paths if p.is_dir()] for s, paths in split_entries(root).items()}
    folders = {s: paths[0] for s, paths in entries.items() if paths} or {"train": root}
    if "train" not in folders:
        raise ConfigError(
            f"data.path={config.path} has {', '.join(folders)} but no train split; add a folder "
            "train/ with a folder per class"
        )
    names = tuple(sorted(p.name for p in folders["train"].iterdir() if p.is_dir()))
    found = {split: _listing(config, path, names) for split, path in folders.items()}
    if shape is None:
        paths = [path for split in SPLITS for path, _ in found.get(split, [])]
        shape = _common_shape(paths, progress)
    return {split: _listed(listing, root, names, shape) for split, listing in found.items()}


def _common_shape(paths: list[Path], progress: bool) -> Shape:
    """The one shape of all images; ConfigError names the first that is another."""
    with _open(paths[0]) as image:
        width, height = image.size
    if width != height:
        raise ConfigError(f"data.path: {paths[0]} is {width} × {height} pixels; it must be square")
    modes = set()
    with progress_bar("Checking images", len(paths), progress) as advance:
        for path in paths:
            with _open(path) as image:
                modes.add(image.mode)
                if image.size != (width, height):
                    found = " × ".join(map(str, image.size))
                    raise ConfigError(
                        f"data.path: {path} is {found} pixels but {paths[0]} is {width} × "
                        f"{height}; all images must have one shape"
                    )
            advance(1)
    return height, width, 1 if modes <= set(GREY_MODES) else 3


def _listed(
    listing: list[tuple[Path, int]],
    root: Path,
    class_names: tuple[str, ...],
    shape: Shape,
) -> Table:
    # By a hash of the name, so that an image that is added later hardly moves the others.
    names = [str(path.relative_to(root)).encode() for path, _ in listing]
    hashes = [blake2b(name, digest_size=8).digest() for name in names]
    return Table(
        labels=np.array([label for _, label in listing], np.int64),
        order=np.array(sorted(range(len(listing)), key=hashes.__getitem__)),
        class_names=class_names,
        shape=shape,
        paths=tuple(path for path, _ in listing),
    )


def _listing(
    config: DataConfig, folder: Path, class_names: tuple[str, ...]
) -> list[tuple[Path, int]]:
    listing = []
    for class_folder in sorted(p for p in folder.iterdir() if p.is_dir()):
        if class_folder.name not in class_names:
            raise ConfigError(
                f"data.path={config.path}: {class_folder} is no class of the train split, which "
                f"has {', '.join(class_names)}"
            )
        label = class_names.index(class_folder.name)
        paths = sorted(p for p in class_folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        listing += [(path, label) for path in paths]
    if not listing:
        raise ConfigError(
            f"data.path={config.path}: {folder} holds no images; data.kind=images reads a folder "
            f"per class with {', '.join(SUFFIXES[:3])}, ... files, or an .npz"
        )
    return listing

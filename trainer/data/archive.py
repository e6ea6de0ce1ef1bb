"""Labelled images in an .npz archive; layouts and ranges that are unknown are rejected.

N images · H rows · W columns · C channels
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from trainer.config.train import DataConfig, DataError
from trainer.data.folders import FILLERS, SPLITS, split_of
from trainer.data.image_files import ImageTable, Shape
from trainer.data.pictures import pixels_of
from trainer.data.sampler import epoch_permutation

ROLES = {
    **dict.fromkeys(("x", "image", "images", "pixels"), "x"),
    **dict.fromkeys(("y", "label", "labels", "target", "targets"), "y"),
}


@dataclass(frozen=True)
class Archive:
    """The tables of an archive's splits, and the names of the arrays they are made of."""

    tables: dict[str, ImageTable]
    sources: dict[str, tuple[str, str]]
    left_out: dict[str, str]


def read_archive(config: DataConfig, path: Path) -> Archive:
    """Read an .npz with x_train, y_train, ... and optionally `classes`; raises DataError.

    Pixels are uint8 or converted to it: bool and integers that are 0 or 1, uint16 by its range,
    floats from 0 to 1, and other whole numbers from 0 to 255.
    """
    where = f"data.path={config.path}"
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive.items())
    except Exception as error:  # zip, zlib and numpy raise many types on damaged files
        why = " ".join(str(error).split())[:200]  # some messages quote the file
        why = re.sub(r"malformed node or string.*", "a damaged header", why)
        raise DataError(
            f"{where}: {path} is not an .npz archive of numbers ({why}); data.kind=images reads "
            "an .npz with x_train and y_train, or a folder of class folders"
        ) from error
    no_array = {key: "not an array" for key, array in arrays.items() if isinstance(array, bytes)}
    arrays = {key: array for key, array in arrays.items() if key not in no_array}
    keys, left_out = _array_roles(where, arrays)
    if ("x", "train") not in keys or ("y", "train") not in keys:
        raise DataError(
            f"{where} holds {', '.join(sorted(arrays)) or 'nothing'}; it must hold x_train and "
            "y_train, and may hold x_valid, y_valid, x_test, y_test and classes"
        )
    found = [split for split in SPLITS if ("x", split) in keys]
    for role, split in keys:
        if split not in found:
            raise DataError(
                f"{where} holds {keys[role, split]}, but no images of the {split} split; add "
                f"x_{split}, or remove it"
            )
    names = {split: (keys["x", split], keys.get(("y", split), f"y_{split}")) for split in found}
    return Archive(_split_tables(where, arrays, names), names, left_out | no_array)


def _split_tables(
    where: str, arrays: dict[str, np.ndarray], names: dict[str, tuple[str, str]]
) -> dict[str, ImageTable]:
    """Return the table of each split; `names` has its image and label arrays, train first."""
    labels, class_names = _class_labels(where, arrays, names)
    scale, tables = None, dict[str, ImageTable]()
    for split, (x, y) in names.items():
        pixels, scale = _to_uint8(f"{where}: {x}", arrays[x], scale)
        if len(pixels) != len(labels[split]) or len(pixels) == 0:
            raise DataError(
                f"{where}: {x} has shape {arrays[x].shape} but {y} has shape {arrays[y].shape}; "
                "there must be one label for each image"
            )
        shape: Shape = (pixels.shape[1], pixels.shape[2], pixels.shape[3])
        first = tables["train"].shape if tables else shape
        if shape != first or shape[0] != shape[1]:
            raise DataError(
                f"{where}: images of {x} have the shape {shape}, those of {names['train'][0]} "
                f"{first}; all must be square and of one shape"
            )
        order = epoch_permutation(0, 0, len(pixels))
        tables[split] = ImageTable(labels[split], order, class_names, shape, pixels=pixels)
    return tables


def _array_roles(
    where: str, arrays: dict[str, np.ndarray]
) -> tuple[dict[tuple[str, str], str], dict[str, str]]:
    """Return the array of each (role x or y, split), and why other arrays are left out."""
    keys: dict[tuple[str, str], str] = {}
    left_out = {}
    for key in arrays:
        words = re.findall(r"[^\W\d_]+", key.lower())
        roles = {ROLES[word] for word in words if word in ROLES}
        others = [word for word in words if word not in ROLES and word not in FILLERS]
        split = split_of(others[0]) if len(others) == 1 else None  # not x_train_mean
        if key == "classes":
            continue
        if len(roles) != 1 or not split:
            left_out[key] = "an array that is neither images nor labels of a split"
            continue
        role = roles.pop()
        if (role, split) in keys:
            raise DataError(
                f"{where} holds {keys[role, split]} and {key}, which are both of the {split} "
                "split; remove one"
            )
        keys[role, split] = key
    return keys, left_out


def _to_uint8(where: str, images: np.ndarray, scale: str | None) -> tuple[np.ndarray, str]:
    """Return the pixels (N, H, W, C) uint8 and their range; `scale` is the range of train."""
    if images.ndim == 4 and images.shape[1] in (1, 3, 4) and images.shape[3] not in (1, 3, 4):
        images = images.transpose(0, 2, 3, 1)
    images = images[..., None] if images.ndim == 3 else images
    images = images.astype(images.dtype.newbyteorder("="), copy=False)
    wrong = images.dtype.kind not in "buif" or images.ndim != 4 or images.shape[-1] not in (1, 3, 4)
    if wrong or 0 in images.shape[1:]:
        raise DataError(
            f"{where} is {images.dtype} of shape {images.shape}; it must be numbers of shape "
            "(images, rows, columns), or with 1, 3 or 4 channels as well"
        )
    scale = scale or _pixel_range(images)
    low, high = (float(images.min()), float(images.max())) if images.size else (0.0, 0.0)
    top, scales = TOPS[scale], {scale, _pixel_range(images)} if images.size else {scale}
    if scale == "uint16" and images.dtype == np.uint16:
        scales = {scale}  # a dark split of a brighter data set
    compatible = scales <= {"uint8", "whole", "bool"} and images.dtype.kind != "b"
    compatible |= scale == "bool" and images.dtype.kind in "biu"
    if not (low >= 0.0 and high <= top) or not (len(scales) == 1 or compatible):
        raise DataError(
            f"{where} is {images.dtype} from {low:g} to {high:g}; pixels must be uint8 or uint16 "
            "(of its whole range), floats from 0 to 1, or whole numbers from 0 to 255, the "
            "same in all splits"
        )
    if scale in ("uint8", "whole"):
        pixels = images.astype(np.uint8)
    else:
        pixels = np.rint(images.astype(np.float64) * (255.0 / top)).astype(np.uint8)
    if pixels.shape[-1] == 4:
        pixels = np.stack([pixels_of(Image.fromarray(p, "RGBA"), 3) for p in pixels])
    return pixels, scale


# The maximum of each range; -1 = rejected, as the range of such numbers is unknown.
TOPS = {
    "bool": 1.0,
    "uint8": 255.0,
    "whole": 255.0,
    "uint16": 65535.0,
    "unit": 1.0,
    "fraction": -1.0,
    "few bits": -1.0,  # 12 bits in 16, or dark: scaled to 8 bits, at most 16 shades are left
}


def _pixel_range(images: np.ndarray) -> str:
    """Return the range of an array of pixels, a key of TOPS, by its dtype or its values."""
    if images.dtype.kind in "iu" and images.size and images.min() >= 0 and images.max() == 1:
        return "bool"
    if images.dtype == np.uint16:
        most = int(images.max(initial=0))
        return "whole" if most <= 255 else "few bits" if most < 1 << 12 else "uint16"
    if images.dtype.name in ("bool", "uint8"):
        return images.dtype.name
    if images.dtype.kind == "f":
        if images.size and float(images.max()) <= 1.0:
            return "unit"
        return "whole" if (images == np.rint(images)).all() else "fraction"
    return "whole"


def _class_labels(
    where: str, arrays: dict[str, np.ndarray], names: dict[str, tuple[str, str]]
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Return the labels (N,) int64 of each split, and the class names."""
    found = {}
    for split, (x, y) in names.items():
        if y not in arrays:
            raise DataError(f"{where}: {x} has shape {arrays[x].shape} but {y} is missing")
        found[split] = _label_column(f"{where}: {y}", arrays[y])
    if found["train"].dtype.kind == "U":
        class_names = tuple(map(str, np.unique(found["train"])))
        if number := next((s for s, column in found.items() if column.dtype.kind != "U"), None):
            raise DataError(
                f"{where}: labels of train are words, those of {number} numbers; use words for all"
            )
        if "classes" in arrays:
            raise DataError(f"{where}: labels are words, and `classes` names them again")
    else:
        count = int(found["train"].max(initial=-1)) + 1
        if count > len(found["train"]) and "classes" not in arrays:
            raise DataError(
                f"{where}: {names['train'][1]} holds labels up to {count - 1} for "
                f"{len(found['train'])} images; labels must be whole numbers from 0 to less than "
                "the number of classes: renumber them, or name all of them in `classes`"
            )
        class_names = tuple(map(str, _decode_names(np.ravel(arrays.get("classes", range(count))))))
    if len(set(class_names)) < len(class_names):
        raise DataError(f"{where}: `classes` names a class twice: {', '.join(class_names)}")
    rows = {name: row for row, name in enumerate(class_names)}
    labels = {}
    for split, column in found.items():
        if column.dtype.kind == "U":
            column = np.array([rows.get(name, -1) for name in column], np.int64)
        if len(column) and (column.min() < 0 or column.max() >= len(class_names)):
            raise DataError(
                f"{where}: {names[split][1]} holds {column.min()} to {column.max()}; labels must "
                f"be whole numbers from 0 to {len(class_names) - 1} for {len(class_names)} classes"
            )
        labels[split] = column.astype(np.int64)
    return labels, class_names


def _label_column(where: str, labels: np.ndarray) -> np.ndarray:
    """Return the labels (N,) as int64 or text; raises DataError if they are neither."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    labels = _decode_names(labels)
    is_label = labels.dtype.kind in "biuU" or (
        labels.dtype.kind == "f"
        and bool((labels == np.rint(labels)).all() and (abs(labels) < 1 << 31).all())
    )
    if labels.ndim != 1 or not is_label:
        raise DataError(
            f"{where} is {labels.dtype} of shape {labels.shape}; it must be one whole number, or "
            "one word, for each image"
        )
    return labels if labels.dtype.kind == "U" else labels.astype(np.int64)


def _decode_names(names: np.ndarray) -> np.ndarray:
    """Decode bytes as UTF-8, else as Latin-1; return other arrays unchanged."""
    if names.dtype.kind != "S":
        return names
    try:
        return np.char.decode(names, "utf-8")
    except UnicodeDecodeError:
        return np.char.decode(names, "latin-1")

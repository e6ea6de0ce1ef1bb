"""Fit annotated pictures into squares, on all cores, and write them for `StoredSplit`."""

import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import cpu_count
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.train import DataConfig, DataError, UserError
from trainer.data import pictures
from trainer.data.cache import Record, progress_bar
from trainer.data.detection.annotations import AnnotatedPicture, Annotations, first_names
from trainer.data.detection.dataset import StoredPicture
from trainer.data.detection.scene import Boxes, Letterbox, make_boxes

SLACK = 1.0  # pixels that a box may reach over the edge, as some tools count from 1
CLIPPED = "{} boxes reach over the edge of their picture and are clipped"
REPEATED = "{} boxes are listed twice in their picture and are counted once"
FARTHEST = 1e9  # pixels: no corner is farther
OUTSIDE = "{} boxes are outside their picture, or have no area, and are left out"
TURNED = "{} pictures are turned by their EXIF, and their boxes read as of the turned picture"
EMPTY = "{} pictures have no box and are background"
STATISTICS = 10_000  # training pictures used for mean and standard deviation


@dataclass(frozen=True)
class _Looked:
    """A picture in its square; without pixels it could not be read."""

    pixels_HWC: np.ndarray | None = None
    stored: StoredPicture | None = None
    grey: bool = True
    problem: str = ""


def write_pictures(config: DataConfig, found: Annotations, folder: Path, progress: bool) -> Record:
    """Write each split's squares and boxes into the folder, and return its record."""
    counts = Counter(found.counts)
    total = sum(map(len, found.splits.values()))
    with (
        progress_bar("Fitting pictures", total, progress) as advance,
        ThreadPoolExecutor(cpu_count()) as pool,
    ):
        looked = {
            split: _look_at(pool, config, found, split, counts, advance) for split in found.splits
        }
    damaged = {
        picture.name: look.problem
        for split, looks in looked.items()
        for picture, look in zip(found.splits[split], looks, strict=True)
        if look.problem
    }
    if damaged and config.on_bad_file == "stop":
        raise _damaged_error(damaged, total)
    channels = 1 if all(look.grey for looks in looked.values() for look in looks) else 3
    sizes = {}
    for split, looks in looked.items():
        sizes[split] = _write_split(config, split, looks, channels, folder, counts)
    return {
        "class_names": found.class_names,
        "shape": [config.image_size, config.image_size, channels],
        **measure_pixels(np.load(folder / "train.npy", mmap_mode="r")),
        "splits": {
            split: {"samples": size, "sources": found.sources[split]}
            for split, size in sizes.items()
        },
        "left_out": found.left_out | {name: f"damaged: {why}" for name, why in damaged.items()},
        "notes": [note.format(f"{count:,}") for note, count in counts.items() if count],
    }


def _look_at(
    pool: ThreadPoolExecutor,
    config: DataConfig,
    found: Annotations,
    split: str,
    counts: Counter[str],
    advance: Callable[[int], None],
) -> list[_Looked]:
    rows = {name: row for row, name in enumerate(found.class_names)}
    looks = []
    for look, own in pool.map(lambda p: _fit_picture(p, rows, config), found.splits[split]):
        looks.append(look)
        counts.update(own)
        advance(1)
    return looks


def _fit_picture(
    picture: AnnotatedPicture, rows: dict[str, int], config: DataConfig
) -> tuple[_Looked, Counter[str]]:
    counts: Counter[str] = Counter()
    if picture.path is None:
        return _Looked(problem="no such file"), counts
    try:
        with pictures.open_image(picture.path) as image:
            grey, turned = pictures.is_grey(image), pictures.is_turned(image)
            pixels_HWC = pictures.pixels_of(image, 1 if grey else 3)
    except UserError as error:
        why = str(error).partition("read as an image: ")[2] or str(error)
        return _Looked(problem=why), counts
    height, width = pixels_HWC.shape[:2]
    if picture.size not in (None, (width, height)):
        stated = " × ".join(map(str, picture.size or ()))
        problem = f"{width} × {height} pixels, annotated as {stated}"
        problem += ", as EXIF turns it" if turned and picture.size == (height, width) else ""
        return _Looked(problem=problem), counts
    letterbox = Letterbox(width, height, config.image_size)
    boxes = _checked_boxes(picture, rows, width, height, counts)
    counts[TURNED] += turned and len(boxes) > 0
    stored = StoredPicture(letterbox, boxes)
    return _Looked(letterbox.fit_pixels(pixels_HWC), stored, grey), counts


def _checked_boxes(
    picture: AnnotatedPicture, rows: dict[str, int], width: int, height: int, counts: Counter[str]
) -> Boxes:
    """Return the boxes inside the picture, in its pixels."""
    corners_N4 = np.array(picture.corners, np.float64).reshape(-1, 4)
    areas_N = np.array(picture.areas, np.float64)
    if picture.in_sides:
        corners_N4, areas_N = corners_N4 * ([width, height] * 2), areas_N * width * height
    known_N = np.isfinite(corners_N4).all(axis=1)
    corners_N4 = np.clip(corners_N4, -FARTHEST, FARTHEST)
    boxes = make_boxes(
        corners_N4.tolist(),
        [rows[name] for name in picture.classes],
        picture.crowd,
        np.clip(areas_N, 0, FARTHEST).tolist(),
    )
    good = boxes.select(np.flatnonzero(known_N))
    beyond_N4 = np.concatenate(
        (-good.corners_N4[:, :2], good.corners_N4[:, 2:] - np.array([width, height])), axis=1
    )
    over = np.flatnonzero(beyond_N4.max(axis=1, initial=0.0) > SLACK)
    inside = good.clipped(width, height)
    counts[OUTSIDE] += len(boxes) - len(inside)
    counts[CLIPPED] += len(good.select(over).clipped(width, height))
    rows_N5 = np.column_stack((inside.corners_N4, inside.classes_N))
    _, first_N = np.unique(rows_N5, axis=0, return_index=True)
    counts[REPEATED] += len(inside) - len(first_N)
    return inside.select(np.sort(first_N))


def _write_split(
    config: DataConfig,
    split: str,
    looks: list[_Looked],
    channels: int,
    folder: Path,
    counts: Counter[str],
) -> int:
    """Write the squares and boxes of a split; return its number of pictures."""
    kept = [(look.pixels_HWC, look.stored) for look in looks if not look.problem]
    if not kept:
        raise DataError(f"data.path={config.path}: no picture of the {split} split can be read")
    size = config.image_size
    pixels_NHWC = np.lib.format.open_memmap(
        folder / f"{split}.npy", "w+", np.uint8, (len(kept), size, size, channels)
    )
    stored: list[dict[str, Any]] = []
    for row, (square, picture) in enumerate(kept):
        assert square is not None and picture is not None
        pixels_NHWC[row] = square  # a grey one gives all channels its values
        stored.append(picture.to_json())
        if not len(picture.boxes):
            counts[EMPTY] += 1
    pixels_NHWC.flush()
    if split == "train" and not any(len(picture.boxes) for _, picture in kept if picture):
        notes = "; ".join(note.format(f"{count:,}") for note, count in counts.items() if count)
        raise DataError(
            f"data.path={config.path}: no picture of the train split has a box: {notes}"
        )
    (folder / f"{split}.json").write_text(json.dumps(stored), encoding="utf-8")
    return len(kept)


def read_pictures(folder: Path, split: str, size: int) -> list[StoredPicture]:
    """Return what `write_pictures` wrote of a split's boxes."""
    stored = json.loads((folder / f"{split}.json").read_text(encoding="utf-8"))
    return [StoredPicture.from_json(values, size) for values in stored]


def measure_pixels(pixels_NHWC: np.ndarray) -> Record:
    """Return mean and deviation of each channel, of pixels in [0, 1]."""
    count = len(pixels_NHWC)
    rows = np.linspace(0, count - 1, min(count, STATISTICS)).astype(int)
    sums = np.zeros((2, pixels_NHWC.shape[3]))
    for row in rows:
        image_PC = np.asarray(pixels_NHWC[row]).reshape(-1, pixels_NHWC.shape[3]) / 255
        sums += np.stack((image_PC.mean(0), (image_PC**2).mean(0)))
    mean_C, square_C = sums / len(rows)
    std_C = np.sqrt(np.maximum(square_C - mean_C**2, 0))
    return {"mean": mean_C.tolist(), "std": np.where(std_C > 0, std_C, 1.0).tolist()}


def _damaged_error(damaged: dict[str, str], total: int) -> DataError:
    shown = first_names(f"{name} ({why})" for name, why in damaged.items())
    return DataError(
        f"data.path: {len(damaged)} of {total} pictures cannot be read: {shown}; repair them, or "
        "leave them out with data.on_bad_file=skip"
    )

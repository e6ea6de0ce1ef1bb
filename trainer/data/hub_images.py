"""Images of a Hugging Face data set, written as one .npz archive for images.py."""

import logging
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.train import DataConfig, DataError, UserError
from trainer.data import pictures
from trainer.data.reader import HubFormat, HubRows

log = logging.getLogger(__name__)

ARCHIVE = "images.npz"


def write_archive(config: DataConfig, folder: Path, rows: HubRows) -> None:
    """Write all splits as one .npz; see `_image_arrays` for damaged pictures."""
    arrays = _image_arrays(config, rows)
    if rows.class_names:
        arrays["classes"] = np.array(rows.class_names)
    np.savez(folder / ARCHIVE, **arrays)


FORMAT = HubFormat(
    columns=(("image", "label"), ("img", "label"), ("image", "labels")),
    write=write_archive,
    file=ARCHIVE,
)


def _image_arrays(config: DataConfig, rows: HubRows) -> dict[str, Any]:
    """Return the images x and labels y of each split.

    Damaged images are counted in `rows.left_out`, or raise DataError if data.on_bad_file=stop.
    """
    read: dict[str, list[tuple[np.ndarray, Any]]] = {}
    for split, cells in rows.splits.items():
        read[split], damaged = [], []
        for number, (image, label) in enumerate(cells):
            try:
                pixels = _cell_pixels(config, f"image {number} of {split}", image)
                read[split].append((pixels, label))
            except UserError as error:
                damaged.append(str(error))
        if damaged and config.on_bad_file == "stop":
            more = f"; and {len(damaged) - 1} more" if len(damaged) > 1 else ""
            raise DataError(
                f"{damaged[0]}{more}; repair them, or leave them out with data.on_bad_file=skip"
            )
        if damaged:
            log.warning("%d images of %s are damaged and are left out", len(damaged), split)
            rows.left_out[f"{len(damaged)} images of {split}"] = "damaged"
    channels = max((image.shape[-1] for found in read.values() for image, _ in found), default=1)
    arrays: dict[str, Any] = {}
    for split, found in read.items():
        images = [i.repeat(3, -1) if (i.shape[-1], channels) == (1, 3) else i for i, _ in found]
        shapes = {picture.shape for picture in images}
        if len(shapes) != 1:
            sizes = ", ".join(map(str, sorted(shapes))) or "none"
            raise DataError(
                f"data.path={config.path}: the {split} split has images of the shapes {sizes}; all "
                "must have one shape"
            )
        arrays[f"x_{split}"] = np.stack(images)
        arrays[f"y_{split}"] = np.array([label for _, label in found])
    return arrays


def _cell_pixels(config: DataConfig, name: str, image: Any) -> np.ndarray:
    """Return a cell as (H, W, C): uint8 of a picture, or numbers that archive.py checks."""
    if isinstance(image, dict):
        content = BytesIO(image["bytes"]) if image.get("bytes") else None
        name = name if content else str(image.get("path"))
        with pictures.open_image(name, f"data.path={config.path}", content) as picture:
            return pictures.pixels_of(picture, 1 if pictures.is_grey(picture) else 3)
    try:
        numbers = np.asarray(image)
    except ValueError as error:  # rows of different lengths
        raise DataError(f"data.path={config.path}: {name} is not an array: {error}") from error
    return numbers if numbers.ndim == 3 else numbers[..., None]

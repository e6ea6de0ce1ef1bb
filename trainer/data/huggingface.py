"""Hugging Face data sets, written out once as the files that the readers take."""

import logging
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.train import ConfigError, DataConfig, DataError, UserError
from trainer.data import pictures
from trainer.data.cache import Record, build, opened, prepared_folder
from trainer.data.files import name_of
from trainer.data.folders import scan, split_of

log = logging.getLogger(__name__)

USUAL = {
    "text": (("text",), ("content",)),
    "images": (("image", "label"), ("img", "label"), ("image", "labels")),
    "pairs": (("source", "target"),),
}


def export(config: DataConfig) -> Path:
    """Return the file or folder of `hf:NAME` or `hf:NAME:SUBSET`, downloaded and converted if need
    be.
    """
    folder = located(config)
    build(folder, lambda temporary: _write(config, temporary))
    return _inside(config, folder)


def located(config: DataConfig) -> Path:
    """Return the folder of the converted data set."""
    local = Path(config.path.removeprefix("hf:"))
    files = scan(local)[0].files() if local.is_dir() else ()
    fingerprints = [file.fingerprint() for file in files]
    settings = [config.path, config.fields, config.document_separator, config.on_bad_file]
    ingredients = [*settings, *fingerprints]
    return prepared_folder(config, f"hf-{name_of(config)}", ingredients)


def unread(config: DataConfig) -> dict[str, str]:
    """Return the splits and rows that were left out when the data set was converted, and why."""
    found: dict[str, str] = opened(located(config)).get("left_out", {})
    return found


def _inside(config: DataConfig, folder: Path) -> Path:
    return folder / "images.npz" if config.kind == "images" else folder


def exported(config: DataConfig) -> Path:
    """Return what `export` has made."""
    return _inside(config, located(config))


def _write(config: DataConfig, folder: Path) -> Record:
    splits, left_out = _load(config)
    columns = _columns(config, splits["train"])
    rows = {split: _complete(config, split, found, columns) for split, found in splits.items()}
    for split, found in rows.items():
        if missing := len(splits[split]) - len(found):
            log.warning("%d rows of %s have an empty cell and are left out", missing, split)
            left_out[f"{missing} rows of {split}"] = "a cell is empty"
    if config.kind == "images":
        arrays = _arrays(config, rows, left_out)
        if names := getattr(splits["train"].features[columns[1]], "names", None):
            arrays["classes"] = np.array(names)
        np.savez(folder / "images.npz", **arrays)
    for split, found in rows.items():
        if config.kind == "text":
            text = (config.document_separator or "\n").join(texts[0] for texts in found)
            (folder / f"{split}.txt").write_text(text, encoding="utf-8", newline="")
        elif config.kind == "pairs":
            lines = ("\t".join(" ".join(str(side).split()) for side in pair) for pair in found)
            (folder / f"{split}.tsv").write_text("\n".join(lines), encoding="utf-8", newline="")
    return {"left_out": left_out}


def _load(config: DataConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the data set's splits under our names, and those that are not read."""
    if find_spec("datasets") is None:
        raise ConfigError(
            f'data.path={config.path} needs `datasets`: pip install "samestep[huggingface]"'
        )
    name, _, subset = config.path.removeprefix("hf:").partition(":")
    try:
        # Imported by name because it is optional, and slow to import.
        found = import_module("datasets").load_dataset(name, subset or None)
    except Exception as error:  # the library raises what its many back ends do
        raise DataError(f"data.path={config.path} cannot be loaded: {error}") from error
    splits: dict[str, Any] = {}
    left_out = {}
    for theirs in found:
        ours = split_of(theirs)
        if ours and ours not in splits:
            splits[ours] = found[theirs]
        else:
            left_out[theirs] = f"another {ours} split" if ours else "named after no split"
    if "train" not in splits:
        raise DataError(f"data.path={config.path} has no train split but {', '.join(found)}")
    return splits, left_out


def _columns(config: DataConfig, rows: Any) -> tuple[str, ...]:
    """Return the columns to read.

    Of `translation`, a dict of languages, `translation.LANGUAGE` each.
    """
    names = _flat_names(rows)
    usual = [columns for columns in USUAL[config.kind] if set(columns) <= set(names)]
    languages = tuple(name for name in names if name.startswith("translation."))
    if config.kind == "pairs" and len(languages) == 2:
        usual.insert(0, languages)
    chosen = tuple(config.fields)
    if chosen == ("translation",) and len(languages) == 2:
        chosen = languages
    if chosen:
        chosen = tuple(f if f in names else f"translation.{f}" for f in chosen)
    else:
        chosen = usual[0] if usual else ()
    if len(chosen) == len(USUAL[config.kind][0]) and set(chosen) <= set(names):
        return chosen
    examples = " or ".join(", ".join(columns) for columns in USUAL[config.kind])
    raise ConfigError(
        f"data.path={config.path} has the columns {', '.join(names)}, of which data.fields="
        f"{config.fields} and data.kind={config.kind} read none; set data.fields to "
        f"{len(USUAL[config.kind][0])} of them, e.g. [{examples}]"
    )


def _flat_names(rows: Any) -> list[str]:
    """Return the columns, and those inside a column that is a dict of languages."""
    inner = rows.features.get("translation")
    languages = list(getattr(inner, "languages", inner if isinstance(inner, dict) else ()))
    if not languages:
        return list(rows.column_names)
    within = [f"translation.{language}" for language in languages]
    return [name for name in rows.column_names if name != "translation"] + within


def _complete(
    config: DataConfig, split: str, rows: Any, columns: tuple[str, ...]
) -> list[tuple[Any, ...]]:
    """Return the cells of the columns, of the rows in which none of them is empty."""
    found = []
    try:
        for name, feature in rows.features.items():
            if type(feature).__name__ == "Image":  # decoded here, as all pictures are
                rows = rows.cast_column(name, type(feature)(decode=False))
        for row in rows:
            cells = tuple(_cell(row, column) for column in columns)
            empty = any(cell is None for cell in cells)
            blank = config.kind == "pairs" and any(not str(cell).strip() for cell in cells)
            if not empty and not blank:
                found.append(cells)
    except Exception as error:  # the library raises what its many back ends do
        raise DataError(
            f"data.path={config.path}: the {split} split cannot be read: {error}"
        ) from error
    allowed: tuple[type, ...] = (str,) if config.kind == "text" else (str, int, float)
    for cells in found if config.kind != "images" else []:
        for column, cell in zip(columns, cells, strict=True):
            if not isinstance(cell, allowed):
                raise DataError(
                    f"data.path={config.path}: the column {column} of the {split} split holds a "
                    f"{type(cell).__name__}; data.kind={config.kind} reads text, set data.fields"
                )
    return found


def _cell(row: dict[str, Any], column: str) -> Any:
    outer, _, inner = column.partition(".")
    if column in row or not inner:
        return row[column]
    return (row[outer] or {}).get(inner)


def _arrays(
    config: DataConfig, splits: dict[str, list[tuple[Any, ...]]], left_out: dict[str, str]
) -> dict[str, Any]:
    """Images x and labels y of each split; those that are damaged go to `left_out`, if allowed."""
    read: dict[str, list[tuple[np.ndarray, Any]]] = {}
    for split, rows in splits.items():
        read[split], damaged = [], []
        for number, (image, label) in enumerate(rows):
            try:
                read[split].append((_pixels(config, f"image {number} of {split}", image), label))
            except UserError as error:
                damaged.append(str(error))
        if damaged and config.on_bad_file == "stop":
            more = f"; and {len(damaged) - 1} more" if len(damaged) > 1 else ""
            raise DataError(
                f"{damaged[0]}{more}; put them right, or leave them out with data.on_bad_file=skip"
            )
        if damaged:
            log.warning("%d images of %s are damaged and are left out", len(damaged), split)
            left_out[f"{len(damaged)} images of {split}"] = "damaged"
    channels = max((image.shape[-1] for rows in read.values() for image, _ in rows), default=1)
    arrays: dict[str, Any] = {}
    for split, found in read.items():
        images = [
            image.repeat(3, -1) if (image.shape[-1], channels) == (1, 3) else image
            for image, _ in found
        ]
        shapes = {picture.shape for picture in images}
        if len(shapes) != 1:
            sizes = ", ".join(map(str, sorted(shapes))) or "none"
            raise DataError(
                f"data.path={config.path}: the {split} split has images of the shapes {sizes}; all "
                "must have one shape"
            )
        labels = np.array([label for _, label in found])
        arrays |= {f"x_{split}": np.stack(images), f"y_{split}": labels}
    return arrays


def _pixels(config: DataConfig, name: str, image: Any) -> np.ndarray:
    """(H, W, C) of one cell: uint8 of a picture, or numbers that archive.py judges."""
    if isinstance(image, dict):
        content = BytesIO(image["bytes"]) if image.get("bytes") else None
        name = name if content else str(image.get("path"))
        with pictures.opened(name, f"data.path={config.path}", content) as picture:
            return pictures.pixels_of(picture, 1 if pictures.is_grey(picture) else 3)
    try:
        numbers = np.asarray(image)
    except ValueError as error:  # rows of different lengths
        raise DataError(f"data.path={config.path}: {name} is no array: {error}") from error
    return numbers if numbers.ndim == 3 else numbers[..., None]

"""Hugging Face data sets, written out once as the files that the readers take."""

import logging
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import ConfigError, DataConfig
from trainer.data.folders import split_of
from trainer.data.pictures import GREY, pixels_of
from trainer.data.prepared import Record, build, opened, prepared_folder
from trainer.data.source import Part, name_of

log = logging.getLogger(__name__)

USUAL = {
    "text": (("text",), ("content",)),
    "images": (("image", "label"), ("img", "label"), ("image", "labels")),
    "pairs": (("source", "target"),),
}


def export(config: DataConfig) -> Path:
    """The file or folder of `hf:NAME` or `hf:NAME:SUBSET`, downloaded and converted if need be."""
    folder = located(config)
    build(folder, lambda temporary: _write(config, temporary))
    return _inside(config, folder)


def located(config: DataConfig) -> Path:
    """The folder of the converted data set."""
    local = Path(config.path.removeprefix("hf:"))
    files = sorted(p for p in local.rglob("*") if p.is_file()) if local.is_dir() else []
    fingerprints: list[Any] = [Part(path, 0, 0).fingerprint() for path in files]
    ingredients = [config.path, config.fields, config.document_separator, *fingerprints]
    return prepared_folder(config, f"hf-{name_of(config)}", ingredients)


def unread(config: DataConfig) -> dict[str, str]:
    """Return the splits and rows that were left out when the data set was converted, and why."""
    found: dict[str, str] = opened(located(config)).get("left_out", {})
    return found


def _inside(config: DataConfig, folder: Path) -> Path:
    return folder / "images.npz" if config.kind == "images" else folder


def exported(config: DataConfig) -> Path:
    """What `export` has made."""
    return _inside(config, located(config))


def _write(config: DataConfig, folder: Path) -> Record:
    splits, left_out = _load(config)
    columns = _columns(config, splits["train"])
    rows = {split: _complete(config, found, columns) for split, found in splits.items()}
    for split, found in rows.items():
        if missing := len(splits[split]) - len(found):
            log.warning("%d rows of %s have an empty cell and are left out", missing, split)
            left_out[f"{missing} rows of {split}"] = "a cell is empty"
    if config.kind == "images":
        _save_arrays(config, rows, splits["train"].features[columns[1]], folder / "images.npz")
    for split, found in rows.items():
        if config.kind == "text":
            text = (config.document_separator or "\n").join(texts[0] for texts in found)
            (folder / f"{split}.txt").write_text(text, encoding="utf-8", newline="")
        elif config.kind == "pairs":
            lines = ("\t".join(" ".join(str(side).split()) for side in pair) for pair in found)
            (folder / f"{split}.tsv").write_text("\n".join(lines), encoding="utf-8", newline="")
    return {"left_out": left_out}


def _load(config: DataConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """The data set's splits under our names, and those that are not read."""
    if find_spec("datasets") is None:
        raise ConfigError(
            f'data.path={config.path} needs `datasets`: pip install "samestep[huggingface]"'
        )
    name, _, subset = config.path.removeprefix("hf:").partition(":")
    try:
        # Imported by name because it is optional, and slow to import.
        found = import_module("datasets").load_dataset(name, subset or None)
    except Exception as error:  # the library raises what its many back ends do
        raise ConfigError(f"data.path={config.path} cannot be loaded: {error}") from error
    splits: dict[str, Any] = {}
    left_out = {}
    for theirs in found:
        ours = split_of(theirs)
        if ours and ours not in splits:
            splits[ours] = found[theirs]
        else:
            left_out[theirs] = f"another {ours} split" if ours else "named after no split"
    if "train" not in splits:
        raise ConfigError(f"data.path={config.path} has no train split but {', '.join(found)}")
    return splits, left_out


def _columns(config: DataConfig, rows: Any) -> tuple[str, ...]:
    """The columns to read; of `translation`, a dict of languages, `translation.LANGUAGE` each."""
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
    """The columns, and those inside a column that is a dict of languages."""
    first = rows[0] if len(rows) else {}
    inner = first.get("translation")
    within = [f"translation.{language}" for language in inner] if isinstance(inner, dict) else []
    return [name for name in rows.column_names if name != "translation"] + within


def _complete(config: DataConfig, rows: Any, columns: tuple[str, ...]) -> list[tuple[Any, ...]]:
    """The cells of the columns, of the rows in which none of them is empty."""
    found = []
    for row in rows:
        cells = tuple(_cell(row, column) for column in columns)
        empty = any(cell is None for cell in cells)
        blank = config.kind == "pairs" and any(not str(cell).strip() for cell in cells)
        if not empty and not blank:
            found.append(cells)
    return found


def _cell(row: dict[str, Any], column: str) -> Any:
    outer, _, inner = column.partition(".")
    if column in row or not inner:
        return row[column]
    return (row[outer] or {}).get(inner)


def _save_arrays(
    config: DataConfig, splits: dict[str, list[tuple[Any, ...]]], feature: Any, path: Path
) -> None:
    arrays: dict[str, Any] = {}
    modes = {image.mode for rows in splits.values() for image, _ in rows if hasattr(image, "mode")}
    channels = 1 if modes <= set(GREY) else 3
    for split, rows in splits.items():
        images = [_pixels(config, split, image, channels) for image, _ in rows]
        shapes = {picture.shape for picture in images}
        if len(shapes) != 1:
            raise ConfigError(
                f"data.path={config.path}: the {split} split has images of shapes {shapes}; all "
                "must have one shape"
            )
        labels = np.array([label for _, label in rows])
        arrays |= {f"x_{split}": np.stack(images), f"y_{split}": labels}
    if names := getattr(feature, "names", None):
        arrays["classes"] = np.array(names)
    np.savez(path, **arrays)


def _pixels(config: DataConfig, split: str, image: Any, channels: int) -> np.ndarray:
    if not hasattr(image, "mode"):
        return np.asarray(image)  # rows of numbers, which archive.py judges
    try:
        return pixels_of(image, channels)
    except Exception as error:  # Pillow's readers raise what they like on damaged files
        raise ConfigError(
            f"data.path={config.path}: an image of the {split} split cannot be read: {error}"
        ) from error

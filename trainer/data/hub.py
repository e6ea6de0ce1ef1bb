"""Hugging Face data sets, written out once as the files that the readers take."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import ConfigError, DataConfig
from trainer.data.prepared import Record, build, prepared_folder
from trainer.data.source import SPELLINGS, Part, name_of

USUAL = {
    "text": (("text",), ("content",)),
    "images": (("image", "label"), ("img", "label"), ("image", "labels")),
    "pairs": (("translation",), ("source", "target")),
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


def _inside(config: DataConfig, folder: Path) -> Path:
    return folder / "images.npz" if config.kind == "images" else folder


def exported(config: DataConfig) -> Path:
    """What `export` has made."""
    return _inside(config, located(config))


def _write(config: DataConfig, folder: Path) -> Record:
    splits = _load(config)
    columns = _columns(config, splits["train"].column_names)
    if config.kind == "images":
        _save_arrays(config, splits, columns, folder / "images.npz")
    for split, rows in splits.items():
        if config.kind == "text":
            texts = (row[columns[0]] for row in rows)
            (folder / f"{split}.txt").write_text(
                (config.document_separator or "\n").join(texts), encoding="utf-8", newline=""
            )
        elif config.kind == "pairs":
            lines = ("\t".join(_pair(row, columns)) for row in rows)
            (folder / f"{split}.tsv").write_text("\n".join(lines), encoding="utf-8", newline="")
    return {}


def _load(config: DataConfig) -> dict[str, Any]:
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
    splits = {s: found[n] for s, names in SPELLINGS.items() for n in names if n in found}
    if "train" not in splits:
        raise ConfigError(f"data.path={config.path} has no train split but {', '.join(found)}")
    return splits


def _columns(config: DataConfig, names: list[str]) -> tuple[str, ...]:
    choices = [tuple(config.fields)] if config.fields else USUAL[config.kind]
    for columns in choices:
        if set(columns) <= set(names) and len(columns) in {len(usual) for usual in choices}:
            return columns
    usual = " or ".join(", ".join(columns) for columns in USUAL[config.kind])
    raise ConfigError(
        f"data.path={config.path} has the columns {', '.join(names)}, of which data.fields="
        f"{config.fields} and data.kind={config.kind} read none; set data.fields, e.g. [{usual}]"
    )


def _pair(row: dict[str, Any], columns: tuple[str, ...]) -> list[str]:
    sides = list(row[columns[0]].values()) if len(columns) == 1 else [row[c] for c in columns]
    return [" ".join(str(side).split()) for side in sides[:2]]


def _save_arrays(
    config: DataConfig, splits: dict[str, Any], columns: tuple[str, ...], path: Path
) -> None:
    image, label = columns
    arrays: dict[str, Any] = {}
    for split, rows in splits.items():
        images = [np.asarray(row[image]) for row in rows]
        shapes = {picture.shape for picture in images}
        if len(shapes) > 1:
            raise ConfigError(
                f"data.path={config.path}: the {split} split has images of shapes {shapes}; all "
                "must have one shape"
            )
        arrays |= {f"x_{split}": np.stack(images), f"y_{split}": np.array(rows[label])}
    names = getattr(splits["train"].features[label], "names", None)
    if names:
        arrays["classes"] = np.array(names)
    np.savez(path, **arrays)

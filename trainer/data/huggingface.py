"""Hugging Face data sets, converted once to files that the readers accept."""

import logging
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainer.config.train import ConfigError, DataConfig, DataError
from trainer.data.cache import Record, build_folder, load_prepared, prepared_folder
from trainer.data.files import name_of
from trainer.data.folders import scan_folder, split_of
from trainer.data.reader import HubFormat, HubRows

log = logging.getLogger(__name__)


def export_dataset(config: DataConfig, format: HubFormat) -> Path:
    """Download and convert `hf:NAME` or `hf:NAME:SUBSET` if need be; return its file or folder."""
    folder = converted_folder(config)
    build_folder(folder, lambda temporary: _write_dataset(config, format, temporary))
    return folder / format.file


def converted_folder(config: DataConfig) -> Path:
    """Return the cache folder of the converted data set."""
    local = Path(config.path.removeprefix("hf:"))
    files = scan_folder(local)[0].iter_files() if local.is_dir() else ()
    fingerprints = [file.fingerprint() for file in files]
    settings = [config.path, config.fields, config.document_separator, config.on_bad_file]
    ingredients = [*settings, *fingerprints]
    return prepared_folder(config, f"hf-{name_of(config)}", ingredients)


def left_out_rows(config: DataConfig) -> dict[str, str]:
    """Return the splits and rows that the conversion left out, and why."""
    found: dict[str, str] = load_prepared(converted_folder(config)).get("left_out", {})
    return found


def exported_path(config: DataConfig, format: HubFormat) -> Path:
    """Return the file or folder that `export_dataset` has made."""
    return converted_folder(config) / format.file


def _write_dataset(config: DataConfig, format: HubFormat, folder: Path) -> Record:
    splits, left_out = _load_splits(config)
    columns = _column_names(config, format, splits["train"])
    rows = {
        split: _complete_rows(config, format, split, found, columns)
        for split, found in splits.items()
    }
    for split, found in rows.items():
        if missing := len(splits[split]) - len(found):
            log.warning("%d rows of %s have an empty cell and are left out", missing, split)
            left_out[f"{missing} rows of {split}"] = "a cell is empty"
    names = getattr(splits["train"].features.get(columns[-1]), "names", None)
    format.write(config, folder, HubRows(rows, names, left_out))
    return {"left_out": left_out}


def _load_splits(config: DataConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the data set's splits as train, valid and test, and why others are not read."""
    if find_spec("datasets") is None:
        raise ConfigError(
            f'data.path={config.path} needs `datasets`: pip install "samestep[huggingface]"'
        )
    name, _, subset = config.path.removeprefix("hf:").partition(":")
    try:
        # Imported by name because it is optional, and slow to import.
        found = import_module("datasets").load_dataset(name, subset or None)
    except Exception as error:  # its back ends raise many types
        raise DataError(f"data.path={config.path} cannot be loaded: {error}") from error
    splits: dict[str, Any] = {}
    left_out = {}
    for theirs in found:
        ours = split_of(theirs)
        if ours and ours not in splits:
            splits[ours] = found[theirs]
        else:
            left_out[theirs] = f"another {ours} split" if ours else "not named after a split"
    if "train" not in splits:
        raise DataError(f"data.path={config.path} has no train split but {', '.join(found)}")
    return splits, left_out


def _column_names(config: DataConfig, format: HubFormat, rows: Any) -> tuple[str, ...]:
    """Return the columns to read; a language of `translation` is `translation.LANGUAGE`."""
    names = _flat_names(rows)
    usual = [columns for columns in format.columns if set(columns) <= set(names)]
    languages = tuple(name for name in names if name.startswith("translation."))
    if format.languages and len(languages) == 2:
        usual.insert(0, languages)
    chosen = tuple(config.fields)
    if chosen == ("translation",) and len(languages) == 2:
        chosen = languages
    if chosen:
        chosen = tuple(f if f in names else f"translation.{f}" for f in chosen)
    else:
        chosen = usual[0] if usual else ()
    if len(chosen) in map(len, format.columns) and set(chosen) <= set(names):
        return chosen
    examples = " or ".join(", ".join(columns) for columns in format.columns)
    raise ConfigError(
        f"data.path={config.path} has the columns {', '.join(names)}, of which data.fields="
        f"{config.fields} and data.kind={config.kind} read none; set data.fields to "
        f"{len(format.columns[0])} of them, e.g. [{examples}]"
    )


def _flat_names(rows: Any) -> list[str]:
    """Return the column names, with `translation` expanded to one name per language."""
    inner = rows.features.get("translation")
    languages = list(getattr(inner, "languages", inner if isinstance(inner, dict) else ()))
    if not languages:
        return list(rows.column_names)
    within = [f"translation.{language}" for language in languages]
    return [name for name in rows.column_names if name != "translation"] + within


def _complete_rows(
    config: DataConfig, format: HubFormat, split: str, rows: Any, columns: tuple[str, ...]
) -> list[tuple[Any, ...]]:
    """Return the cells of the columns of every row in which none of them is empty."""
    found = []
    try:
        for name, feature in rows.features.items():
            if type(feature).__name__ == "Image":  # pictures.py decodes all pictures
                rows = rows.cast_column(name, type(feature)(decode=False))
        for row in rows:
            cells = tuple(_cell(row, column) for column in columns)
            empty = any(cell is None for cell in cells)
            blank = format.skips_blank and any(not str(cell).strip() for cell in cells)
            if not empty and not blank:
                found.append(cells)
    except Exception as error:  # its back ends raise many types
        raise DataError(
            f"data.path={config.path}: the {split} split cannot be read: {error}"
        ) from error
    for cells in found if format.cell_types else []:
        for column, cell in zip(columns, cells, strict=True):
            if not isinstance(cell, format.cell_types):
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

"""Folders of prepared data: written atomically, and reused until their sources change."""

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from trainer.config.train import ConfigError, DataConfig, StorageError

RECORD = "prepared.json"
FORMAT = 2  # increment when the files of a prepared folder change their meaning

Record = dict[str, Any]

log = logging.getLogger(__name__)


def prepared_folder(config: DataConfig, name: str, ingredients: list[Any]) -> Path:
    """Return the folder for these ingredients; a change of any of them gives another folder."""
    text = json.dumps([FORMAT, config.kind, ingredients], default=str)
    fingerprint = blake2b(text.encode(), digest_size=6).hexdigest()
    return Path(config.cache) / f"{name}-{fingerprint}"


def build_folder(folder: Path, write: Callable[[Path], Record]) -> Record:
    """Return the record of a folder; `write` fills it and returns the record if need be.

    Several processes may build at once: each fills a temporary folder, and the first to finish
    renames it. Raises StorageError if data.cache cannot be written.
    """
    record = read_prepared(folder)
    if record is not None:
        return record
    if folder.exists():
        log.warning("%s; it is prepared again", find_damage(folder))
    try:
        return _fill_folder(folder, write)
    except OSError as error:
        raise StorageError(
            f"data.cache={folder.parent} cannot be written: {error}; set data.cache to a "
            "folder with free space"
        ) from error


def _fill_folder(folder: Path, write: Callable[[Path], Record]) -> Record:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        record = write(temporary)
        record["files"] = {f.name: f.stat().st_size for f in sorted(temporary.iterdir())}
        (temporary / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
        temporary.chmod(0o755)  # mkdtemp denies access to other users
        if read_prepared(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)  # the existing one is damaged
            _publish_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return record


def _publish_folder(temporary: Path, folder: Path) -> None:
    try:
        temporary.replace(folder)
    except OSError:
        if read_prepared(folder) is None:  # else another process has built the same content
            raise


def read_prepared(folder: Path) -> Record | None:
    """Return the record of an intact prepared folder, or None."""
    return None if find_damage(folder) else _parse_record(folder)


def find_damage(folder: Path) -> str:
    """Return what is wrong with a prepared folder, e.g. its sizes in bytes; empty = intact."""
    try:
        sizes = dict(_parse_record(folder)["files"])
    except OSError:
        return f"{folder} is missing or holds no {RECORD}"
    except (ValueError, KeyError, TypeError):
        return f"{folder / RECORD} is damaged"
    for name, expected in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != expected:
            return f"{path} is damaged: it has {path.stat().st_size} bytes, not {expected}"
    return ""


def load_prepared(folder: Path) -> Record:
    """Return the record of a prepared folder; raises ConfigError if it is no longer intact."""
    if found := find_damage(folder):
        raise ConfigError(
            f"{found}; data.path or data.cache has changed since it was prepared. Start again: "
            "it is prepared again"
        )
    return _parse_record(folder)


def _parse_record(folder: Path) -> Record:
    record: Record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    return record


@contextmanager
def progress_bar(title: str, total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function that advances the bar by its argument; shown if stderr is a terminal."""
    console = Console(stderr=True)
    if not (show and console.is_terminal):
        yield lambda done: None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.advance(task, done)

"""Atomic writes of files and folders."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from parallel.errors import StorageError


def write_atomically(path: Path, text: str) -> None:
    """Write a file atomically."""
    # A name of its own: two ranks may write at once.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Fsync a folder's entries to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(to: Path) -> Iterator[Path]:
    """Yield a folder that is renamed to `to` at the end; StorageError if it cannot be written.

    If anything fails, no partial folder is left.
    """
    partial = to.with_name(f".{to.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        partial.rename(to)
    except OSError as error:
        raise StorageError(
            f"output_dir={to} cannot be written ({error.strerror}); choose another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)

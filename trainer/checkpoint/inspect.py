"""List and verify checkpoints, without a process group and without torch."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from trainer.checkpoint.folder import find_leftovers, list_checkpoints
from trainer.checkpoint.manifest import (
    NAME,
    CorruptCheckpointError,
    Manifest,
    check_folder,
    file_problems,
    read_manifest,
)
from trainer.config.train import ConfigError
from trainer.metrics.console import print_whole


def print_checkpoints(run_dir: Path) -> bool:
    """Print a table of a run's checkpoints, by file names and sizes; True if all are complete.

    Raises ConfigError if the folder holds none.
    """
    table = Table()
    for title in ("checkpoint", "state", "size", "eval_loss", "written by", ""):
        table.add_column(title)
    whole = True
    for path in _all_checkpoints(run_dir):
        try:
            manifest = check_folder(path, hashed=())
        except CorruptCheckpointError as error:
            whole = False
            table.add_row(path.name, "damaged", "", "", "", str(error))
        else:
            loss = "" if manifest.eval_loss is None else f"{manifest.eval_loss:.4f}"
            size = f"{manifest.size / 1e6:,.1f} MB"
            table.add_row(path.name, "complete", size, loss, _format_layout(manifest), "")
    for path in find_leftovers(run_dir):
        table.add_row(path.name, "incomplete", "", "", "", "being written, or its run was killed")
    print_whole(table)
    Console().print("`verify` compares every byte", highlight=False)
    return whole


def verify_checksums(path: Path) -> bool:
    """Compare every byte of a checkpoint, or of a run's, with its manifest; True if all match.

    Prints a line for each, with all damage found. Raises ConfigError if there is no checkpoint.
    """
    console, good = Console(), True
    for folder in [path] if _is_checkpoint(path) else _all_checkpoints(path):
        try:
            manifest = read_manifest(folder)
            problems = file_problems(folder, manifest, manifest.files)
        except CorruptCheckpointError as error:
            problems = [str(error)]
        good = good and not problems
        what = "; ".join(problems) or f"{len(manifest.files)} files, {manifest.size:,} bytes"
        state = "damaged" if problems else "good"
        console.print(f"{folder} {state}: {what}", markup=False, highlight=False, soft_wrap=True)
    return good


def require_valid_checkpoint(path: Path) -> tuple[Path, Manifest]:
    """Return folder and manifest of a checkpoint, or of a run's newest; ConfigError if invalid."""
    folder = path
    if not _is_checkpoint(path):
        found = list_checkpoints(path)
        if not found:
            raise ConfigError(_no_checkpoint_message(path))
        folder = found[-1][1]
    try:
        return folder, check_folder(folder)
    except CorruptCheckpointError as error:
        raise ConfigError(f"{folder} is damaged: {error}") from error


def _is_checkpoint(path: Path) -> bool:
    return (path / NAME).exists() or path.name.startswith("step-")


def _all_checkpoints(run_dir: Path) -> list[Path]:
    """Return published and retired checkpoints, oldest first."""
    found = [path for _, path in list_checkpoints(run_dir)]
    found += sorted((run_dir / "checkpoints").glob("unused-step-*"))
    if not found and not find_leftovers(run_dir):
        raise ConfigError(_no_checkpoint_message(run_dir))
    return found


def _no_checkpoint_message(path: Path) -> str:
    return f"{path} is no checkpoint, and no run's folder that holds one; name either"


def _format_layout(manifest: Manifest) -> str:
    parts = {axis: degree for axis, degree in manifest.layout.items() if degree != 1}
    return " ".join(f"{axis}={degree}" for axis, degree in parts.items()) or "ranks=1"

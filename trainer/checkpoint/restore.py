"""Restore a run: all ranks agree on the newest valid checkpoint and load it."""

import logging
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor
from torch import distributed as dist

from parallel.errors import StorageError
from parallel.parallel_model import ParallelModel
from parallel.runtime import all_gather_objects, broadcast_from_rank0
from parallel.strategy import StrategyConfig, axis_degrees
from trainer.checkpoint.contents import KEPT, Checkpointed
from trainer.checkpoint.folder import checkpoint_path, find_leftovers, list_checkpoints
from trainer.checkpoint.identity import RunRecord
from trainer.checkpoint.manifest import (
    CorruptCheckpointError,
    Manifest,
    TensorEntry,
    UnsupportedFormatError,
    file_problems,
    read_manifest,
)
from trainer.checkpoint.shards import DTYPES, read_tensors, read_whole, take_rows
from trainer.checkpoint.vocabulary import BY_ROW
from trainer.checkpoint.weight_digest import check_base
from trainer.config.lora import FACTORS
from trainer.config.train import ConfigError
from trainer.optim.lr_schedule import lr_jump_message

log = logging.getLogger(__name__)

DIFFERENCES_SHOWN = 5


def layout_of(strategy: StrategyConfig) -> dict[str, int]:
    """Return the degrees and the world size, in the form that a manifest stores."""
    return axis_degrees(strategy) | {"ranks": dist.get_world_size()}


@dataclass
class Candidate:
    """The checkpoint to load, and the newer damaged ones that are skipped."""

    path: Path | None = None  # None = none is valid
    manifest: Manifest | None = None
    damaged: dict[int, str] = field(default_factory=dict)  # reason by step


def find_newest_valid(run_dir: Path, step: int = 0) -> Candidate:
    """Return the newest valid checkpoint, or that of `step`; the same on every rank.

    Every byte is compared with the manifest; each file is hashed by one rank. Raises ConfigError
    for a checkpoint of another format version, which an older one must not silently replace.
    """
    while True:
        choice, removed = Candidate(), False
        steps = broadcast_from_rank0([step for step, _ in list_checkpoints(run_dir)])
        for candidate in reversed([s for s in steps if step in (0, s)]):
            path = checkpoint_path(run_dir, candidate)
            try:
                choice.manifest = _check_on_all_ranks(path)
            except UnsupportedFormatError as error:
                raise ConfigError(f"{path}: {error}; or choose another run_dir") from error
            except CorruptCheckpointError as error:
                choice.damaged[candidate] = str(error)
            except FileNotFoundError:  # removed by the running run: a newer one exists
                removed = True
            else:
                choice.path = path
                return choice
        if not removed:
            return choice


def _check_on_all_ranks(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint; if any rank finds damage, every rank raises."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    problem: CorruptCheckpointError | None = None
    try:
        manifest = read_manifest(folder)
        mine = set(sorted(manifest.files)[rank::ranks])
        found = file_problems(folder, manifest, mine)
        problem = CorruptCheckpointError(found[0]) if found else None
    except CorruptCheckpointError as error:
        problem = error
    except OSError as error:
        problem = CorruptCheckpointError(f"cannot be read: {error}")
    everyone = all_gather_objects(problem)
    if not any(everyone):
        return manifest
    if not broadcast_from_rank0(folder.exists()):
        raise FileNotFoundError(folder)
    raise next(error for error in everyone if error)


def restore_checkpoint(
    run: RunRecord, state: Checkpointed, step: int = 0, scratch: bool = False
) -> None:
    """Resume from the newest valid checkpoint of run.run_dir, or from that of `step`.

    Damaged checkpoints are logged with the number of steps lost, and newer ones are renamed.
    Without any checkpoint the state is unchanged. Raises ConfigError if the checkpoint has another
    model, configuration or data, and StorageError if all are damaged (unless `scratch`).
    """
    run_dir, first = Path(run.run_dir), dist.get_rank() == 0
    if first:
        _remove_partial(run_dir)
    state.run = broadcast_from_rank0(uuid4().hex)
    while True:
        choice = find_newest_valid(run_dir, step)
        if choice.path is None:
            break
        assert choice.manifest is not None
        _check_same_run(run, choice.manifest)
        check_base(f"run_dir={run.run_dir}", choice.manifest.base, state.base)
        if _load_state(choice.path, choice.manifest, state, run):
            state.run = choice.manifest.run
            break
    state.read_rollbacks(run.run_dir, state.order_batch_size or run.identity["batch_size"])
    lines = [
        f"{checkpoint_path(run_dir, step)} is damaged: {reason}"
        for step, reason in choice.damaged.items()
    ]
    if choice.path is None and choice.damaged and not scratch:
        raise StorageError(
            "\n".join(lines) + f"\nno checkpoint in run_dir={run_dir} is good; put one back, set "
            "resume_step to another, choose another run_dir, or begin again with resume=scratch"
        )
    if first:
        for line in lines:
            log.warning(line)
        if choice.damaged:
            lost = max(choice.damaged) - state.step
            log.warning("going on from step %d: %d steps are done again", state.step, lost)
        _retire_newer(run_dir, state.step)


def _check_same_run(run: RunRecord, manifest: Manifest) -> None:
    problems = run.differences(manifest.config)
    other = run.data and manifest.data and run.data != manifest.data
    if other and not run.may_change("data.path"):
        problems.append(
            f"run_dir={run.run_dir} was trained on other data: what data.path="
            f"{run.identity['data.path']} holds has changed since step {manifest.step}; put the "
            "old data back, choose another run_dir, or go on all the same with "
            "resume_changed=[data.path]"
        )
    if problems:
        raise ConfigError(*problems)
    batch_size = run.identity["batch_size"]
    if dist.get_rank() == 0:
        for key, value in run.identity.items():
            if (before := manifest.config.get(key, value)) != value:
                log.warning("going on with %s=%s, not %s: see resume_changed", key, value, before)
        if other:
            log.warning("going on with other data: see resume_changed")
        if leap := lr_jump_message(manifest.step, run.steps, manifest.lr, run.optim):
            log.warning(leap)
        elif (before := manifest.config.get("batch_size")) not in (None, batch_size):
            log.warning(
                "a step takes %d samples, not %d, at the same learning rate: see optim.lr, which "
                "suits one batch_size, and steps=%d, which counts steps of either size",
                *(batch_size, before, run.steps),
            )


def _load_state(path: Path, manifest: Manifest, state: Checkpointed, run: RunRecord) -> bool:
    strategy = run.strategy
    _check_shapes(path, manifest, state.weight_shapes)
    tensors = state.state_tensors()
    if not _has_error_feedback(manifest, tensors, strategy):
        tensors = {n: t for n, t in tensors.items() if not n.startswith(KEPT)}
        if dist.get_rank() == 0:
            log.warning(
                "the error feedback of strategy.reduce=%s begins anew: %s was saved under another "
                "layout, or with another strategy.reduce",
                *(strategy.reduce, path),
            )
    _check_optimizer_state(path, manifest, tensors)
    if not _read_on_all_ranks(path, manifest, tensors):
        return False
    state.after_load(tensors)
    # Older versions counted the data in steps of one batch size.
    batch_size = int(manifest.config.get("batch_size", run.identity["batch_size"]))
    state.order_batch_size = manifest.order_batch_size or batch_size
    state.samples = state.step * batch_size if manifest.samples is None else manifest.samples
    return True


def _has_error_feedback(
    manifest: Manifest, tensors: dict[str, Tensor], strategy: StrategyConfig
) -> bool:
    """Return whether a checkpoint has the error-feedback state of these ranks and gradient sums."""
    own = {name: tuple(t.shape) for name, t in tensors.items() if name.startswith(KEPT)}
    there = {name: entry.shape for name, entry in manifest.tensors.items() if name in own}
    return not own or (own == there and manifest.layout == layout_of(strategy))


def _read_on_all_ranks(path: Path, manifest: Manifest, tensors: dict[str, Tensor]) -> bool:
    """Load the tensors on all ranks; False if the checkpoint was removed meanwhile."""
    problem = ""
    try:
        read_tensors(path, manifest, tensors)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    problems = [f"rank {r}: {text}" for r, text in enumerate(all_gather_objects(problem)) if text]
    if problems and broadcast_from_rank0(path.exists()):
        raise RuntimeError(f"{path} is good but cannot be read: {problems[0]}")
    return not problems


def load_weights(run_dir: Path, worker: ParallelModel, rows: list[int] | None = None) -> Path:
    """Load the weights of a run's newest valid checkpoint into a model, and return its folder.

    `rows` as for `load` in trained_run.py. Raises ConfigError if there is none, or if its model has
    other parameters or shapes.
    """
    parameters = base_weights(worker)
    shapes = {n: shape for n, shape in worker.whole.shapes.items() if not n.endswith(FACTORS)}
    if rows is None:
        return load_parameters(run_dir, parameters, shapes)
    alike = {name: p for name, p in parameters.items() if name not in BY_ROW}
    path = load_parameters(run_dir, alike, shapes, by_row=BY_ROW)
    manifest = read_manifest(path)
    for name in parameters.keys() - alike.keys():
        take_rows(parameters[name], read_whole(path, manifest, f"model.{name}"), rows)
    return path


def base_weights(worker: ParallelModel) -> dict[str, Tensor]:
    """Return this rank's weights by canonical name, without the factors of adapters."""
    return {n: p for n, p in worker.parameters().items() if not n.endswith(FACTORS)}


def load_parameters(
    run_dir: Path,
    parameters: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    key: str = "run_dir",
    by_row: Collection[str] = (),
) -> Path:
    """Load the local parameters of a model with the given full shapes; see `load_weights`.

    All ranks must call it, also those without parameters. `key` is the config key that names the
    folder. Parameters in `by_row` may have another number of rows in the checkpoint.
    """
    weights = {f"model.{name}": parameter for name, parameter in parameters.items()}
    while True:
        path, manifest = _newest_weights(run_dir, key)
        _check_shapes(path, manifest, shapes, by_row)
        if _read_on_all_ranks(path, manifest, weights):
            return path


def _newest_weights(run_dir: Path, key: str) -> tuple[Path, Manifest]:
    """Return the newest valid checkpoint; ConfigError if there is none."""
    choice = find_newest_valid(run_dir)
    if dist.get_rank() == 0:
        for step, reason in choice.damaged.items():
            log.warning("%s is damaged: %s", checkpoint_path(run_dir, step), reason)
    if choice.path is None:
        what = "no good checkpoint" if choice.damaged else "no checkpoint yet"
        raise ConfigError(f"{key}={run_dir} holds {what}; train there first")
    assert choice.manifest is not None
    return choice.path, choice.manifest


def _check_shapes(
    path: Path, manifest: Manifest, shapes: Mapping[str, torch.Size], by_row: Collection[str] = ()
) -> None:
    saved = {
        name.removeprefix("model."): entry.shape
        for name, entry in manifest.tensors.items()
        if name.startswith("model.")
    }
    ours = {name: tuple(shape) for name, shape in shapes.items()}
    for name in by_row:
        if name in ours and name in saved and ours[name][1:] == saved[name][1:]:
            ours[name] = saved[name]
    other = [name for name in {**ours, **saved} if ours.get(name) != saved.get(name)]
    if not other:
        return
    missing = "missing"
    shown = "; ".join(
        f"{name} is {saved.get(name, missing)} there and {ours.get(name, missing)} in this model"
        for name in other[:DIFFERENCES_SHOWN]
    )
    more = f"; and {len(other) - DIFFERENCES_SHOWN} more" if len(other) > DIFFERENCES_SHOWN else ""
    raise ConfigError(
        f"checkpoint {path} has another shape: {shown}{more}; set model=… as in the run's "
        "config.yaml, or choose another run_dir"
    )


def _check_optimizer_state(path: Path, manifest: Manifest, tensors: dict[str, Tensor]) -> None:
    """Raise ConfigError, on every rank, if the optimizer's state differs from the saved one."""
    odd = [
        name
        for name, tensor in tensors.items()
        if name.startswith("optimizer.")
        and not _has_same_layout(manifest.tensors.get(name), tensor)
    ]
    found = [name for names in all_gather_objects(odd[:1]) for name in names]
    if not found:
        return
    name = found[0].removeprefix("optimizer.")
    raise ConfigError(
        f"checkpoint {path} holds other moments, the first of them {name}; set optim.name as in "
        "the run's config.yaml (and for adamw8bit a strategy.tensor that cuts rows into the same "
        "blocks), or choose another run_dir"
    )


def _has_same_layout(entry: TensorEntry | None, tensor: Tensor) -> bool:
    if entry is None or entry.shape != tuple(tensor.shape):
        return False
    codes = DTYPES[torch.uint8]
    return (entry.dtype == codes) == (DTYPES[tensor.dtype] == codes)


def _remove_partial(run_dir: Path) -> None:
    """Remove the leftovers of an interrupted save or removal."""
    left = find_leftovers(run_dir)
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    if left:
        names = ", ".join(path.name for path in left)
        log.info("removed what a killed run left unfinished in %s: %s", left[0].parent, names)


def _retire_newer(run_dir: Path, step: int) -> None:
    """Rename the checkpoints newer than the resumed step, since the run diverges from them."""
    for newer, path in list_checkpoints(run_dir):
        if newer > step:
            aside = path.with_name(f"unused-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            log.warning("%s is not gone on from; it is now %s", path, aside.name)

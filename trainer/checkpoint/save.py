"""Save checkpoints: copy in the training thread, write and publish in a background thread.

The ranks agree through the process group's store, never by a collective, which could interleave
with those of training. So a save that fails on one rank fails on all.
"""

import logging
import math
import shutil
import time
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread
from typing import Any, Self
from uuid import uuid4

from torch import distributed as dist

from parallel.errors import StorageError, UserError
from parallel.health.watchdog import StoppedError
from parallel.runtime import broadcast_from_rank0
from parallel.store_tree import StoreTree
from trainer.atomic_files import sync_folder
from trainer.checkpoint.contents import Checkpointed
from trainer.checkpoint.folder import checkpoint_path, list_checkpoints, steps_to_keep
from trainer.checkpoint.identity import RunRecord
from trainer.checkpoint.manifest import (
    CorruptCheckpointError,
    FileEntry,
    Manifest,
    check_folder,
    file_name,
    write_manifest,
)
from trainer.checkpoint.restore import layout_of
from trainer.checkpoint.shards import Shard
from trainer.config.train import CheckpointConfig
from trainer.optim.lr_schedule import learning_rate_at

log = logging.getLogger(__name__)

LEAVING_SECONDS = 10.0  # wait for a save in flight when training fails


@dataclass(frozen=True)
class PendingSave:
    """A save in progress: its number in this process, and the metadata for its manifest."""

    number: int
    step: int
    samples: int
    eval_loss: float | None  # None unless finite
    began: float  # monotonic seconds


class Saver:
    """Saves the checkpoints of a run; a context manager whose methods all ranks call in step.

    At most one save is in flight: it holds the only copy in host memory.
    """

    def __init__(self, run: RunRecord, config: CheckpointConfig, state: Checkpointed):
        """Plan the saves of this state of a run.

        Raises StorageError, on all ranks, if the disk cannot hold one checkpoint more.
        """
        self._run_save, self._config = run, config
        self._folder = checkpoint_path(run.run_dir, 0).parent
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._record: dict[str, Any] = {
            "run": state.run,
            "config": dict(run.identity),
            "data": run.data,
            "layout": layout_of(run.strategy),
            "order_batch_size": state.order_batch_size,
            "base": dict(state.base),
        }
        there = checkpoint_path(run.run_dir, state.step).exists()
        # the token makes the names unique
        self._token, there = broadcast_from_rank0((uuid4().hex[:8], there))
        store = dist.distributed_c10d._get_default_store()
        # A clone has its own connection: waiting on it does not block other users of the store.
        clone = store.clone()  # type: ignore[attr-defined]
        store = dist.PrefixStore(f"saves-{self._token}", clone)
        self._tree = StoreTree(store, self._rank, self._ranks)
        self._shard = Shard(state.state_tensors(), self._tree)
        if problem := broadcast_from_rank0(self._too_small() if self._rank == 0 else ""):
            raise StorageError(problem)
        self._number = 0
        self._thread: Thread | None = None
        self._outcome: dict[str, str] = {}
        self._news: deque[dict[str, Any]] = deque()
        self._saved_step = state.step if there else -1
        self._step_in_flight = -1
        self._warned = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        """Finish the save in flight; raise StorageError if it failed."""
        if kind is None:
            self.wait(last=True)
        elif self._thread is not None:
            # After a user's mistake or a signal all ranks are alive; after anything else one may be
            # dead.
            together = issubclass(kind, UserError | StoppedError)
            self._thread.join(None if together else LEAVING_SECONDS)

    def save(self, state: Checkpointed, eval_loss: float | None = None) -> None:
        """Save the run, with its loss on the valid split if measured.

        Returns after the copy or, with checkpoint.async_save=false, after publishing. Raises
        StorageError, on all ranks, if a save has failed and checkpoint.on_error=stop.
        """
        self.wait()
        if state.step == self._saved_step:
            return
        self._number += 1
        # A loss that is not finite cannot be compared, and JSON cannot represent it.
        measured = eval_loss is not None and math.isfinite(eval_loss)
        save = PendingSave(
            self._number,
            state.step,
            state.samples,
            eval_loss if measured else None,
            time.monotonic(),
        )
        self._shard.copy_tensors(state.state_tensors())
        self._step_in_flight = state.step
        self._thread = Thread(target=self._write_all, args=(save,), name="checkpoint", daemon=True)
        self._thread.start()
        if not self._config.async_save:
            self.wait()

    def wait(self, last: bool = False) -> None:
        """Wait for the save in flight; a failure of the `last` one always raises."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if "bug" in self._outcome:
                raise RuntimeError(f"a checkpoint could not be saved:\n{self._outcome['bug']}")
            if "problem" not in self._outcome:
                self._saved_step = self._step_in_flight
        problem = self._outcome.get("problem")
        if problem and (last or self._config.on_error == "stop"):
            raise StorageError(problem)

    def finished_saves(self) -> Iterator[dict[str, Any]]:
        """Yield, on rank 0, a metrics record for each save finished since the last call."""
        while self._news:
            yield self._news.popleft()

    def forget_last_save(self) -> None:
        """Wait, and allow a saved step to be saved again after a rollback."""
        self.wait()
        self._saved_step = -1

    def _write_all(self, save: PendingSave) -> None:
        """Write this rank's file and collect the outcome of all ranks, in the background thread."""
        try:
            reports = self._tree.gather(f"{save.number}", self._write_shard(save))
            self._outcome = (
                self._tree.hear(f"{save.number}/all")
                if self._rank
                else self._publish_outcome(save, reports)
            )
        except Exception:
            self._outcome = {"bug": traceback.format_exc()}
        if self._rank:
            return
        # Without a store no rank is left to notify; the cause is reported elsewhere.
        with suppress(dist.DistError):
            self._tree.tell(f"{save.number}/all", self._outcome)
        self._warn_not_saved(save)
        if not self._outcome:
            self._remove_old(save)
        self._note_saved(save)

    def _write_shard(self, save: PendingSave) -> dict[str, Any]:
        """Write this rank's file; return its size and digest, or the error."""
        partial = self._partial_folder(save)
        try:
            partial.mkdir(parents=True, exist_ok=True)
            free, needed = shutil.disk_usage(partial).free, self._shard.file_bytes()
            if needed > free:  # never fill the disk completely
                return {"problem": "No space left on device"}
            entry = self._shard.write_file(partial / file_name(self._rank))
            return {} if entry is None else asdict(entry)
        except OSError as error:
            return {"problem": error.strerror or str(error)}
        except Exception:
            return {"bug": traceback.format_exc()}

    def _publish_outcome(
        self, save: PendingSave, reports: dict[int, dict[str, Any]]
    ) -> dict[str, str]:
        """Publish a save on rank 0; return an empty dict on success."""
        # All ranks have read it: they have reached this save.
        self._tree.store.delete_key(f"{save.number - 1}/all")
        partial = self._partial_folder(save)
        try:
            if not any({"problem", "bug"} & report.keys() for report in reports.values()):
                files = {file_name(r): FileEntry(**f) for r, f in sorted(reports.items()) if f}
                self._publish_checkpoint(save, partial, files)
                return {}
        except OSError as error:
            reports[0] = {"problem": error.strerror or str(error)}
        shutil.rmtree(partial, ignore_errors=True)
        for rank, report in sorted(reports.items()):
            if "bug" in report:
                return {"bug": f"rank {rank}: {report['bug']}"}
        rank, reason = min((r, f["problem"]) for r, f in reports.items() if "problem" in f)
        return {"problem": self._failure_message(save, rank, reason)}

    def _publish_checkpoint(
        self, save: PendingSave, partial: Path, files: dict[str, FileEntry]
    ) -> None:
        write_manifest(
            partial,
            Manifest(
                step=save.step,
                samples=save.samples,
                eval_loss=save.eval_loss,
                lr=learning_rate_at(save.step, self._run_save.steps, self._run_save.optim),
                tensors=self._shard.tensors,
                files=files,
                **self._record,
            ),
        )
        final = checkpoint_path(self._run_save.run_dir, save.step)
        replaced = final.with_name(f"unused-{final.name}")
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        partial.rename(final)
        sync_folder(self._folder)

    def _remove_old(self, save: PendingSave) -> None:
        """Remove the checkpoints that checkpoint.keep* do not retain; damaged ones do not count."""
        options = self._config
        found = list_checkpoints(self._run_save.run_dir)
        losses: dict[int, float | None] = {save.step: save.eval_loss}
        for step, path in found:
            try:
                losses[step] = check_folder(path, hashed=()).eval_loss
            except CorruptCheckpointError:
                log.info("%s is damaged and does not count as kept", path)
        chosen = steps_to_keep(losses, options.keep, options.keep_best, options.keep_every)
        for step, path in found:
            if options.keep and step not in chosen:
                _remove_checkpoint(path)

    def _note_saved(self, save: PendingSave) -> None:
        if "problem" in self._outcome:
            reason = self._outcome["problem"]
            self._news.append({"event": "save_failed", "step": save.step, "reason": reason})
        elif not self._outcome:
            seconds = round(time.monotonic() - save.began, 3)
            gib = round(self._shard.total_bytes / 2**30, 6)
            self._news.append({"event": "save", "step": save.step, "seconds": seconds, "gib": gib})

    def _warn_not_saved(self, save: PendingSave) -> None:
        told = self._config.on_error == "stop" or save.step >= self._run_save.steps
        if "problem" in self._outcome and not told:  # reported as the run's error
            log.warning(
                "%s; training goes on, and the next save tries again", self._outcome["problem"]
            )
        seconds, grace = time.monotonic() - save.began, self._config.grace_seconds
        if grace and seconds > grace and not self._warned:
            self._warned = True
            log.warning(
                "the save of step %d took %.1f s, more than checkpoint.grace_seconds=%g: a run "
                "that is told to stop may be killed before it has saved; ask for a longer grace",
                *(save.step, seconds, grace),
            )

    def _failure_message(self, save: PendingSave, rank: int, reason: str) -> str:
        return (
            f"the save of step {save.step} failed on rank {rank}: {reason}; it needs "
            f"{_format_bytes(self._shard.total_bytes)} and "
            f"{_format_bytes(_free_bytes(self._folder))} are free in "
            f"run_dir={self._run_save.run_dir}; older checkpoints are untouched"
        )

    def _too_small(self) -> str:
        """Return the reason that the disk cannot hold one more checkpoint; empty if it can."""
        needed = self._shard.total_bytes
        try:
            if not self._folder.exists():
                self._folder.mkdir(parents=True)
                sync_folder(self._folder.parent)
            free = _free_bytes(self._folder)
        except OSError as error:
            return (
                f"run_dir={self._run_save.run_dir} cannot be written ({error.strerror}); choose "
                "another run_dir"
            )
        if needed <= free:
            return ""
        return (
            f"a checkpoint needs {_format_bytes(needed)}, but {_format_bytes(free)} are free in "
            f"run_dir="
            f"{self._run_save.run_dir}; free some space there, or choose another run_dir"
        )

    def _partial_folder(self, save: PendingSave) -> Path:
        return self._folder / f".step-{save.step:08d}.{self._token}.partial"


def warn_rare_evaluation(config: CheckpointConfig, measured: int) -> str:
    """Return a warning if most checkpoints have no loss for checkpoint.keep_best; otherwise empty.

    `measured` is eval.every, the steps between evaluations.
    """
    saved = config.every
    if not (config.keep_best and saved and measured and saved % measured):
        return ""
    return (
        f"checkpoint.keep_best=true goes by losses that are measured at the step of a save, which "
        f"with checkpoint.every={saved} and eval.every={measured} is every "
        f"{math.lcm(saved, measured)}th step; set eval.every={math.gcd(saved, measured)} or "
        f"checkpoint.every={max(1, round(saved / measured)) * measured}"
    )


def _remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint; rename it first, so that a reader sees all of it or nothing."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.removed")
    try:
        checkpoint.rename(hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        log.warning("%s could not be removed: %s", checkpoint, error)


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _format_bytes(count: float) -> str:
    """Format a size in powers of 1000, such as "812.3 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"

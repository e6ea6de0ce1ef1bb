"""Detect and handle steps with a non-finite or spiking loss.

A step is bad if its loss or gradient is not finite or, if configured, if its loss is a spike. The
device decides before the update and drops it; the host reads the flags at the next log line. A step
is also bad if its update leaves weights or optimizer state that are not finite, which is checked
where steps are bad and before a save.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from parallel.errors import NumericalError
from parallel.health.replica_check import find_replica_mismatches
from parallel.parallel_model import ParallelModel
from parallel.runtime import all_gather_objects, broadcast_from_rank0
from trainer.atomic_files import write_atomically
from trainer.checkpoint.folder import checkpoint_path, list_checkpoints
from trainer.config.train import LONGEST_WINDOW, ConfigError
from trainer.data.loader import TrainLoader
from trainer.data.sampler import position_ranges
from trainer.metrics.recorder import Recorder
from trainer.optim.optimizer import Optimizer
from trainer.precision import LossScale

LOSS, GRADIENT, SPIKE = 1, 2, 4  # flags of a step; LOSS is local to this rank
DEVIATION = 1.4826  # standard deviation / median absolute deviation of a normal distribution
LEAST_DEVIATION = 1e-3  # lower bound relative to the median, for losses that hardly vary
REMEDY = "try a lower optim.lr, a longer optim.warmup_steps, or precision=fp32 (or bf16 for fp16)"


class RolledBackError(Exception):
    """The run must resume from its last valid checkpoint; raised on every rank."""


@dataclass(frozen=True)
class BadStepPolicy:
    """The definition of a bad step and the action on it: the config keys of these names."""

    on_bad_step: str  # stop | skip | rollback
    max_bad_steps: int
    spike_sigma: float
    spike_window: int


@dataclass(frozen=True)
class BadStep:
    """A step whose update was dropped."""

    step: int  # of the run, from 1
    kind: str  # loss | gradient | spike | update
    rank: int | None  # first rank of the data rank at fault; None = several
    shares: list[int]  # data ranks whose samples may be the cause
    tensor: str = ""  # first tensor that an update left not finite


@dataclass(frozen=True)
class Rollback:
    """A rollback to a checkpoint: its step, and the range of samples skipped from then on."""

    step: int
    samples: list[tuple[int, int]]  # ranges [begin, end) of positions in the sample order


class BadStepGuard:
    """Checks every step on the device; its loss window is part of the run's state.

    All ranks come to the same verdict, since gradient norm and mean loss are global.
    """

    def __init__(self, policy: BadStepPolicy, run_dir: str, device: torch.device):
        """Build a guard with an empty window for the run in `run_dir`."""
        self._policy, self._run_dir = policy, run_dir
        self.rollbacks: list[Rollback] = []
        self._losses = torch.zeros(LONGEST_WINDOW, device=device)  # of good steps, newest last
        self._known = torch.zeros((), dtype=torch.int64, device=device)  # number of valid entries
        self._bad_in_row = 0  # consecutive bad steps up to the last call
        self._flags: list[Tensor] = []  # flags of the steps since then, int64 scalars

    @property
    def skipped_steps(self) -> set[tuple[int, int]]:
        """Return the skipped ranges of positions in the sample order."""
        return {samples for rollback in self.rollbacks for samples in rollback.samples}

    def read_rollbacks(self, run_dir: str, batch_size: int) -> None:
        """Restore the skipped ranges of a run's data; every rank calls it, and rank 0 reads.

        `batch_size` converts entries of older versions, which name steps. Raises ConfigError.
        """
        self.rollbacks = _read_rollbacks(run_dir, batch_size)

    def check_step(
        self, worker: ParallelModel, loss: Tensor, grad_norm: Tensor, scale: LossScale
    ) -> tuple[Tensor, Tensor]:
        """Return whether to drop the update, and whether its gradient overflowed, as 1.0 or 0.0.

        In fp16 an overflow is dropped and adapts the loss scale: the step is bad only if the loss
        itself is not finite, or if the gradient still overflows at a scale below 1. Nothing is read
        back.
        """
        overflow = ~grad_norm.isfinite()
        bad, drop = overflow, overflow
        spike_sigma = self._policy.spike_sigma
        if scale.dynamic or spike_sigma:
            mean_loss = worker.sum_over_data(loss.clone())
        if scale.dynamic:
            lost = ~mean_loss.isfinite()  # independent of the loss scale, which is applied later
            drop = overflow | lost
            overflow = overflow & ~lost
            bad = lost | (overflow & (scale.scale < 1.0))
        flags = LOSS * ~loss.isfinite() + GRADIENT * bad
        if spike_sigma:
            spike = self._is_spike(mean_loss) & ~drop
            flags, drop = flags + SPIKE * spike, drop | spike
            self._remember_loss(mean_loss, ~drop)
        self._flags.append(flags)
        return drop.float(), overflow.float()

    def _is_spike(self, loss: Tensor) -> Tensor:
        """Return whether the loss is `spike_sigma` deviations above the median of a full window."""
        size = self._policy.spike_window
        window = self._losses[-size:]
        median = window.sort().values[size // 2]
        deviation = DEVIATION * (window - median).abs().sort().values[size // 2]
        deviation = torch.maximum(deviation, LEAST_DEVIATION * median.abs())
        limit = median + self._policy.spike_sigma * deviation
        return (self._known >= size) & (loss > limit)

    def _remember_loss(self, loss: Tensor, good: Tensor) -> None:
        longer = torch.cat((self._losses[1:], loss[None].to(self._losses.dtype)))
        self._losses = torch.where(good, longer, self._losses)
        self._known = self._known + good

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds: a resumed run judges as the unbroken one."""
        in_row = torch.tensor(self._bad_in_row)
        return {"losses": self._losses, "known": self._known, "bad_in_row": in_row}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore the state from a checkpoint."""
        self._losses.copy_(state["losses"])
        # Without spike detection no losses are kept: they would be outdated when it is enabled.
        self._known.copy_(state["known"] * (self._policy.spike_sigma > 0))
        self._bad_in_row = int(state["bad_in_row"].item())
        self._flags.clear()

    def _leave_out(self, good: int, found: list[BadStep], loader: TrainLoader) -> None:
        """Skip the samples of bad steps from step `good` on, and record that in the run folder."""
        places = [place for bad in found for place in loader.sample_positions(bad.step - 1)]
        self.rollbacks.append(Rollback(good, position_ranges(places)))
        if dist.get_rank() == 0:  # before training continues, so that a kill loses nothing
            _write_rollbacks(self._run_dir, self.rollbacks)

    def process_bad_steps(
        self,
        step: int,
        worker: ParallelModel,
        loader: TrainLoader,
        recorder: Recorder,
        settle: Callable[[], None],
        not_finite: Callable[[], str],
        saving: bool = False,
    ) -> None:
        """Handle the bad steps recorded since the last call, up to `step`; waits for the device.

        All ranks must call it. `settle` waits for a save in flight; `not_finite` returns the name
        of a weight or optimizer state that is not finite, checked if steps are bad and before a
        save. Raises RolledBackError to roll back, NumericalError to stop.
        """
        flags = torch.stack(self._flags).tolist() if self._flags else []
        self._flags.clear()
        numbers = self._bad_steps(flags)
        tensor = not_finite() if saving or numbers else ""
        if not (numbers or tensor):
            return
        settle()
        saved = list_checkpoints(self._run_dir)
        everyone = all_gather_objects((worker.data_rank, flags, saved[-1][0] if saved else None))
        good = everyone[0][2]  # rank 0's view of the folder decides
        found = [_bad_step(step - len(flags) + 1, number, everyone) for number in numbers]
        if tensor:
            first, ranks = _first_bad_update(step, flags), _data_ranks(everyone)
            found = self._with_update(found, BadStep(first, "update", None, ranks, tensor))
        policy, why = self._policy.on_bad_step, self._stop_reason(good, found[-1])
        if policy == "rollback" and not why:
            self._leave_out(good, found, loader)
        _record_all(found, policy, why, loader, recorder)
        if why:
            made = "nothing was saved since" if found[-1].tensor else "no update was made with it"
            raise NumericalError(f"{_describe_steps(found[-1])}; {made}, {why}")
        if policy == "rollback":
            recorder.log_rollback(f"going back to the checkpoint of step {good}")
            raise RolledBackError

    @property
    def _steps_allowed(self) -> int:
        return 1 if self._policy.on_bad_step == "stop" else self._policy.max_bad_steps

    def _bad_steps(self, flags: list[int]) -> list[int]:
        """Return the bad steps, up to the one that stops the run; counts consecutive ones."""
        numbers = []
        for number, flag in enumerate(flags):
            bad = flag & (GRADIENT | SPIKE)
            self._bad_in_row = self._bad_in_row + 1 if bad else 0
            if bad:
                numbers.append(number)
            if self._bad_in_row == self._steps_allowed:
                break
        return numbers

    def _with_update(self, found: list[BadStep], update: BadStep) -> list[BadStep]:
        """Return the bad steps up to and including the one whose update made the later ones bad."""
        before = [bad for bad in found if bad.step < update.step]
        if before and self._policy.on_bad_step == "stop":
            return before  # the earlier one stops the run anyway
        self._bad_in_row = 1  # later steps do not count
        return [*before, update]

    def _stop_reason(self, good: int | None, last: BadStep) -> str:
        """Return the reason to stop, with the last valid checkpoint and a remedy; empty = go on."""
        policy, most = self._policy.on_bad_step, f"max_bad_steps={self._policy.max_bad_steps}"
        tries = 1  # attempts from this checkpoint, including the failed one
        while tries <= len(self.rollbacks) and self.rollbacks[-tries].step == good:
            tries += 1
        if last.tensor and policy != "rollback":
            remedy = f"Set on_bad_step=rollback to leave the step out, or {REMEDY}"
        elif policy == "stop":
            remedy = f"Set on_bad_step=skip or rollback to leave such steps out, or {REMEDY}"
        elif self._bad_in_row >= self._steps_allowed:
            remedy = f"It is the last of {most} in a row: {REMEDY}"
        elif policy == "rollback" and (tries >= self._steps_allowed or good is None):
            remedy = f"Going on from there has failed {most} times: {REMEDY}"
        else:
            return ""
        if good is None:
            return f"and there is no checkpoint yet. {remedy}"
        where = checkpoint_path(self._run_dir, good)
        return f"and the last good checkpoint is {where}. {remedy}"


def _bad_step(
    first: int, number: int, everyone: list[tuple[int, list[int], int | None]]
) -> BadStep:
    """Build the record of a bad step from the (data rank, flags, …) of all ranks."""
    flag = everyone[0][1][number]
    ranks = [rank for rank, (_, flags, _) in enumerate(everyone) if flags[number] & LOSS]
    kind = "spike" if flag & SPIKE else "loss" if ranks else "gradient"
    shares = sorted({everyone[rank][0] for rank in ranks})
    if kind != "loss":
        shares = _data_ranks(everyone)
    rank = ranks[0] if kind == "loss" and len(shares) == 1 else None
    return BadStep(first + number, kind, rank, shares)


def _data_ranks(everyone: list[tuple[int, list[int], int | None]]) -> list[int]:
    """Return the data ranks of all ranks, sorted."""
    return sorted({data_rank for data_rank, *_ in everyone})


def _first_bad_update(step: int, flags: list[int]) -> int:
    """Return the step, up to `step`, whose update left weights that are not finite.

    Every later step is bad too: it is the one before the last consecutive run of bad steps.
    """
    row = takewhile(lambda flag: flag & GRADIENT, reversed(flags))
    return step - sum(1 for _ in row)


def _describe_steps(bad: BadStep) -> str:
    if bad.tensor:
        return f"{bad.tensor} is not finite after step {bad.step}"
    what = {
        "loss": "the loss is not finite",
        "gradient": "the gradient is not finite",
        "spike": "the loss is a spike",
    }[bad.kind]
    return f"{what} at step {bad.step}" + ("" if bad.rank is None else f" on rank {bad.rank}")


def _record_all(
    found: list[BadStep], policy: str, why: str, loader: TrainLoader, recorder: Recorder
) -> None:
    """Write an event for each bad step, on rank 0; `why` is the reason to stop, if any."""
    for bad in found if dist.get_rank() == 0 else ():
        stops = why and (policy == "rollback" or bad is found[-1])
        _record_step(bad, "stop" if stops else policy, loader, recorder)


def _record_step(bad: BadStep, action: str, loader: TrainLoader, recorder: Recorder) -> None:
    """Write a record to metrics.jsonl and a line to the console."""
    shares = [loader.sample_ids(bad.step - 1, share) for share in bad.shares]
    samples = sorted(chain.from_iterable(shares))
    record = {
        "event": "bad_step",
        "step": bad.step,
        "rank": bad.rank,
        "kind": bad.kind,
        "action": action,
        "samples": samples,
    } | ({"tensor": bad.tensor} if bad.tensor else {})
    done = {
        "stop": "the run stops",
        "skip": "its update is left out",
        "rollback": "its samples are left out from now on",
    }[action]
    recorder.log_event(
        record, f"{_describe_steps(bad)}: {done} ({len(samples)} samples, in metrics.jsonl)"
    )


def check_replicas(
    step: int, worker: ParallelModel, optimizer: Optimizer, recorder: Recorder, run_dir: str
) -> None:
    """Raise NumericalError, on every rank, if replicas of weights or moments differ in a bit."""
    tensors: dict[str, Tensor] = dict(worker.parameters())
    for name, moments in optimizer.state().items():
        tensors |= {f"{name} ({moment})": tensor for moment, tensor in moments.items()}
    found = find_replica_mismatches(tensors, worker.device)
    if not found:
        return
    first = found[0]
    ranks = " and ".join(map(str, first.ranks))
    where = f"rank{'s' * (len(first.ranks) > 1)} {ranks} of {first.copies} with a copy"
    what = f"replicas differ at step {step}: {first.name} on {where}"
    what += f", and {len(found) - 1} more tensors" if len(found) > 1 else ""
    rank = first.ranks[0] if len(first.ranks) == 1 else None
    record = {"event": "replicas_differ", "step": step, "rank": rank, "tensor": first.name}
    recorder.log_event(record, what)
    saved = list_checkpoints(run_dir)
    good = f"from {saved[-1][1]}" if saved else "from the beginning"
    raise NumericalError(
        f"{what}; these ranks no longer train one model. Start again {good}, which is as good as "
        "the last comparison before it; if it comes back on the same rank, its device is faulty"
    )


def _read_rollbacks(run_dir: str, batch_size: int) -> list[Rollback]:
    """Return the rollbacks that rank 0 reads, on every rank.

    Older versions recorded steps, of `batch_size` samples each.
    """
    path = _rollbacks_path(run_dir)
    reads = dist.get_rank() == 0 and path.exists()
    text = broadcast_from_rank0(path.read_text(encoding="utf-8") if reads else "[]")
    try:
        return [Rollback(int(r["step"]), _skipped_ranges(r, batch_size)) for r in json.loads(text)]
    except (ValueError, TypeError, KeyError):
        raise ConfigError(
            f"{path} is damaged: it says which samples, by their place in the order, are left out; "
            'write it again, as [{"step": 50, "samples": [[1792, 1824]]}], or choose another '
            "run_dir"
        ) from None


def _skipped_ranges(rollback: dict[str, Any], batch_size: int) -> list[tuple[int, int]]:
    if "samples" not in rollback:
        steps = map(int, rollback["data_steps"])
        return [(step * batch_size, (step + 1) * batch_size) for step in steps]
    found = [(int(begin), int(end)) for begin, end in rollback["samples"]]
    if not all(0 <= begin < end for begin, end in found):
        raise ValueError(found)
    return found


def _write_rollbacks(run_dir: str, rollbacks: list[Rollback]) -> None:
    text = json.dumps([asdict(rollback) for rollback in rollbacks])
    write_atomically(_rollbacks_path(run_dir), text + "\n")


def _rollbacks_path(run_dir: str) -> Path:
    return Path(run_dir) / "rollbacks.json"

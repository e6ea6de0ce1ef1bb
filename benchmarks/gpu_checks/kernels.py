"""Count what a step launches, by torch's profiler: kernels, copies and waits."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from gpu_checks.findings import Band, Finding
from gpu_checks.jobs import Job, rank_of, run_config, small_llama, start_job, synchronise
from parallel.runtime import Runtime
from trainer.config.train import TrainConfig
from trainer.loop import open_saver

MARK = "measured step"
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
FUSED, SLOW = ("flash", "cudnn"), ("fmha_cutlass", "AttentionKernel", "softmax_warp")
MOST_EAGER, MOST_COMPILED = 120, 60  # kernels of a block, forward and backward


@dataclass(frozen=True)
class StepProfile:
    """Names of what a step has issued, once for each time."""

    kernels: list[str]
    copies: list[str]  # between memories
    waits: list[str]  # of the host, for the device
    operators: list[str]

    @classmethod
    def of_events(cls, events: Iterable[Mapping[str, Any]]) -> "StepProfile":
        """Read the events of a Chrome trace; waits count inside of the marked range alone."""
        known = [event for event in events if event.get("ph") == "X"]
        marks = [e for e in known if e["name"] == MARK and e.get("cat") == "user_annotation"]
        begin = float(marks[0]["ts"])
        end = begin + float(marks[0]["dur"])

        def named(*kinds: str) -> list[Mapping[str, Any]]:
            return [event for event in known if event.get("cat") in kinds]

        runtime = named("cuda_runtime", "cuda_driver")
        return cls(
            [event["name"] for event in named("kernel")],
            [event["name"] for event in named("gpu_memcpy")],
            [e["name"] for e in runtime if e["name"] in WAITS and begin <= float(e["ts"]) <= end],
            [event["name"] for event in named("cpu_op")],
        )


def profile_step(job: Job, device: str) -> StepProfile:
    """Return the profile of the fourth step; the third is profiled too, to start the profiler."""
    job.losses(2)
    profile_work(job.step, device)
    return profile_work(job.step, device)


def profile_work(work: Callable[[], Any], device: str) -> StepProfile:
    """Return the profile of a call."""
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    synchronise(device)
    with profile(activities=activities) as profiler:
        with record_function(MARK):
            work()
        synchronise(device)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return StepProfile.of_events(events)


def _profile_save(job: Job, device: str) -> StepProfile:
    """Return the profile of a second save; the first takes its memory."""
    with TemporaryDirectory() as folder:
        run = replace(job.config, run_dir=str(Path(folder) / "run"))
        with open_saver(run, job.state) as saver:
            saver.save(job.state)
            saver.wait()
            job.step()
            return profile_work(lambda: saver.save(job.state), device)


def _count(names: Iterable[str], *words: str) -> int:
    return sum(any(word in name for word in words) for name in names)


def _kernels_per_block(
    config: TrainConfig, runtime: Runtime, device: str, whole: StepProfile
) -> float:
    """Return how many kernels a block has, by a model with half the layers."""
    layers = config.model.layers
    half = replace(config, model=replace(config.model, layers=layers // 2))
    less = profile_step(start_job(half, runtime), device)
    return (len(whole.kernels) - len(less.kernels)) / (layers - layers // 2)


def launched_kernels(device: str) -> Iterator[Finding]:
    """Check the kernels of a step in bf16: attention, norm, optimizer, copies, waits, number."""
    config = run_config(small_llama(device), precision="bf16")
    with rank_of(device) as runtime:
        for name, documents in (("no documents", False), ("documents", True)):
            found = profile_step(start_job(config, runtime, documents), device)
            facts = {"kernels": len(found.kernels), "names": sorted(set(found.kernels))}
            fused, slow = (_count(found.kernels, *words) for words in (FUSED, SLOW))
            least = 2 * config.model.layers
            yield Finding(f"kernels, {name}: fused attention", fused, _on_gpu(least, None), facts)
            none = _on_gpu(0, 0)
            yield Finding(f"kernels, {name}: other attention", slow, none)
            yield Finding(f"kernels, {name}: the host waits", len(found.waits), none)
            yield _pageable(name, found)
        save = _profile_save(start_job(config, runtime), device)
        yield _pageable("a save", save)
        norms = _count(found.operators, "aten::_fused_rms_norm")
        yield Finding("kernels: fused RMSNorm", norms, _on_gpu(2 * config.model.layers + 1, None))
        adam = _count(found.kernels, "FusedAdam")
        yield Finding("kernels: fused multi-tensor Adam", adam, _on_gpu(1, None))
        for name, compiles, most in (
            ("eager", False, MOST_EAGER),
            ("compiled", True, MOST_COMPILED),
        ):
            run = replace(config, compile=compiles)
            whole = profile_step(start_job(run, runtime), device)
            number = _kernels_per_block(run, runtime, device, whole)
            yield Finding(f"kernels: of a block, {name}", number, _on_gpu(1, most))


def _pageable(name: str, found: StepProfile) -> Finding:
    """Return how many copies between memories have a pageable end."""
    copies = {"copies": sorted(set(found.copies))}
    number = _count(found.copies, "Pageable")
    return Finding(f"kernels, {name}: pageable copies", number, _on_gpu(0, 0), copies)


def _on_gpu(least: float, most: float | None) -> Band:
    return Band(least, most, on_cpu=False)

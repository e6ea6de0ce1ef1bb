"""benchmarks/gpu.py: all that needs no GPU, in its short form, and what it makes of failures."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import gpu
import pytest
import step_anatomy
import torch
from gpu_checks import compiled, jobs, kernels, mfu, numerics, one_rank, saves, waits
from gpu_checks.child import FUNCTIONS
from gpu_checks.findings import CHECKS, Band, Check, Finding, SkippedError, failed
from torch._subclasses.fake_tensor import DataDependentOutputException

from parallel.parallel_model import ParallelModel
from parallel.runtime import JobQueue, process_group
from parallel.strategy import StrategyConfig
from trainer.nn.layers import Attention
from trainer.plan.cases import preset

ROOT = Path(__file__).parents[1]
# On the machines that lend a GPU: what sections, data and metrics of other kinds need is missing.
MISSING = "hydra omegaconf soundfile jiwer faster_coco_eval sacrebleu charset_normalizer wandb"
CUDA = ("synchronize", "empty_cache", "reset_peak_memory_stats", "_sleep", "set_sync_debug_mode")


def rows(check: str, device: str = "cpu") -> dict[str, dict]:
    found = [finding.row(device, 0.0) for finding in FUNCTIONS[check](device)]
    assert found
    return {row["name"]: row for row in found}


def test_the_report_of_a_machine_without_hydra_and_omegaconf(tmp_path):
    block = f"import sys\nfor name in {MISSING.split()}:\n    sys.modules[name] = None\n"
    (tmp_path / "sitecustomize.py").write_text(block)
    report = tmp_path / "gpu.json"
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "benchmarks/gpu.py"), "device=cpu"),
            *("only=overflow", f"json={report}"),
        ],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "overflow: factor of the loss scale" in done.stdout
    found = json.loads(report.read_text())
    assert found.keys() == {"env", "roofline", "checks", "perf"}
    assert len(found["checks"]) == 3
    for row in found["checks"]:
        assert row.keys() >= {"name", "ok", "value", "expected", "seconds"} and row["ok"]


@pytest.mark.parametrize(
    "check",
    [
        *("roofline", "fp32", "deterministic", "collectives", "replicas and shards", "save"),
        *("llama-1b documents", "gpt2", "vit-l16"),
    ],
)
def test_a_check_on_a_cpu(check):
    found = rows(check)
    assert [row for row in found.values() if row["ok"] is False] == []
    assert check == "roofline" or any(row["ok"] for row in found.values())


def test_half_precision(monkeypatch):
    def no_float8(config, *args):
        if config.precision == "fp8":
            raise ImportError("torchao", name="torchao")
        return jobs.start_job(config, *args)

    monkeypatch.setattr(numerics, "start_job", no_float8)
    found = []
    with pytest.raises(SkippedError, match="torchao is not installed"):
        for finding in numerics.half_precision("cpu"):
            found.append(finding.row("cpu", 0.0))
    assert len(found) == 6 and all(row["ok"] for row in found)


def test_a_wait_is_found(monkeypatch):
    monkeypatch.setattr(waits, "OPTIONS", {"fp16": waits.OPTIONS["fp16"], "eager": {}})
    assert [row["value"] for row in rows("steps without waiting").values()] == [0, 0]

    def waiting(worker, *args):
        return clip(worker, *args) * worker.sum_over_data(torch.ones(())).item()

    clip = ParallelModel.clip_grad_norm
    monkeypatch.setattr(ParallelModel, "clip_grad_norm", waiting)
    with pytest.raises(DataDependentOutputException):  # child.py makes it an entry
        rows("steps without waiting")


def test_a_graph_break_is_found(monkeypatch):
    monkeypatch.setattr(compiled, "MODES", ("none",))
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m: compile(m, backend="eager"))
    assert all(row["ok"] for row in rows("compile bf16").values())
    forward = Attention.forward

    def broken(self, *args):
        torch._dynamo.graph_break()
        return forward(self, *args)

    monkeypatch.setattr(Attention, "forward", broken)
    found = rows("compile bf16")
    assert found["compile, bf16, activation checkpointing none: breaks"]["ok"] is False


def event(kind: str, name: str, begin: float = 5.0) -> dict:
    return {"ph": "X", "cat": kind, "name": name, "ts": begin, "dur": 10.0}


def test_the_events_of_a_step():
    events = [
        event("user_annotation", kernels.MARK),
        event("kernel", "void pytorch_flash::flash_fwd_kernel<…>"),
        event("kernel", "at::native::multi_tensor_apply_kernel<…FusedAdamMathFunctor<float, 4>>"),
        event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)"),
        event("cuda_runtime", "cudaStreamSynchronize", 7.0),
        event("cuda_runtime", "cudaDeviceSynchronize", 16.0),  # behind the step
        event("cpu_op", "aten::mm"),
        {"ph": "M", "name": "process_name"},
    ]
    found = kernels.StepProfile.of_events(events)
    assert len(found.kernels) == 2 and found.operators == ["aten::mm"]
    assert found.waits == ["cudaStreamSynchronize"]
    assert kernels._count(found.copies, "Pageable") == 1
    assert kernels._count(found.kernels, *kernels.FUSED) == 1
    assert kernels._count(found.kernels, *kernels.SLOW) == 0


def test_the_profiler_marks_a_step():
    with process_group("cpu", JobQueue.single_process()) as runtime:
        job = jobs.start_job(jobs.run_config(jobs.small_llama("cpu")), runtime)
        found = kernels.profile_step(job, "cpu")
    assert "aten::mm" in found.operators and found.kernels == found.waits == []


@pytest.fixture
def as_if_cuda(monkeypatch):
    """Let the lines for a GPU run on a CPU: torch.cuda does nothing, sizes are those of a CPU."""

    @contextmanager
    def rank_of(device):
        assert device == "cuda"
        with process_group("cpu", JobQueue.single_process()) as runtime:
            yield runtime

    peaks = iter([10, 7])
    for name in CUDA:
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(peaks, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *args: "NVIDIA H100 80GB HBM3")
    for module in (waits, saves, mfu, numerics, kernels):
        monkeypatch.setattr(module, "rank_of", rank_of)
        monkeypatch.setattr(
            module,
            "small_llama",
            lambda _device, **changes: jobs.small_llama("cpu"),
            raising=False,
        )
        monkeypatch.setattr(
            module,
            "published_model",
            lambda _name, **changes: jobs.small_llama("cpu"),
            raising=False,
        )


def test_the_lines_for_a_gpu(as_if_cuda, monkeypatch):
    memory = rows("8-bit memory", "cuda")
    assert memory["8-bit moments: share of AdamW's peak"]["value"] == 0.7
    monkeypatch.setattr(waits, "OPTIONS", {"documents": {"documents": True}})
    assert rows("steps without waiting", "cuda").keys() == {"waits, documents", "waits, a save"}
    slept = rows("sleeping kernel", "cuda")
    assert slept["behind a kernel of a second, bf16: the device"]["ok"] is False  # nothing slept
    assert rows("races", "cuda")["races of steps and saves"]["ok"]
    assert rows("save", "cuda")["save: tensors in the file that differ"]["ok"]
    eager = rows("llama-1b eager", "cuda")["llama-1b eager"]
    assert eager["expected"] == "36 to 42 % MFU" and 0 < eager["value"] < 1


def test_a_wait_on_a_gpu_is_an_error(as_if_cuda, monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def waits_for_it():
        raise RuntimeError("called a synchronizing CUDA operation\nC++ stack")

    assert waits._guarded(waits_for_it) == "called a synchronizing CUDA operation"
    assert modes == ["error", "default"]


def test_no_check_is_forgotten():
    assert FUNCTIONS.keys() == CHECKS.keys()
    assert sum(check.seconds for check in CHECKS.values() if check.alone) > 480  # the total cuts
    with pytest.raises(SkippedError, match="no CUDA device"), jobs.rank_of("cuda"):
        pass


def test_bands():
    assert Band(36, 42, "% MFU").holds(36) and not Band(36, 42).holds(42.1)
    assert not Band(most=1).holds(float("nan")) and not Band(0, 0).holds("it broke")
    texts = [str(b) for b in (Band(36, 42, "%"), Band(2), Band(most=1), Band(0, 0), Band())]
    assert texts == ["36 to 42 %", "≥ 2", "≤ 1", "0", ""]
    here = Finding("copy", 0.1, Band(2.6, on_cpu=False))
    assert here.row("cpu", 1.0)["ok"] is None and here.row("cuda", 1.0)["ok"] is False


@pytest.mark.parametrize(
    ("device", "limit", "value"),
    [("cpu", 0.3, "not finished after 0 s"), ("tpu", 60.0, "its process ended with status 1")],
)
def test_a_process_that_does_not_end_well(tmp_path, monkeypatch, device, limit, value):
    monkeypatch.setitem(gpu.CHECKS, "overflow", Check(limit))
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.0)
    if device == "tpu":  # a module that breaks while it is imported
        monkeypatch.setattr(gpu, "environment", lambda *args: {"PYTHONPATH": ""})
    (row,) = gpu.run_check("overflow", device, tmp_path, gpu.time.monotonic() + 99)
    assert row["ok"] is False and row["value"] == value and row["check"] == "overflow"


def test_no_time_is_left(tmp_path):
    (row,) = gpu.run_check("fp32", "cpu", tmp_path, gpu.time.monotonic() + 1)
    assert row["ok"] is None and row["value"] == "not run: no time was left"


def test_a_report_is_whole_after_each_check(tmp_path):
    report = gpu.Report(tmp_path / "gpu.json", {"device": "H100"})
    facts = {"step_seconds": 0.3}
    report.add([Finding("a", 1.0, Band(2), facts).row("cuda", 1.0) | {"check": "a"}])
    report.add([failed("b", "not run", None) | {"check": "b"}])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["ok"] for row in found["checks"]] == [False, None] and found["perf"] == [facts]
    assert report.table().row_count == 2


def test_unknown_words_are_refused():
    for words in (["device=tpu"], ["steps=3"], ["fast"]):
        with pytest.raises(SystemExit, match="device="):
            gpu.parse(words)
    assert gpu.parse(["only=fp32"])["seconds"] == "480"


def test_a_lost_gradient_is_found(monkeypatch):
    """A reduction that halves gradients of one layer is seen in their cosine."""
    wrap = one_rank.wrap_in_ddp

    def faulty(model, mesh, strategy):
        model.blocks["0"].attention.query.weight.register_hook(lambda g: -g)
        return wrap(model, mesh, strategy)

    monkeypatch.setattr(one_rank, "wrap_in_ddp", faulty)
    monkeypatch.setattr(one_rank, "REDUCTIONS", {"auto": one_rank.REDUCTIONS["auto"]})
    found = rows("replicas and shards")
    assert found["DDP, reduce=auto: cosine of the gradients"]["ok"] is False


def test_a_torn_save_is_found(monkeypatch):
    """A saver that copies after training has gone on writes what training has written."""
    copy = saves.Saver.save

    def late(self, state, *args):
        copy(self, state, *args)
        if self._number > 1:
            self._shard._buffer[:64] += 1

    monkeypatch.setattr(saves.Saver, "save", late)
    assert rows("save")["save: tensors in the file that differ"]["ok"] is False


def test_the_anatomy_of_a_block():
    """Bytes of the collectives are those of the weights; a split block moves less memory."""
    options = step_anatomy.OPTIONS | {"seq_len": "64", "model": "llama-tiny"}
    chosen = {name: preset(name, 2) for name in ("ddp", "fsdp", "tensor")}
    chosen["whole"] = StrategyConfig(tensor=2, sequence_parallel=False)
    found = {
        name: step_anatomy.trace_block(step_anatomy.job_of(options, strategy), 2)
        for name, strategy in chosen.items()
    }
    (plain,) = (row for _, row in step_anatomy.rows(options, ["plain"]))
    ours = step_anatomy.trace_block(step_anatomy.job_of(options, StrategyConfig()), 1)
    model = step_anatomy.job_of(options, StrategyConfig()).model
    with torch.device("meta"):
        block = step_anatomy.PlainBlock(model, torch.bfloat16)
    weights = sum(p.numel() for p in block.products.parameters())
    norms = 2 * model.width
    assert found["fsdp"].wire_bytes == (2 + 2 + 4) * (weights + norms)  # gathered twice, fp32 sums
    assert found["ddp"].wire_bytes >= 4 * weights and ours.collectives == 0
    assert found["whole"].collectives == 4  # Megatron's f and g, twice each
    assert found["tensor"].moved_bytes < ours.moved_bytes
    assert plain.forward_operators < ours.forward_operators < 2 * plain.forward_operators


def test_the_anatomy_needs_ranks_for_all_rows():
    with pytest.raises(SystemExit, match="ranks=6 must be a multiple of 8"):
        step_anatomy.main(["ranks=6"])

"""Numbers: this device in every precision against a CPU in float64, to the bit where due."""

import os
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from gpu_checks.findings import Band, Finding
from gpu_checks.jobs import (
    Job,
    needs_gpu,
    rank_of,
    run_config,
    small_llama,
    start_job,
    without_torchao,
)
from parallel.runtime import Runtime
from trainer.config.train import OptimConfig
from trainer.plan.inputs import longest_inputs
from trainer.plan.trace import trace_step

STEPS = 20
HUGE_SCALE = 2.0**120  # of a loss: finite in float32, and no gradient is in fp16


def _on_cpu(runtime: Runtime) -> Runtime:
    return replace(runtime, device=torch.device("cpu"))


def single_precision(device: str) -> Iterator[Finding]:
    """Compare fp32 with float64 on a CPU: the losses of 20 steps, and the weights after them."""
    config = run_config(small_llama(device))
    with rank_of(device) as runtime:
        ours = start_job(config, runtime, documents=True)
        truth = start_job(replace(config, precision="fp64"), _on_cpu(runtime), documents=True)
        pairs = zip(ours.losses(STEPS), truth.losses(STEPS), strict=True)
        gap = max(abs(a / b - 1) for a, b in pairs)
        yield Finding("fp32: losses of 20 steps against float64", gap, Band(most=1e-5))
        moved = farthest(truth.weights(), ours.weights()) / config.optim.lr
        yield Finding("fp32: a weight after 20 steps, in learning rates", moved, Band(most=0.1))


def half_precision(device: str) -> Iterator[Finding]:
    """Compare bf16, fp16 and fp8 with float64 on a CPU: loss and gradient of a first step."""
    config = run_config(small_llama(device))
    with rank_of(device) as runtime:
        for precision, documents, least in (
            ("bf16", False, 0.999),
            ("bf16", True, 0.999),
            ("fp16", True, 0.999),
            ("fp8", False, 0.99),
        ):
            truth = start_job(replace(config, precision="fp64"), _on_cpu(runtime), documents)
            true_loss, true_gradient = truth.gradient()
            try:
                job = start_job(replace(config, precision=precision), runtime, documents)
            except ImportError as error:
                raise without_torchao(error) from error
            loss, gradient = job.gradient()
            name = f"{precision}, documents" if documents else precision
            gap, alike = abs(loss / true_loss - 1), cosine(gradient, true_gradient)
            yield Finding(f"{name}: loss against float64", gap, Band(most=2e-2))
            yield Finding(f"{name}: cosine of the gradients", alike, Band(least, 1.001))


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine of the angle between two vectors."""
    return (a @ b / (a.norm() * b.norm())).item()


def farthest(these: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """Return the largest difference of a weight."""
    return max(
        (others[name].double().cpu() - weight.double().cpu()).abs().max().item()
        for name, weight in these.items()
        if name.startswith("model.")
    )


def overflow(device: str) -> Iterator[Finding]:
    """Force gradients of fp16 to overflow: nothing changes but the loss scale, which halves."""
    with rank_of(device) as runtime:
        job = start_job(run_config(small_llama(device), precision="fp16"), runtime)
        job.losses(2)
        before, scale = job.weights(), job.state.loss_scale
        scale.scale = torch.full_like(scale.scale, HUGE_SCALE)
        job.step()
        yield Finding("overflow: tensors that change", changed(before, job.weights()), Band(0, 0))
        factor = scale.scale.item() / HUGE_SCALE
        yield Finding("overflow: factor of the loss scale", factor, Band(0.5, 0.5))
        scale.scale = torch.full_like(scale.scale, scale.first)
        job.step()
        moved = changed(before, job.weights())
        yield Finding("overflow: tensors that the next step changes", moved, Band(least=1))


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> int:
    """Return how many tensors differ in a bit."""
    return sum(not torch.equal(tensor, after[name]) for name, tensor in before.items())


def deterministic(device: str) -> Iterator[Finding]:
    """Train twice with deterministic kernels, on packed documents: equal to the bit."""
    assert device == "cpu" or os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    torch.use_deterministic_algorithms(True)
    config = run_config(small_llama(device), precision="bf16", deterministic=True)
    with rank_of(device) as runtime:

        def trained() -> Job:
            job = start_job(config, runtime, documents=True)
            job.losses(4)
            return job

        differ = changed(trained().weights(), trained().weights())
    torch.use_deterministic_algorithms(False)
    yield Finding("deterministic: tensors that differ", differ, Band(0, 0))


def eight_bit_memory(device: str) -> Iterator[Finding]:
    """Compare the peaks of AdamW with 8-bit and with float32 moments, and each with its trace."""
    sizes = {"width": 1024, "ffn_width": 4096, "vocab_size": 65536} if device == "cuda" else {}
    config = run_config(small_llama(device, **sizes), batch_size=2, precision="bf16")
    traced, measured = {}, {}
    for name in ("adamw", "adamw8bit"):
        run = replace(config, optim=OptimConfig(name=name))
        inputs = longest_inputs(run, run.micro_batch_size)
        traced[name] = trace_step(run, 1, [inputs], device=device).peak_bytes
    share = traced["adamw8bit"] / traced["adamw"]
    yield Finding("8-bit moments: share of AdamW's peak, traced", share, Band(most=0.99))
    needs_gpu(device)
    with rank_of(device) as runtime:
        for name in traced:
            job = start_job(replace(config, optim=OptimConfig(name=name)), runtime)
            job.losses(2)
            torch.cuda.reset_peak_memory_stats()
            job.losses(2)
            measured[name] = torch.cuda.max_memory_allocated()
            del job
            torch.cuda.empty_cache()
    share = measured["adamw8bit"] / measured["adamw"]
    yield Finding("8-bit moments: share of AdamW's peak", share, Band(most=0.99))
    for name, peak in measured.items():
        yield Finding(f"{name}: peak against its trace", peak / traced[name], Band(0.93, 1.07))

"""Speed: model FLOPs utilisation of the product's own step, and its memory."""

import statistics
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import torch

from gpu_checks.findings import Band, Finding
from gpu_checks.jobs import (
    published_model,
    quick_weights,
    rank_of,
    run_config,
    small_llama,
    start_job,
    synchronise,
    without_torchao,
)
from trainer.config.train import ModelConfig, TrainConfig
from trainer.nn.flops import flops_per_sample, peak_flops

WARM_UP, TIMED = 5, 10
SEQ_LEN = 2048
CLOCKS = "clocks.sm,clocks.mem,power.draw,temperature.gpu"


def llama_eager(device: str) -> Iterator[Finding]:
    """Measure llama-1b, 8 × 2048 tokens, without compilation."""
    return _speed("llama-1b eager", _llama(device, "llama-1b"), device, Band(36, 42))


def llama_compiled(device: str) -> Iterator[Finding]:
    """Measure llama-1b, 8 × 2048 tokens, with compiled blocks."""
    config = _llama(device, "llama-1b", compile=device == "cuda")
    return _speed("llama-1b compiled", config, device, Band(50, 55))


def llama_documents(device: str) -> Iterator[Finding]:
    """Measure llama-1b with four documents in a sample, compiled."""
    config = _llama(device, "llama-1b", compile=device == "cuda")
    return _speed("llama-1b documents", config, device, Band(45, 55), documents=True)


def llama_fp8(device: str) -> Iterator[Finding]:
    """Measure llama-1b with products in float8, compiled; of the peak of bf16."""
    config = _llama(device, "llama-1b", compile=device == "cuda", precision="fp8")
    return _speed("llama-1b fp8", config, device, Band(55, 62))


def llama_8b_width(device: str) -> Iterator[Finding]:
    """Measure four layers of llama-8b, whose products are wider, compiled."""
    layers = {"layers": 4 if device == "cuda" else 2}
    config = _llama(device, "llama-8b", compile=device == "cuda", **layers)
    return _speed("llama-8b width, 4 layers", config, device, Band(58, 64))


def gpt2(device: str) -> Iterator[Finding]:
    """Measure GPT-2 of 124 million parameters, 32 × 1024 tokens, compiled."""
    model = _scaled(published_model("gpt2"), device)
    config = _config(model, device, samples=32, compile=device == "cuda")
    return _speed("gpt2", config, device, Band(38, 45))


def vit(device: str) -> Iterator[Finding]:
    """Measure ViT-L/16, 128 images of 224 pixels a side, compiled."""
    model = published_model("vit-l16")
    if device == "cpu":
        small: dict[str, Any] = {"layers": 2, "width": 64, "heads": 2, "ffn_width": 128}
        model = published_model("vit-l16", image_size=32, **small)
    config = _config(model, device, samples=128, compile=device == "cuda")
    return _speed("vit-l16", config, device, Band(38, 48))


def _scaled(model: ModelConfig, device: str) -> ModelConfig:
    if device == "cuda":
        return model
    kept = {"norm": model.norm, "activation": model.activation, "bias": model.bias}
    return small_llama(device, layers=2, positions=model.positions, tied=model.tied, **kept)


def _llama(device: str, name: str, **keys: Any) -> TrainConfig:
    sizes = {"layers": keys.pop("layers")} if "layers" in keys else {}
    model = _scaled(published_model(name, max_positions=SEQ_LEN, **sizes), device)
    return _config(model, device, samples=8, **keys)


def _config(model: ModelConfig, device: str, samples: int, **keys: Any) -> TrainConfig:
    samples = samples if device == "cuda" else 2
    return run_config(model, batch_size=samples, **{"precision": "bf16"} | keys)


def _speed(
    name: str, config: TrainConfig, device: str, band: Band, documents: bool = False
) -> Iterator[Finding]:
    """Find the median of ten steps behind five, as a share of the dense peak of bf16."""
    with rank_of(device) as runtime:
        peak = None
        if device == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(runtime.device), "bf16")
        try:
            job = start_job(config, runtime, documents, quick_weights(runtime.device))
        except ImportError as error:
            raise without_torchao(error) from error
        losses, seconds = job.losses(WARM_UP), []
        for _ in range(TIMED):
            synchronise(device)
            began = time.perf_counter()
            job.step()
            synchronise(device)
            seconds.append(time.perf_counter() - began)
        step = statistics.median(seconds)
        model, length = config.model, config.model.max_positions
        flops = config.batch_size * flops_per_sample(model, length, length)
        facts = {
            "name": name,
            "step_seconds": step,
            "slowest_seconds": max(seconds),
            "tflops": 1e-12 * flops / step,
            "samples_per_second": config.batch_size / step,
            "losses": [*losses, *job.losses(1)],
            **_card_facts(device),
        }
        if device == "cpu":
            yield Finding(f"{name}: a step", 1e3 * step, Band(unit="ms", on_cpu=False), facts)
        else:
            share = 100 * flops / step / peak if peak else f"{facts['tflops']:.0f} TFLOP/s"
            unit = Band(band.least, band.most, "% MFU")
            yield Finding(name, share, unit, facts)
        fell = facts["losses"][-1] < facts["losses"][0]
        yield Finding(f"{name}: the loss falls", int(fell), Band(1, 1))


def _card_facts(device: str) -> dict[str, Any]:
    """Return the memory that was needed, and the clocks right behind the steps."""
    if device == "cpu":
        return {}
    ask = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
    try:
        said = subprocess.run(ask, capture_output=True, text=True, timeout=10, check=False).stdout
    except OSError:
        said = ""
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {"memory_gib": peak, "clocks": said.strip(), "asked": CLOCKS}

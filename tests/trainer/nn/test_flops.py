"""Compare the FLOP formula with torch's counter on real models; test the table of peaks."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trainer.config.train import ModelConfig
from trainer.model import Transformer
from trainer.nn.flops import flops_per_sample, peak_flops

BATCH, SEQ_LEN, SOURCE_LEN = 3, 12, 7
SMALL = ModelConfig(
    layers=2,
    width=48,
    heads=6,
    ffn_width=80,
    vocab_size=61,
    max_positions=16,
    image_size=8,
    patch_size=4,
    channels=3,
    classes=7,
)
GPT2 = replace(SMALL, norm="layernorm", activation="gelu", positions="learned", bias=True)
MODELS = {
    "llama": replace(SMALL, kv_heads=2, tied=False),
    "wide heads": replace(SMALL, kv_heads=3, head_width=10, activation="geglu"),
    "gemma": replace(SMALL, kv_heads=2, activation="geglu_tanh", qk_norm="head", sliding_window=4),
    "gpt2": GPT2,
    "vit, class token": replace(GPT2, family="encoder", pool="class_token"),
    "vit, mean": replace(GPT2, family="encoder", pool="mean", patch_size=2),
    "translation": replace(SMALL, family="encoder_decoder", activation="relu"),
    "audio": replace(GPT2, family="encoder_decoder", inputs="audio", mels=5, sinusoid="whisper"),
    "deep encoder": replace(SMALL, family="encoder_decoder", encoder_layers=3, kv_heads=2),
}


def _counted(config: ModelConfig) -> int:
    """Return the FLOPs that torch counts in one forward and backward of a batch."""
    model = Transformer(config)
    inputs = {
        "tokens": torch.zeros(BATCH, SEQ_LEN, dtype=torch.int64),
        "source": torch.zeros(BATCH, SOURCE_LEN, dtype=torch.int64),
        "images": torch.zeros(BATCH, 3, 8, 8),
    }
    if config.inputs == "audio":
        inputs["source"] = torch.zeros(BATCH, SOURCE_LEN + 1, config.mels)
    # torch does not count the CPU's fused attention; it does count the products of the math one.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = model(inputs)
        assert isinstance(logits, torch.Tensor)
        logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", MODELS)
def test_formula_equals_torchs_counter(name: str) -> None:
    config = MODELS[name]
    assert BATCH * flops_per_sample(config, SEQ_LEN, SOURCE_LEN) == _counted(config)


def test_decoder_is_close_to_six_flops_per_weight_and_token() -> None:
    # PaLM's rule (arXiv 2204.02311, appendix B): 6N + 12·layers·heads·head width·sequence.
    config = replace(SMALL, activation="gelu")
    weights = 2 * (4 * 48 * 48 + 2 * 48 * 80) + 48 * 61
    per_token = flops_per_sample(config, SEQ_LEN) / SEQ_LEN
    assert per_token == 6 * weights + 12 * 2 * 48 * SEQ_LEN


@pytest.mark.parametrize(
    ("device", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 80GB HBM3", "fp8", 1979.0),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H100 PCIe", "fp8", 1513.0),
        ("NVIDIA H100 NVL", "fp16", 835.5),
        ("NVIDIA H200", "fp32", 67.0),
        ("NVIDIA H200", "fp8", 1979.0),
        ("NVIDIA H200 NVL", "bf16", 835.5),
        ("NVIDIA H200 NVL", "fp8", 1670.5),
        ("NVIDIA B200", "bf16", 2250.0),
        ("NVIDIA B200", "fp8", 4500.0),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156.0),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A10", "bf16", 125.0),
        ("NVIDIA L40S", "fp16", 362.0),
        ("NVIDIA L40S", "fp8", 733.0),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 4090", "fp8", 330.3),
        ("Tesla V100-SXM2-32GB", "fp16", 125.0),
        ("Tesla V100-PCIE-16GB", "fp16", 112.0),
    ],
)
def test_peak_of_a_named_device(device: str, precision: str, tflops: float) -> None:
    assert peak_flops(device, precision) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    ("device", "precision"),
    [
        ("Tesla V100-SXM2-32GB", "bf16"),  # Volta has no bfloat16
        ("NVIDIA A100-SXM4-80GB", "fp8"),  # Ampere has no float8
        ("NVIDIA A10G", "bf16"),  # half an A10
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"),
        ("NVIDIA GeForce RTX 4090 D", "bf16"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16"),
        ("NVIDIA L40", "bf16"),
        ("cpu", "fp32"),
    ],
)
def test_unknown_peak_is_none(device: str, precision: str) -> None:
    assert peak_flops(device, precision) is None

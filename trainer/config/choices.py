"""Choices, with their meanings, that keys of several commands share."""

PRECISIONS = {
    "fp64": "",
    "fp32": "",
    "bf16": "",
    "fp16": "",
    "fp8": (
        "bf16, but the layers between embedding and head multiply in float8 (GPUs of compute "
        "capability 8.9 or more, with torchao)"
    ),
    "auto": "bf16 on CUDA, fp32 on CPU",
}
DEVICES = {"cpu": "", "cuda": "", "auto": "cuda where there is one"}
RECOMPUTED = {"none": "", "selective": "matmul outputs are not recomputed", "block": ""}

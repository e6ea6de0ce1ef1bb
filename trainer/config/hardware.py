"""Accelerators by name: what their data sheets say, the one home of peaks and bandwidths."""

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    """One kind of device, and the hosts and network that it is usually sold with."""

    title: str
    pattern: str  # of the name that torch.cuda.get_device_name returns
    tflops: Mapping[str, float]  # dense peak by precision, without sparsity
    memory_gib: float = 0.0  # as the driver shows it; 0 = what the machine has
    memory_tbyte_s: float = 0.0  # bandwidth of the device's memory
    link_gbyte_s: float = 0.0  # one way, of one device to the others of its host
    network_gbit_s: float = 0.0  # of one device to other hosts
    per_host: int = 8
    linked: int = 0  # devices that the fast link joins; 0 = those of one host
    generation: str = "hopper"  # whose fitted efficiencies apply (trainer/plan/fitted.json)
    fitted: bool = False  # whether steps of this device are among those that were fitted to


def _peaks(fp8: float, bf16: float, tf32: float, fp32: float, fp64: float) -> dict[str, float]:
    found = {"fp8": fp8, "bf16": bf16, "fp16": bf16, "tf32": tf32, "fp32": fp32, "fp64": fp64}
    return {precision: peak for precision, peak in found.items() if peak}


# Dense peaks in TFLOP/s from the vendors' data sheets; fp32 is without TF32, fp64 with tensor cores
# if the device has any; fp8, bf16 and fp16 accumulate in fp32. NVLink is half of the two-way figure
# that is advertised. PCIe cards are joined by the bus (16 lanes), as rings of more than two are.
_HOPPER_SXM = _peaks(1979.0, 989.5, 494.7, 67.0, 67.0)
_HOPPER_NVL = _peaks(1670.5, 835.5, 417.5, 60.0, 60.0)
_AMPERE = _peaks(0, 312.0, 156.0, 19.5, 19.5)
_VOLTA = {"fp16": 125.0, "fp32": 15.7, "fp64": 7.8}
_BLACKWELL = _peaks(4500.0, 2250.0, 1125.0, 75.0, 37.0)
_GRACE_BLACKWELL = _peaks(5000.0, 2500.0, 1250.0, 80.0, 40.0)

# The first pattern that matches a device's name applies.
ACCELERATORS: dict[str, Accelerator] = {
    "a100-40": Accelerator(
        *("A100 40 GB", r"\bA100\b.*\b40GB", _AMPERE, 39.5, 1.555, 300, 200),
        generation="ampere",
        fitted=True,
    ),
    "a100": Accelerator(
        *("A100 80 GB", r"\bA100\b", _AMPERE, 79.2, 2.039, 300, 200),
        generation="ampere",
        fitted=True,
    ),
    "h100-nvl": Accelerator("H100 NVL", r"\bH100\b.*\bNVL\b", _HOPPER_NVL, 93.6, 3.9, 64, 200),
    "h200-nvl": Accelerator("H200 NVL", r"\bH200\b.*\bNVL\b", _HOPPER_NVL, 140.4, 4.8, 64, 400),
    "h100-pcie": Accelerator(
        *("H100 PCIe", r"\bH100 PCIe\b", _peaks(1513.0, 756.5, 378.0, 51.0, 51.0)),
        *(79.6, 2.0, 64, 200),
    ),
    "h100": Accelerator(*("H100 SXM", r"\bH100\b", _HOPPER_SXM, 79.6, 3.35, 450, 400), fitted=True),
    "h200": Accelerator("H200", r"\bH200\b", _HOPPER_SXM, 140.4, 4.8, 450, 400),
    "b200": Accelerator("B200", r"\bB200\b", _BLACKWELL, 178.4, 8.0, 900, 400),
    "gb200": Accelerator(
        *("GB200 NVL72", r"\bGB200\b", _GRACE_BLACKWELL, 184.0, 8.0, 900, 400),
        per_host=4,
        linked=72,
    ),
    "l40s": Accelerator(
        *("L40S", r"\bL40S\b", _peaks(733.0, 362.0, 183.0, 91.6, 0), 44.4, 0.864, 32, 100),
        generation="ampere",
    ),
    "a10": Accelerator(
        *("A10", r"\bA10\b", _peaks(0, 125.0, 62.5, 31.2, 0), 22.5, 0.6, 32, 100),
        generation="ampere",
    ),
    "rtx4090": Accelerator(
        *("RTX 4090", r"\bRTX 4090\b", _peaks(330.3, 165.2, 82.6, 82.6, 0), 23.6, 1.008, 32, 100),
        generation="ampere",
    ),
    "mi300x": Accelerator(
        *("MI300X", r"\bMI300X\b", _peaks(2614.9, 1307.4, 653.7, 163.4, 163.4)),
        *(191.7, 5.3, 448, 400),
    ),
    "v100-pcie": Accelerator(
        *("V100 PCIe", r"\bV100-PCIE\b", {"fp16": 112.0, "fp32": 14.0, "fp64": 7.0}),
        *(31.7, 0.9, 16, 100),
        generation="ampere",
    ),
    "v100": Accelerator(
        *("V100 SXM 32 GB", r"\bV100-SXM[23]\b", _VOLTA, 31.7, 0.9, 150, 100),
        generation="ampere",
    ),
    "cpu": Accelerator("CPU", r"\bcpu\b", {}, per_host=0, generation="cpu"),
}
# Slower than the full device of that name: unknown.
UNKNOWN = r"\bMIG\b|Laptop|\b4090 D\b"


def accelerator_of(device_name: str) -> str:
    """Return the name in ACCELERATORS of a device that torch names so; empty if it is unknown."""
    if re.search(UNKNOWN, device_name):
        return ""
    found = (name for name, a in ACCELERATORS.items() if re.search(a.pattern, device_name))
    return next(found, "")

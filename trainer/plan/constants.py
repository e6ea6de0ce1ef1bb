"""Efficiencies of a training stack that data sheets do not give, fitted to measured steps."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

FITTED = Path(__file__).with_name("fitted.json")
CPU_FITTED = Path(__file__).with_name("fitted_cpu.json")  # of the nominal CPU


@dataclass(frozen=True)
class Constants:
    """Fractions of peaks that are reached, and overheads; seconds and tokens where they say so."""

    product_ampere: float  # share of the peak that large matrix products reach
    product_hopper: float
    attention_ampere: float  # share of the peak that fused attention reaches in the forward
    attention_hopper: float
    attention_unfused: float
    attention_cudnn: float  # times as fast on Hopper with cuDNN's kernels
    attention_backward: float  # share of the forward's rate
    float8: float  # times as fast as bf16
    half_tokens: float  # tokens of a product at which half of its rate is reached
    half_width: float  # narrowest side of a product at which half of its rate is reached
    odd_width: float  # rate where a width is no multiple of a tile
    pointwise: float  # passes over the kept activations, forward and backward
    fused: float  # of those, share that is left with fused kernels
    launch_seconds: float  # least time of a block's forward; a backward takes twice that
    network: float  # share of the network's bandwidth that rings reach
    link: float  # share of the link's
    latency_seconds: float  # of a ring, times the logarithm of its ranks
    overlap: float  # share of hidden communication that it costs the computation
    overlap_sharded: float  # the same where each parameter is sharded by itself (FSDP2)
    tensor_hidden: float  # share of the tensor axis's communication that an overlap hides
    optimizer: float  # share of the memory's bandwidth that the update reaches
    # Of CPUs, which wait for each operator and communicate with the cores that compute.
    half_length: float = 0.0  # positions at which half of attention's rate is reached
    traffic: float = 0.0  # times that the bytes of operators that are not fused are moved
    operator_seconds: float = 0.0  # for each operator
    group_seconds: float = 0.0  # for each gather or sum of a block's weights
    collective_seconds: float = 0.0  # for each collective of the tensor and the context axis
    action_seconds: float = 0.0  # for each forward or backward of a pipeline's stage
    step_seconds: float = 0.0  # for each step
    sync_seconds: float = 0.0  # more for each step of several ranks
    host_bound: float = 0.0  # share of hidden communication, where none is fitted, that is paid

    def rates(self, generation: str) -> tuple[float, float]:
        """Return the shares of the peak that products and attention reach."""
        if generation == "cpu":  # whose peak is what a product has reached
            return 1.0, self.attention_unfused
        if generation == "ampere":
            return self.product_ampere, self.attention_ampere
        return self.product_hopper, self.attention_hopper


@dataclass(frozen=True)
class Fit:
    """Constants, and the error to expect of a step time on a stack that was not measured."""

    constants: Constants
    median_error: float  # relative, of whole sources that the fit has not seen
    ninetieth_error: float
    calibrated: bool = False  # measured on this machine

    @classmethod
    def read(cls, path: Path = FITTED) -> "Fit":
        """Read constants: those of `benchmarks/published_runs.py CSV --fit`, or of the CPU."""
        values = json.loads(path.read_text(encoding="utf-8"))
        names = {field.name for field in fields(Constants)}
        constants = Constants(**{name: values["constants"][name] for name in names})
        return cls(constants, values["median_error"], values["ninetieth_error"])


def fitted_text(fit: Fit, facts: Mapping[str, Any]) -> str:
    """Return the text of a file of constants; `facts` say what made it."""
    values = {
        **facts,
        "median_error": round(fit.median_error, 4),
        "ninetieth_error": round(fit.ninetieth_error, 4),
        "constants": {name: float(f"{v:.5g}") for name, v in asdict(fit.constants).items()},
    }
    return json.dumps(values, indent=1) + "\n"

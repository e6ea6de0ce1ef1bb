"""The devices and the network of a plan, in plain units."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from trainer.config.hardware import ACCELERATORS, Accelerator

GIB = 2**30
SIDE, COPIED, TRIES = 768, 1 << 25, 3  # of the CPU's products; bytes of its copies
GLOO = 4  # times as long as a copy: between processes of a host


@dataclass(frozen=True)
class Machine:
    """Equal devices: rates in FLOP/s and bytes/s, memory in bytes."""

    title: str
    generation: str  # of Constants.generations
    products: float  # dense peak of matrix products in the precision of the run
    attention: float  # dense peak of attention, which is never in float8
    memory_bandwidth: float
    link: float  # one way, of a device to the others of `linked`
    network: float  # of a device to all others
    linked: int  # neighbouring ranks that the fast link joins
    memory: float  # of one device
    fitted: bool = False  # whether measured steps of such devices are among those fitted to


def named_machine(
    name: str, precision: str, per_host: int = 0, memory_gib: float = 0.0, network_gbit: float = 0.0
) -> Machine | None:
    """Return the machine of an accelerator's data sheet; None if it lacks that precision.

    What is 0 is taken from the data sheet. `precision` is one of fp64, fp32, bf16, fp16, fp8.
    """
    device = ACCELERATORS[name]
    if precision not in device.tflops:
        return None
    return Machine(
        title=device.title,
        generation=device.generation,
        products=device.tflops[precision] * 1e12,
        attention=_attention_peak(device.tflops, precision) * 1e12,
        memory_bandwidth=device.memory_tbyte_s * 1e12,
        link=device.link_gbyte_s * 1e9,
        network=(network_gbit or device.network_gbit_s) * 1e9 / 8,
        linked=_linked(device, per_host),
        memory=(memory_gib or device.memory_gib) * GIB,
        fitted=device.fitted,
    )


def _attention_peak(tflops: Mapping[str, float], precision: str) -> float:
    return tflops["bf16" if precision == "fp8" else precision]


def _linked(device: Accelerator, per_host: int) -> int:
    return max(1, device.linked, per_host or device.per_host)


def measured_cpu(ranks: int) -> Machine:
    """Return this host's CPU, measured in a few products and copies, shared by so many ranks."""
    matrix = np.ones((SIDE, SIDE), np.float32)
    source = np.ones(COPIED, np.uint8)
    product = _least_seconds(lambda: matrix @ matrix)
    bandwidth = 2 * COPIED / _least_seconds(source.copy) / ranks
    peak = 2 * SIDE**3 / product / ranks
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks
    link = bandwidth / GLOO
    return Machine("CPU rank", "cpu", peak, peak, bandwidth, link, link, ranks, memory)


def _least_seconds(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(TRIES):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def nominal_cpu(ranks: int) -> Machine:
    """Return this host's CPU by fixed rates for each core, shared by so many ranks."""
    cores = os.cpu_count() or 1
    peak, bandwidth = 60e9 * cores / ranks, 10e9 / ranks
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks
    link = bandwidth / GLOO
    return Machine("CPU rank", "cpu", peak, peak, bandwidth, link, link, ranks, memory)

"""The devices and the network of a plan, in plain units."""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trainer.config.hardware import ACCELERATORS, Accelerator

GIB = 2**30
# A core of an AMD EPYC (Zen 4, 2.6 GHz), torch 2.13, one thread: FLOP/s of products of 512 tokens
# by 128 × 384 by precision, bytes/s of copies, and of gloo in one host.
CORE_PRODUCTS = {"fp64": 50e9, "fp32": 100e9, "bf16": 210e9, "fp16": 18e9}
CORE_BANDWIDTH, CORE_LINK = 30e9, 1.5e9
CGROUP = Path("/sys/fs/cgroup")


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


def nominal_cpu(ranks: int, precision: str = "fp32") -> Machine:
    """Return this host's CPU, its cores and memory shared by so many ranks; nothing is measured.

    `calibrate` replaces the rates, which are those of another machine.
    """
    cores = host_cores() / ranks
    return Machine(
        title="CPU rank",
        generation="cpu",
        products=cores * CORE_PRODUCTS[precision],
        attention=cores * CORE_PRODUCTS[precision],
        memory_bandwidth=cores * CORE_BANDWIDTH,
        link=cores * CORE_LINK,
        network=cores * CORE_LINK,
        linked=ranks,
        memory=host_memory() / ranks,
    )


def host_cores() -> int:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def host_memory() -> int:
    """Return the bytes of memory that processes here may use: the machine's, or the cgroup's."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *_cgroup_limits()])


def _cgroup_limits() -> Iterator[int]:
    """Yield the memory limits of this process's cgroup and of those around it."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        root, name = CGROUP, "memory.max"  # of version 2
        if controllers:
            root, name = CGROUP / "memory", "memory.limit_in_bytes"
        if controllers and "memory" not in controllers.split(","):
            continue
        own = root / path.strip("/")
        for folder in (own, *own.parents):
            with suppress(OSError, ValueError):
                yield int((folder / name).read_text(encoding="utf-8"))
            if folder == root:
                break

"""Define what a calibration measures, as numbers; free of torch."""

from dataclasses import dataclass

from trainer.config.train import TrainConfig

INSIDE, BETWEEN = "inside", "between"  # hosts


@dataclass(frozen=True)
class Product:
    """Seconds of a layer's three products: forward, and gradients of input and weight."""

    tokens: int
    width: int
    outputs: int
    seconds: float


@dataclass(frozen=True)
class FusedAttention:
    """Seconds of fused causal attention."""

    samples: int
    heads: int
    length: int
    head_width: int
    forward: float
    backward: float


@dataclass(frozen=True)
class Collective:
    """Seconds of a collective; the whole tensor has so many bytes."""

    name: str
    where: str
    ranks: int
    payload_bytes: int
    seconds: float


@dataclass(frozen=True)
class Overlap:
    """Seconds of products and of a collective, alone and side by side."""

    products: float
    collective: float
    together: float


@dataclass(frozen=True)
class Rates:
    """All that is measured but steps."""

    products: list[Product]
    attention: list[FusedAttention]
    copy_bandwidth: float  # bytes/s, read and written
    collectives: list[Collective]
    overlap: Overlap | None  # None on one rank


@dataclass(frozen=True)
class MeasuredStep:
    """The time of a real step under a resolved strategy."""

    config: TrainConfig
    seconds: float

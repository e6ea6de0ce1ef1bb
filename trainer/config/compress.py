"""The keys of compression: `compress.*`."""

from dataclasses import dataclass
from typing import Any

from parallel.config_fields import key


@dataclass
class CompressConfig:
    """Compression: shorter sequences, fewer bits, fewer weights; read by trainer/compress/."""

    merge: int = key(
        0,
        "Encoders: tokens merged into their most similar one after each block but the last (at "
        "most half of the remaining tokens)",
        off=0,
        at_least=0,
    )
    pool_after: int = key(
        0,
        "Blocks before the pooling; in a language model as many blocks after it work on the full "
        "sequence again",
        off=0,
        at_least=0,
    )
    pool_stride: int = key(
        2, "Patches per side, or tokens of text, averaged into one vector", at_least=2
    )
    drop: float = key(
        0.0,
        "Image classifiers: fraction of the patches dropped while training",
        off=0.0,
        at_least=0,
        below=1,
    )
    bits: int = key(
        0,
        "Bits of the weights between embedding and head (quantization-aware training)",
        off=0,
        off_means="all",
        at_least=0,
        at_most=8,
    )
    input_bits: int = key(
        8,
        "Bits of the inputs of those layers, if bits is set",
        off=0,
        off_means="all",
        at_least=0,
        at_most=8,
    )
    group: int = key(
        0,
        "Adjacent weights of an output that share a quantization scale",
        off=0,
        off_means="one scale per output",
        at_least=0,
    )
    sparse_n: int = key(
        0, "Nonzero weights in each group of sparse_m (n:m sparsity)", off=0, at_least=0
    )
    sparse_m: int = key(4, "Group size along the inputs", at_least=2)
    sparse_start: float = key(
        0.0, "Fraction of the steps before weights are set to zero", at_least=0, below=1
    )
    prune_heads: float = key(
        0.0,
        "Fraction of each block's attention heads to prune, the least important first; an "
        "exported model does not contain them",
        off=0.0,
        at_least=0,
        below=1,
    )
    prune_ffn: float = key(
        0.0, "The same fraction for the feed-forward layer's channels", off=0.0, at_least=0, below=1
    )
    prune_start: float = key(
        0.1, "Fraction of the steps before pruning starts", at_least=0, below=1
    )
    prune_end: float = key(
        0.5, "Fraction of the steps after which pruning is complete", at_least=0, below=1
    )
    teacher: str = key(
        "",
        "Folder of a trained run whose newest checkpoint is the teacher of a distillation, "
        "or of its precomputed logits (launch/teach.py)",
        off="",
    )
    temperature: float = key(
        2.0,
        "Divisor of student and teacher logits: above 1.0 gives improbable classes more weight",
        above=0,
    )
    distill_weight: float = key(
        0.5,
        "Weight of the divergence from the teacher (times temperature²) in the loss",
        off=0.0,
        at_least=0,
        at_most=1,
    )
    match: list[list[int]] = key(
        [],
        "Pairs of (student, teacher) blocks, counted from 0, e.g. [[1,3],[3,7]]: the similarities "
        "within a sample after block 1 learn to match those after the teacher's block 3",
        off=[],
    )
    match_weight: float = key(
        1.0,
        "Factor of the mean squared difference of those similarities, added to the loss",
        off=0.0,
        at_least=0,
    )


def non_default_options(compress: CompressConfig) -> dict[str, Any]:
    """Return the keys, with their values, that differ from no compression."""
    plain = CompressConfig()
    return {k: v for k, v in vars(compress).items() if v != getattr(plain, k)}

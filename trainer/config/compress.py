"""The keys of compression: `compress.*`."""

from dataclasses import dataclass
from typing import Any

from parallel.config_fields import key


@dataclass
class CompressConfig:
    """Compression: shorter sequences, fewer bits, fewer weights; read by trainer/compress/."""

    merge: int = key(
        0,
        "Encoders: vectors that join the most alike one, behind each block but the last (at "
        "most half of those that are there)",
        off=0,
        at_least=0,
    )
    pool_after: int = key(
        0,
        "Blocks in front of the pooling (of a language model also behind it, where every "
        "token has a vector again)",
        off=0,
        at_least=0,
    )
    pool_stride: int = key(
        2, "Patches a side, or tokens of text, whose mean becomes one vector", at_least=2
    )
    drop: float = key(
        0.0,
        "Image classifiers: share of the patches left out while training",
        off=0.0,
        at_least=0,
        below=1,
    )
    bits: int = key(
        0,
        "Bits of the weights between embedding and head, trained as they will be",
        off=0,
        off_means="all",
        at_least=0,
        at_most=8,
    )
    input_bits: int = key(
        8,
        "Bits of what those weights are multiplied with, where bits is set",
        off=0,
        off_means="all",
        at_least=0,
        at_most=8,
    )
    group: int = key(
        0,
        "Neighbouring weights of an output that share a scale",
        off=0,
        off_means="all of an output's",
        at_least=0,
    )
    sparse_n: int = key(
        0, "Weights that are not zero, of every sparse_m neighbours", off=0, at_least=0
    )
    sparse_m: int = key(4, "Neighbours along the inputs", at_least=2)
    sparse_start: float = key(
        0.0, "Share of the steps before weights become zero", at_least=0, below=1
    )
    prune_heads: float = key(
        0.0,
        "Share of each block's attention heads that are pruned, the least important first, "
        "and that an exported model is without",
        off=0.0,
        at_least=0,
        below=1,
    )
    prune_ffn: float = key(
        0.0, "The same share of the feed-forward layer's channels", off=0.0, at_least=0, below=1
    )
    prune_start: float = key(
        0.1, "Share of the steps before the first of them are pruned", at_least=0, below=1
    )
    prune_end: float = key(0.5, "Share of the steps before the last are", at_least=0, below=1)
    teacher: str = key(
        "",
        "Folder of a run whose newest checkpoint says what else is likely beside each target, "
        "or of what such a run has said (launch/teach.py); the model learns that too",
        off="",
    )
    temperature: float = key(
        2.0, "Logits of both are divided by it: above 1.0 unlikely classes say more", above=0
    )
    distill_weight: float = key(
        0.5,
        "Share of the loss that is the divergence from the teacher (times temperature²)",
        off=0.0,
        at_least=0,
        at_most=1,
    )
    match: list[list[int]] = key(
        [],
        "Pairs of blocks, counted from 0, e.g. [[1,3],[3,7]]: behind block 1 the vectors of a "
        "sample learn to be as alike as those behind block 3 of the teacher",
        off=[],
    )
    match_weight: float = key(
        1.0,
        "Factor of the mean squared difference of those similarities, added to the loss",
        off=0.0,
        at_least=0,
    )


def non_default_options(compress: CompressConfig) -> dict[str, Any]:
    """Return the keys with their values that are not as where nothing is compressed."""
    plain = CompressConfig()
    return {k: v for k, v in vars(compress).items() if v != getattr(plain, k)}

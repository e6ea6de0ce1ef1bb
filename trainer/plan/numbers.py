"""Numbers that the closed forms of memory work out once, and use in every layout; torch-free."""

from collections.abc import Mapping
from dataclasses import dataclass

from trainer.plan.block_memory import BlockBytes, LossBytes
from trainer.plan.parameters import Parameters


@dataclass(frozen=True)
class Part:
    """Numbers of a kind of block."""

    bytes: BlockBytes
    parameters: Parameters
    copies: float  # its weights in the dtype of compute
    more: float  # kept in addition with mode none


@dataclass(frozen=True)
class Numbers:
    """Numbers of one micro-batch under one split of sequences and layers."""

    parts: Mapping[str, Part]
    loss: LossBytes
    head: float  # the head's matrices in the dtype of compute
    inputs: float
    embedding: float
    shared: float
    memory: float  # the encoder's output, which a stage of decoder blocks receives
    target: float  # the embedded target, which waits in a stage of encoder blocks


@dataclass(frozen=True)
class StageNumbers:
    """Numbers of one stage of a pipeline rank, for one micro-batch."""

    kept: float  # without the loss
    late: float  # from the loss to its backward
    waiting: float  # more between two halves of a backward
    parameters: Parameters  # its ends included
    ends: float  # of these, the head's that learn
    has_head: bool
    block: Part  # the largest
    blocks: int
    one: float  # what the block keeps
    work: tuple[float, float]  # of its backward, recomputed included; gradients there, or first
    done: float  # of the head, gone when the blocks' backward begins


@dataclass(frozen=True)
class RankNumbers:
    """Numbers of one pipeline rank."""

    stages: tuple[StageNumbers, ...]
    blocks: Parameters
    ends: Parameters
    own: Parameters  # both

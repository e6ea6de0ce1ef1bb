"""Bytes of a training step: counted from its collectives, and by the closed form."""

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from parallel.axis import find_axis
from parallel.comm_volume.closed_form import (
    Shape,
    ShardedSequence,
    StepBytes,
    context_bytes,
    cross_entropy_bytes,
    stage_bytes,
    step_bytes,
    tensor_bytes,
)
from parallel.comm_volume.counter import CollectiveCounter, Payload
from parallel.context.attention import ContextParallel
from parallel.data.data_parallel import DataParallel
from parallel.data.ddp import reduce_dtype
from parallel.grad_norm import local_tensor
from parallel.parallel_model import MicroBatch, ParallelModel
from parallel.pipeline.stages import PipelineParallel
from parallel.pipeline.torch_schedules import list_actions
from parallel.runtime import Runtime
from parallel.strategy import StrategyConfig
from parallel.tensor.layers import HEADS, TensorParallel, split_dim, style_of
from trainer.build import parallel_model
from trainer.config.train import LoraConfig, ModelConfig, head_width_of
from trainer.inference.trained_run import unwrap_transformer
from trainer.loss import rows_of_logits
from trainer.model import Transformer
from trainer.nn.embeddings import TokenEmbedding
from trainer.nn.heads import ClassifierHead
from trainer.nn.tensor_layout import TENSOR_LAYOUT
from trainer.precision import PRECISIONS
from trainer.verify.cases import make_batch, samples_per_step, split_batch

COUNT_BYTES, FLOAT_BYTES = 8, 4  # a number of targets (int64); a gradient or a norm (float32)
COMPUTE_BYTES = 2  # bf16


def step_traffic(
    runtime: Runtime,
    strategy: StrategyConfig,
    model_config: ModelConfig,
    lora: LoraConfig | None = None,
) -> tuple[Payload, Payload]:
    """Return the bytes of one bf16 step of this rank by collective: counted, and closed form."""
    worker = parallel_model(model_config, strategy, runtime, PRECISIONS["bf16"], lora=lora)
    return count_traffic(worker, strategy)


def count_traffic(worker: ParallelModel, strategy: StrategyConfig) -> tuple[Payload, Payload]:
    """Return the bytes of one step of a bf16 model's rank: counted, and by the closed form."""
    config = unwrap_transformer(worker).config
    micro_batches = split_batch(make_batch(config, 0, 0, samples_per_step(strategy)), worker)
    # DDP agrees on its buckets once, in the second step.
    data = find_axis(worker.axes, DataParallel)
    wraps = data is not None and isinstance(data.wrapped, DistributedDataParallel)
    for _ in range(3 if wraps else 1):
        worker.zero_grad()
        with CollectiveCounter() as traffic:
            worker.forward_backward(micro_batches)
            worker.clip_grad_norm(1.0)
    due = _due_bytes(worker, strategy, micro_batches)
    counted = {key: size for key, size in traffic.payload_bytes.items() if size}
    return counted, {key: size for key, size in due.items() if size}


def _due_bytes(
    worker: ParallelModel, strategy: StrategyConfig, micro_batches: list[MicroBatch]
) -> Payload:
    """Return the closed form: gradients and weights, activations, and the listed small ones."""
    model = unwrap_transformer(worker)
    moved, heads, learned_heads, tied = StepBytes(), 0, 0, 0
    floats = (_norm_reductions(strategy) + _partial_gradients(worker)) * FLOAT_BYTES
    if find_axis(worker.axes, TensorParallel) is not None:
        moved += _activation_bytes(worker, strategy, micro_batches)
        floats += sum(_norm_elements(worker, m) for m in micro_batches) * FLOAT_BYTES
        heads, learned_heads = _shared_heads(worker, len(micro_batches))
        if model.head is not None:
            floats += sum(cross_entropy_bytes(_rows_of_logits(worker, m)) for m in micro_batches)
    if find_axis(worker.axes, ContextParallel) is not None:
        moved += sum((_attention_bytes(model, strategy, m) for m in micro_batches), StepBytes())
        floats += FLOAT_BYTES  # the loss, of which each rank has a part
    if (pipeline := find_axis(worker.axes, PipelineParallel)) is not None:
        moved += _stage_messages(pipeline, model, micro_batches)
        floats += FLOAT_BYTES  # the loss, which the last stage has
        if pipeline.tied is not None and pipeline.tied.requires_grad:
            tied = local_tensor(pipeline.tied).numel()
    # FSDP hands a layer its weights in bf16, and their gradients come back so.
    fsdp = isinstance(worker.model, FSDPModule)
    half, full = (COMPUTE_BYTES, 0) if fsdp else (0, FLOAT_BYTES)
    return _reduced_bytes(worker, strategy, len(micro_batches)) + Counter(
        {
            ("all_reduce", torch.int64): COUNT_BYTES if worker.data_degree > 1 else 0,
            ("all_reduce", torch.float32): floats,
            ("all_reduce", torch.bfloat16): moved.all_reduce,
            ("all_gather", torch.bfloat16): moved.all_gather + half * heads,
            ("all_gather", torch.float32): full * heads,
            ("reduce_scatter", torch.bfloat16): moved.reduce_scatter + half * learned_heads,
            ("reduce_scatter", torch.float32): full * learned_heads,
            ("all_to_all", torch.bfloat16): moved.all_to_all,
            ("send", torch.bfloat16): moved.send,
            ("send", torch.float32): FLOAT_BYTES * tied,
        }
    )


def _rows_of_logits(worker: ParallelModel, micro_batch: MicroBatch) -> int:
    """Return how many rows of a micro-batch have logits on this rank."""
    targets = micro_batch["targets"]
    own = unwrap_transformer(worker).local_targets(targets)
    return rows_of_logits(own.numel(), int(worker.count_valid(targets)))


def _reduced_bytes(worker: ParallelModel, strategy: StrategyConfig, micro_batches: int) -> Counter:
    """Gradients and weights: these in bf16, gradients in the dtype they are reduced in."""
    dtype = reduce_dtype(strategy.reduce, torch.float32)
    blocks, others, learned = _parameter_shapes(worker)
    due = step_bytes(
        blocks, others, strategy, micro_batches, COMPUTE_BYTES, dtype.itemsize, learned
    )
    gathered = torch.uint8 if strategy.reduce == "int8" else torch.bfloat16
    return Counter(
        {
            ("all_reduce", dtype): due.all_reduce,
            ("all_gather", gathered): due.all_gather,
            ("reduce_scatter", dtype): due.reduce_scatter,
            ("all_to_all", torch.uint8): due.all_to_all,
        }
    )


def _parameter_shapes(worker: ParallelModel) -> tuple[list[Shape], list[Shape], list[Shape]]:
    """Shapes of this rank's layers before FSDP: inside blocks, outside, and of all that learn."""
    blocks: list[Shape] = []
    others: list[Shape] = []
    learned: list[Shape] = []
    for name, parameter in worker.model.named_parameters():
        shape = list(parameter.shape)
        for axis in worker.axes:
            if (dim := axis.split_dim(name)) is not None:
                rows = math.ceil(shape[dim] / axis.degree)
                shape[dim] = max(0, min(rows, shape[dim] - axis.group.rank() * rows))
        (blocks if name.startswith("blocks.") else others).append(tuple(shape))
        if parameter.requires_grad:
            learned.append(tuple(shape))
    return blocks, others, learned


def _norm_reductions(strategy: StrategyConfig) -> int:
    """Return the all-reduces of the gradient norm: one per axis and set of split axes.

    Split layers are one set, parameters replicated over the tensor axis another; one more sums over
    the stages of a pipeline.
    """
    shards, tensor, staged = strategy.shard > 1, strategy.tensor > 1, strategy.pipeline > 1
    return (shards + tensor) + (shards if tensor else 0) + staged


def _partial_gradients(worker: ParallelModel) -> int:
    """Elements of gradients that are a part of the sequence's, or of the stages': summed once."""
    parameters = dict(worker.model.named_parameters())
    return sum(local_tensor(parameters[n]).numel() for axis in worker.axes for n in axis.partial)


def _norm_elements(worker: ParallelModel, micro_batch: MicroBatch) -> int:
    """Elements of the means that norms over all heads reduce, forward and backward."""
    model, means = unwrap_transformer(worker), 0
    if model.config.qk_norm != "width":
        return 0
    sizes = _sequence_sizes(model, micro_batch)
    for block in model.blocks.values():
        count, length = sizes[str(block.stream)]
        means += 2 * count * length
        if block.cross_attention is not None:
            means += count * (length + sizes["source"][1])
    return 2 * means


def _shared_heads(worker: ParallelModel, micro_batches: int) -> tuple[int, int]:
    """Elements of layers with fewer heads than ranks, gathered, and of their gradients."""
    config = unwrap_transformer(worker).config
    least = worker.mesh["tensor"].size() * head_width_of(config)
    shared = [
        parameter
        for name, parameter in worker.model.named_parameters()
        if style_of(name, TENSOR_LAYOUT) == HEADS
        and split_dim(HEADS, name) is not None
        and parameter.shape[0] < least
    ]
    learned = (parameter.numel() for parameter in shared if parameter.requires_grad)
    return micro_batches * sum(p.numel() for p in shared), micro_batches * sum(learned)


def _activation_bytes(
    worker: ParallelModel, strategy: StrategyConfig, micro_batches: list[MicroBatch]
) -> StepBytes:
    """Return the activation bytes that this rank's tensor-parallel layers communicate."""
    model, pipeline = unwrap_transformer(worker), find_axis(worker.axes, PipelineParallel)
    if pipeline is None:
        stages, split_backwards = {0: tuple(model.blocks)}, set()
    else:
        stages = {stage.stage_index: stage.blocks for stage in pipeline.stages}
        # Parameters that stages share keep the backward whole.
        split_backwards = (
            set() if pipeline.partial else _split_backwards(strategy, pipeline, len(micro_batches))
        )
    sequences = [
        sequence
        for stage, blocks in stages.items()
        for number, micro_batch in enumerate(micro_batches)
        for sequence in _stage_sequences(
            model, blocks, micro_batch, (stage, number) in split_backwards
        )
    ]
    return tensor_bytes(sequences, model.config.width, strategy, COMPUTE_BYTES)


def _split_backwards(
    strategy: StrategyConfig, pipeline: PipelineParallel, micro_batches: int
) -> set[tuple[int, int]]:
    """Stages and micro-batches whose backward comes in two halves; the first stage's is one."""
    per_rank = len(pipeline.stages)
    lists = list_actions(strategy.schedule, strategy.pipeline, per_rank, micro_batches)
    return {(a.stage, a.micro_batch) for own in lists.values() for a in own if a.kind == "I"} - {
        (0, micro_batch) for micro_batch in range(micro_batches)
    }


def _stage_sequences(
    model: Transformer, blocks: Sequence[str], micro_batch: MicroBatch, splits_backward: bool
) -> list[ShardedSequence]:
    """Return the sequences that flow through the layers of one stage."""
    sizes = _sequence_sizes(model, micro_batch)
    has_tokens = isinstance(model.embed, TokenEmbedding)
    last = int(blocks[-1]) == model.depth - 1
    embedding = model.embed.parameters() if model.embed is not None else ()
    embedding_learns = any(parameter.requires_grad for parameter in embedding)
    found = []
    for stream, (count, length) in sizes.items():
        own = [model.blocks[name] for name in blocks if model.blocks[name].stream == stream]
        found.append(
            ShardedSequence(
                count,
                length,
                branches=sum(2 + (b.cross_attention is not None) for b in own),
                starts=int(blocks[0] == "0" and has_tokens),
                ends=sum(b.turn_norm is not None for b in own)
                + (last and stream == list(sizes)[-1]),
                backwards=2 if splits_backward else 1,
                frozen_start=blocks[0] == "0" and not embedding_learns,
            )
        )
    return found


def _attention_bytes(
    model: Transformer, strategy: StrategyConfig, micro_batch: MicroBatch
) -> StepBytes:
    """Return the bytes that this rank's attention communicates over the context axis."""
    config, degree, moved = model.config, strategy.context, StepBytes()
    sizes = _sequence_sizes(model, micro_batch)
    width = head_width_of(config)
    queries = config.heads // strategy.tensor
    groups = max(1, (config.kv_heads or config.heads) // strategy.tensor)
    for block in model.blocks.values():
        count, length = sizes[str(block.stream)]
        seen = [length] + ([sizes["source"][1]] if block.cross_attention is not None else [])
        for keys in seen:
            moved += context_bytes(
                strategy.context_method,
                (count, queries, length, width),
                (count, groups, keys, width),
                degree,
                COMPUTE_BYTES,
            )
    if isinstance(model.head, ClassifierHead):  # it pools the whole sequence
        count, length = sizes["source"]
        pooled = count * length * degree * config.width * COMPUTE_BYTES
        moved += StepBytes(all_gather=pooled, reduce_scatter=pooled)
    return moved


def _sequence_sizes(model: Transformer, micro_batch: MicroBatch) -> dict[str, tuple[int, int]]:
    """Return (samples, local positions) of each sequence, in the order of the blocks."""
    count = len(micro_batch["targets"])
    lengths = model.sequence_lengths(micro_batch)
    return {name: (count, model.context.local_length(length)) for name, length in lengths.items()}


def _stage_messages(
    pipeline: PipelineParallel, model: Transformer, micro_batches: list[MicroBatch]
) -> StepBytes:
    """Return the bytes that this rank's stages send."""
    moved = StepBytes()
    for micro_batch in micro_batches:
        likes = [model.flow_like(micro_batch, int(blocks[0])) for blocks in pipeline.runs]
        flows = [
            (sum(x.nbytes for x in flow), sum(x.nbytes for x in flow if x.is_floating_point()))
            for flow in ([x for x in flow if x is not None] for flow in likes)
        ]
        moved += stage_bytes(flows, pipeline.placement, pipeline.rank)
    return moved

"""Bytes of a training step: counted from the collectives that it issues, and by the closed form."""

import math

import torch
from torch import Tensor

from parallel.config import StrategyConfig
from parallel.cost import SplitSequence, StepBytes, cross_entropy_bytes, step_bytes, tensor_bytes
from parallel.runtime import Runtime
from parallel.tensor import HEADS, split_dim, style_of
from parallel.traffic import Payload, Traffic
from parallel.worker import Worker
from trainer.build import parallel_model
from trainer.cases import make_batch, split
from trainer.config import ModelConfig
from trainer.model import TENSOR_LAYOUT
from trainer.precision import PRECISIONS

COUNT_BYTES, FLOAT_BYTES = 8, 4  # a number of targets (int64); a gradient or a norm (float32)


def step_traffic(
    runtime: Runtime, strategy: StrategyConfig, model_config: ModelConfig
) -> tuple[Payload, Payload]:
    """Bytes of one bf16 step by collective: counted from those issued, and by the closed form."""
    worker = parallel_model(model_config, strategy, runtime, PRECISIONS["bf16"])
    micro_batches = split(make_batch(model_config, 0, 0), worker)
    for _ in range(3):  # DDP agrees on its buckets once, in the second step
        worker.zero_grad()
        with Traffic() as traffic:
            worker.forward_backward(micro_batches)
            worker.clip_grad_norm(1.0)
    due = _due_bytes(worker, strategy, model_config, micro_batches)
    counted = {key: size for key, size in traffic.payload_bytes.items() if size}
    return counted, {key: size for key, size in due.items() if size}


def _due_bytes(worker: Worker, strategy: StrategyConfig, model: ModelConfig,
               micro_batches: list[dict[str, Tensor]]) -> Payload:  # fmt: skip
    """The closed form: gradients and weights, activations, and the listed small ones."""
    degree, times = strategy.tensor, len(micro_batches)
    # FSDP hands a layer its weights in bf16, and their gradients come back so.
    fsdp = strategy.shard > 1 or (degree > 1 and strategy.replicate > 1)
    partial, shared_heads = 0, 0
    blocks: list[tuple[int, ...]] = []
    others: list[tuple[int, ...]] = []
    for name, parameter in worker.model.named_parameters():
        style, shape = style_of(name, TENSOR_LAYOUT), list(parameter.shape)
        dim = split_dim(style, name)
        if degree > 1 and dim is not None:
            shape[dim] = math.ceil(shape[dim] / degree)  # the first rank's
        elif name in worker.partial_gradients():
            partial += math.ceil(shape[0] / strategy.shard) * math.prod(shape[1:]) * FLOAT_BYTES
        if style == HEADS and parameter.shape[0] < degree * model.width // model.heads:
            shared_heads += times * parameter.numel()
        (blocks if name.startswith("blocks.") else others).append(tuple(shape))
    due = step_bytes(blocks, others, strategy, times, compute_bytes=2, reduce_bytes=FLOAT_BYTES)
    moved, floats = StepBytes(), partial + _norms(strategy) * FLOAT_BYTES
    if degree > 1:
        for micro_batch in micro_batches:
            moved += tensor_bytes(_sequences(model, micro_batch), model.width, strategy, 2)
            floats += cross_entropy_bytes(micro_batch["targets"].numel())
    half, full = (2 * shared_heads, 0) if fsdp else (0, FLOAT_BYTES * shared_heads)
    return {
        ("all_reduce", torch.int64): COUNT_BYTES if worker.data_degree > 1 else 0,
        ("all_reduce", torch.float32): due.all_reduce + floats,
        ("all_reduce", torch.bfloat16): moved.all_reduce,
        ("all_gather", torch.bfloat16): due.all_gather + moved.all_gather + half,
        ("all_gather", torch.float32): full,
        ("reduce_scatter", torch.bfloat16): moved.reduce_scatter + half,
        ("reduce_scatter", torch.float32): due.reduce_scatter + full,
    }


def _norms(strategy: StrategyConfig) -> int:
    """All-reduces of the gradient norm: one per axis and set of axes that parameters are split on.

    Split layers are one set, what every tensor rank has whole is another.
    """
    shards, tensor = strategy.shard > 1, strategy.tensor > 1
    return (shards + tensor) + (shards if tensor else 0)


def _sequences(model: ModelConfig, micro_batch: dict[str, Tensor]) -> list[SplitSequence]:
    """The sequences that flow through the model's split layers."""
    if model.family == "encoder":
        length = (model.image_size // model.patch_size) ** 2 + (model.pool == "class_token")
        return [SplitSequence(len(micro_batch["images"]), length, 2 * model.layers, starts=0)]
    samples, length = micro_batch["tokens"].shape
    if model.family == "decoder":
        return [SplitSequence(samples, length, 2 * model.layers)]
    source = SplitSequence(
        samples, micro_batch["source"].shape[1], 2 * (model.encoder_layers or model.layers)
    )
    return [source, SplitSequence(samples, length, 3 * model.layers)]

"""Build the parallel model of a config: the only module that joins trainer/ and parallel/."""

import logging
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from parallel import parallelize as apply
from parallel.mesh import build_mesh
from parallel.parallel_model import ParallelModel
from parallel.runtime import Runtime
from parallel.strategy import StrategyConfig, resolve_degrees
from trainer.compress.compression import Compression
from trainer.config.train import (
    CompressConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    TrainConfig,
    longest_source,
)
from trainer.lora.adapter import add_adapters
from trainer.loss import CrossEntropy, Objective
from trainer.model import Transformer
from trainer.nn.auxiliary_loss import attach_loss
from trainer.nn.float8 import multiply_in_float8
from trainer.nn.flops import flops_per_block
from trainer.nn.heads import Head
from trainer.nn.init import init_rows
from trainer.nn.sequence import Flow, Inputs, Sequences
from trainer.nn.tensor_layout import TENSOR_LAYOUT
from trainer.precision import Precision, resolve_precision

log = logging.getLogger(__name__)


def build_worker(
    config: TrainConfig,
    runtime: Runtime,
    compression: Compression | None = None,
    objective: Objective | None = None,
    parallelize: apply.Parallelize = apply.parallelize,
) -> ParallelModel:
    """Build the config's model under its strategy on the current ranks, with initial weights.

    Pass the config's `compression` if the caller uses it afterwards. `objective` is the training
    objective; None = cross-entropy. A trace passes a `parallelize` that allocates fake tensors.
    """
    compression = compression or Compression(config.compress)
    strategy = resolve_degrees(config.strategy, runtime.world_size)
    _warn_of_slow_layouts(config, strategy, runtime)
    return parallel_model(
        config.model,
        strategy,
        runtime,
        resolve_precision(config.precision, runtime.device),
        seed=config.seed,
        loss=config.loss,
        objective=objective,
        activation_checkpointing=config.activation_checkpointing,
        compile=config.compile,
        compression=compression,
        lora=config.lora,
        parallelize=parallelize,
    )


def _warn_of_slow_layouts(config: TrainConfig, strategy: StrategyConfig, runtime: Runtime) -> None:
    """Log what makes this run slower than another one that takes the same steps."""
    if strategy.tensor > runtime.local_world_size:
        log.warning(
            "strategy.tensor=%d is more than the %d ranks of this host: the activations of every "
            "layer cross the network several times in each direction, which is many times slower "
            "than inside a host; use strategy.tensor=%d and more strategy.shard or "
            "strategy.replicate",
            strategy.tensor,
            runtime.local_world_size,
            math.gcd(strategy.tensor, runtime.local_world_size),
        )
    if config.precision == "fp8" and runtime.device.type == "cuda" and not config.compile:
        log.warning(
            "precision=fp8 with compile=false casts to 8 bits by kernels of their own, which takes "
            "longer than the faster products save; set compile=true, or precision=bf16"
        )


def build_meta_model(
    config: ModelConfig, precision: Precision, compression: Compression, lora: LoraConfig
) -> Transformer:
    """Build the full model on the meta device, with compressed, float8 and adapted layers."""
    with torch.device("meta"):
        model = Transformer(config, precision.compute)
    compression.reshape_model(model)
    if precision.float8:
        multiply_in_float8(model.blocks)
    add_adapters(model, lora)
    return model


def parallel_model(
    config: ModelConfig,
    strategy: StrategyConfig,
    runtime: Runtime,
    precision: Precision,
    *,
    seed: int = 0,
    loss: LossConfig | None = None,
    objective: Objective | None = None,
    activation_checkpointing: str = "none",
    compile: bool = False,
    compression: Compression | None = None,
    lora: LoraConfig | None = None,
    draw_rows: Callable[..., Tensor] = init_rows,
    parallelize: apply.Parallelize = apply.parallelize,
) -> ParallelModel:
    """Build a model under a resolved strategy; `verify` passes a `parallelize` with a fault."""
    compression = compression or Compression(CompressConfig())
    model = build_meta_model(config, precision, compression, lora or LoraConfig())
    objective, source = objective or CrossEntropy(), longest_source(config)
    facts = apply.ModelSpec(
        draw_rows=partial(draw_rows, config, seed),
        loss_sum=_training_loss(model, objective, loss or LossConfig(), compression),
        count_valid=objective.count_valid,
        layout=TENSOR_LAYOUT,
        splits_classes=objective.splits_classes,
        costs=flops_per_block(config, config.max_positions, source, model.block_lengths(source)),
    )
    return parallelize(
        model,
        facts,
        build_mesh(strategy, runtime.device),
        strategy,
        runtime.device,
        parameters=precision.parameters,
        compute=precision.compute,
        activation_checkpointing=activation_checkpointing,
        compile=compile,
    )


def _training_loss(
    model: Transformer, objective: Objective, config: LossConfig, compression: Compression
) -> Callable[..., Tensor]:
    """Return the loss of the last logits; CTC and each auxiliary head add their own in a step."""
    assert model.head is not None
    loss_sum = objective.build_loss(model.head, config)
    if model.ctc is not None:
        model.block_hooks[str(model.encoder_depth - 1)].append(partial(add_ctc_loss, model))
    for name in model.auxiliary_heads:
        model.block_hooks[name].append(partial(_add_auxiliary_loss, model, name, loss_sum))
    return compression.wrap_loss(loss_sum, objective.divergence_sum, model)


def add_ctc_loss(model: Transformer, flow: Flow, streams: Sequences, inputs: Inputs) -> Flow:
    """Add the loss of CTC behind the last encoder block to the step's; nothing outside a step."""
    assert model.ctc is not None
    return model.ctc(flow, streams["source"], inputs, model.scale_auxiliary_loss)


def _add_auxiliary_loss(
    model: Transformer,
    name: str,
    loss_sum: Callable[..., Tensor],
    flow: Flow,
    streams: Sequences,
    inputs: Inputs,
) -> Flow:
    """Add the loss of the head behind a block to the step's; nothing outside a step."""
    scale_loss, head = model.scale_auxiliary_loss, model.auxiliary_heads[name]
    if scale_loss is None:
        return flow
    assert isinstance(head, Head)
    stream = streams[str(model.blocks[name].stream)]
    targets = model.local_targets(inputs["targets"])

    def scaled_loss(logits: Tensor) -> Tensor:
        return scale_loss(loss_sum(logits, targets, targets.numel()))

    x_BSD = attach_loss(flow[0], head, stream, scaled_loss)
    return x_BSD, *flow[1:]

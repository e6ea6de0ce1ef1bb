"""Cases to verify: small models of each family, strategies, and adversarial batches."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from parallel.parallel_model import ParallelModel
from parallel.strategy import StrategyConfig, data_degree
from trainer.config.train import (
    CompressConfig,
    LoraConfig,
    ModelConfig,
    VerifyConfig,
    is_encoder_decoder,
    outputs_of,
)
from trainer.model import Transformer
from trainer.nn.init import init_rows
from trainer.tasks.registry import task_of_model
from trainer.verify.features import FEATURES, feature_strategies

SAMPLES = 8  # per step, over all ranks
MICRO_BATCHES = 2  # per rank and step, so that gradients accumulate
SEQ_LEN = 12

# One model of each kind that the project trains; `verify_all` runs every strategy on all of them.
FAMILIES = {
    "decoder (Llama)": ModelConfig(heads=8, kv_heads=4, ffn_width=344, tied=False),
    "decoder (GPT-2)": ModelConfig(
        norm="layernorm", activation="gelu_tanh", positions="learned", bias=True
    ),
    "encoder (ViT)": ModelConfig(
        family="encoder",
        norm="layernorm",
        activation="gelu",
        positions="learned",
        bias=True,
        init="vit",
        pool="class_token",
    ),
    "encoder-decoder": ModelConfig(family="encoder_decoder", activation="relu"),
}
# Detectors, also under every strategy.
DETECTORS = {
    "encoder (detector)": ModelConfig(
        family="encoder", outputs="boxes", positions="learned", tied=False
    ),
    "encoder-decoder (DETR)": ModelConfig(
        family="encoder_decoder",
        inputs="patches",
        outputs="boxes",
        positions="learned",
        queries=16,
        query_groups=3,
        auxiliary_heads=True,
        tied=False,
    ),
}
STRATEGIES = {
    "ddp 2": StrategyConfig(replicate=2),
    "ddp 4": StrategyConfig(replicate=4),
    "fsdp 2": StrategyConfig(shard=2),
    "fsdp 4": StrategyConfig(shard=4),
    "fsdp 4, kept": StrategyConfig(shard=4, reshard_after_forward=False),
    "hsdp 2×2": StrategyConfig(replicate=2, shard=2),
    "tensor 2": StrategyConfig(tensor=2),
    "tensor 2, whole sequences": StrategyConfig(tensor=2, sequence_parallel=False),
    "tensor 4": StrategyConfig(tensor=4),
    "tensor 4, whole sequences": StrategyConfig(tensor=4, sequence_parallel=False),
    "ddp 2 × tensor 2": StrategyConfig(replicate=2, tensor=2),
    "fsdp 2 × tensor 2": StrategyConfig(shard=2, tensor=2),
    "fsdp 2 × tensor 2, whole sequences": StrategyConfig(
        shard=2, tensor=2, sequence_parallel=False
    ),
    "ddp 2 × tensor 4": StrategyConfig(replicate=2, tensor=4),
    "fsdp 2 × tensor 4": StrategyConfig(shard=2, tensor=4),
    "hsdp 2×2 × tensor 2": StrategyConfig(replicate=2, shard=2, tensor=2),
    "pipeline 2": StrategyConfig(pipeline=2),
    "pipeline 4": StrategyConfig(pipeline=4),
    **{
        f"pipeline {ranks}, {schedule}": StrategyConfig(pipeline=ranks, schedule=schedule)
        for schedule in ("1f1b", "interleaved", "looped_bfs", "zero_bubble", "zbv", "dualpipev")
        for ranks in (2, 4)
    },
    **{
        f"context {ranks}, {method}": StrategyConfig(context=ranks, context_method=method)
        for method in ("all_gather", "ring", "ulysses")
        for ranks in (2, 4)
    },
    "ddp 2 × context 2": StrategyConfig(replicate=2, context=2),
    "fsdp 2 × context 2, ring": StrategyConfig(shard=2, context=2, context_method="ring"),
    "context 2 × tensor 2": StrategyConfig(context=2, tensor=2),
    "context 2 × tensor 2, ulysses, whole sequences": StrategyConfig(
        context=2, tensor=2, context_method="ulysses", sequence_parallel=False
    ),
    "pipeline 2 × context 2": StrategyConfig(pipeline=2, context=2),
    "pipeline 2 × context 2, ring, zero_bubble": StrategyConfig(
        pipeline=2, context=2, context_method="ring", schedule="zero_bubble"
    ),
    "hsdp 2×2 × context 2": StrategyConfig(replicate=2, shard=2, context=2),
    "pipeline 2 × context 2 × tensor 2": StrategyConfig(pipeline=2, context=2, tensor=2),
    "ddp 2 × pipeline 2 × context 2": StrategyConfig(replicate=2, pipeline=2, context=2),
    "ddp 2 × pipeline 2 × tensor 2": StrategyConfig(replicate=2, pipeline=2, tensor=2),
    "fsdp 2 × pipeline 2 × context 2": StrategyConfig(shard=2, pipeline=2, context=2),
    "ddp 2 × context 2 × tensor 2": StrategyConfig(replicate=2, context=2, tensor=2),
    "fsdp 2 × context 2 × tensor 2": StrategyConfig(shard=2, context=2, tensor=2),
    "ddp 2 × pipeline 2": StrategyConfig(replicate=2, pipeline=2),
    "fsdp 2 × pipeline 2": StrategyConfig(shard=2, pipeline=2),
    "fsdp 2 × pipeline 2, zbv": StrategyConfig(shard=2, pipeline=2, schedule="zbv"),
    "tensor 2 × pipeline 2": StrategyConfig(tensor=2, pipeline=2),
    "tensor 2 × pipeline 2, zero_bubble": StrategyConfig(
        tensor=2, pipeline=2, schedule="zero_bubble"
    ),
    "hsdp 2×2 × pipeline 2": StrategyConfig(replicate=2, shard=2, pipeline=2),
    "fsdp 2 × tensor 2 × pipeline 2": StrategyConfig(shard=2, tensor=2, pipeline=2),
    "fsdp 2 × tensor 2 × pipeline 2, zero_bubble": StrategyConfig(
        shard=2, tensor=2, pipeline=2, schedule="zero_bubble"
    ),
}

# Sums of gradients that are rounded or compressed: no layout with one equals one process.
REDUCED = {
    **{
        f"{name}, {reduce}": replace(strategy, reduce=reduce)
        for reduce in ("bf16", "fp16")
        for name, strategy in STRATEGIES.items()
        if name in ("ddp 2", "fsdp 2", "hsdp 2×2", "ddp 2 × tensor 2", "fsdp 2 × pipeline 2")
    },
    "ddp 2, int8": StrategyConfig(replicate=2, reduce="int8"),
    "ddp 4, int8": StrategyConfig(replicate=4, reduce="int8"),
    "ddp 2, powersgd": StrategyConfig(
        replicate=2, reduce="powersgd", powersgd_rank=2, powersgd_start_step=0
    ),
}


def _round_to_multiple(value: float, of: int) -> int:
    return max(8, of * round(value / of))


def scale_down(
    model: ModelConfig, tensor: int = 1, stages: int = 1, groups: bool = False
) -> ModelConfig:
    """Return a model small enough for float64 on CPU ranks, with the ratios of the given one.

    Kept: family, norm, activation, positions, ties, biases, query heads per key/value head, the
    feed-forward ratio. Dropout is always on: its masks must not depend on the layout either.
    There are as many heads as `tensor` ranks need, and more blocks than `stages`. With `groups`
    every rank has whole groups of eight of a layer's inputs.
    """
    group = max(1, model.heads // (model.kv_heads or model.heads))
    heads = math.lcm(group * max(1, 4 // group), tensor)
    width = heads * 8
    two = is_encoder_decoder(model)
    layers = max(2, math.ceil((stages + 1) / (2 if two else 1)))
    return replace(
        model,
        layers=layers,
        encoder_layers=layers if two else 0,
        width=width,
        heads=heads,
        kv_heads=heads // group,
        head_width=0,
        ffn_width=_round_to_multiple(
            width * model.ffn_width / model.width, 8 * tensor if groups else 1
        ),
        vocab_size=4 * min(model.query_groups, 2) if model.queries else 61,
        queries=min(model.queries, 4),
        query_groups=min(model.query_groups, 2),
        max_positions=SEQ_LEN,
        dropout=0.1,
        image_size=8,
        patch_size=2,
        channels=3,
        mels=5,
        audio_positions=SEQ_LEN,
        classes=7,
    )


# What is compressed, under each of these strategies.
COMPRESSED_STRATEGIES = (
    "single",
    "ddp 2",
    "fsdp 2",
    "tensor 2",
    "pipeline 2",
    "fsdp 2 × tensor 2",
    "tensor 2 × pipeline 2",
)
# A teacher's logits are sharded like sequences and classes.
DISTILLED_STRATEGIES = (
    *COMPRESSED_STRATEGIES,
    "tensor 2, whole sequences",
    "context 2, ring",
    "context 2 × tensor 2",
)
# Hidden states are matched on full sequences only.
MATCHED_STRATEGIES = tuple(name for name in DISTILLED_STRATEGIES if "context" not in name)
# Of six blocks: in front of a pipeline's cut and behind it, of an encoder the last, and the last.
MATCH = [[1, 0], [2, 2], [5, 4]]
COMPRESSED = {
    "encoder (ViT)": {
        "merge": CompressConfig(merge=2),
        "pool": CompressConfig(pool_after=1),
        "drop": CompressConfig(drop=0.5),
        "int8": CompressConfig(bits=8),
        "int4": CompressConfig(bits=4, group=8),
        "sparse": CompressConfig(sparse_n=2, sparse_start=0.3),
        "drop, merge, sparse": CompressConfig(drop=0.3, merge=2, sparse_n=2),
        "prune": CompressConfig(prune_heads=0.5, prune_ffn=0.5, prune_start=0.3, prune_end=0.6),
        "distill": CompressConfig(teacher="drawn"),
        "distill, match": CompressConfig(teacher="drawn", match=MATCH, match_weight=20.0),
    },
    "encoder-decoder": {
        "merge": CompressConfig(merge=2),
        "pool": CompressConfig(pool_after=1),
        "merge, int8": CompressConfig(merge=2, bits=8),
        "pool, merge, int4, sparse": CompressConfig(
            pool_after=1, merge=1, bits=4, group=8, sparse_n=2
        ),
        "prune, merge, int8": CompressConfig(
            prune_heads=0.3, prune_ffn=0.3, prune_start=0.0, prune_end=0.6, merge=2, bits=8
        ),
        "distill": CompressConfig(teacher="drawn"),
        "match": CompressConfig(
            teacher="drawn", distill_weight=0.0, match=MATCH, match_weight=20.0
        ),
    },
    "decoder (Llama)": {
        "pool": CompressConfig(pool_after=2),
        "int8": CompressConfig(bits=8),
        "distill": CompressConfig(teacher="drawn"),
        "distill, match": CompressConfig(teacher="drawn", match=MATCH, match_weight=20.0),
        "int2, sparse": CompressConfig(bits=2, group=8, sparse_n=2),
        "prune": CompressConfig(prune_heads=0.5, prune_ffn=0.5, prune_start=0.3, prune_end=0.3),
    },
    "encoder (detector)": {
        "int8": CompressConfig(bits=8),
        "distill": CompressConfig(teacher="drawn"),
        "prune": CompressConfig(prune_heads=0.5, prune_ffn=0.5, prune_start=0.3, prune_end=0.6),
    },
    "encoder-decoder (DETR)": {
        "int8": CompressConfig(bits=8),
        "prune": CompressConfig(prune_heads=0.5, prune_ffn=0.5, prune_start=0.3, prune_end=0.6),
    },
    "encoder (speech)": {
        "merge": CompressConfig(merge=1),
        "pool": CompressConfig(pool_after=1),
        "int8": CompressConfig(bits=8),
        "prune": CompressConfig(prune_heads=0.5, prune_ffn=0.5, prune_start=0.3, prune_end=0.6),
        "distill": CompressConfig(teacher="drawn"),
    },
    "decoder (GPT-2)": {"pool, int8": CompressConfig(pool_after=1, pool_stride=3, bits=8)},
}


# Rows of several conversations, under each axis alone and where two of them meet.
CHAT_STRATEGIES = (
    *("ddp 2", "fsdp 2", "tensor 2", "tensor 2, whole sequences"),
    *("pipeline 2, 1f1b", "pipeline 2, zero_bubble"),
    *(f"context 2, {method}" for method in ("all_gather", "ring", "ulysses")),
    *("fsdp 2 × context 2, ring", "fsdp 2 × tensor 2 × pipeline 2"),
)
LORA = LoraConfig(rank=3, dropout=0.2)
# Of the frozen weights.
PACKED = (
    CompressConfig(bits=8, input_bits=0),
    CompressConfig(bits=4, group=8, input_bits=0),
    CompressConfig(bits=4, input_bits=0),
)


def iter_cases() -> Iterator[tuple[str, str, VerifyConfig]]:
    """Yield (model, strategy, config): every strategy on every family; compressed models; adapters.

    Adapters are verified under every strategy, on the families in turn.
    """
    for family, model in (FAMILIES | DETECTORS).items():
        for name, strategy in STRATEGIES.items():
            yield family, name, VerifyConfig(strategy, model)
    for family, model in FEATURES.items():
        own_loss = outputs_of(model) == "ctc"
        for name in STRATEGIES if own_loss else feature_strategies(model):
            yield family, name, VerifyConfig(STRATEGIES[name], model)
    for name in CHAT_STRATEGIES:
        config = VerifyConfig(STRATEGIES[name], FAMILIES["decoder (Llama)"], task="chat")
        yield "decoder (Llama), chats", name, config
    models = FAMILIES | DETECTORS | FEATURES
    for family, techniques in COMPRESSED.items():
        for technique, compress in techniques.items():
            for name in _strategy_names(compress):
                strategy = STRATEGIES.get(name, StrategyConfig())
                config = VerifyConfig(strategy, models[family], compress)
                yield f"{family}, {technique}", name, config
    for number, (name, strategy) in enumerate(STRATEGIES.items()):
        family = list(FAMILIES)[(number + 1) % len(FAMILIES)]
        yield f"{family}, LoRA", name, VerifyConfig(strategy, FAMILIES[family], lora=LORA)
    for number, name in enumerate(COMPRESSED_STRATEGIES):
        family, packed = list(FAMILIES)[number % len(FAMILIES)], PACKED[number % len(PACKED)]
        config = VerifyConfig(STRATEGIES.get(name, StrategyConfig()), FAMILIES[family], packed)
        yield f"{family}, LoRA, int{packed.bits}", name, replace(config, lora=LORA)


def _strategy_names(compress: CompressConfig) -> tuple[str, ...]:
    if compress.match:
        return MATCHED_STRATEGIES
    return DISTILLED_STRATEGIES if compress.teacher else COMPRESSED_STRATEGIES


def scale_compression(compress: CompressConfig, model: ModelConfig) -> CompressConfig:
    """Return the same techniques at sizes that fit a model that was scaled down."""
    encoder, last = model.encoder_layers, model.encoder_layers + model.layers - 1
    match = {min(pair[0], last): min(pair[1], last) for pair in compress.match}
    return replace(
        compress,
        merge=min(compress.merge, 2),
        pool_after=min(compress.pool_after, 2),
        group=8 if compress.group else 0,
        sparse_m=min(compress.sparse_m, 8),
        match=[[i, j] for i, j in match.items() if (i < encoder) == (j < encoder)],
    )


def draw_rows(
    config: ModelConfig, seed: int, name: str, shape: torch.Size, start: int, stop: int
) -> Tensor:
    """Return rows of a parameter's initial value: `init_rows`, but an adapter's B is random too.

    The gradient of its A is zero while B is.
    """
    drawn = f"{name}.random" if name.endswith("lora_b") else name
    return init_rows(config, seed, drawn, shape, start, stop)


def random_teacher(config: ModelConfig, seed: int) -> Transformer:
    """Return a frozen, randomly initialised teacher of the same shape."""
    config = replace(config, init="gpt2", init_std=0.3)
    model = Transformer(config, torch.float64).double().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.copy_(init_rows(config, seed + 1, name, parameter.shape, 0, len(parameter)))
    return model


@torch.no_grad()
def round_frozen(model: nn.Module, compress: CompressConfig) -> None:
    """Round the frozen weights of the linear layers of blocks to integers times a scale."""
    top = 2 ** (compress.bits - 1) - 1
    for name, weight in model.named_parameters():
        if name.startswith("blocks.") and weight.dim() == 2 and not weight.requires_grad:
            groups = weight.view(-1, compress.group or weight.shape[1])
            scale = groups.abs().amax(1, keepdim=True) / top
            weight.copy_(((groups / scale).round() * scale).view_as(weight))


def samples_per_step(strategy: StrategyConfig) -> int:
    """Return the samples per step: enough micro-batches for the ranks of a pipeline."""
    if strategy.pipeline == 1:
        return SAMPLES
    return data_degree(strategy) * (MICRO_BATCHES * strategy.pipeline + 1)


def make_batch(
    model: ModelConfig, seed: int, step: int, samples: int = SAMPLES, task: str = "auto"
) -> dict[str, Tensor]:
    """Return a global batch with unequal numbers of valid targets, padding and documents."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    return task_of_model(model, task).random_batch(model, samples, SEQ_LEN, generator)


def split_batch(batch: dict[str, Tensor], worker: ParallelModel) -> list[dict[str, Tensor]]:
    """Return this rank's micro-batches of a global batch, of unequal sizes where possible."""
    rows = len(batch["targets"]) // worker.data_degree
    own = {k: v[worker.data_rank * rows :][:rows] for k, v in batch.items()}
    count = min(rows, MICRO_BATCHES * worker.mesh["pipeline"].size())
    bounds = [*range(count), rows]  # the last has all the others
    return [{k: v[i:j] for k, v in own.items()} for i, j in pairwise(bounds)]

"""Small runs of each family under each strategy, to hold traces and closed forms against."""

from collections.abc import Iterator
from dataclasses import replace

from parallel.activation_checkpointing import MODES
from parallel.pipeline.schedules import SCHEDULES
from parallel.strategy import StrategyConfig, data_degree
from trainer.config.train import DataConfig, ModelConfig, TrainConfig, inputs_of, outputs_of
from trainer.plan.inputs import Shapes, longest_inputs
from trainer.verify.cases import DETECTORS, FAMILIES
from trainer.verify.features import FEATURES

SEQ_LEN, SAMPLES = 64, 2  # of a micro-batch
MODELS = FAMILIES | DETECTORS | {"encoder (CTC)": FEATURES["encoder (speech)"]}


def preset(name: str, ranks: int) -> StrategyConfig:
    """Return a preset of conf/strategy/ on this many ranks."""
    return {
        "single": StrategyConfig(),
        "ddp": StrategyConfig(replicate=ranks),
        "fsdp": StrategyConfig(shard=ranks),
        "hsdp": StrategyConfig(replicate=2, shard=ranks // 2),
        "tensor": StrategyConfig(tensor=ranks),
        "pipeline": StrategyConfig(pipeline=ranks),
        "context": StrategyConfig(context=ranks),
        "hybrid": StrategyConfig(pipeline=2, tensor=2, shard=ranks // 4),
    }[name]


PRESETS = {
    "single": preset("single", 1),
    **{f"{name} 2": preset(name, 2) for name in ("ddp", "fsdp", "tensor", "pipeline", "context")},
    **{
        f"{name} 4": preset(name, 4)
        for name in ("ddp", "fsdp", "hsdp", "tensor", "pipeline", "context", "hybrid")
    },
    **{
        f"pipeline 2, {schedule}": StrategyConfig(pipeline=2, schedule=schedule)
        for schedule in SCHEDULES
        if schedule != "gpipe"
    },
    **{
        f"context 2, {method}": StrategyConfig(context=2, context_method=method)
        for method in ("ring", "ulysses")
    },
    "tensor 2, whole sequences": StrategyConfig(tensor=2, sequence_parallel=False),
    "fsdp 2, kept": StrategyConfig(shard=2, reshard_after_forward=False),
    "fsdp 2 × tensor 2": StrategyConfig(shard=2, tensor=2),
    "fsdp 2 × pipeline 2": StrategyConfig(shard=2, pipeline=2),
    "ddp 2 × tensor 2": StrategyConfig(replicate=2, tensor=2),
}


def small_run(
    model: ModelConfig,
    strategy: StrategyConfig,
    activation_checkpointing: str = "none",
    layers: int = 4,
) -> tuple[TrainConfig, list[Shapes]]:
    """Return a complete configuration with a small model, and its micro-batches."""
    model = replace(
        model,
        layers=layers,
        encoder_layers=layers if model.family == "encoder_decoder" else 0,
        vocab_size=model.queries * model.query_groups or 512,
        max_positions=SEQ_LEN,
        image_size=32,
        channels=3,
        classes=10,
        mels=20,
        audio_positions=SEQ_LEN,
    )
    micro_batches = 2 * strategy.pipeline
    config = TrainConfig(
        model=model,
        strategy=strategy,
        data=DataConfig(kind=_kind_of(model), seq_len=SEQ_LEN),
        precision="bf16",
        batch_size=SAMPLES * micro_batches * data_degree(strategy),
        micro_batch_size=SAMPLES,
        activation_checkpointing=activation_checkpointing,
    )
    return config, [longest_inputs(config, SAMPLES)] * micro_batches


def _kind_of(model: ModelConfig) -> str:
    reads, gives = inputs_of(model), outputs_of(model)
    if gives == "boxes":
        return "detection"
    if reads == "audio":
        return "speech"
    if gives == "classes":
        return "images" if reads == "patches" else "labelled_text"
    if model.family == "encoder":
        return "masked_text"
    return "pairs" if model.family == "encoder_decoder" else "text"


def iter_runs() -> Iterator[tuple[str, str, str, TrainConfig, list[Shapes]]]:
    """Yield (family, strategy, activation checkpointing, configuration, micro-batches)."""
    for family, model in MODELS.items():
        for name, strategy in PRESETS.items():
            splits = SCHEDULES[strategy.schedule].splits_backward
            for mode in ("none",) if splits else MODES:
                yield family, name, mode, *small_run(model, strategy, mode)

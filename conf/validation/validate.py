"""Validation beyond types: pure functions that find every problem of a config at once."""

import difflib
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

from conf.submit import SubmitConfig, cluster_problems
from conf.validation.compression import compress_problems, match_problems
from conf.validation.float8 import precision_problems
from conf.validation.intervals import (
    COUNT,
    COUNT_OR_OFF,
    POSITIVE,
    SHARE,
    SHARE_BELOW_ONE,
    Interval,
)
from conf.validation.layout import (
    CONTEXT_FAULTS,
    PIPELINE_FAULTS,
    SPLIT_FAULTS,
    batch_problems,
    layout_problems,
    model_problems,
    near_divisors,
)
from parallel.errors import ConfigError, UserError
from parallel.pipeline.schedules import SCHEDULES
from parallel.strategy import resolve
from trainer.config.train import (
    DataConfig,
    ModelConfig,
    TrainConfig,
    inputs_of,
    outputs_of,
)
from trainer.data import READERS

if TYPE_CHECKING:
    from trainer.data.dataset import DataFacts

CHOICES = {
    "precision": ("fp64", "fp32", "bf16", "fp16", "fp8", "auto"),
    "device": ("cpu", "cuda", "auto"),
    "on_bad_step": ("stop", "skip", "rollback"),
    "resume": ("auto", "never", "always", "scratch"),
    "checkpoint.on_error": ("continue", "stop"),
    "activation_checkpointing": ("none", "selective", "block"),
    "split": ("valid", "test"),
    "fault": (
        "",
        "skip_gradient_sum",
        "local_target_count",
        "local_gradient_norm",
        *SPLIT_FAULTS,
        *PIPELINE_FAULTS,
        *CONTEXT_FAULTS,
    ),
    "strategy.schedule": tuple(SCHEDULES),
    "strategy.context_method": ("all_gather", "ring", "ulysses"),
    "strategy.reduce": ("auto", "fp32", "bf16", "fp16", "int8", "powersgd"),
    "model.family": ("decoder", "encoder", "encoder_decoder"),
    "model.inputs": ("auto", "tokens", "patches"),
    "model.outputs": ("auto", "tokens", "classes"),
    "model.norm": ("rmsnorm", "layernorm"),
    "model.activation": ("swiglu", "geglu", "gelu", "gelu_tanh", "relu"),
    "model.positions": ("rope", "learned"),
    "model.init": ("gpt2", "vit"),
    "model.pool": ("class_token", "mean"),
    "data.kind": ("text", "images", "pairs"),
    "data.on_bad_file": ("stop", "skip"),
    "optim.name": ("adamw", "adamw8bit"),
    "optim.schedule": ("cosine", "wsd", "constant"),
    "metrics.wandb": ("off", "offline", "online"),
}
LARGEST = 2**63 - 1  # of torch's integers

RANGES = {
    "steps": COUNT,
    "batch_size": COUNT,
    "micro_batch_size": COUNT_OR_OFF,
    "seed": COUNT_OR_OFF,
    "max_bad_steps": COUNT,
    "spike_sigma": COUNT_OR_OFF,
    "spike_window": Interval(8, 1024),  # the longest is trainer/resilience/bad_steps.py's
    "timeout_seconds": COUNT_OR_OFF,
    "samples": COUNT_OR_OFF,
    "rounds": COUNT,
    "beams": COUNT,
    "tolerance": COUNT_OR_OFF,
    "max_tokens": COUNT,
    "temperature": COUNT_OR_OFF,
    "top_k": COUNT_OR_OFF,
    "k": COUNT,
    "top_p": Interval(0, 1, low_open=True),
    "length_penalty": COUNT_OR_OFF,
    "launch.ranks": COUNT_OR_OFF,
    "compress.merge": COUNT_OR_OFF,
    "compress.pool_after": COUNT_OR_OFF,
    "compress.pool_stride": Interval(2),
    "compress.drop": SHARE_BELOW_ONE,
    "compress.bits": Interval(0, 8),
    "compress.input_bits": Interval(0, 8),
    "compress.group": COUNT_OR_OFF,
    "compress.sparse_n": COUNT_OR_OFF,
    "compress.sparse_m": Interval(2),
    "compress.sparse_start": SHARE_BELOW_ONE,
    "compress.prune_heads": SHARE_BELOW_ONE,
    "compress.prune_ffn": SHARE_BELOW_ONE,
    "compress.prune_start": SHARE_BELOW_ONE,
    "compress.prune_end": SHARE_BELOW_ONE,
    "compress.temperature": POSITIVE,
    "compress.distill_weight": SHARE,
    "compress.match_weight": COUNT_OR_OFF,
    "cluster.nodes": COUNT,
    "cluster.gpus_per_node": COUNT_OR_OFF,
    "cluster.ranks_per_node": COUNT_OR_OFF,
    "cluster.cpus_per_rank": COUNT_OR_OFF,
    "cluster.hours": COUNT_OR_OFF,
    "cluster.signal_seconds": Interval(1, 65535),  # of sbatch --signal
    "cluster.chain": COUNT,
    "cluster.parallel": COUNT_OR_OFF,
    "strategy.bucket_mib": POSITIVE,
    "strategy.powersgd_rank": COUNT,
    "strategy.powersgd_start_step": COUNT_OR_OFF,
    "strategy.stages_per_rank": COUNT_OR_OFF,
    "model.layers": COUNT,
    "model.encoder_layers": COUNT_OR_OFF,
    "model.width": COUNT,
    "model.heads": COUNT,
    "model.kv_heads": COUNT_OR_OFF,
    "model.head_width": COUNT_OR_OFF,
    "model.ffn_width": COUNT,
    "model.vocab_size": COUNT_OR_OFF,
    "model.max_positions": COUNT_OR_OFF,
    "model.norm_eps": POSITIVE,
    "model.rope_theta": POSITIVE,
    "model.rope_scaling": Interval(1),
    "model.dropout": SHARE_BELOW_ONE,
    "model.init_std": POSITIVE,
    "model.image_size": COUNT_OR_OFF,
    "model.patch_size": COUNT,
    "model.channels": COUNT_OR_OFF,
    "model.classes": COUNT_OR_OFF,
    "data.seq_len": COUNT,
    "optim.lr": POSITIVE,
    "optim.eps": POSITIVE,
    "optim.weight_decay": COUNT_OR_OFF,
    "optim.warmup_steps": COUNT_OR_OFF,
    "optim.decay_share": SHARE,
    "optim.min_lr_ratio": SHARE,
    "optim.max_grad_norm": COUNT_OR_OFF,
    "loss.label_smoothing": SHARE_BELOW_ONE,
    "loss.chunks": COUNT,
    "eval.every": COUNT_OR_OFF,
    "eval.samples": COUNT_OR_OFF,
    "eval.beams": COUNT,
    "checkpoint.every": COUNT_OR_OFF,
    "checkpoint.keep": COUNT_OR_OFF,
    "checkpoint.check_replicas_every": COUNT_OR_OFF,
    "checkpoint.keep_every": COUNT_OR_OFF,
    "checkpoint.grace_seconds": COUNT_OR_OFF,
    "resume_step": COUNT_OR_OFF,
    "overfit_steps": COUNT_OR_OFF,
    "metrics.every": COUNT,
    "metrics.sample_tokens": COUNT_OR_OFF,
    "metrics.profile_steps": COUNT_OR_OFF,
    "metrics.peak_tflops": COUNT_OR_OFF,
}


def problems(config: Any, world_size: int) -> list[str]:
    """Return every problem of a door's configuration on `world_size` ranks; empty = none."""
    found = _choices(config) + _ranges(config)
    wrong = {problem.split("=", 1)[0] for problem in found}
    broken: list[str] = []
    if hasattr(config, "model"):
        broken = _model(config.model, wrong)
        found += broken
    if reads_data := isinstance(getattr(config, "data", None), DataConfig):
        found += _data(config.data)
    if hasattr(config, "model") and reads_data:
        found += _fit(config.model, config.data)
    if hasattr(config, "optim"):
        found += _betas(config.optim.betas)
    if isinstance(config, TrainConfig):
        found += _checkpoints(config) + _teacher(config)
    if isinstance(config, SubmitConfig) and not any("cluster." in key for key in wrong):
        found += cluster_problems(config)
    if hasattr(config, "strategy") and not any("strategy." in key for key in wrong):
        try:
            strategy = resolve(config.strategy, world_size)
        except UserError as error:
            return found + error.problems
        if hasattr(config, "model") and not broken and not any("model." in key for key in wrong):
            found += model_problems(config.model, strategy)
            # Verify scales model and compression down.
            if isinstance(config, TrainConfig) and not any("compress." in key for key in wrong):
                found += compress_problems(config.compress, config.model, strategy)
                found += precision_problems(
                    config.precision, config.model, config.compress, strategy
                )
                found += match_problems(config.compress, config.model, strategy)
        found += layout_problems(config, strategy)
        if isinstance(config, TrainConfig) and not wrong & {"batch_size", "micro_batch_size"}:
            found += batch_problems(config, strategy)
    return found


def complete(config: TrainConfig, facts: "DataFacts") -> TrainConfig:
    """Return the configuration with model sizes of 0 taken from the data, or raise ConfigError."""
    model, data = config.model, config.data
    filled = replace(
        model,
        vocab_size=model.vocab_size or facts.vocab_size,
        max_positions=model.max_positions or data.seq_len,
        classes=model.classes or facts.classes,
        image_size=model.image_size or facts.image_size,
        channels=model.channels or facts.channels,
    )
    if inputs_of(model) == "patches":
        found = _images(filled, facts)
        side = filled.image_size // filled.patch_size
        filled = replace(filled, max_positions=side**2 + (model.pool == "class_token"))
    else:
        found = _tokens(filled, facts)
    if outputs_of(model) == "classes":
        found += _classes(filled, facts)
    found += model_problems(filled, config.strategy)
    if config.data.kind == "images":  # all else was told without the data
        found += compress_problems(config.compress, filled, config.strategy)
    if found:
        raise ConfigError(*found)
    return replace(config, model=filled)


def _choices(config: Any) -> list[str]:
    found = []
    for key, choices in CHOICES.items():
        value = _value(config, key)
        if value is not None and value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near else ""
            found.append(f"{key}={value} is not one of {', '.join(choices)}{hint}")
    return found


def _ranges(config: Any) -> list[str]:
    return _too_large(config) + [
        f"{key}={value} must be {interval}"
        for key, interval in RANGES.items()
        if (value := _value(config, key)) is not None and value not in interval
    ]


def _too_large(config: Any, prefix: str = "") -> list[str]:
    """Whole numbers that no kernel takes, in any section."""
    found = []
    for key, value in ((f.name, getattr(config, f.name)) for f in fields(config)):
        if is_dataclass(value):
            found += _too_large(value, f"{prefix}{key}.")
        elif isinstance(value, int) and value > LARGEST:
            found.append(f"{prefix}{key}={value} must be at most {LARGEST}")
    return found


def _betas(betas: list[float]) -> list[str]:
    if len(betas) == 2 and all(beta in SHARE_BELOW_ONE for beta in betas):
        return []
    return [f"optim.betas={betas} must be two numbers, each {SHARE_BELOW_ONE}, e.g. [0.9,0.95]"]


def _checkpoints(config: TrainConfig) -> list[str]:
    found = []
    if config.checkpoint.keep_best and not config.eval.every:
        found.append(
            "checkpoint.keep_best=true goes by the loss on the valid split, but eval.every=0 "
            "measures it at the end only; set eval.every, best to checkpoint.every="
            f"{config.checkpoint.every}, or checkpoint.keep_best=false"
        )
    if config.resume_step and config.resume == "never":
        found.append(
            f"resume_step={config.resume_step} goes on with a run, but resume=never refuses one; "
            "set resume=auto, or resume_step=0"
        )
    return found


def _teacher(config: TrainConfig) -> list[str]:
    teacher = config.compress.teacher
    if teacher and config.loss.chunks > 1:
        return [
            f"compress.teacher={teacher} is learned from by all logits of a micro-batch at once, "
            f"but loss.chunks={config.loss.chunks} makes them in pieces; set loss.chunks=1, or "
            "compress.teacher= for none"
        ]
    return []


def _model(model: ModelConfig, wrong: set[str]) -> list[str]:
    if wrong & {f"model.{key}" for key in ("width", "heads", "kv_heads", "head_width")}:
        return []
    found = []
    if model.kv_heads and model.heads % model.kv_heads:
        found.append(
            f"model.kv_heads={model.kv_heads} does not divide model.heads={model.heads}; "
            f"try {near_divisors(model.heads, model.kv_heads)}"
        )
    if not model.head_width and model.width % model.heads:
        found.append(
            f"model.heads={model.heads} does not divide model.width={model.width}; "
            f"try {near_divisors(model.width, model.heads)}, or set model.head_width"
        )
        return found
    head_width = model.head_width or model.width // model.heads
    if model.positions == "rope" and head_width % 2:
        found.append(
            f"model.positions=rope turns pairs of numbers, but a head is {head_width} wide; "
            f"set model.head_width={head_width + 1}, or model.positions=learned"
        )
    return found + _ends(model) + _patches(model)


def _ends(model: ModelConfig) -> list[str]:
    """Return what a family's first and last layer cannot be."""
    found = []
    if inputs_of(model) == "patches" and model.family != "encoder":
        found.append(
            f"model.inputs=patches is for model.family=encoder, but model.family={model.family} "
            "reads tokens; set model.inputs=auto"
        )
    if (outputs_of(model) == "classes") != (model.family == "encoder"):
        found.append(
            f"model.outputs={model.outputs} does not go with model.family={model.family}: an "
            "encoder gives classes, the others tokens; set model.outputs=auto"
        )
    return found


def _patches(model: ModelConfig) -> list[str]:
    if (
        inputs_of(model) != "patches"
        or model.patch_size < 1
        or model.image_size % model.patch_size == 0
    ):
        return []
    return [
        f"model.patch_size={model.patch_size} does not divide model.image_size="
        f"{model.image_size}; try {near_divisors(model.image_size, model.patch_size)}"
    ]


def _data(data: DataConfig) -> list[str]:
    if data.path:
        return []
    return [
        f"data.path is empty; name one file of {data.kind}, or a folder with train.*, valid.* and "
        "test.*"
    ]


def _fit(model: ModelConfig, data: DataConfig) -> list[str]:
    reads = " or ".join(kind for kind, r in READERS.items() if model.family in r.families)
    reader = READERS.get(data.kind)
    if reads and reader and model.family not in reader.families:
        return [
            f"model.family={model.family} learns from {reads}, but data.kind={data.kind}; "
            f"choose a model of family {' or '.join(reader.families)}, or data of kind {reads}"
        ]
    if data.kind != "images" and 0 < model.max_positions < data.seq_len:
        return [
            f"data.seq_len={data.seq_len} is more than model.max_positions={model.max_positions}; "
            f"set data.seq_len={model.max_positions} or less"
        ]
    return []


def _tokens(model: ModelConfig, facts: "DataFacts") -> list[str]:
    if model.vocab_size >= facts.vocab_size:
        return []
    return [
        f"model.vocab_size={model.vocab_size} is less than the tokenizer's {facts.vocab_size}: "
        f"token ids from {model.vocab_size} on have no row; set model.vocab_size="
        f"{facts.vocab_size}, or 0 to follow the data"
    ]


def _images(model: ModelConfig, facts: "DataFacts") -> list[str]:
    found = _patches(model)
    for key in ("image_size", "channels"):
        ours, theirs = getattr(model, key), getattr(facts, key)
        if ours != theirs:
            found.append(f"model.{key}={ours}, but the data's is {theirs}; set model.{key}=0")
    return found


def _classes(model: ModelConfig, facts: "DataFacts") -> list[str]:
    if model.classes >= facts.classes:
        return []
    return [
        f"model.classes={model.classes} is less than the data's {facts.classes}; "
        f"set model.classes={facts.classes}, or 0 to follow the data"
    ]


def _value(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name, None)
    return config

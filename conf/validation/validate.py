"""Validation beyond types: pure functions that collect all problems of a configuration."""

import difflib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from conf.submit import SubmitConfig, cluster_problems
from conf.validation.attention import attention_problems
from conf.validation.audio import audio_data_problems, audio_problems
from conf.validation.compression import compress_problems, match_problems
from conf.validation.float8 import precision_problems
from conf.validation.layout import layout_problems
from conf.validation.lora import lora_problems
from conf.validation.outputs import rules_of
from parallel.config_fields import facts_of, key_facts, known_keys, value_at
from parallel.errors import ConfigError, UserError
from parallel.strategy import StrategyConfig, resolve_degrees, without_degrees
from trainer.config.train import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    VerifyConfig,
    inputs_of,
    outputs_of,
)
from trainer.data import READERS
from trainer.plan.layout_rules import batch_problems, model_problems, near_divisors

if TYPE_CHECKING:
    from trainer.data.dataset import DataFacts

LARGEST = 2**63 - 1  # largest int64


def find_problems(config: Any, world_size: int) -> list[str]:
    """Return every problem of a command's configuration on `world_size` ranks."""
    found = _choice_problems(config) + _range_problems(config)
    wrong = {problem.split("=", 1)[0] for problem in found}
    broken: list[str] = []
    if hasattr(config, "model"):
        broken = _model_problems(config.model, wrong)
        found += broken
    if reads_data := isinstance(getattr(config, "data", None), DataConfig):
        found += _data_problems(config.data)
    if hasattr(config, "model") and reads_data:
        found += _fit_problems(config.model, config.data)
    if isinstance(config, VerifyConfig) and "task" not in wrong:
        found += _verify_problems(config)
    if hasattr(config, "optim"):
        found += _beta_problems(config.optim.betas)
    if isinstance(config, TrainConfig):
        found += _training_problems(config)
    if hasattr(config, "lora") and not any(key.startswith(("lora.", "model.")) for key in wrong):
        found += lora_problems(config)
    if isinstance(config, SubmitConfig) and not any("cluster." in key for key in wrong):
        found += cluster_problems(config)
    if hasattr(config, "strategy") and not any("strategy." in key for key in wrong):
        try:
            strategy = _resolved(config, world_size)
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


def _resolved(config: Any, world_size: int) -> StrategyConfig:
    """Return the resolved strategy; where training is to choose it, one rank stands for it."""
    if isinstance(config, TrainConfig) and config.strategy.auto in ("once", "always"):
        return without_degrees(config.strategy)
    return resolve_degrees(config.strategy, world_size)


def fill_from_data(config: TrainConfig, facts: "DataFacts") -> TrainConfig:
    """Return the configuration with model sizes of 0 taken from the data; raises ConfigError."""
    model, data = config.model, config.data
    filled = replace(
        model,
        vocab_size=model.vocab_size or facts.vocab_size,
        max_positions=model.max_positions or data.seq_len,
        classes=model.classes or facts.classes,
        image_size=model.image_size or facts.image_size,
        channels=model.channels or facts.channels,
        mels=model.mels or facts.mels,
    )
    if inputs_of(model) == "patches":
        found = _image_problems(filled, facts)
        side = filled.image_size // filled.patch_size
        filled = replace(
            filled,
            max_positions=side**2 + (model.pool == "class_token"),
            vocab_size=model.queries * model.query_groups,
        )
    else:
        found = _token_problems(filled, facts)
    if inputs_of(model) == "audio":
        found += audio_data_problems(filled, data)
    if outputs_of(model) in ("classes", "boxes"):
        found += _classes(filled, facts)
    found += model_problems(filled, config.strategy)
    if inputs_of(model) == "patches":  # other problems were found without the data
        found += compress_problems(config.compress, filled, config.strategy)
    if found:
        raise ConfigError(*found)
    return replace(config, model=filled)


def _choice_problems(config: Any) -> list[str]:
    found = []
    for key, field in known_keys(type(config)).items():
        value, choices = value_at(config, key), facts_of(field).choices
        if choices and value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near else ""
            found.append(f"{key}={value} is not one of {', '.join(choices)}{hint}")
    return found


def _range_problems(config: Any) -> list[str]:
    too_large, outside = [], []
    for key, field in known_keys(type(config)).items():
        value, interval = value_at(config, key), facts_of(field).interval
        if field.type is int and value > LARGEST:
            too_large.append(f"{key}={value} must be at most {LARGEST}")
        if field.type in (int, float) and interval and value not in interval:
            outside.append(f"{key}={value} must be {interval}")
    return too_large + outside


def _beta_problems(betas: list[float]) -> list[str]:
    interval = key_facts(OptimConfig, "betas").interval
    assert interval is not None
    if len(betas) == 2 and all(beta in interval for beta in betas):
        return []
    return [f"optim.betas={betas} must be two numbers, each {interval}, e.g. [0.9,0.95]"]


def _training_problems(config: TrainConfig) -> list[str]:
    found = _checkpoint_problems(config) + _teacher_problems(config)
    return found + rules_of(config.model).training(config)


def _checkpoint_problems(config: TrainConfig) -> list[str]:
    found = []
    if config.checkpoint.keep_best and not config.eval.every:
        found.append(
            "checkpoint.keep_best=true goes by the loss on the valid split, but eval.every=0 "
            "measures it at the end only; set eval.every, best to checkpoint.every="
            f"{config.checkpoint.every}, or checkpoint.keep_best=false"
        )
    exports, every = config.checkpoint.huggingface_every, config.checkpoint.every
    if exports > 0 and (every == 0 or exports % every):
        near = every * max(1, round(exports / every)) if every else 0
        found.append(
            f"checkpoint.huggingface_every={exports} exports checkpoints, and is no multiple of "
            f"checkpoint.every={every}; set "
            + (f"checkpoint.huggingface_every={near}" if near else f"checkpoint.every={exports}")
        )
    if config.resume_step and config.resume == "never":
        found.append(
            f"resume_step={config.resume_step} goes on with a run, but resume=never refuses one; "
            "set resume=auto, or resume_step=0"
        )
    return found


def _teacher_problems(config: TrainConfig) -> list[str]:
    teacher = config.compress.teacher
    if teacher and config.loss.chunks > 1:
        return [
            f"compress.teacher={teacher} is learned from by all logits of a micro-batch at once, "
            f"but loss.chunks={config.loss.chunks} makes them in pieces; set loss.chunks=1, or "
            "compress.teacher= for none"
        ]
    return []


def _model_problems(model: ModelConfig, wrong: set[str]) -> list[str]:
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
    found += attention_problems(model) + _position_problems(model)
    found += _ends(model) + rules_of(model).model(model) + _patch_problems(model)
    return found + audio_problems(model)


def _position_problems(model: ModelConfig) -> list[str]:
    found, given = [], f"model.positions={model.positions}"
    if model.positions == "sinusoidal" and model.width % 2:
        found.append(
            f"{given} has as many sines as cosines, but model.width={model.width} is odd; set "
            f"model.width={model.width + 1}"
        )
    if model.positions in ("sinusoidal", "relative") and inputs_of(model) == "patches":
        found.append(
            f"{given} is for tokens, but model.inputs={model.inputs} reads patches, whose "
            "positions are learned; set model.positions=learned"
        )
    if model.positions == "relative" and model.sliding_window > 0:
        found.append(
            f"{given} has a bias for every distance, but model.sliding_window="
            f"{model.sliding_window} hides some; set model.sliding_window=0"
        )
    if model.positions == "relative" and model.relative_buckets % 4:
        found.append(
            f"model.relative_buckets={model.relative_buckets} is halved twice; set "
            f"model.relative_buckets={max(4, model.relative_buckets // 4 * 4)}"
        )
    if model.positions == "relative" and model.relative_distance <= model.relative_buckets // 2:
        found.append(
            f"model.relative_distance={model.relative_distance} is within the buckets of one "
            f"distance each, half of model.relative_buckets={model.relative_buckets}; set "
            f"model.relative_distance={model.relative_buckets}"
        )
    return found


def _ends(model: ModelConfig) -> list[str]:
    """Return the problems of model.inputs and model.outputs for the model's family."""
    found = []
    if inputs_of(model) == "patches" and model.family != "encoder" and not model.queries:
        found.append(
            f"model.inputs=patches is for model.family=encoder, but model.family={model.family} "
            "reads tokens; set model.inputs=auto"
        )
    if outputs_of(model) == "classes" and model.family != "encoder":
        found.append(
            f"model.outputs={model.outputs} does not go with model.family={model.family}: an "
            "encoder gives classes, the others tokens; set model.outputs=auto"
        )
    if outputs_of(model) == "tokens" and inputs_of(model) == "patches":
        found.append(
            f"model.outputs={model.outputs} needs tokens, but model.inputs={model.inputs} reads "
            "patches; set model.outputs=auto, or model.inputs=tokens"
        )
    if model.segments > 0 and (model.family, inputs_of(model)) != ("encoder", "tokens"):
        found.append(
            f"model.segments={model.segments} is for the tokens of model.family=encoder, but "
            f"model.family={model.family} reads {inputs_of(model)} here; set model.segments=0"
        )
    if model.auxiliary_heads and not model.queries:
        found.append(
            "model.auxiliary_heads=true are those of a decoder of queries, but model.queries=0; "
            "set model.auxiliary_heads=false, or model=detr-tiny"
        )
    if model.embed_norm and inputs_of(model) == "patches":
        found.append(
            "model.embed_norm=true is for tokens, but model.inputs="
            f"{model.inputs} reads patches; set model.embed_norm=false"
        )
    return found


def _patch_problems(model: ModelConfig) -> list[str]:
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


def _data_problems(data: DataConfig) -> list[str]:
    if data.path:
        return []
    return [
        f"data.path is empty; name one file of {data.kind}, or a folder with train.*, valid.* and "
        "test.*"
    ]


def _fit_problems(model: ModelConfig, data: DataConfig) -> list[str]:
    ends = inputs_of(model), outputs_of(model)
    of_family = {kind: r for kind, r in READERS.items() if model.family in r.families}
    fitting = [
        kind for kind, r in of_family.items() if r.inputs == ends[0] and ends[1] in r.outputs
    ]
    reads = " or ".join(fitting or of_family)
    reader = READERS.get(data.kind)
    if reads and reader and model.family not in reader.families:
        return [
            f"model.family={model.family} learns from {reads}, but data.kind={data.kind}; "
            f"choose a model of family {' or '.join(reader.families)}, or data of kind {reads}"
        ]
    if reader and inputs_of(model) in {r.inputs for r in READERS.values()} - {reader.inputs}:
        return [
            f"model.inputs={inputs_of(model)} does not read data.kind={data.kind}, which gives "
            f"{reader.inputs}; set model.inputs={reader.inputs}, or choose other data"
        ]
    taught = {outputs for r in READERS.values() for outputs in r.outputs}
    if reader and outputs_of(model) in taught - {*reader.outputs}:
        return [
            f"model.outputs={outputs_of(model)} are not what data.kind={data.kind} teaches: set "
            f"model.outputs={' or '.join(reader.outputs)}, or choose other data"
        ]
    if (reader is None or reader.inputs != "patches") and 0 < model.max_positions < data.seq_len:
        return [
            f"data.seq_len={data.seq_len} is more than model.max_positions={model.max_positions}; "
            f"set data.seq_len={model.max_positions} or less"
        ]
    return []


def _verify_problems(config: VerifyConfig) -> list[str]:
    if config.backend == "nccl_like" and config.device == "cuda":
        return ["backend=nccl_like runs on CPUs, but device=cuda; set device=cpu"]
    reader, model = READERS.get(config.task), config.model  # None = that of the family
    if reader is None:
        return []
    if model.family not in reader.families:
        return [
            f"task={config.task} needs model.family={' or '.join(reader.families)}, but it is "
            f"{model.family}; set task=auto"
        ]
    wanted = {"inputs": (reader.inputs,), "outputs": reader.outputs}
    given = {"inputs": inputs_of(model), "outputs": outputs_of(model)}
    return [
        f"task={config.task} needs model.{key}={' or '.join(want)}, but it is {given[key]}; set "
        f"model.{key}={want[0]}, or task=auto"
        for key, want in wanted.items()
        if given[key] not in want
    ]


def _token_problems(model: ModelConfig, facts: "DataFacts") -> list[str]:
    if model.vocab_size >= facts.vocab_size:
        return []
    return [
        f"model.vocab_size={model.vocab_size} is less than the tokenizer's {facts.vocab_size}: "
        f"token ids from {model.vocab_size} on have no row; set model.vocab_size="
        f"{facts.vocab_size}, or 0 to follow the data"
    ]


def _image_problems(model: ModelConfig, facts: "DataFacts") -> list[str]:
    found = _patch_problems(model)
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

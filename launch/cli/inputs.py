"""The inputs and first weights of a run, chosen before any rank starts."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from parallel.errors import ConfigError
from trainer import data
from trainer.checkpoint.folder import list_checkpoints
from trainer.checkpoint.identity import absolute_path
from trainer.checkpoint.vocabulary import map_vocabulary
from trainer.config.train import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    PrepareConfig,
    TrainConfig,
    audio_settings,
)
from trainer.data.chat_template import TEMPLATES
from trainer.data.record import (
    FACTS,
    TOKENIZER,
    data_of,
    format_record,
    has_record,
    read_record,
    write_record,
)
from trainer.huggingface.registry import architecture_for, is_model_folder, read_model
from trainer.run.run_dir import EXPORTED, load_config

# Keys of a model that do not show in the shapes of its weights.
CHANGE_THE_FUNCTION = (
    *("norm_eps", "pool", "rope_theta", "rope_scaling", "rope_type", "rope_original_positions"),
    *("rope_slow_turns", "rope_fast_turns", "rope_attention_factor", "local_rope_theta"),
    *("sliding_window", "full_attention_every"),
)
FREE_OF_SHAPE = ("dropout", "init", "init_std", "max_positions", *CHANGE_THE_FUNCTION)
FREE_OF_IMPORT = ("dropout", "init", "init_std")  # not said by a config.json
NEW = "new"  # data.processor: made of the train split
log = logging.getLogger(__name__)


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Return the configuration with paths that do not depend on the working directory."""
    reads = config.data
    processor = reads.processor if reads.processor == NEW else absolute_path(reads.processor)
    reads = replace(
        reads,
        path=absolute_path(reads.path),
        tokenizer=absolute_path(reads.tokenizer),
        processor=processor,
        chat_template=_absolute_template(reads.chat_template),
    )
    compress = replace(config.compress, teacher=absolute_path(config.compress.teacher))
    lora = replace(config.lora, adapter=absolute_path(config.lora.adapter))
    return replace(
        config,
        data=reads,
        init_from=absolute_path(config.init_from),
        compress=compress,
        lora=lora,
    )


def _absolute_template(template: str) -> str:
    return template if template in TEMPLATES else absolute_path(template)


def with_imported_model(config: TrainConfig, given: Sequence[str]) -> TrainConfig:
    """Return the configuration with the model of init_from, if that is a Hugging Face folder.

    `given` are the overrides of the command: ConfigError if one of them says another model.
    Dropout is the configuration's.
    """
    if not is_model_folder(config.init_from):
        return config
    model, default = read_model(config.init_from)[1], ModelConfig()
    names = {override.lstrip("+~").partition("=")[0] for override in given}
    found = []
    for key, theirs in vars(model).items():
        ours = getattr(config.model, key)
        said = f"model.{key}" in names or ("model" in names and ours != getattr(default, key))
        if said and key not in FREE_OF_IMPORT and ours != theirs:
            found.append(
                f"model.{key}={ours}, but init_from={config.init_from} is a model with model.{key}"
                f"={theirs}; leave model.* out: its config.json sets it"
            )
    if found:
        raise ConfigError(*found)
    return replace(config, model=replace(model, dropout=config.model.dropout))


def with_audio_of_model(config: TrainConfig, given: Sequence[str]) -> TrainConfig:
    """Return the configuration with the data of audio that its model reads.

    `given` are the overrides of the command: ConfigError if one of them says otherwise.
    """
    names = {override.lstrip("+~").partition("=")[0] for override in given}
    settings = audio_settings(config.model)
    found = [
        f"data.{key}={ours}, but this model reads audio with data.{key}={theirs}; leave it out"
        for key, theirs in settings.items()
        if f"data.{key}" in names and (ours := getattr(config.data, key)) != theirs
    ]
    if found:
        raise ConfigError(*found)
    data = replace(config.data)
    for key, value in settings.items():
        setattr(data, key, value)
    return replace(config, data=data)


def with_imported_adapter(config: TrainConfig) -> TrainConfig:
    """Return the completed configuration with the settings of lora.adapter, if there is one.

    Raises ConfigError if it contradicts them, or if the adapter is of another model.
    """
    ours = config.lora
    if not ours.adapter:
        return config
    if not config.init_from:
        raise ConfigError(
            f"lora.adapter={ours.adapter} adapts a model; set init_from to that model's folder"
        )
    from trainer.huggingface.adapter_files import AdapterReader  # loads torch

    architecture = architecture_for(config.model, like=config.init_from)
    reader = AdapterReader(ours.adapter, architecture, config.model)
    if not reader.digests and Path(reader.base).name not in ("", Path(config.init_from).name):
        raise ConfigError(
            f"lora.adapter={ours.adapter} is an adapter of {reader.base}, not of init_from="
            f"{config.init_from}; set init_from to that model, or, if it is the same, write its "
            "name into base_model_name_or_path of adapter_config.json"
        )
    default, found = LoraConfig(), []
    for key in ("rank", "alpha", "rslora", "targets"):
        said, theirs = getattr(ours, key), getattr(reader.lora, key)
        same = set(said) == set(theirs) if key == "targets" else said == theirs
        if said != getattr(default, key) and not same:
            found.append(
                f"lora.{key}={said}, but lora.adapter={ours.adapter} has {theirs}; leave it out"
            )
    if found:
        raise ConfigError(*found)
    lora = replace(reader.lora, adapter=ours.adapter, dropout=ours.dropout)
    return replace(config, lora=lora)


def with_processor(config: TrainConfig) -> DataConfig:
    """Return the data section with the tokenizer or classes to use.

    Those in the run's folder, if it has trained with them; else the ones named in the
    configuration; else those of init_from.
    """
    own = config.data
    if list_checkpoints(config.run_dir) and has_record(config.run_dir):
        return data_of(config)
    if own.processor == NEW:
        return replace(own, processor="")
    if own.processor and own.tokenizer:
        raise ConfigError(
            f"data.processor={own.processor} and data.tokenizer={own.tokenizer} both name a "
            "tokenizer; set one of them"
        )
    if own.processor and not has_record(own.processor):
        raise ConfigError(
            f"data.processor={own.processor} is no run's folder: it holds neither {FACTS} nor "
            f"{TOKENIZER}; name a run or an exported model, or {NEW}"
        )
    if config.init_from and not own.processor and not own.tokenizer:
        _check_imported_tokenizer(config)
        return replace(data_of(config, config.init_from), chat_template=own.chat_template)
    return own


def _check_imported_tokenizer(config: TrainConfig) -> None:
    """Raise ConfigError if init_from is a Hugging Face folder of text without a tokenizer.json."""
    folder = Path(config.init_from)
    reads_text = data.reader_of(config.data).open_tokenizer is not None
    if reads_text and is_model_folder(folder) and not (folder / TOKENIZER).is_file():
        raise ConfigError(
            f"init_from={folder} holds no {TOKENIZER}, the form in which tokenizers are read here; "
            "write it with AutoTokenizer.from_pretrained(…).save_pretrained(…), or set "
            f"data.tokenizer to another one, or data.processor={NEW}"
        )


def with_sizes(config: TrainConfig) -> TrainConfig:
    """Return the configuration with the sizes of init_from's model that the data would else set."""
    if not config.init_from or config.data.processor or config.data.tokenizer:
        return config
    theirs = load_config(config.init_from, "init_from").model
    sizes = {
        key: getattr(config.model, key) or getattr(theirs, key) for key in ("vocab_size", "classes")
    }
    return replace(config, model=replace(config.model, **sizes))


def keep_processor(config: TrainConfig, reads: DataConfig, facts: data.DataFacts) -> None:
    """Save the tokenizer, the classes and the record of the data in the run's folder."""
    tokenizer, folder = data.open_tokenizer(reads), Path(config.run_dir)
    try:
        if tokenizer is not None and reads.processor != config.run_dir:
            tokenizer.save(folder / TOKENIZER)
        write_record(folder, facts)
    except OSError as error:
        raise ConfigError(
            f"run_dir={config.run_dir} cannot be written ({error.strerror}); choose another run_dir"
        ) from error


def check_first_weights(config: TrainConfig, reads: DataConfig, facts: data.DataFacts) -> None:
    """Raise ConfigError if config.init_from has no weights, or those of another model.

    Logs every key under which the weights compute another function.
    """
    if config.lora.rank:
        _check_frozen_weights(config)
    if not config.init_from:
        return
    theirs = load_config(config.init_from, "init_from").model
    check_trained(config.init_from, "init_from")
    rows = map_vocabulary(config.init_from, facts, data.open_tokenizer(reads))
    free = FREE_OF_SHAPE if rows is None else (*FREE_OF_SHAPE, "vocab_size", "classes")
    found = [
        f"init_from={config.init_from} holds a model with model.{key}={getattr(theirs, key)}, not "
        f"{value}; set model.{key}={getattr(theirs, key)}, or init_from another run"
        for key, value in vars(config.model).items()
        if key not in free and getattr(theirs, key) != value
    ]
    if found:
        raise ConfigError(*found)
    _warn_of_other_functions(config, theirs, facts)
    if rows is not None:
        log.warning(
            "init_from=%s has %s for %d of %d here: their rows are taken over, the others drawn "
            "anew",
            config.init_from,
            rows.what,
            rows.known_rows,
            len(rows.theirs),
        )


def _check_frozen_weights(config: TrainConfig) -> None:
    """Raise ConfigError if adapters cannot be trained on config.init_from; warn without one."""
    if not config.init_from:
        log.warning(
            "lora.rank=%d trains adapters of random frozen weights; set init_from to the run or "
            "model to fine-tune",
            config.lora.rank,
        )
        return
    bits = load_config(config.init_from, "init_from").compress.bits
    if bits and (Path(config.init_from) / EXPORTED).exists():
        raise ConfigError(
            f"init_from={config.init_from} is an export of compress.bits={bits}, but adapters are "
            "trained on weights that are not packed; set init_from to the run itself"
        )


def _warn_of_other_functions(
    config: TrainConfig, theirs: ModelConfig, facts: data.DataFacts
) -> None:
    """Log the keys under which the weights of config.init_from compute another function."""
    for key in CHANGE_THE_FUNCTION:
        if (before := getattr(theirs, key)) != (now := getattr(config.model, key)):
            log.warning(
                "init_from=%s was trained with model.%s=%s, here it is %s: its weights compute "
                "another function",
                config.init_from,
                key,
                before,
                now,
            )
    record = read_record(config.init_from)
    same = record is None or np.allclose([record.mean, record.std], [facts.mean, facts.std])
    if record and not same:
        log.warning(
            "init_from=%s was trained on pixels less mean %s by deviation %s, here it is %s by %s",
            config.init_from,
            record.mean,
            record.std,
            facts.mean,
            facts.std,
        )


def check_trained(run_dir: str, key: str = "run_dir") -> None:
    """Raise ConfigError unless a folder holds a checkpoint, an export or a Hugging Face model."""
    if is_model_folder(run_dir):
        from trainer.huggingface.weights import WeightReader  # loads torch

        WeightReader(run_dir, key)  # raises
    elif not list_checkpoints(run_dir) and not (Path(run_dir) / EXPORTED).exists():
        raise ConfigError(f"{key}={run_dir} holds no checkpoint yet; train it first")


def prepare_data(config: PrepareConfig) -> None:
    """Prepare the data set and print its record."""
    config.data.processor = config.data.processor.removeprefix(NEW)
    log.info("%s", format_record(data.prepare_data(config.data, progress=True)))

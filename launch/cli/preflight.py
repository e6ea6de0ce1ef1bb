"""The work before any rank starts: checks, data, and the run's folder."""

import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from conf.submit import SubmitConfig, training_part
from conf.validation.compression import compress_problems
from conf.validation.float8 import precision_problems
from conf.validation.lora import lora_problems
from conf.validation.validate import fill_from_data, find_problems
from launch.cli.auto import check_memory, with_chosen_layout
from launch.cli.devices import Devices, devices_here, devices_of
from launch.cli.entrypoint import has_own_name
from launch.cli.environment import note_start
from launch.cli.inputs import (
    check_first_weights,
    check_trained,
    keep_processor,
    with_absolute_paths,
    with_audio_of_model,
    with_imported_adapter,
    with_imported_model,
    with_processor,
    with_sizes,
)
from launch.cli.layouts import DECIDED, given_keys
from launch.cli.plan_text import layout_words
from launch.cli.teacher import check_teacher
from launch.slurm.batch_script import SlurmRun, ranks_per_node
from parallel.errors import ConfigError
from parallel.pipeline.schedules import find_schedule_warnings
from parallel.strategy import StrategyConfig, data_degree, resolve_degrees, without_degrees
from trainer import data
from trainer.config.train import (
    CompressReportConfig,
    DataConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    PrepareConfig,
    TeachConfig,
    TrainConfig,
    VerifyConfig,
    classes_of,
    non_default_options,
    outputs_of,
    used_compression,
)
from trainer.data.record import data_of, format_record
from trainer.data.tokenizer_files import TEMPLATE, TokenizerFiles
from trainer.huggingface.adapter_config import targeted_modules
from trainer.huggingface.architecture import Architecture
from trainer.huggingface.registry import architecture_for
from trainer.metrics import goodput
from trainer.plan.layout import layout_of_job
from trainer.plan.layout_rules import micro_batch_size, model_problems
from trainer.run.run_dir import check_run_dir, claim_folder, load_config, open_run_dir

Reader = TypeVar("Reader", EvaluateConfig, GenerateConfig, TeachConfig)

# Keys of compress.* with which a run's weights alone do not give its outputs.
CHANGE_EXPORTS = {"merge", "pool_after", "bits", "sparse_n", "prune_heads", "prune_ffn"}
log = logging.getLogger(__name__)


def prepare_training(
    config: TrainConfig, world_size: int, held: ExitStack | None = None
) -> TrainConfig:
    """Return the checked and completed configuration, with prepared data and an open folder.

    The folder is locked until `held` ends (None = not locked).
    """
    opened = _start_time()
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    config = with_imported_model(with_absolute_paths(config), given)
    config = with_audio_of_model(config, given)
    _check_config(config, world_size)
    _check_compiler(config)
    _check_kernels(config, world_size)
    if config.strategy.elastic and given and has_own_name(given):
        raise ConfigError(
            "strategy.elastic=true starts the ranks anew when a host is lost or comes back, and "
            "they must find the run; give it a folder, e.g. run_dir=runs/big"
        )
    devices = devices_here(config, world_size)
    config, reads, facts = _complete_config(config, world_size, devices, given)
    check_first_weights(config, reads, facts)
    planned = check_memory(config, devices, world_size, facts.splits["train"].mean_length)
    log.info("%s", format_record(facts))
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.RUN and has_own_name(given):
        config = replace(config, run_dir=str(_claim_folder(config.run_dir)))
    open_run_dir(config, held)
    keep_processor(config, reads, facts)
    planned.write(Path(config.run_dir))
    goodput.begin_start(Path(config.run_dir), opened, time.time())
    note_start(Path(config.run_dir), list(given))
    log.info("run_dir=%s", config.run_dir)
    return config


def _claim_folder(run_dir: str) -> Path:
    try:
        return claim_folder(run_dir)
    except OSError as error:
        raise ConfigError(
            f"run_dir={run_dir} cannot be written ({error.strerror}); choose another run_dir"
        ) from error


def prepare_submission(config: SubmitConfig) -> SlurmRun:
    """Return the checked and completed run of a job, and its command; nothing is written.

    The data are prepared here, once, before a GPU is allocated.
    """
    world_size = config.cluster.nodes * ranks_per_node(config.cluster)
    _check_config(config, world_size)
    given = HydraConfig.get().overrides.task
    training = with_imported_model(with_absolute_paths(training_part(config)), given)
    training = with_audio_of_model(training, given)
    chooses = training.strategy.auto != "no"
    devices = devices_of(config.cluster, training.precision) if config.cluster.gpu else None
    training, _, _ = _complete_config(training, world_size, devices, given)
    if devices:
        check_memory(training, devices, world_size)
    check_run_dir(training)
    overrides = [o for o in given if not o.startswith(("cluster=", "cluster.", "run_dir="))]
    if chooses:  # the words that make what was chosen
        overrides = [o for o in overrides if given_keys([o]).isdisjoint((*DECIDED, "strategy"))]
        overrides += layout_words(layout_of_job(training)).split()
    if not config.checkpoint.grace_seconds:  # a save that takes longer is warned about
        overrides.append(f"checkpoint.grace_seconds={config.cluster.signal_seconds}")
    return SlurmRun(training, config.cluster, overrides)


def _complete_config(
    config: TrainConfig, world_size: int, devices: Devices | None, given: Sequence[str]
) -> tuple[TrainConfig, DataConfig, data.DataFacts]:
    """Return the completed configuration, its data section as read, and the record of the data.

    `devices` are those that a layout is chosen for, None = not known; `given` are the words of the
    command line.
    """
    asked = config.strategy
    if asked.auto == "no":
        config = replace(config, strategy=resolve_degrees(asked, world_size))
    else:
        config = replace(config, strategy=without_degrees(asked))
    reads = with_processor(config)
    facts = data.prepare_data(reads, progress=True)
    if facts.sample_counts["train"] < config.batch_size:
        log.warning(
            "the train split has %d samples, fewer than batch_size=%d: a step sees some of them "
            "more than once",
            facts.sample_counts["train"],
            config.batch_size,
        )
    config = fill_from_data(with_sizes(config), facts)
    if asked.auto != "no":
        config = replace(config, strategy=asked)
        length = facts.splits["train"].mean_length
        config = with_chosen_layout(config, devices, world_size, given_keys(given), length)
    config = replace(config, micro_batch_size=micro_batch_size(config, config.strategy))
    share = config.batch_size // data_degree(config.strategy)
    for warning in find_schedule_warnings(config.strategy, share // config.micro_batch_size):
        log.warning("%s", warning)
    if config.checkpoint.huggingface_every:
        _check_exportable(config, non_default_options(used_compression(config)))
    if config.compress.teacher:
        check_teacher(replace(config, data=reads), facts)
    config = with_imported_adapter(config)
    if found := lora_problems(config):
        raise ConfigError(*found)
    return config, reads, facts


def _check_compiler(config: TrainConfig) -> None:
    """Raise ConfigError if torch.compile would fail for lack of a compiler."""
    names = (os.environ.get("CXX", "g++"), "g++", "clang++")
    if config.compile and not any(map(shutil.which, names)):
        raise ConfigError(
            "compile=true needs a C++ compiler, but there is none here; install g++, or set "
            "compile=false"
        )


def _check_kernels(config: TrainConfig | Reader, world_size: int) -> None:
    """Raise ConfigError if precision=fp8 is not available on this machine."""
    if config.precision == "fp8":
        from trainer.nn import float8

        float8.check_float8(config.device, world_size)


def _start_time() -> float:
    """Return when this start began, by the monotonic clock: with the process, or later in a
    sweep.
    """
    now = time.monotonic()
    job = HydraConfig.get().job if HydraConfig.initialized() else None
    if job is not None and not OmegaConf.is_missing(job, "num") and job.num > 0:
        return now
    return now - goodput.process_seconds()


def check_verify(
    config: VerifyConfig, world_size: int, held: ExitStack | None = None
) -> VerifyConfig:
    """Return the checked configuration."""
    _check_config(config, world_size)
    return replace(config, strategy=resolve_degrees(config.strategy, world_size))


def check_trained_run(config: Reader, world_size: int, held: ExitStack | None = None) -> Reader:
    """Return the checked configuration of a door that reads a run with at least one checkpoint."""
    _check_config(config, world_size)
    _check_kernels(config, world_size)
    trained = load_config(config.run_dir)
    check_trained(config.run_dir)
    strategy = resolve_degrees(config.strategy, world_size)
    found = model_problems(trained.model, strategy)
    compress = used_compression(trained)
    found += compress_problems(compress, trained.model, strategy)
    found += precision_problems(config.precision, trained.model, compress, strategy)
    if isinstance(config, GenerateConfig) and config.chat:
        found += _chat_problems(config, trained)
    if found:
        raise ConfigError(*found)
    return replace(config, strategy=strategy)


def _chat_problems(config: GenerateConfig, trained: TrainConfig) -> list[str]:
    """Return why a conversation cannot be held with a run."""
    found = []
    if trained.model.family != "decoder":
        found.append(
            f"chat=true is for decoders, but run_dir={config.run_dir} has model.family="
            f"{trained.model.family}; set chat=false"
        )
    elif not TokenizerFiles.read(Path(config.run_dir)).chat_template():
        found.append(
            f"chat=true: run_dir={config.run_dir} has no chat template ({TEMPLATE}); name a run "
            "of data.kind=chat, or set chat=false"
        )
    if config.prompt:
        found.append("prompt is for chat=false: a conversation reads lines from standard input")
    if config.launch.ranks > 1:
        found.append(
            f"launch.ranks={config.launch.ranks} starts ranks without a standard input, from which "
            "chat=true reads; start them with torchrun --nproc_per_node="
            f"{config.launch.ranks}, or set launch.ranks=1"
        )
    return found


def check_export(
    config: ExportConfig, world_size: int, held: ExitStack | None = None
) -> ExportConfig:
    """Return the checked configuration: there is a run, and nothing where it is to go."""
    _check_runs_readable(config, world_size, [config.run_dir], "exports")
    _check_output_free(config.output_dir, f"{config.run_dir}-exported")
    run = load_config(config.run_dir)
    if config.format != "native":
        _check_huggingface(config, run)
    elif config.step:
        raise ConfigError(
            f"step={config.step} is for format=huggingface or peft; format=native takes the newest"
        )
    compress = replace(used_compression(run), **non_default_options(config.compress))
    if found := compress_problems(compress, run.model, StrategyConfig()):
        raise ConfigError("\n".join(found))
    return replace(config, compress=compress)


def _check_huggingface(config: ExportConfig, run: TrainConfig) -> None:
    """Raise ConfigError if transformers has no model that computes what the run's does."""
    changed = non_default_options(config.compress) | non_default_options(used_compression(run))
    architecture = _check_exportable(run, changed)
    if config.format == "peft":
        if not run.lora.rank:
            raise ConfigError(
                f"run_dir={config.run_dir} has no adapters (lora.rank=0), which format=peft "
                "writes; set format=huggingface"
            )
        targeted_modules(architecture, run.model, run.lora)


def _check_exportable(run: TrainConfig, changed: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a run's model; ConfigError if transformers has no such model.

    `changed` are the keys of compress.* that are set.
    """
    architecture = architecture_for(run.model, like=run.init_from)
    if found := sorted(changed.keys() & CHANGE_EXPORTS):
        raise ConfigError(
            f"compress.{found[0]}={changed[found[0]]} makes a model that transformers does not "
            "have; set format=native (an export without pruned heads and channels can be exported "
            "again with format=huggingface)"
        )
    return architecture


def check_precompute(
    config: TeachConfig, world_size: int, held: ExitStack | None = None
) -> TeachConfig:
    """Return the checked configuration: there is a run, and nothing where its answers are to go."""
    config = check_trained_run(config, world_size)
    _check_output_free(config.output_dir, f"{config.run_dir}-answers")
    trained = load_config(config.run_dir)
    if outputs_of(trained.model) == "ctc":
        raise ConfigError(
            f"run_dir={config.run_dir} has model.outputs=ctc, whose alignment is its own: it does "
            "not teach another model; name another run"
        )
    if config.k > (classes := classes_of(trained.model)):
        raise ConfigError(
            f"k={config.k} is more than the {classes} classes that run_dir={config.run_dir} tells "
            f"apart; set k={classes}"
        )
    data.prepare_data(data_of(trained, config.run_dir), progress=True)
    return config


def _check_output_free(to: str, near: str) -> None:
    if not to or Path(to).exists():
        given = f"output_dir={to} is there already" if to else "output_dir is empty"
        more = (f"{near}-{number}" for number in count(2))
        near = next(name for name in chain([near], more) if not Path(name).exists())
        raise ConfigError(f"{given}; name a new folder, e.g. output_dir={near}")


def check_compare(
    config: CompressReportConfig, world_size: int, held: ExitStack | None = None
) -> CompressReportConfig:
    """Return the checked configuration: both runs are there."""
    both = [config.run_dir, *filter(None, [config.baseline])]
    _check_runs_readable(config, world_size, both, "measures")
    return config


def _check_runs_readable(config: object, world_size: int, run_dirs: list[str], does: str) -> None:
    """Raise ConfigError unless there are such runs and one rank, which `does` something."""
    _check_config(config, world_size)
    for run_dir in run_dirs:
        load_config(run_dir)
        check_trained(run_dir)
    if world_size > 1:
        raise ConfigError(f"{world_size} ranks were started, but one {does}; start 1 rank")


def check_prepare(
    config: PrepareConfig, world_size: int, held: ExitStack | None = None
) -> PrepareConfig:
    """Return the checked configuration."""
    _check_config(config, world_size)
    return config


def _check_config(config: object, world_size: int) -> None:
    found = find_problems(config, world_size)
    if found:
        raise ConfigError(*found)

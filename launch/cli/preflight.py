"""The work before any rank starts: checks, data, and the run's folder."""

import logging
import os
import shutil
import time
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import TypeVar

import numpy as np
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from conf.submit import SubmitConfig, training_part
from conf.validation.compression import answers_problems, compress_problems, teacher_problems
from conf.validation.float8 import precision_problems
from conf.validation.layout import micro_batch_size, model_problems
from conf.validation.lora import lora_problems
from conf.validation.validate import fill_from_data, find_problems
from launch.cli.entrypoint import has_own_name
from launch.cli.environment import note_start
from launch.cli.inputs import (
    check_first_weights,
    check_trained,
    keep_processor,
    with_absolute_paths,
    with_imported_adapter,
    with_imported_model,
    with_processor,
    with_sizes,
)
from launch.slurm.batch_script import SlurmRun, ranks_per_node
from parallel.errors import ConfigError, UserError
from parallel.pipeline.schedules import find_schedule_warnings
from parallel.strategy import StrategyConfig, data_degree, resolve_degrees
from trainer import data
from trainer.checkpoint.folder import list_checkpoints
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
    used_compression,
)
from trainer.data.record import TOKENIZER, data_of, format_record, read_record
from trainer.distill.logit_dataset import LogitFacts, RecordedLogits, is_logit_folder
from trainer.huggingface.adapter_config import targeted_modules
from trainer.huggingface.registry import architecture_for
from trainer.metrics import goodput
from trainer.run.run_dir import check_run_dir, claim_folder, load_config, open_run_dir

Reader = TypeVar("Reader", EvaluateConfig, GenerateConfig, TeachConfig)

TEACHER = "compress.teacher"
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
    _check_config(config, world_size)
    _check_compiler(config)
    _check_kernels(config, world_size)
    if config.strategy.elastic and given and has_own_name(given):
        raise ConfigError(
            "strategy.elastic=true starts the ranks anew when a host is lost or comes back, and "
            "they must find the run; give it a folder, e.g. run_dir=runs/big"
        )
    config, reads, facts = _complete_config(config, world_size)
    check_first_weights(config, reads, facts)
    log.info("%s", format_record(facts))
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.RUN and has_own_name(given):
        config = replace(config, run_dir=str(_claim_folder(config.run_dir)))
    open_run_dir(config, held)
    keep_processor(config, reads, facts)
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
    training, _, _ = _complete_config(training, world_size)
    check_run_dir(training)
    overrides = [o for o in given if not o.startswith(("cluster=", "cluster.", "run_dir="))]
    if not config.checkpoint.grace_seconds:  # a save that takes longer is warned about
        overrides.append(f"checkpoint.grace_seconds={config.cluster.signal_seconds}")
    return SlurmRun(training, config.cluster, overrides)


def _complete_config(
    config: TrainConfig, world_size: int
) -> tuple[TrainConfig, DataConfig, data.DataFacts]:
    """Return the completed configuration, its data section as read, and the record of the data."""
    config = replace(config, strategy=resolve_degrees(config.strategy, world_size))
    config = replace(config, micro_batch_size=micro_batch_size(config, config.strategy))
    share = config.batch_size // data_degree(config.strategy)
    for warning in find_schedule_warnings(config.strategy, share // config.micro_batch_size):
        log.warning("%s", warning)
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
    if config.compress.teacher:
        check_teacher(replace(config, data=reads), facts)
    config = with_imported_adapter(config)
    if found := lora_problems(config):
        raise ConfigError(*found)
    return config, reads, facts


def check_teacher(config: TrainConfig, facts: data.DataFacts) -> None:
    """Raise ConfigError if a completed run cannot be trained with compress.teacher.

    `config.data` is the section as the run reads it. A finished run raises AlreadyFinishedError
    instead.
    """
    check_run_dir(config)
    folder = config.compress.teacher
    said = None
    try:
        if is_logit_folder(folder):
            said = RecordedLogits(folder).facts
        found = _run_problems(config) if said is None else answers_problems(config, said)
        found = found or _processor_problems(config, facts)
        if not found and said is not None:
            found = _sample_problems(config, said)
    except UserError as error:
        found = error.problems
    if found and list_checkpoints(config.run_dir):
        both = f"{TEACHER}= compress.match=[] resume_changed=[{TEACHER},compress.match]"
        alone = f"{TEACHER}= resume_changed=[{TEACHER}]"
        found[-1] += f"; to go on without it: {both if config.compress.match else alone}"
    if found:
        raise ConfigError(*found)


def _processor_problems(config: TrainConfig, facts: data.DataFacts) -> list[str]:
    """Return the differences between the teacher's tokenizer or classes and the student's."""
    folder, tokenizer = config.compress.teacher, data.open_tokenizer(config.data)
    own = Path(folder) / TOKENIZER
    if tokenizer and not (own.is_file() and tokenizer.is_same_file(own)):
        return [
            f"{TEACHER}={folder} has another tokenizer than the data here; set data.tokenizer={own}"
        ]
    theirs = read_record(folder)
    if theirs is None or (
        theirs.class_names == facts.class_names
        and np.allclose([theirs.mean, theirs.std], [facts.mean, facts.std])
    ):
        return []
    return [
        f"{TEACHER}={folder} has other classes ({', '.join(theirs.class_names)}), or another mean "
        f"of the pixels, than the data here ({', '.join(facts.class_names)}); set "
        f"data.processor={folder}"
    ]


def _run_problems(config: TrainConfig) -> list[str]:
    """Return the problems of using the run of compress.teacher as a teacher, with remedies."""
    folder = config.compress.teacher
    teacher = load_config(folder, TEACHER)
    steps = [step for step, _ in list_checkpoints(folder)]
    if not steps:
        return [f"{TEACHER}={folder} holds no checkpoint; name a run that has been trained"]
    found = teacher_problems(config, teacher)
    if not found and steps[-1] < teacher.steps:
        log.warning(
            "%s=%s is at step %d of %d: whoever starts later learns from a newer checkpoint",
            TEACHER,
            folder,
            steps[-1],
            teacher.steps,
        )
    return found


def _sample_problems(config: TrainConfig, facts: LogitFacts) -> list[str]:
    """Return the differences between the training data and the data of the recorded logits."""
    if facts.data == data.data_fingerprint(config.data, ["train"]):
        return []
    return [
        f"{TEACHER}={config.compress.teacher} is about other samples than those of data.path="
        f"{config.data.path}; set data.path={facts.path} and leave it as it was, or ask the "
        "teacher about these: launch/teach.py"
    ]


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
    if found:
        raise ConfigError(*found)
    return replace(config, strategy=strategy)


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
    architecture = architecture_for(run.model, like=run.init_from)
    if config.format == "peft":
        if not run.lora.rank:
            raise ConfigError(
                f"run_dir={config.run_dir} has no adapters (lora.rank=0), which format=peft "
                "writes; set format=huggingface"
            )
        targeted_modules(architecture, run.model, run.lora)
    changed = non_default_options(config.compress) | non_default_options(used_compression(run))
    if found := sorted(changed.keys() & CHANGE_EXPORTS):
        raise ConfigError(
            f"compress.{found[0]}={changed[found[0]]} makes a model that transformers does not "
            "have; set format=native (an export without pruned heads and channels can be exported "
            "again with format=huggingface)"
        )


def check_precompute(
    config: TeachConfig, world_size: int, held: ExitStack | None = None
) -> TeachConfig:
    """Return the checked configuration: there is a run, and nothing where its answers are to go."""
    config = check_trained_run(config, world_size)
    _check_output_free(config.output_dir, f"{config.run_dir}-answers")
    trained = load_config(config.run_dir)
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

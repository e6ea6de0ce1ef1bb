"""Checks of a teacher before any rank starts: a run, or its recorded logits."""

import logging
from pathlib import Path

import numpy as np

from conf.validation.teacher import answers_problems, teacher_problems
from parallel.errors import ConfigError, UserError
from trainer import data
from trainer.checkpoint.folder import list_checkpoints
from trainer.config.train import TrainConfig
from trainer.data.record import TOKENIZER, read_record
from trainer.distill.logit_dataset import LogitFacts, RecordedLogits, is_logit_folder
from trainer.run.run_dir import check_run_dir, load_config

TEACHER = "compress.teacher"
log = logging.getLogger(__name__)


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

"""Registry of tasks: what is learned from a kind of data by a model."""

from trainer.config.train import DataConfig, ModelConfig
from trainer.tasks.chat import Chat
from trainer.tasks.detection import Detection
from trainer.tasks.image_classification import ImageClassification
from trainer.tasks.language import LanguageModeling
from trainer.tasks.masked_language import MaskedLanguageModeling
from trainer.tasks.speech import SpeechRecognition
from trainer.tasks.task import Task
from trainer.tasks.text_classification import TextClassification
from trainer.tasks.transcription import Transcription
from trainer.tasks.translation import Translation

TASKS: tuple[Task, ...] = (
    LanguageModeling(),
    Translation(),
    ImageClassification(),
    Chat(),
    MaskedLanguageModeling(),
    TextClassification(),
    SpeechRecognition(),
    Transcription(),
    Detection(),
)


def task_of(data: DataConfig, model: ModelConfig) -> Task:
    """Return the task that a model learns from the data."""
    return _task_of_kind(data.kind, model)


def task_of_model(model: ModelConfig, named: str = "auto") -> Task:
    """Return the task that a model's configuration implies, without data; or the one `named`."""
    if named != "auto":
        return _task_of_kind(named, model)
    return next(task for task in TASKS if task.fits(model))


def _task_of_kind(kind: str, model: ModelConfig) -> Task:
    """Return the task of a kind of data; where there are several, the one that fits the model."""
    of_kind = [task for task in TASKS if task.data_kind == kind]
    return next((task for task in of_kind if task.fits(model)), of_kind[0])

"""Registry of tasks by data.kind."""

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

TASKS: dict[str, Task] = {
    task.data_kind: task
    for task in (
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
}


def task_of(data: DataConfig) -> Task:
    """Return the task that is learned from the data."""
    return TASKS[data.kind]


def task_of_model(model: ModelConfig, named: str = "auto") -> Task:
    """Return the task that a model's configuration implies, without data; or the one `named`."""
    if named != "auto":
        return TASKS[named]
    return next(task for task in TASKS.values() if task.fits(model))

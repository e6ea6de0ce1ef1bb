"""Validate what goes with each value of model.outputs: one entry of a table for each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from conf.validation.audio import (
    ctc_compression_problems,
    ctc_problems,
    joint_ctc_problems,
)
from conf.validation.detection import (
    detection_compression_problems,
    detection_problems,
    detector_problems,
)
from trainer.config.train import CompressConfig, ModelConfig, TrainConfig, outputs_of


@dataclass(frozen=True)
class OutputRules:
    """The checks of models with one kind of output, and of what they are trained with."""

    model: Callable[[ModelConfig], list[str]] = lambda model: []
    training: Callable[[TrainConfig], list[str]] = lambda config: []
    compression: Callable[[CompressConfig, ModelConfig], list[str]] = lambda compress, model: []
    taught: tuple[str, ...] = ()  # keys of the model in which a teacher must be alike
    recorded: bool = True  # whether a teacher's most probable classes can be recorded


RULES: Mapping[str, OutputRules] = {
    "tokens": OutputRules(training=joint_ctc_problems),
    "boxes": OutputRules(
        detector_problems,
        detection_problems,
        detection_compression_problems,
        taught=("patch_size",),
        recorded=False,
    ),
    "ctc": OutputRules(
        training=ctc_problems,
        compression=ctc_compression_problems,
        taught=("vocab_size", "mels", "audio_stride"),
        recorded=False,
    ),
}


def rules_of(model: ModelConfig) -> OutputRules:
    """Return the checks for a model's outputs."""
    return RULES.get(outputs_of(model), OutputRules())

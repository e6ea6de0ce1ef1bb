"""What each value of model.outputs does not go with: one entry of a table for each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from conf.validation.audio import ctc_compression_problems, ctc_loss_problems
from conf.validation.detection import (
    detection_compression_problems,
    detection_loss_problems,
    detector_problems,
)
from trainer.config.train import CompressConfig, LossConfig, ModelConfig, outputs_of


@dataclass(frozen=True)
class OutputRules:
    """The checks of models with one kind of output, and of what they are trained with."""

    model: Callable[[ModelConfig], list[str]] = lambda model: []
    loss: Callable[[LossConfig], list[str]] = lambda loss: []
    compression: Callable[[CompressConfig, ModelConfig], list[str]] = lambda compress, model: []


RULES: Mapping[str, OutputRules] = {
    "boxes": OutputRules(
        detector_problems, detection_loss_problems, detection_compression_problems
    ),
    "ctc": OutputRules(loss=ctc_loss_problems, compression=ctc_compression_problems),
}


def rules_of(model: ModelConfig) -> OutputRules:
    """Return the checks for a model's outputs."""
    return RULES.get(outputs_of(model), OutputRules())

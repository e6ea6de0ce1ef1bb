"""The interface of a task: what is learned, how it is measured and how the result is used."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from rich.console import RenderableType
from torch import Tensor
from torch.nn import functional as F

from parallel.parallel_model import MicroBatch, ParallelModel
from trainer.config.train import GenerateConfig, ModelConfig
from trainer.data import Dataset
from trainer.data.tokenizer import Tokenizer
from trainer.inference.trained_run import TrainedRun
from trainer.loss import CrossEntropy


@dataclass(frozen=True)
class Decoding:
    """How an evaluation that writes text writes it."""

    tokenizer: Tokenizer
    beams: int = 1
    length_penalty: float = 1.0


class Metrics(Protocol):
    """Values of an evaluation, added up over its micro-batches."""

    def update(self, logits: Tensor, inputs: MicroBatch) -> None:
        """Add a micro-batch: its inputs and targets, on this rank's device, and its logits."""
        ...

    def compute(self) -> dict[str, float]:
        """Return the values by name, the same on every rank; `eval_loss` is among them.

        All ranks call it. What cannot be known, since the loss is NaN, is NaN.
        """
        ...


class Task(CrossEntropy, ABC):
    """A task; TASKS (trainer/tasks/registry.py) lists them by the data that they learn from.

    It is trained with the cross-entropy of class numbers unless it overrides `build_loss` and
    `count_valid` (trainer/loss.py: Objective), and then `reference_loss` too.
    """

    data_kind: str  # value of data.kind
    unit = "tok"  # of throughput: what a valid target is
    decodes_in_test = False  # evaluation of the test split also decodes (Decoding)

    @abstractmethod
    def fits(self, model: ModelConfig) -> bool:
        """Return whether a model learns this task, where no data say so."""

    def reference_loss(self, logits: Tensor, batch: MicroBatch, label_smoothing: float) -> Tensor:
        """Return the mean loss of a whole batch by torch's own functions: what verify compares."""
        targets = batch["targets"].flatten()
        return F.cross_entropy(logits.flatten(0, -2), targets, label_smoothing=label_smoothing)

    @abstractmethod
    def build_metrics(
        self, worker: ParallelModel, dataset: Dataset, decoding: Decoding | None
    ) -> Metrics:
        """Return the empty metrics of an evaluation of the dataset."""

    def notes(self, values: dict[str, float]) -> list[str]:
        """Return what a reader of the values should know, a line each."""
        return []

    @abstractmethod
    def generate(self, config: GenerateConfig, run: TrainedRun) -> RenderableType:
        """Return what a trained model makes of config.prompt; all ranks call it."""

    @abstractmethod
    def random_batch(
        self, model: ModelConfig, samples: int, seq_len: int, generator: torch.Generator
    ) -> MicroBatch:
        """Return a global batch with the difficulties of real ones: padding, unequal targets."""

    def sample_output(
        self, worker: ParallelModel, tokenizer: Tokenizer | None, max_tokens: int, seed: int
    ) -> str:
        """Return what the model gives at the end of a run, to be shown; empty = nothing."""
        return ""

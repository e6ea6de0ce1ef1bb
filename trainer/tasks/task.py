"""Interface of a task: its training objective, its metrics and its use for inference."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from rich.console import RenderableType
from torch import Tensor
from torch.nn import functional as F

from parallel.parallel_model import MicroBatch, ParallelModel
from trainer.config.loss import IGNORED
from trainer.config.train import GenerateConfig, ModelConfig
from trainer.data import Dataset
from trainer.data.tokenizer import Tokenizer
from trainer.inference.trained_run import TrainedRun
from trainer.loss import CrossEntropy


@dataclass(frozen=True)
class Decoding:
    """Decoding settings of an evaluation that generates text."""

    tokenizer: Tokenizer
    beams: int = 1
    length_penalty: float = 1.0


class Metrics(Protocol):
    """Metrics of an evaluation, accumulated over micro-batches."""

    def update(self, logits: Tensor, inputs: MicroBatch) -> None:
        """Add a micro-batch: its inputs and targets, on this rank's device, and its logits."""
        ...

    def compute(self) -> dict[str, float]:
        """Return the values by name, identical on every rank; `eval_loss` is among them.

        All ranks must call it. If the loss is NaN, values derived from it are NaN.
        """
        ...


class Task(CrossEntropy, ABC):
    """A task; TASKS (trainer/tasks/registry.py) lists them.

    The objective is cross-entropy over class indices, unless a task overrides `build_loss` and
    `count_valid` (trainer/loss.py: Objective), and then `reference_loss` too.
    """

    data_kind: str  # value of data.kind
    unit = "tok"  # unit of throughput: one valid target
    decodes_in_test = False  # evaluation of the test split also decodes (Decoding)

    @abstractmethod
    def fits(self, model: ModelConfig) -> bool:
        """Return whether a model's configuration implies this task, without data."""

    def reference_loss(self, logits: Tensor, batch: MicroBatch, label_smoothing: float) -> Tensor:
        """Return the mean loss of a full batch by torch's own functions, as verify's reference."""
        targets = batch["targets"].flatten()
        return F.cross_entropy(logits.flatten(0, -2), targets, label_smoothing=label_smoothing)

    def reference_divergence(
        self, logits: Tensor, told: Tensor, batch: MicroBatch, temperature: float
    ) -> Tensor:
        """Return the mean divergence from a teacher's logits, as verify's reference."""
        valid = batch["targets"].flatten() != IGNORED
        ours, theirs = (x.flatten(0, -2)[valid] / temperature for x in (logits, told))
        return F.kl_div(ours.log_softmax(-1), theirs.softmax(-1), reduction="batchmean")

    @abstractmethod
    def build_metrics(
        self, worker: ParallelModel, dataset: Dataset, decoding: Decoding | None
    ) -> Metrics:
        """Return the empty metrics of an evaluation of the dataset."""

    def notes(self, values: dict[str, float]) -> list[str]:
        """Return notes on the values for their reader, one per line."""
        return []

    @abstractmethod
    def generate(self, config: GenerateConfig, run: TrainedRun) -> RenderableType:
        """Return a trained model's output for config.prompt; all ranks must call it."""

    @abstractmethod
    def random_batch(
        self, model: ModelConfig, samples: int, seq_len: int, generator: torch.Generator
    ) -> MicroBatch:
        """Return a random global batch with padding and unequal numbers of targets per sample."""

    def sample_output(
        self,
        worker: ParallelModel,
        load_tokenizer: Callable[[], Tokenizer | None],
        open_split: Callable[[str], Dataset],
        max_tokens: int,
        seed: int,
    ) -> str:
        """Return a sample of the model's output to show at the end of a run; empty = none."""
        return ""

    def sample_pictures(
        self, worker: ParallelModel, open_split: Callable[[str], Dataset]
    ) -> dict[str, bytes]:
        """Return PNG files of the model's output by name, which a report shows; none by default.

        All ranks must call it.
        """
        return {}

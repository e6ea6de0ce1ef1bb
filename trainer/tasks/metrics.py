"""Metrics that tasks share: loss, accuracy, perplexity; texts beside their references."""

import math
from collections.abc import Callable, Mapping

import jiwer
import torch
from torch import Tensor

from parallel.parallel_model import MicroBatch, ParallelModel
from trainer.loss import count_valid, cross_entropy_sum

LARGEST_EXPONENT = 700.0  # beyond it exp overflows float64


class CrossEntropyMetrics:
    """Mean cross-entropy in nats per valid target, without label smoothing, and accuracy."""

    def __init__(self, worker: ParallelModel):
        self._worker = worker
        # Sums of nats, valid targets and correct predictions.
        self._totals = torch.zeros(3, dtype=torch.float64, device=worker.device)

    def update(self, logits: Tensor, inputs: MicroBatch) -> None:
        """Add a micro-batch."""
        targets = inputs["targets"]
        nats = cross_entropy_sum(logits, targets)
        correct = (logits.argmax(dim=-1) == targets).sum()
        counts = nats.double(), count_valid(targets).double(), correct.double()
        self._totals += torch.stack(counts)

    def reduce(self) -> tuple[float, float]:
        """Return the loss and the accuracy (0 to 1, NaN as the loss) over all ranks."""
        nats, targets, correct = self._worker.sum_over_data(self._totals.clone()).tolist()
        loss = nats / targets
        return loss, math.nan if math.isnan(loss) else correct / targets


def gather_texts(
    worker: ParallelModel, texts: Mapping[int, str], reference_of: Callable[[int], str]
) -> tuple[list[str], list[str]]:
    """Return the references and the texts of all ranks, which have them by the sample's index."""
    found: dict[int, str] = {}
    for part in worker.gather_data_ranks(texts):
        found |= part
    return [reference_of(index) for index in found], list(found.values())


def error_rates(loss: float, said: list[str], heard: list[str]) -> dict[str, float]:
    """Return the shares of wrong words and characters (jiwer's), NaN as the loss."""
    if math.isnan(loss):
        return {"wer": math.nan, "cer": math.nan}
    return {"wer": jiwer.wer(said, heard), "cer": jiwer.cer(said, heard)}


def perplexity(loss: float) -> float:
    """Return exp(loss), or infinity if it overflows float64."""
    return math.inf if loss > LARGEST_EXPONENT else math.exp(loss)

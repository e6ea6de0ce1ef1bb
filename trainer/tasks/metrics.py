"""Metrics of classification losses: loss, accuracy, perplexity."""

import math

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


def perplexity(loss: float) -> float:
    """Return exp(loss), or infinity if it overflows float64."""
    return math.inf if loss > LARGEST_EXPONENT else math.exp(loss)

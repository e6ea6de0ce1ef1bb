"""Sums of gradients as a layout makes them, beside the own gradients of each rank."""

import tiny
import torch

from parallel.strategy import StrategyConfig
from trainer.build import parallel_model
from trainer.config.loss import LossConfig
from trainer.loss import CrossEntropy
from trainer.model import Transformer
from trainer.nn.init import init_rows
from trainer.precision import PRECISIONS
from trainer.verify.cases import FAMILIES, make_batch, samples_per_step, scale_down, split_batch

MODEL = scale_down(FAMILIES["decoder (GPT-2)"])
STEPS = 3
# So small that there are several buckets, which DDP fills otherwise from the second step on.
BUCKET_MIB = 0.02

Gradients = dict[str, torch.Tensor]


def own_gradients(micro_batches: list[dict], count: torch.Tensor) -> list[Gradients]:
    """Each micro-batch's share of the mean loss's gradient, by one process with plain torch."""
    model = Transformer(MODEL, torch.float32)
    for name, parameter in model.named_parameters():
        rows = init_rows(MODEL, 0, name, parameter.shape, 0, parameter.shape[0])
        parameter.data.copy_(rows)
    objective, found = CrossEntropy(), []
    loss_sum = objective.build_loss(model.head, LossConfig())
    for micro_batch in micro_batches:
        model.zero_grad()
        targets = micro_batch["targets"]
        valid = int(objective.count_valid(targets))
        (loss_sum(model(micro_batch), targets, valid) / count).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters()})
    return found


def sums(runtime, strategy: StrategyConfig, steps: int) -> list[tuple[Gradients, list]]:
    """Per step the summed gradients, and of each rank the own ones of each micro-batch."""
    worker = parallel_model(MODEL, strategy, runtime, PRECISIONS["fp32"])
    found = []
    for step in range(steps):
        micro_batches = split_batch(make_batch(MODEL, 0, step, samples_per_step(strategy)), worker)
        worker.zero_grad()
        _, count = worker.forward_backward(micro_batches)
        total = {n: tiny.whole(p.grad) for n, p in worker.parameters().items()}
        own = own_gradients(micro_batches, count)
        found.append((total, worker.gather_data_ranks(own)))
    return found

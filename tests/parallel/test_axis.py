"""A mesh axis defined in this file: the ParallelAxis interface is sufficient."""

from functools import partial

import torch

from parallel.axis import ParallelAxis
from parallel.mesh import build_mesh
from parallel.parallel_model import FullParameters, ParallelModel
from parallel.parallelize import materialize_parameters
from parallel.strategy import StrategyConfig
from trainer.build import parallel_model
from trainer.loss import count_valid, cross_entropy_sum
from trainer.model import Transformer
from trainer.nn.init import init_rows
from trainer.precision import PRECISIONS
from trainer.verify.cases import FAMILIES, make_batch, scale_down, split_batch

CONFIG = scale_down(FAMILIES["decoder (GPT-2)"])
STRATEGY = StrategyConfig(replicate=2)


class Plain(ParallelAxis):
    """An axis of ranks with different samples that sums only the `partial` gradients."""

    splits_loss = True

    def prepare(self, model):
        self.model, self.schedule, self.calls = model, self, []
        self.partial = [name for name, _ in model.named_parameters()]

    def run(self, micro_batches, loss_of):
        for number, micro_batch in enumerate(micro_batches):
            loss_of(self.model(micro_batch), number).backward()

    def forward(self, inputs, cache):
        return self.model(inputs, cache)


class Halves(Plain):
    """Around it: the same, with half of the logits and something to keep."""

    partial = ()
    splits_loss = False

    def prepare(self, model):
        self.partial = []

    def gather_logits(self, logits, inputs, cache):
        return logits / 2

    def state(self):
        return {"kept": torch.ones(1)}


def loss_sum(logits, targets, inputs, count):
    return cross_entropy_sum(logits, targets)


def gradients(worker) -> tuple:
    loss, count = worker.forward_backward(split_batch(make_batch(CONFIG, 0, 0), worker))
    norm = worker.clip_grad_norm(0.0)
    return loss, count, norm, {n: p.grad.clone() for n, p in worker.parameters().items()}


def both(runtime) -> tuple:
    """Run a step under DDP, and under an axis of this file."""
    ours = gradients(parallel_model(CONFIG, STRATEGY, runtime, PRECISIONS["fp64"]))
    with torch.device("meta"):
        model = Transformer(CONFIG, torch.float64)
    whole = FullParameters(
        {name: p.shape for name, p in model.named_parameters()},
        {"head.output.weight": "embed.tokens.weight"},
    )
    mesh = build_mesh(STRATEGY, runtime.device)
    axes = [Halves(mesh["replicate"]), Plain(mesh["replicate"])]
    for axis in axes:
        axis.prepare(model)
    model.to(torch.float64)
    materialize_parameters(model, runtime.device, partial(init_rows, CONFIG, 0), whole.ties)
    worker = ParallelModel(model, whole, mesh, runtime.device, loss_sum, count_valid, axes)
    theirs = gradients(worker)
    inputs = split_batch(make_batch(CONFIG, 0, 0), worker)[0]
    with worker.evaluation_mode():
        half = worker.forward(inputs)
        assert torch.equal(half, model(inputs) / 2)
    assert worker.error_feedback_state().keys() == {"kept"}
    return ours, theirs


def test_an_axis_needs_nothing_but_its_interface(ranks):
    results = ranks.run(2, both)
    for ours, theirs in results:
        assert ours[1] == theirs[1]
        assert torch.allclose(ours[2], theirs[2], rtol=1e-13)
        for name, gradient in ours[3].items():
            assert torch.allclose(gradient, theirs[3][name], rtol=0, atol=1e-15), name
    # DDP's ranks have parts of the loss; the axis has said that it splits the loss.
    total = sum(ours[0] for ours, _ in results)
    assert all(torch.allclose(total, theirs[0], rtol=1e-13) for _, theirs in results)

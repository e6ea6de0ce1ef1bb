"""A new task needs one class and one registry entry, and no other change."""

from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from parallel.strategy import StrategyConfig, world_size
from trainer.config.train import ModelConfig, VerifyConfig
from trainer.tasks import registry
from trainer.tasks.metrics import CrossEntropyMetrics
from trainer.tasks.task import Task
from trainer.verify.compare import compare_layout, format_verdict

MODEL = ModelConfig(family="encoder", inputs="tokens", pool="mean", tied=False)
NO_ROW = -100.0  # label of a sample that is ignored


class TextClassification(Task):
    """Sentences of unequal lengths, one class each."""

    data_kind = "sentences"

    def fits(self, model):
        return model.family == "encoder" and model.inputs == "tokens"

    def build_metrics(self, worker, dataset, decoding):
        return CrossEntropyMetrics(worker)

    def generate(self, config, run):
        return ""

    def random_batch(self, model, samples, seq_len, generator):
        tokens = torch.randint(0, model.vocab_size, (samples, seq_len), generator=generator)
        lengths = torch.randint(1, seq_len + 1, (samples, 1), generator=generator)
        return {
            "tokens": tokens,
            "source_valid": torch.arange(seq_len) < lengths,
            "targets": torch.randint(0, model.classes, (samples,), generator=generator),
            "seeds": torch.randint(0, 1 << 62, (samples,), generator=generator),
        }


class Tagging(TextClassification):
    """A set of labels for each sentence: no cross-entropy over classes, no class numbers."""

    splits_classes = False

    def build_loss(self, head, config):
        def loss_sum(logits, targets, count):
            rows = self._valid(targets)
            return F.binary_cross_entropy_with_logits(logits[rows], targets[rows], reduction="sum")

        return loss_sum

    def count_valid(self, targets):
        return self._valid(targets).sum()

    def reference_loss(self, logits, batch, label_smoothing):
        rows = self._valid(batch["targets"])
        each = [
            F.binary_cross_entropy_with_logits(row, labels) * len(row)
            for row, labels in zip(logits[rows], batch["targets"][rows], strict=True)
        ]
        return torch.stack(each).mean()

    def random_batch(self, model, samples, seq_len, generator):
        batch = super().random_batch(model, samples, seq_len, generator)
        labels = torch.rand(samples, model.classes, generator=generator) < 0.3
        batch["targets"] = labels.double()
        batch["targets"][1] = NO_ROW
        return batch

    @staticmethod
    def _valid(targets):
        return targets[:, 0] != NO_ROW


def verify_task(runtime, task, strategy):
    with mock.patch.object(registry, "TASKS", (task(), *registry.TASKS)):
        return compare_layout(runtime, VerifyConfig(strategy=strategy, model=MODEL))


LAYOUTS = {
    "one process": StrategyConfig(),
    "ddp 2": StrategyConfig(replicate=2),
    "fsdp 2": StrategyConfig(shard=2),
    "pipeline 2": StrategyConfig(pipeline=2),
    "context 2": StrategyConfig(context=2),
    "context 2 × fsdp 2": StrategyConfig(context=2, shard=2),
    "tensor 2": StrategyConfig(tensor=2),
    "tensor 2 × pipeline 2": StrategyConfig(tensor=2, pipeline=2),
}


@pytest.mark.parametrize("strategy", LAYOUTS.values(), ids=LAYOUTS)
def test_sentences_with_classes_equal_one_process(ranks, strategy):
    found = ranks.run(world_size(strategy), verify_task, TextClassification, strategy)[0]
    assert format_verdict(found, 1e-10) == "equal"


@pytest.mark.parametrize("strategy", LAYOUTS.values(), ids=LAYOUTS)
def test_a_loss_of_sets_equals_one_process(ranks, strategy):
    found = ranks.run(world_size(strategy), verify_task, Tagging, strategy)[0]
    assert format_verdict(found, 1e-10) == "equal"

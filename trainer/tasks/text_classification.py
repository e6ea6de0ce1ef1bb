"""Text classification: predict the label of a text."""

import torch
from rich.table import Table

from parallel.parallel_model import MicroBatch, ParallelModel
from trainer.config.loss import IGNORED
from trainer.config.train import ConfigError, GenerateConfig, ModelConfig, inputs_of, outputs_of
from trainer.data import Dataset, prepare_data
from trainer.data.labelled_text import frame_text, pad_texts
from trainer.data.record import read_record
from trainer.inference.sampling import check_finite
from trainer.inference.trained_run import TrainedRun
from trainer.tasks.image_classification import ClassificationMetrics
from trainer.tasks.language import random_targets
from trainer.tasks.task import Decoding, Task


class TextClassification(Task):
    """Text classification with encoders of tokens, on labelled texts."""

    data_kind = "labelled_text"
    unit = "text"

    def fits(self, model: ModelConfig) -> bool:
        """Return whether the model is an encoder of tokens, with logits of classes."""
        return (inputs_of(model), outputs_of(model)) == ("tokens", "classes")

    def build_metrics(
        self, worker: ParallelModel, dataset: Dataset, decoding: Decoding | None
    ) -> ClassificationMetrics:
        """Return empty metrics of loss and accuracy."""
        return ClassificationMetrics(worker)

    def generate(self, config: GenerateConfig, run: TrainedRun) -> Table:
        """Return the most probable label of each line of the prompt."""
        facts = read_record(run.config.run_dir) or prepare_data(run.data_config)
        names, tokenizer = facts.class_names, run.load_tokenizer()
        lines = [line.strip() for line in config.prompt.splitlines() if line.strip()]
        if not lines:
            raise ConfigError("prompt is empty; it must be the text to classify, one on a line")
        longest = run.config.data.seq_len
        framed = [frame_text(ids, tokenizer, longest) for ids in tokenizer.encode_batch(lines)]
        batch = pad_texts(framed, tokenizer)
        inputs = {name: torch.from_numpy(array) for name, array in batch.items()}
        with run.worker.evaluation_mode():
            logits_BV = run.worker.forward(run.worker.to_device(inputs))
        check_finite(logits_BV)
        best = logits_BV[:, : len(names)].float().softmax(-1).max(-1)
        table = Table("text", "label", "probability")
        found = zip(lines, best.values.tolist(), best.indices.tolist(), strict=True)
        for line, probability, number in found:
            table.add_row(line, names[number], f"{probability:.1%}")
        return table

    def random_batch(
        self, model: ModelConfig, samples: int, seq_len: int, generator: torch.Generator
    ) -> MicroBatch:
        """Return texts of unequal lengths and classes; one of the targets is IGNORED."""
        batch = random_targets(model, samples, seq_len, generator)
        batch["source_valid"] = batch["targets"] != IGNORED
        batch["targets"] = torch.randint(0, model.classes, (samples,), generator=generator)
        batch["targets"][1] = IGNORED
        if model.segments:
            size = batch["tokens"].shape
            batch["segments"] = torch.randint(model.segments, size, generator=generator)
        return batch

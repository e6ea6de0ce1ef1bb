"""Masked language modelling: guess the masked tokens of a text."""

import torch
from rich.table import Table

from parallel.parallel_model import MicroBatch, ParallelModel
from trainer.config.loss import IGNORED
from trainer.config.train import ConfigError, GenerateConfig, ModelConfig, inputs_of, outputs_of
from trainer.data import Dataset
from trainer.data.tokenizer import MASK_NAMES, Tokenizer
from trainer.inference.sampling import check_finite
from trainer.inference.trained_run import TrainedRun
from trainer.tasks.language import random_targets
from trainer.tasks.metrics import CrossEntropyMetrics, perplexity
from trainer.tasks.task import Decoding, Task

TOP_TOKENS = 5  # shown for a mask


class MaskedLanguageModeling(Task):
    """Masked language modelling with encoders of tokens, on text."""

    data_kind = "masked_text"

    def fits(self, model: ModelConfig) -> bool:
        """Return whether the model is an encoder of tokens, with logits of tokens."""
        ends = (inputs_of(model), outputs_of(model))
        return model.family == "encoder" and ends == ("tokens", "tokens")

    def build_metrics(
        self, worker: ParallelModel, dataset: Dataset, decoding: Decoding | None
    ) -> "MaskedLanguageMetrics":
        """Return empty metrics of loss, perplexity and accuracy."""
        return MaskedLanguageMetrics(worker)

    def generate(self, config: GenerateConfig, run: TrainedRun) -> Table:
        """Return the most probable tokens for each mask of the prompt."""
        tokenizer = run.load_tokenizer()
        ids = encode_with_masks(config.prompt, tokenizer)
        inputs = run.worker.to_device({"tokens": torch.tensor([ids])})
        inputs["targets"] = inputs["tokens"]  # of the same length
        with run.worker.evaluation_mode():
            logits_SV = run.worker.forward(inputs)[0]
        check_finite(logits_SV)
        table = Table("mask", "token", "probability", title=config.prompt)
        masks = [place for place, token in enumerate(ids) if token == tokenizer.mask_id]
        for number, place in enumerate(masks, 1):
            top = logits_SV[place].float().softmax(-1).topk(min(TOP_TOKENS, logits_SV.shape[-1]))
            for probability, token in zip(top.values.tolist(), top.indices.tolist(), strict=True):
                table.add_row(str(number), tokenizer.decode([token]), f"{probability:.1%}")
        return table

    def random_batch(
        self, model: ModelConfig, samples: int, seq_len: int, generator: torch.Generator
    ) -> MicroBatch:
        """Return samples of unequal lengths and segments, with unequal numbers of targets."""
        batch = random_targets(model, samples, seq_len, generator)
        batch["source_valid"] = batch["targets"] != IGNORED
        guessed = torch.rand(batch["targets"].shape, generator=generator) < 0.5
        batch["targets"][~guessed] = IGNORED
        batch["targets"][0, 0] = batch["tokens"][0, 0]  # one at least
        if model.segments:
            size = batch["tokens"].shape
            batch["segments"] = torch.randint(model.segments, size, generator=generator)
        return batch


class MaskedLanguageMetrics(CrossEntropyMetrics):
    """Loss and perplexity per masked token, and the share that is guessed right."""

    def compute(self) -> dict[str, float]:
        """Return the metrics over all ranks."""
        loss, accuracy = self.reduce()
        return {"eval_loss": loss, "perplexity": perplexity(loss), "accuracy": accuracy}


def encode_with_masks(prompt: str, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a prompt that spells mask tokens; raises ConfigError if it has none."""
    name = next((name for name in MASK_NAMES if name in prompt), None)
    if name is None or tokenizer.mask_id is None:
        raise ConfigError(
            f"prompt={prompt} has no mask to fill; write {' or '.join(MASK_NAMES)} for each word "
            "that is to be guessed"
        )
    first, *others = tokenizer.encode_batch(prompt.split(name))
    return [*first, *(token for ids in others for token in (tokenizer.mask_id, *ids))]

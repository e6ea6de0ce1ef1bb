"""Language modelling: predict the next token of a text."""

import math

import torch

from parallel.parallel_model import MicroBatch, ParallelModel
from trainer.config.loss import IGNORED
from trainer.config.train import GenerateConfig, ModelConfig
from trainer.data import Dataset
from trainer.data.tokenizer import Tokenizer
from trainer.inference.sampling import sample_tokens
from trainer.inference.trained_run import TrainedRun
from trainer.tasks.metrics import CrossEntropyMetrics, perplexity
from trainer.tasks.task import Decoding, Task


class LanguageModeling(Task):
    """Decoders that learn from text."""

    data_kind = "text"

    def fits(self, model: ModelConfig) -> bool:
        """Return whether the model is a decoder."""
        return model.family == "decoder"

    def build_metrics(
        self, worker: ParallelModel, dataset: Dataset, decoding: Decoding | None
    ) -> "LanguageMetrics":
        """Return the metrics of a text."""
        return LanguageMetrics(worker, dataset)

    def generate(self, config: GenerateConfig, run: TrainedRun) -> str:
        """Return the prompt and what the model writes after it."""
        tokenizer = run.tokenizer()
        prompt_ids = tokenizer.encode(config.prompt)
        written = sample_tokens(
            run.worker,
            prompt_ids,
            max_tokens=config.max_tokens,
            eot_id=tokenizer.eot_id,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=config.seed,
        )
        return tokenizer.decode([*prompt_ids, *written])

    def random_batch(
        self, model: ModelConfig, samples: int, seq_len: int, generator: torch.Generator
    ) -> MicroBatch:
        """Return packed samples of two documents each, with padding at the end."""
        batch = random_targets(model, samples, seq_len, generator)
        cut = torch.randint(1, seq_len, (samples, 1), generator=generator)
        position = torch.arange(seq_len)[None]
        batch["documents"] = (position >= cut).long()
        batch["positions"] = torch.where(position >= cut, position - cut, position)
        return batch

    def sample_output(
        self, worker: ParallelModel, tokenizer: Tokenizer | None, max_tokens: int, seed: int
    ) -> str:
        """Return a text that the model writes from nothing."""
        assert tokenizer is not None
        if not max_tokens:
            return ""
        ids = sample_tokens(
            worker,
            [],
            max_tokens=max_tokens,
            eot_id=tokenizer.eot_id,
            temperature=0.8,
            seed=seed,
        )
        return tokenizer.decode(ids)


class LanguageMetrics(CrossEntropyMetrics):
    """Also bits per character (or token, where the tokenizer loses characters) and perplexity."""

    def __init__(self, worker: ParallelModel, dataset: Dataset):
        super().__init__(worker)
        self._dataset = dataset

    def compute(self) -> dict[str, float]:
        """Return the values over all ranks."""
        loss, _ = self.reduce()
        values = {"eval_loss": loss} | bits(loss, self._dataset)
        return values | {"perplexity": perplexity(loss)}


def bits(loss: float, dataset: Dataset) -> dict[str, float]:
    """Bits per character; per token where the tokenizer loses characters, which cost nothing."""
    bits = loss / math.log(2)
    if dataset.lost:
        return {"bits_per_token": bits}
    # All that is known of a part of a split is its tokens: they are as long as the others.
    return {"bits_per_character": bits * dataset.targets / dataset.characters}


def random_targets(
    model: ModelConfig, samples: int, seq_len: int, generator: torch.Generator
) -> MicroBatch:
    """Return tokens and targets (B,S) of unequal lengths, and dropout seeds (B,)."""
    seeds = torch.randint(0, 1 << 62, (samples,), generator=generator)
    size = (2, samples, seq_len)
    tokens, targets = torch.randint(0, model.vocab_size, size, generator=generator)
    lengths = torch.randint(1, seq_len + 1, (samples,), generator=generator)
    targets[torch.arange(seq_len) >= lengths[:, None]] = IGNORED
    return {"tokens": tokens, "targets": targets, "seeds": seeds}

"""Language modelling: predict the next token of a text."""

import math
from collections.abc import Callable

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
    """Language modelling with decoders, on text."""

    data_kind = "text"

    def fits(self, model: ModelConfig) -> bool:
        """Return whether the model is a decoder."""
        return model.family == "decoder"

    def build_metrics(
        self, worker: ParallelModel, dataset: Dataset, decoding: Decoding | None
    ) -> "LanguageMetrics":
        """Return empty metrics of a text."""
        return LanguageMetrics(worker, dataset)

    def generate(self, config: GenerateConfig, run: TrainedRun) -> str:
        """Return the prompt with the generated continuation."""
        tokenizer = run.load_tokenizer()
        prompt_ids = tokenizer.encode_prompt(config.prompt)
        generated = sample_tokens(
            run.worker,
            prompt_ids,
            max_tokens=config.max_tokens,
            eot_id=tokenizer.eot_id,
            end_ids=tokenizer.end_ids,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=config.seed,
        )
        return tokenizer.decode([*prompt_ids, *generated])

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
        self,
        worker: ParallelModel,
        load_tokenizer: Callable[[], Tokenizer | None],
        open_split: Callable[[str], Dataset],
        max_tokens: int,
        seed: int,
    ) -> str:
        """Return a text generated from an empty prompt."""
        tokenizer = load_tokenizer()
        assert tokenizer is not None
        ids = sample_tokens(
            worker,
            tokenizer.bos_ids,
            max_tokens=max_tokens,
            eot_id=tokenizer.eot_id,
            end_ids=tokenizer.end_ids,
            temperature=0.8,
            seed=seed,
        )
        return tokenizer.decode(ids)


class LanguageMetrics(CrossEntropyMetrics):
    """Loss, perplexity, and bits per character (or per token, if the tokenizer is lossy)."""

    def __init__(self, worker: ParallelModel, dataset: Dataset):
        super().__init__(worker)
        self._dataset = dataset

    def compute(self) -> dict[str, float]:
        """Return the metrics over all ranks."""
        loss, _ = self.reduce()
        values = {"eval_loss": loss} | bits(loss, self._dataset)
        return values | {"perplexity": perplexity(loss)}


def bits(loss: float, dataset: Dataset) -> dict[str, float]:
    """Return bits per character; per token if the tokenizer is lossy: lost characters cost none."""
    bits = loss / math.log(2)
    if dataset.lost:
        return {"bits_per_token": bits}
    # If only some samples are evaluated, the characters per token of the full split are assumed.
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

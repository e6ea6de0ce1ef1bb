"""Chat: predict the answers of a conversation."""

from collections.abc import Callable

import torch

from parallel.parallel_model import MicroBatch, ParallelModel
from trainer.config.loss import IGNORED
from trainer.config.train import GenerateConfig, ModelConfig
from trainer.data import Dataset
from trainer.data.tokenizer import Tokenizer
from trainer.inference.conversation import Dialogue
from trainer.inference.sampling import Sampling
from trainer.inference.trained_run import TrainedRun
from trainer.tasks.language import random_targets
from trainer.tasks.metrics import CrossEntropyMetrics, perplexity
from trainer.tasks.task import Decoding, Task

SHOWN_ANSWERS = 3  # at the end of a run


class Chat(Task):
    """Fine-tuning of decoders on conversations, of which the answers are learned."""

    data_kind = "chat"

    def fits(self, model: ModelConfig) -> bool:
        """Return False: a decoder implies language modelling."""
        return False

    def build_metrics(
        self, worker: ParallelModel, dataset: Dataset, decoding: Decoding | None
    ) -> "ChatMetrics":
        """Return empty metrics of answers."""
        return ChatMetrics(worker)

    def generate(self, config: GenerateConfig, run: TrainedRun) -> str:
        """Return the answer to the prompt."""
        sampling = Sampling(config.temperature, config.top_k, config.top_p, config.seed)
        dialogue = Dialogue(run.worker, run.load_tokenizer(), sampling)
        return "".join(dialogue.answer(config.prompt, config.max_tokens))

    def random_batch(
        self, model: ModelConfig, samples: int, seq_len: int, generator: torch.Generator
    ) -> MicroBatch:
        """Return rows of three conversations, with few answers, and with padding at the end."""
        batch = random_targets(model, samples, seq_len, generator)
        asked = torch.rand(samples, seq_len, generator=generator) < 0.6
        asked[:, 0] = False  # of a row without a target there are enough: the last is one
        asked[-1] = True
        batch["targets"][asked] = IGNORED
        cuts = torch.randint(1, seq_len, (samples, 2), generator=generator).sort(dim=1).values
        position = torch.arange(seq_len)[None]
        starts = torch.zeros(samples, 1, dtype=torch.int64)
        for cut in (cuts[:, :1], cuts[:, 1:]):
            starts = torch.where(position >= cut, cut, starts)
        batch["documents"] = (position[:, :, None] >= cuts[:, None]).sum(-1)
        batch["positions"] = position - starts
        return batch

    def sample_output(
        self,
        worker: ParallelModel,
        load_tokenizer: Callable[[], Tokenizer | None],
        open_split: Callable[[str], Dataset],
        max_tokens: int,
        seed: int,
    ) -> str:
        """Return answers to a few prompts of the test split."""
        tokenizer, dataset = load_tokenizer(), open_split("test")
        assert tokenizer is not None
        shown = []
        for index in range(min(SHOWN_ANSWERS, len(dataset))):
            opening = dataset.opening(index)
            dialogue = Dialogue(worker, tokenizer, Sampling(seed=seed))
            answer = "".join(dialogue.answer_to(opening, max_tokens))
            asked = opening[-1]["content"] if opening else ""
            shown.append(f"> {asked}\n{answer}")
        return "\n".join(shown)


class ChatMetrics(CrossEntropyMetrics):
    """Loss and perplexity per token of an answer, the end of its turn included."""

    def compute(self) -> dict[str, float]:
        """Return the metrics over all ranks."""
        loss, _ = self.reduce()
        return {"eval_loss": loss, "perplexity": perplexity(loss)}

"""Translation: predict the next token of a sentence from its source."""

import math

import sacrebleu
import torch
from torch import Tensor

from parallel.parallel_model import MicroBatch, ParallelModel
from trainer.config.train import (
    ConfigError,
    GenerateConfig,
    ModelConfig,
    inputs_of,
    is_encoder_decoder,
)
from trainer.data import Dataset
from trainer.data.pairs import Pairs, frame_of
from trainer.inference.beam_search import translate_tokens
from trainer.inference.sampling import check_finite
from trainer.inference.trained_run import TrainedRun, unwrap_transformer
from trainer.tasks.language import random_targets
from trainer.tasks.metrics import CrossEntropyMetrics, gather_texts, perplexity
from trainer.tasks.task import Decoding, Task


class Translation(Task):
    """Translation with encoder-decoders, on pairs of sentences."""

    data_kind = "pairs"
    decodes_in_test = True

    def fits(self, model: ModelConfig) -> bool:
        """Return whether the model is an encoder-decoder of tokens."""
        return is_encoder_decoder(model) and inputs_of(model) == "tokens"

    def build_metrics(
        self, worker: ParallelModel, dataset: Dataset, decoding: Decoding | None
    ) -> "TranslationMetrics":
        """Return empty metrics of pairs, with BLEU if `decoding` is given."""
        return TranslationMetrics(worker, dataset, decoding)

    def notes(self, values: dict[str, float]) -> list[str]:
        """Return the signature of BLEU, if it was measured."""
        return [f"BLEU: {bleu_signature()}"] if "bleu" in values else []

    def generate(self, config: GenerateConfig, run: TrainedRun) -> str:
        """Return a translation of each line of the prompt."""
        tokenizer = run.load_tokenizer()
        lines = [line.strip() for line in config.prompt.splitlines() if line.strip()]
        if not lines:
            raise ConfigError(
                "prompt is empty; it must be the sentence to translate, one on a line"
            )
        frame = frame_of(run.config.data, tokenizer)
        around = len(frame.before_source) + len(frame.behind_source)
        longest = run.config.data.seq_len - around  # longer ones are truncated, as in evaluation
        ids = [
            [*frame.before_source, *(found[:longest] or [tokenizer.eot_id]), *frame.behind_source]
            for found in tokenizer.encode_batch(lines)
        ]
        source_BT = torch.full((len(ids), max(map(len, ids))), tokenizer.pad_id)
        source_valid_BT = torch.zeros(source_BT.shape, dtype=torch.bool)
        for row, line_ids in enumerate(ids):
            source_BT[row, : len(line_ids)] = torch.tensor(line_ids)
            source_valid_BT[row, : len(line_ids)] = True
        start_B1 = torch.full((len(ids), 1), tokenizer.eot_id)
        inputs = {"source": source_BT, "source_valid": source_valid_BT, "tokens": start_B1}
        with run.worker.evaluation_mode():
            check_finite(run.worker.forward(run.worker.to_device(inputs)))
        translations = translate_tokens(
            run.worker,
            source_BT,
            source_valid_BT,
            max_tokens=config.max_tokens,
            bos_id=tokenizer.eot_id,
            end_ids=tokenizer.end_ids,
            prefix_ids=frame.before_target,
            beams=config.beams,
            length_penalty=config.length_penalty,
        )
        return "\n".join(map(tokenizer.decode, translations))

    def random_batch(
        self, model: ModelConfig, samples: int, seq_len: int, generator: torch.Generator
    ) -> MicroBatch:
        """Return random pairs with unequal lengths of sources and targets."""
        batch = random_targets(model, samples, seq_len, generator)
        size = (samples, seq_len - 1)
        batch["source"] = torch.randint(0, model.vocab_size, size, generator=generator)
        valid = torch.randint(1, seq_len, (samples, 1), generator=generator)
        batch["source_valid"] = torch.arange(seq_len - 1)[None] < valid
        return batch


class TranslationMetrics(CrossEntropyMetrics):
    """Loss, perplexity per token and, with decoding, BLEU (0 to 100)."""

    def __init__(self, worker: ParallelModel, dataset: Dataset, decoding: Decoding | None):
        super().__init__(worker)
        assert isinstance(dataset, Pairs)
        self._dataset, self._decoding = dataset, decoding
        self._translations: dict[int, str] = {}  # by the sample's index

    def update(self, logits: Tensor, inputs: MicroBatch) -> None:
        """Add a micro-batch, and translate its sources if decoding is enabled."""
        super().update(logits, inputs)
        if self._decoding is not None:
            self._translations |= self._translate(inputs, self._decoding)

    def compute(self) -> dict[str, float]:
        """Return the metrics over all ranks."""
        loss, _ = self.reduce()
        values = {"eval_loss": loss, "perplexity": perplexity(loss)}
        if self._decoding is not None:
            bleu = self._bleu()
            values["bleu"] = math.nan if math.isnan(loss) else bleu
        return values

    def _translate(self, inputs: MicroBatch, decoding: Decoding) -> dict[int, str]:
        tokenizer = decoding.tokenizer
        sentences = translate_tokens(
            self._worker,
            inputs["source"],
            inputs.get("source_valid"),
            max_tokens=unwrap_transformer(self._worker).config.max_positions,
            bos_id=tokenizer.eot_id,
            end_ids=tokenizer.end_ids,
            prefix_ids=self._dataset.frame.before_target,
            beams=decoding.beams,
            length_penalty=decoding.length_penalty,
        )
        pairs = zip(inputs["index"].tolist(), sentences, strict=True)
        return {index: tokenizer.decode(ids) for index, ids in pairs if index >= 0}

    def _bleu(self) -> float:
        """Return BLEU over all ranks, as sacreBLEU (arXiv 1804.08771) defines it."""
        found = gather_texts(self._worker, self._translations, self._dataset.target_text)
        references, translations = found
        return float(sacrebleu.corpus_bleu(translations, [references]).score)


def bleu_signature() -> str:
    """Return the tokenisation and other choices of sacreBLEU, which make BLEU comparable."""
    return str(sacrebleu.BLEU(references=[["."]]).get_signature())

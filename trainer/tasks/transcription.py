"""Transcription: predict the next token of what is said in a recording (Whisper)."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parallel.parallel_model import MicroBatch, ParallelModel
from trainer.config.loss import BLANK, IGNORED, LossConfig
from trainer.config.train import (
    ConfigError,
    GenerateConfig,
    ModelConfig,
    inputs_of,
    is_encoder_decoder,
)
from trainer.data import Dataset
from trainer.data.audio.decode import read_audio
from trainer.data.audio.transcription import Transcripts
from trainer.data.tokenizer import Tokenizer
from trainer.inference.trained_run import TrainedRun
from trainer.inference.transcripts import Decoder, transcribe_recording
from trainer.nn.heads import Head
from trainer.tasks.language import random_targets
from trainer.tasks.metrics import CrossEntropyMetrics, error_rates, gather_texts, perplexity
from trainer.tasks.task import Decoding, Task

SHOWN = 5  # transcripts at the end of a run


class Transcription(Task):
    """Transcription with encoder-decoders, on recordings and what is said in them."""

    data_kind = "speech"
    decodes_in_test = True

    def fits(self, model: ModelConfig) -> bool:
        """Return whether the model is an encoder-decoder of audio."""
        return is_encoder_decoder(model) and inputs_of(model) == "audio"

    def build_loss(self, head: nn.Module, config: LossConfig) -> Callable[..., Tensor]:
        """Return the cross-entropy's share of the loss; CTC of the encoder adds its own."""
        assert isinstance(head, Head)
        return partial(_share_of, super().build_loss(head, config), 1.0 - head.ctc_weight)

    def build_metrics(
        self, worker: ParallelModel, dataset: Dataset, decoding: Decoding | None
    ) -> "TranscriptionMetrics":
        """Return empty metrics of utterances, with WER and CER if `decoding` is given."""
        return TranscriptionMetrics(worker, dataset, decoding)

    def notes(self, values: dict[str, float]) -> list[str]:
        """Return what WER and CER compare, if they were measured."""
        return ["WER, CER: lower case, without punctuation"] if "wer" in values else []

    def generate(self, config: GenerateConfig, run: TrainedRun) -> str:
        """Return what is said in the recording that the prompt names."""
        if not config.prompt:
            raise ConfigError("prompt is empty; it must be a recording to transcribe")
        data = run.data_config
        recording = read_audio(Path(config.prompt).expanduser(), data.sample_rate, "prompt")
        decoder = Decoder.of(data, run.load_tokenizer(), config.beams, config.length_penalty)
        return transcribe_recording(
            run.worker, decoder, recording.samples_N, data, config.max_tokens
        )

    def random_batch(
        self, model: ModelConfig, samples: int, seq_len: int, generator: torch.Generator
    ) -> MicroBatch:
        """Return random frames and targets of unequal lengths."""
        batch = random_targets(model, samples, seq_len, generator)
        longest, shortest = seq_len - 1, 1
        if model.ctc_weight:  # needs a vector for each token, and one more between two equal ones
            targets_BS, shortest = batch["targets"], longest - 3
            targets_BS[:, shortest // 2 + 1 :] = IGNORED
            targets_BS[::3, 0] = IGNORED  # given, as what is in front of a transcript
            targets_BS[targets_BS == BLANK] = BLANK + 1
        lengths_B1 = torch.randint(shortest, longest + 1, (samples, 1), generator=generator)
        valid_BT = torch.arange(longest) < lengths_B1
        size = (samples, longest * model.audio_stride, model.mels)
        frames_BFM = torch.randn(size, generator=generator, dtype=torch.float64)
        frames_BFM *= valid_BT.repeat_interleave(model.audio_stride, dim=1)[..., None]
        # The last sample may be the longest: one frame less than its vectors are made of.
        return batch | {"source": frames_BFM[:, :-1], "source_valid": valid_BT}

    def sample_output(
        self,
        worker: ParallelModel,
        load_tokenizer: Callable[[], Tokenizer | None],
        open_split: Callable[[str], Dataset],
        max_tokens: int,
        seed: int,
    ) -> str:
        """Return transcripts of the first utterances of the test split, below the references."""
        dataset = open_split("test")
        assert isinstance(dataset, Transcripts)
        decoder, shown = Decoder(dataset.tokenizer, dataset.prefix), []
        for index in range(min(SHOWN, len(dataset))):
            batch = dataset.collate([dataset.sample(index, None)])
            (ids,) = decoder.decode(worker, torch.from_numpy(batch["source"]))
            said = dataset.tokenizer.decode(ids).strip()
            shown.append(f"> {dataset.target_text(index)}\n{said}")
        return "\n".join(shown)


def _share_of(loss_sum: Callable[..., Tensor], share: float, *args: Any, **options: Any) -> Tensor:
    return share * loss_sum(*args, **options)


class TranscriptionMetrics(CrossEntropyMetrics):
    """Loss and perplexity per token; with decoding the shares of wrong words and characters."""

    def __init__(self, worker: ParallelModel, dataset: Dataset, decoding: Decoding | None):
        super().__init__(worker)
        assert isinstance(dataset, Transcripts)
        self._dataset, self._decoder = dataset, None
        if decoding is not None:
            beams, penalty = decoding.beams, decoding.length_penalty
            self._decoder = Decoder(dataset.tokenizer, dataset.prefix, beams, penalty)
        self._transcripts: dict[int, str] = {}  # by the sample's index

    def update(self, logits: Tensor, inputs: MicroBatch) -> None:
        """Add a micro-batch, and transcribe it if decoding is enabled."""
        super().update(logits, inputs)
        if self._decoder is None:
            return
        said = self._decoder.decode(self._worker, inputs["source"], inputs.get("source_valid"))
        for index, ids in zip(inputs["index"].tolist(), said, strict=True):
            if index >= 0:
                self._transcripts[index] = self._dataset.tokenizer.decode(ids)

    def compute(self) -> dict[str, float]:
        """Return the metrics over all ranks."""
        loss, _ = self.reduce()
        values = {"eval_loss": loss, "perplexity": perplexity(loss)}
        if self._decoder is None:
            return values
        texts = gather_texts(self._worker, self._transcripts, self._dataset.target_text)
        said, heard = (list(map(plain_words, part)) for part in texts)
        return values | error_rates(loss, said, heard)


def plain_words(text: str) -> str:
    """Return a text in lower case, its words and numbers without the punctuation around them."""
    return " ".join(re.findall(r"\w+(?:['’.,]\w+)*", text.lower()))

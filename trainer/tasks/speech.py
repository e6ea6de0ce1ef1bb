"""Speech recognition: transcribe recordings by CTC."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from parallel.parallel_model import MicroBatch, ParallelModel
from trainer.config.loss import BLANK, IGNORED, NO_CHARACTER
from trainer.config.train import (
    ConfigError,
    DataConfig,
    GenerateConfig,
    ModelConfig,
    inputs_of,
    outputs_of,
)
from trainer.data import DataFacts, Dataset, open_split, prepare_data
from trainer.data.audio.decode import load_frames
from trainer.data.audio.speech import Speech
from trainer.data.audio.utterances import FRAMES_PER_SECOND, pad_frames
from trainer.data.record import read_record
from trainer.data.tokenizer import Tokenizer
from trainer.inference.ctc_decoding import decode_logits, join_windows, window_bounds
from trainer.inference.sampling import check_finite
from trainer.inference.trained_run import TrainedRun, unwrap_transformer
from trainer.loss import CTC, ctc_sum
from trainer.tasks.metrics import error_rates, gather_texts
from trainer.tasks.task import Decoding, Task

SHOWN = 5  # transcripts at the end of a run
OVERLAP_SECONDS = 2.0  # of the windows that a long recording is read in


class SpeechRecognition(CTC, Task):
    """Transcription with encoders of audio, by CTC."""

    data_kind = "speech"
    unit = "char"
    decodes_in_test = True

    def fits(self, model: ModelConfig) -> bool:
        """Return whether the model reads audio, with logits of CTC."""
        return (inputs_of(model), outputs_of(model)) == ("audio", "ctc")

    def reference_loss(self, logits: Tensor, batch: MicroBatch, label_smoothing: float) -> Tensor:
        """Return the mean loss per target by torch's function, utterance by utterance."""
        nats, count = logits.new_zeros(()), 0
        for row_TV, targets_T in zip(logits, batch["targets"], strict=True):
            said, vectors = targets_T[targets_T >= 0], int((targets_T != IGNORED).sum())
            if len(said):
                log_TV = row_TV[:vectors].log_softmax(-1)
                lengths = torch.tensor([vectors]), torch.tensor([len(said)])
                nats = nats + F.ctc_loss(log_TV[:, None], said[None], *lengths, reduction="sum")
            count += len(said)
        return nats / count

    def reference_divergence(
        self, logits: Tensor, told: Tensor, batch: MicroBatch, temperature: float
    ) -> Tensor:
        """Return the mean divergence from the teacher per target, utterance by utterance."""
        total, count = logits.new_zeros(()), 0
        for ours_TV, theirs_TV, targets_T in zip(logits, told, batch["targets"], strict=True):
            vectors, said = int((targets_T != IGNORED).sum()), int((targets_T >= 0).sum())
            if said:
                ours, theirs = ours_TV[:vectors] / temperature, theirs_TV[:vectors] / temperature
                apart = F.kl_div(ours.log_softmax(-1), theirs.softmax(-1), reduction="batchmean")
                total = total + said * apart
            count += said
        return total / count

    def build_metrics(
        self, worker: ParallelModel, dataset: Dataset, decoding: Decoding | None
    ) -> "SpeechMetrics":
        """Return empty metrics of transcripts; without `decoding` they are of the best path."""
        assert isinstance(dataset, Speech)
        return SpeechMetrics(worker, dataset, decoding.beams if decoding else 1)

    def generate(self, config: GenerateConfig, run: TrainedRun) -> str:
        """Return the transcript of the recording that the prompt names.

        For a file only the run's folder is read; a prompt such as `test:0` reads the data.
        """
        data = run.data_config
        facts = read_record(run.config.run_dir) or prepare_data(data)
        named = re.fullmatch(r"(train|valid|test):(\d+)", config.prompt)
        if named:
            prepare_data(data)
            frames_FM = _frames_of_split(open_split(data, named[1]), int(named[2]), config.prompt)
        else:
            frames_FM = _frames_of_file(config.prompt, data, facts)
        logits_TV = transcribe_windows(run.worker, frames_FM, data)
        check_finite(logits_TV)
        return text_of(decode_logits(logits_TV, config.beams), run.load_tokenizer())

    def random_batch(
        self, model: ModelConfig, samples: int, seq_len: int, generator: torch.Generator
    ) -> MicroBatch:
        """Return frames of unequal lengths, with unequal numbers of characters; one without any."""
        longest = 2 * seq_len
        size = (samples, longest * model.audio_stride, model.mels)
        frames = torch.randn(size, generator=generator, dtype=torch.float64)
        vectors = torch.randint(seq_len, longest + 1, (samples, 1), generator=generator)
        valid = torch.arange(longest) < vectors
        frames[~valid.repeat_interleave(model.audio_stride, dim=1)] = 0.0
        targets = torch.randint(
            BLANK + 1, model.vocab_size, (samples, longest), generator=generator
        )
        counts = torch.randint(1, seq_len // 2, (samples, 1), generator=generator)
        targets[torch.arange(longest) >= counts] = NO_CHARACTER
        targets[:, 1] = torch.where(counts[:, 0] > 1, targets[:, 0], NO_CHARACTER)  # a repeat
        targets[~valid] = IGNORED
        targets[1] = IGNORED
        seeds = torch.randint(0, 1 << 62, (samples,), generator=generator)
        return {"frames": frames, "source_valid": valid, "targets": targets, "seeds": seeds}

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
        assert isinstance(dataset, Speech)
        shown = []
        for index in range(min(SHOWN, len(dataset))):
            logits_TV = transcribe(worker, dataset.frames(index, None), dataset.stride)
            heard = text_of(decode_logits(logits_TV), dataset.tokenizer)
            shown.append(f"> {dataset.target_text(index)}\n{heard}")
        return "\n".join(shown)


class SpeechMetrics:
    """Loss per character, and the shares of wrong words and characters (WER, CER; jiwer's)."""

    def __init__(self, worker: ParallelModel, dataset: Speech, beams: int):
        self._worker, self._dataset, self._beams = worker, dataset, beams
        # Sums of nats and of targets.
        self._totals = torch.zeros(2, dtype=torch.float64, device=worker.device)
        self._transcripts: dict[int, str] = {}  # by the sample's index

    def update(self, logits: Tensor, inputs: MicroBatch) -> None:
        """Add a micro-batch, and decode it."""
        targets = unwrap_transformer(self._worker).resized_targets(inputs["targets"])
        nats, count = ctc_sum(logits, targets), (targets >= 0).sum()
        self._totals += torch.stack((nats.double(), count.double()))
        vectors = (targets != IGNORED).sum(1).tolist()
        for index, row_TV, length in zip(inputs["index"].tolist(), logits, vectors, strict=True):
            if index >= 0:
                ids = decode_logits(row_TV[:length], self._beams)
                self._transcripts[index] = text_of(ids, self._dataset.tokenizer)

    def compute(self) -> dict[str, float]:
        """Return the metrics over all ranks."""
        nats, count = self._worker.sum_over_data(self._totals.clone()).tolist()
        loss = nats / count
        said, heard = gather_texts(self._worker, self._transcripts, self._dataset.target_text)
        return {"eval_loss": loss} | error_rates(loss, said, heard)


def text_of(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Return the text of ids, with one space between words, as transcripts are read."""
    return " ".join(tokenizer.decode(ids).split())


def transcribe(worker: ParallelModel, frames_FM: np.ndarray, stride: int) -> Tensor:
    """Return the logits (T, V) of one utterance; all ranks must call it."""
    batch = {name: torch.from_numpy(part) for name, part in pad_frames([frames_FM], stride).items()}
    vectors = batch["frames"].shape[1] // stride
    batch["targets"] = torch.full((1, vectors), NO_CHARACTER)  # of the same length
    with worker.evaluation_mode():
        return worker.forward(worker.to_device(batch))[0]


def transcribe_windows(worker: ParallelModel, frames_FM: np.ndarray, data: DataConfig) -> Tensor:
    """Return the logits (T, V) of a recording, read in windows if it is long."""
    stride = data.audio_stride
    vectors = -(-len(frames_FM) // stride)
    window, overlap = (
        int(seconds * FRAMES_PER_SECOND) // stride
        for seconds in (data.max_seconds, OVERLAP_SECONDS)
    )
    bounds = window_bounds(vectors, window, min(overlap, window // 2))
    parts = [
        transcribe(worker, frames_FM[start * stride : end * stride], stride)
        for start, end in bounds
    ]
    if len(bounds) == 1:
        return parts[0]
    lengths = [end - start for start, end in bounds]
    return join_windows(list(map(_stretched, parts, lengths)), bounds, vectors)


def _stretched(logits_TV: Tensor, length: int) -> Tensor:
    """Return `length` rows of a sequence that the encoder shortened: CTC reads repeats as one."""
    rows_T = torch.arange(length, device=logits_TV.device) * len(logits_TV) // length
    return logits_TV[rows_T]


def _frames_of_split(dataset: Dataset, index: int, prompt: str) -> np.ndarray:
    """Return the features of an utterance; raises ConfigError if there is none of this number."""
    assert isinstance(dataset, Speech)
    if index >= len(dataset):
        raise ConfigError(
            f"prompt={prompt}: the split has {len(dataset)} utterances; the last is number "
            f"{len(dataset) - 1}"
        )
    return dataset.frames(index, None)


def _frames_of_file(prompt: str, data: DataConfig, facts: DataFacts) -> np.ndarray:
    """Return the features of a recording as a run was trained on them; raises UserError."""
    if not prompt:
        raise ConfigError("prompt is empty; it must be a recording, or e.g. test:0")
    frames_FM = load_frames(Path(prompt).expanduser(), data, "prompt")
    mean_M, std_M = (np.array(values, np.float32) for values in (facts.mean, facts.std))
    return np.asarray((frames_FM - mean_M) / std_M)

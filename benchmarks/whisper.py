"""Whisper here beside transformers: logits, and WER on recordings, by the words that are said.

`python benchmarks/whisper.py FOLDER [DATA]` compares the logits of the first test recording in
fp32, then transcribes the test split of DATA (bundled:speech) greedily; FOLDER is a Hugging Face
folder or a run. WER and CER are of texts that the normalizer of Whisper's paper has changed: `one`
and `1` are the same.
"""

import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import jiwer
import torch
import transformers
from rich.console import Console
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from parallel.runtime import JobQueue, Runtime, process_group
from trainer.config.train import GenerateConfig
from trainer.data import open_split, prepare_data
from trainer.data.audio.transcription import Transcripts
from trainer.huggingface.registry import is_model_folder
from trainer.inference.trained_run import TrainedRun, load_trained_run, unwrap_transformer
from trainer.inference.transcripts import Decoder
from trainer.nn.audio import fill_with_silence


@torch.no_grad()
def compare_logits(run: TrainedRun, folder: str, dataset: Transcripts) -> float:
    """Return the largest difference of the logits of one utterance."""
    theirs = transformers.WhisperForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32
    )
    batch = {k: torch.from_numpy(v) for k, v in dataset.collate([dataset.sample(0, None)]).items()}
    with run.worker.evaluation_mode():
        logits = run.worker.forward(batch)
    model = unwrap_transformer(run.worker).config
    frames_BMF = fill_with_silence(batch["source"], None, model).transpose(1, 2)
    tokens = batch["tokens"].clone()
    tokens[:, 0] = model.start_token
    reference = theirs(frames_BMF, decoder_input_ids=tokens).logits
    return float((logits - reference).abs().max())


def transcribe_split(run: TrainedRun, dataset: Transcripts) -> tuple[list[str], list[str]]:
    """Return what is said in each utterance, and what is heard."""
    decoder, heard = Decoder(dataset.tokenizer, dataset.prefix), []
    for index in range(len(dataset)):
        batch = dataset.collate([dataset.sample(index, None)])
        (ids,) = decoder.decode(run.worker, torch.from_numpy(batch["source"]))
        heard.append(dataset.tokenizer.decode(ids))
    return [dataset.target_text(index) for index in range(len(dataset))], heard


def main() -> None:
    """Print the comparisons."""
    folder, console = sys.argv[1], Console(width=100)
    transformers.logging.set_verbosity_error()
    with process_group("cpu", JobQueue.single_process()) as runtime:
        measure(runtime, folder, console)


def measure(runtime: Runtime, folder: str, console: Console) -> None:
    """Print the comparisons, in this process group."""
    run = load_trained_run(GenerateConfig(folder, precision="fp32", device="cpu"), runtime)
    data = replace(run.data_config, path=sys.argv[2] if sys.argv[2:] else "bundled:speech")
    prepare_data(data)
    dataset = open_split(data, "test")
    assert isinstance(dataset, Transcripts)
    if is_model_folder(folder):
        console.print(f"largest difference of logits: {compare_logits(run, folder, dataset):.3g}")
    start = perf_counter()
    said, heard = transcribe_split(run, dataset)
    console.print(f"{len(said)} recordings in {perf_counter() - start:.0f} s")
    plain = EnglishTextNormalizer({})
    said, heard = list(map(plain, said)), list(map(plain, heard))
    for a, b in zip(said, heard, strict=True):
        if a != b:
            console.print(f"  {a}\n→ {b}", markup=False, highlight=False)
    console.print(f"{Path(folder).name}: WER {jiwer.wer(said, heard):.4f}", end=", ")
    console.print(f"CER {jiwer.cer(said, heard):.4f}")


if __name__ == "__main__":
    main()

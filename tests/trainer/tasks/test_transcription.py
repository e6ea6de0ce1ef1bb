"""Transcription beside transformers: features, greedy tokens; data, and long recordings."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import transformers
from transformers import WhisperFeatureExtractor
from whisper_folder import (
    BANNED,
    FIRST,
    POSITIONS,
    RATE,
    SILENT,
    START,
    WORDS,
    make_tone,
    write_whisper_folder,
)

from trainer.config.loss import IGNORED
from trainer.config.train import ConfigError, DataConfig, DataError, GenerateConfig, ModelConfig
from trainer.data import open_split, prepare_data
from trainer.data.audio.decode import window_features
from trainer.data.audio.transcription import prefix_ids
from trainer.data.tokenizer import Tokenizer
from trainer.inference.huggingface import export_folder
from trainer.inference.trained_run import load_trained_run
from trainer.inference.transcripts import join_overlap, transcribe_recording
from trainer.nn.audio import fill_with_silence
from trainer.tasks.registry import task_of
from trainer.tasks.transcription import plain_words

MODEL = ModelConfig(inputs="audio", mels=80, audio_positions=POSITIONS, audio_fill="silence")
DATA = DataConfig(kind="speech", targets="tokens", standardize=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_whisper_folder(tmp_path_factory.mktemp("parent") / "whisper")


def their_tokens(folder: Path, samples_N: np.ndarray, count: int) -> list[int]:
    """The tokens that are the most probable by transformers' logits, one after the other."""
    theirs = transformers.WhisperForConditionalGeneration.from_pretrained(folder)
    extractor = WhisperFeatureExtractor(chunk_length=POSITIONS * 2 // 100)
    frames = extractor(samples_N, sampling_rate=RATE, return_tensors="pt").input_features
    ids = [START, SILENT]
    for number in range(count):
        with torch.no_grad():
            logits_V = theirs(frames, decoder_input_ids=torch.tensor([ids])).logits[0, -1]
        logits_V[[BANNED] + ([FIRST, 0] if number == 0 else [])] = -torch.inf
        ids.append(int(logits_V.argmax()))
        if ids[-1] == 0:
            return ids[2:-1]
    return ids[2:]


def generate(runtime, folder: Path, prompt: str) -> str:
    config = GenerateConfig(str(folder), prompt, max_tokens=12, beams=1, precision="fp32")
    run = load_trained_run(replace(config, device="cpu"), runtime)
    return task_of(run.config.data, run.config.model).generate(config, run)


def test_a_recording_is_transcribed_as_by_transformers(ranks, folder, tmp_path):
    samples_N = make_tone(1.3)
    soundfile.write(tmp_path / "said.wav", samples_N, RATE, subtype="FLOAT")
    expected = their_tokens(folder, samples_N, 12)
    assert len(set(expected)) > 3
    said = ranks.run(1, generate, folder, str(tmp_path / "said.wav"))[0]
    assert said == Tokenizer.load(folder / "tokenizer.json").decode(expected).strip()


def export(runtime, folder: Path, to: Path) -> None:
    export_folder(folder, to, torch.float32)


def test_an_exported_folder_makes_the_same_frames_in_transformers(ranks, folder, tmp_path):
    ranks.run(1, export, folder, tmp_path / "out")
    again = WhisperFeatureExtractor.from_pretrained(tmp_path / "out")
    assert (again.chunk_length, again.n_samples, again.hop_length) == (2, 2 * RATE, 160)
    model = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.generation_config.suppress_tokens == [BANNED]
    frames = again(make_tone(1.0), sampling_rate=RATE, return_tensors="pt").input_features
    first = WhisperFeatureExtractor(chunk_length=2)
    assert frames.equal(
        first(make_tone(1.0), sampling_rate=RATE, return_tensors="pt").input_features
    )


def test_a_model_fills_windows_with_what_silence_is():
    window = RATE * 2
    extractor = WhisperFeatureExtractor(chunk_length=2)
    parts = [window_features(make_tone(seconds, 1), window, DATA) for seconds in (1.3, 0.7)]
    longest = max(len(frames_FM) for frames_FM in parts)
    padded = [np.pad(frames_FM, ((0, longest - len(frames_FM)), (0, 0))) for frames_FM in parts]
    lengths = torch.tensor([[len(frames_FM) // 2] for frames_FM in parts])
    valid_BT = torch.arange(longest // 2) < lengths
    ours_BFM = fill_with_silence(torch.from_numpy(np.stack(padded)), valid_BT, MODEL)
    for ours_FM, seconds in zip(ours_BFM, (1.3, 0.7), strict=True):
        theirs = extractor(make_tone(seconds, 1), sampling_rate=RATE, return_tensors="pt")
        torch.testing.assert_close(ours_FM, theirs.input_features[0].T, rtol=0, atol=1e-4)


@pytest.fixture
def speech(tmp_path) -> Path:
    (tmp_path / "audio").mkdir()
    lines = []
    for number in range(6):
        soundfile.write(
            tmp_path / f"audio/{number}.wav", make_tone(0.5 + 0.5 * number, number), RATE
        )
        lines.append(f"audio/{number}.wav\t{' '.join(WORDS[number : number + 4])}\n")
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.tsv").write_text("".join(lines))
    return tmp_path


def test_samples_are_frames_and_tokens_behind_the_prefix(speech, folder):
    tokenizer = str(folder / "tokenizer.json")
    reads = DataConfig(
        kind="speech", targets="tokens", standardize=False, path=str(speech), tokenizer=tokenizer
    )
    reads = replace(reads, cache=str(speech / ".cache"), max_seconds=2.0, augment=False)
    facts = prepare_data(reads)
    assert facts.splits["test"].left_out == {"longer than data.max_seconds=2": 2}
    assert facts.splits["train"].samples == 4
    dataset, spelled = open_split(reads, "test"), Tokenizer.load(tokenizer)
    batch = dataset.collate([dataset.sample(0, None), dataset.sample(1, None)])
    ids = spelled.encode(" " + dataset.target_text(0))
    assert batch["tokens"][0, : 2 + len(ids)].tolist() == [0, SILENT, *ids]
    assert batch["targets"][0, : 2 + len(ids)].tolist() == [IGNORED, *ids, 0]
    # Beyond the end of a recording its last analysis windows hear it; zeros behind are filled.
    assert batch["source"].shape == (2, 102, 80)
    assert batch["source_valid"].sum(1).tolist() == [26, 51]
    assert batch["source"][0, 52:].any() == 0
    filled_BFM = fill_with_silence(
        torch.from_numpy(batch["source"]), torch.from_numpy(batch["source_valid"]), MODEL
    )
    extractor = WhisperFeatureExtractor(chunk_length=2)
    for ours_FM, name in zip(filled_BFM, ("0", "1"), strict=True):
        heard_N = soundfile.read(speech / f"audio/{name}.wav", dtype="float32")[0]
        theirs = extractor(heard_N, sampling_rate=RATE, return_tensors="pt").input_features[0].T
        torch.testing.assert_close(ours_FM, theirs, rtol=0, atol=1e-3)  # float16 at rest
    with pytest.raises(DataError, match=r"4 longer than data\.seq_len=5"):
        prepare_data(replace(reads, seq_len=5))


def test_a_choice_of_languages_is_refused(folder, tmp_path):
    for name in ("tokenizer.json", "generation_config.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    path = tmp_path / "generation_config.json"
    values = json.loads(path.read_text()) | {"is_multilingual": True}
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"set data\.target_prefix to the tokens"):
        prefix_ids(DataConfig(), Tokenizer.load(tmp_path / "tokenizer.json"))
    path.write_text(json.dumps(values | {"forced_decoder_ids": [[1, 5], [2, 6]]}))
    assert prefix_ids(DataConfig(), Tokenizer.load(tmp_path / "tokenizer.json")) == [5, 6]


def test_windows_are_joined_where_they_agree():
    assert join_overlap([1, 2, 3, 4, 5, 9], [8, 4, 5, 6, 7]) == [1, 2, 3, 4, 5, 6, 7]
    assert join_overlap([1, 2, 3], [4, 5, 6]) == [1, 2, 3, 4, 5, 6]
    assert join_overlap([1, 2, 3, 4, 5], [3, 4, 5, 6, 7]) == [1, 2, 3, 4, 5, 6, 7]
    assert join_overlap([1, 2, 3, 4, 9], [3, 4, 5, 6]) == [1, 2, 3, 4, 5, 6]
    assert join_overlap([], [1, 2]) == [1, 2] and join_overlap([1], []) == [1]


class Hearing:
    """A decoder that hears one word in each half second of a recording, numbered in order."""

    def __init__(self):
        self.tokenizer, self.windows = self, 0

    def decode(self, worker, frames_BFM=None, max_tokens=0):
        if frames_BFM is None:  # of the tokenizer
            return str(worker)
        self.windows += 1
        first = 2 * (self.windows - 1)  # windows begin a second apart
        return [list(range(first, first + frames_BFM.shape[1] // 50))]


def test_long_recordings_are_read_in_windows():
    data, hearing = (
        replace(DATA, max_seconds=2.0),
        Hearing(),
    )
    said = transcribe_recording(None, hearing, make_tone(4.5), data, 12)
    assert said == str(list(range(9))) and hearing.windows == 4
    assert transcribe_recording(None, Hearing(), make_tone(2.0), data, 12) == str(list(range(4)))


def test_words_are_compared_without_case_and_punctuation():
    assert plain_words("Press “1”, don't  wait: it's 2.5!") == "press 1 don't wait it's 2.5"

"""A Whisper of random weights in a Hugging Face folder, as transformers writes it."""

import json
from pathlib import Path

import numpy as np
import torch
from reference_models import build_reference

from trainer.data.tokenizer import Tokenizer

WORDS = ["press", "one", "to", "list", "users", "two", "to", "mute", "all", "three"]
RATE, POSITIONS = 16_000, 100  # windows of two seconds
START, SILENT, BANNED, FIRST = 278, 279, 7, 220


def make_tone(seconds: float, seed: int = 0) -> np.ndarray:
    """Return a signal whose pitch changes eight times a second."""
    draw, time = np.random.default_rng(seed), np.arange(int(RATE * seconds)) / RATE
    pitch = np.repeat(draw.uniform(200, 3000, 1 + len(time) // 2000), 2000)[: len(time)]
    return (0.5 * np.sin(2 * np.pi * pitch * time)).astype(np.float32)


def write_whisper_folder(
    folder: Path, positions: int = POSITIONS, text_positions: int = 40
) -> Path:
    """Write the folder, with a tokenizer and the tokens that are never written; return it."""
    folder.mkdir()
    theirs = build_reference(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        vocab_size=280,
        num_mel_bins=80,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=positions,
        max_target_positions=text_positions,
        decoder_start_token_id=START,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.no_grad():
        theirs.model.decoder.embed_positions.weight.mul_(20)
    theirs.float().save_pretrained(folder)
    Tokenizer.train([" ".join(WORDS) * 40], 280).save(folder / "tokenizer.json")
    generation = {
        "eos_token_id": 0,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "no_timestamps_token_id": SILENT,
        "suppress_tokens": [BANNED],
        "begin_suppress_tokens": [FIRST, 0],
    }
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder

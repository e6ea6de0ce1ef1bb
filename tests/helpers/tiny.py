"""Untrained runs of each family on a little data of their own."""

import random
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from launch.cli.preflight import prepare_training
from parallel.errors import UserError
from parallel.parallel_model import ParallelModel
from parallel.runtime import Runtime
from parallel.strategy import StrategyConfig
from trainer.build import build_worker
from trainer.checkpoint.folder import checkpoint_path
from trainer.config.train import CompressConfig, DataConfig, ModelConfig, TrainConfig
from trainer.loop import open_saver, start_run
from trainer.model import Transformer
from trainer.nn.init import init_rows
from trainer.state import TrainState

TWO_RANKS = {
    "ddp 2": StrategyConfig(replicate=2),
    "fsdp 2": StrategyConfig(shard=2),
    "tensor 2": StrategyConfig(tensor=2),
    "pipeline 2": StrategyConfig(pipeline=2),
}
# A large init_std makes an untrained model's opinions differ from token to token.
LLAMA = ModelConfig(
    layers=2,
    width=16,
    heads=4,
    kv_heads=2,
    ffn_width=32,
    vocab_size=23,
    max_positions=16,
    init_std=1.2,
    dropout=0.2,
)
GPT = ModelConfig(
    layers=2,
    width=16,
    heads=4,
    ffn_width=32,
    vocab_size=23,
    max_positions=16,
    init_std=1.2,
    norm="layernorm",
    activation="gelu_tanh",
    positions="learned",
    bias=True,
)
TRANSLATOR = ModelConfig(
    family="encoder_decoder",
    layers=2,
    encoder_layers=1,
    width=16,
    heads=4,
    kv_heads=2,
    ffn_width=32,
    vocab_size=23,
    max_positions=16,
    init_std=0.5,
    dropout=0.2,
)
CLASSIFIER = ModelConfig(
    family="encoder",
    layers=2,
    width=16,
    heads=4,
    ffn_width=32,
    norm="layernorm",
    bias=True,
    activation="gelu",
    positions="learned",
    patch_size=4,
    init_std=0.5,
)
LISTENER = ModelConfig(
    family="encoder",
    inputs="audio",
    outputs="ctc",
    layers=2,
    width=16,
    heads=4,
    ffn_width=32,
    tied=False,
    init_std=0.5,
    dropout=0.2,
)


def make_worker(
    runtime: Runtime,
    model: ModelConfig,
    strategy: StrategyConfig | None = None,
    seed: int = 0,
    compress: CompressConfig | None = None,
) -> ParallelModel:
    """The model in float64, so that layouts agree in every token."""
    config = TrainConfig(
        model=model,
        strategy=strategy or StrategyConfig(),
        precision="fp64",
        seed=seed,
        compress=compress or CompressConfig(),
    )
    return build_worker(config, runtime)


def each(runtime: Runtime, function: Callable, calls: Iterable[tuple]) -> list:
    """Results of several calls in one process group, which takes longer to make than most calls."""
    return [function(runtime, *call) for call in calls]


def make_run(folder: Path, runtime: Runtime, model: ModelConfig, data: DataConfig) -> TrainConfig:
    """A run with one checkpoint, of initial weights, in folder/run."""
    config = TrainConfig(
        model=model,
        data=data,
        precision="fp64",
        device="cpu",
        batch_size=4,
        run_dir=str(folder / "run"),
    )
    config = prepare_training(config, runtime.world_size)
    save(config, start_run(config, runtime))
    return config


def save(config: TrainConfig, state: TrainState, eval_loss: float | None = None) -> Path:
    """Save a state as a run does; where it is now."""
    with open_saver(config, state) as saver:
        saver.save(state, eval_loss)
    return checkpoint_path(config.run_dir, state.step)


def text_data(folder: Path) -> DataConfig:
    """Two short documents in each split."""
    words = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "valid", "test"):
        documents = [" ".join(_word(words) for _ in range(60)) for _ in range(2)]
        (folder / f"{split}.txt").write_text("<|endoftext|>".join(documents))
    return DataConfig(
        kind="text", path=str(folder), vocab_size=280, seq_len=16, cache=str(folder / ".cache")
    )


def speech_data(folder: Path, rate: int = 8000, suffix: str = "wav") -> DataConfig:
    """Words, of which each letter is a tone of its own; 7 recordings to evaluate on."""
    words = random.Random(0)
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    for split, count in {"train": 20, "valid": 7, "test": 7}.items():
        lines = []
        for i in range(count):
            said = " ".join(_word(words) for _ in range(1 + i % 3))
            soundfile.write(folder / "clips" / f"{split}{i}.{suffix}", sound_of(said, rate), rate)
            lines.append(f"clips/{split}{i}.{suffix}\t{said}\n")
        (folder / f"{split}.tsv").write_text("".join(lines))
    return DataConfig(
        kind="speech",
        path=str(folder),
        characters=True,
        sample_rate=8000,
        mels=8,
        cache=str(folder / ".cache"),
    )


def sound_of(said: str, rate: int) -> np.ndarray:
    """A tone of 60 ms for each character, higher for later letters; silence for a space."""
    time = np.arange(rate * 6 // 100) / rate
    tones = [0.3 * np.sin(2 * np.pi * 100 * (ord(c) - 94) * time) * (c != " ") for c in said]
    return np.concatenate(tones)


def pairs_data(folder: Path) -> DataConfig:
    """Sentences of one to five words, and themselves backwards; 7 to evaluate on."""
    words = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in {"train": 20, "valid": 7, "test": 7}.items():
        lines = []
        for i in range(count):
            sentence = [_word(words) for _ in range(1 + i % 5)]
            lines.append(f"{' '.join(sentence)}\t{' '.join(reversed(sentence))}\n")
        (folder / f"{split}.tsv").write_text("".join(lines))
    return DataConfig(
        kind="pairs", path=str(folder), vocab_size=280, seq_len=16, cache=str(folder / ".cache")
    )


def image_data(folder: Path) -> DataConfig:
    """Noise of 8 × 8 pixels in 7 classes; 11 images to evaluate on."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    arrays = {"classes": np.array([f"kind {i}" for i in range(7)])}
    for split, count in {"train": 21, "valid": 11, "test": 11}.items():
        arrays[f"x_{split}"] = draw.integers(0, 256, (count, 8, 8), dtype=np.uint8)
        arrays[f"y_{split}"] = np.arange(count) % 7
    np.savez(folder / "noise.npz", **arrays)
    return DataConfig(kind="images", path=str(folder / "noise.npz"), cache=str(folder / ".cache"))


def _word(draw: random.Random) -> str:
    return "".join(draw.choice("abcdefg") for _ in range(draw.randint(2, 5)))


def no_teacher(config: TrainConfig) -> str:
    """The one message that a run is refused with for what it would learn from."""
    with pytest.raises(UserError) as raised:
        prepare_training(config, 1)
    (message,) = raised.value.problems
    assert message.startswith(f"compress.teacher={config.compress.teacher} ")
    assert not Path(config.run_dir).exists()
    return message


def whole(tensor: Tensor) -> Tensor:
    """A copy of a parameter or moment with all that other ranks of its mesh have of it."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        # Axis by axis, outermost first: FSDP has split what the tensor axis had left.
        for axes in range(1, tensor.device_mesh.ndim + 1):
            placements = [Replicate()] * axes + list(tensor.placements[axes:])
            tensor = tensor.redistribute(placements=placements)
        tensor = tensor.to_local()
    return tensor.clone()


def build(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> Transformer:
    model = Transformer(config, dtype).to(dtype)
    for name, parameter in model.named_parameters():
        rows = init_rows(config, seed, name, parameter.shape, 0, parameter.shape[0])
        parameter.data.copy_(rows)
    return model

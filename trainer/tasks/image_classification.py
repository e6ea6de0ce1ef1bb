"""Image classification: predict the class of an image."""

import re
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from parallel.parallel_model import MicroBatch, ParallelModel
from trainer.config.loss import IGNORED
from trainer.config.train import ConfigError, GenerateConfig, ModelConfig, inputs_of, outputs_of
from trainer.data import Dataset, open_split, prepare_data
from trainer.data.image_files import decode_image
from trainer.data.images import standardize_images
from trainer.data.record import read_record
from trainer.inference.sampling import check_finite
from trainer.inference.trained_run import TrainedRun
from trainer.tasks.metrics import CrossEntropyMetrics
from trainer.tasks.task import Decoding, Task

TOP_CLASSES = 5  # classes shown for an image


class ImageClassification(Task):
    """Image classification with encoders of patches, on labelled images."""

    data_kind = "images"
    unit = "img"

    def fits(self, model: ModelConfig) -> bool:
        """Return whether the model reads patches, and gives classes."""
        return (inputs_of(model), outputs_of(model)) == ("patches", "classes")

    def build_metrics(
        self, worker: ParallelModel, dataset: Dataset, decoding: Decoding | None
    ) -> "ClassificationMetrics":
        """Return empty metrics of loss and accuracy."""
        return ClassificationMetrics(worker)

    def generate(self, config: GenerateConfig, run: TrainedRun) -> Table:
        """Return the most probable classes of the image that the prompt names.

        For an image file only the run's folder is read; a prompt such as `test:0` reads the data.
        """
        facts = read_record(run.config.run_dir) or prepare_data(run.data_config)
        names = facts.class_names
        named = re.fullmatch(r"(train|valid|test):(\d+)", config.prompt)
        table = Table("class", "probability", title=config.prompt)
        if named:
            prepare_data(run.data_config)
            dataset = open_split(run.data_config, named[1])
            if int(named[2]) >= len(dataset):
                raise ConfigError(
                    f"prompt={config.prompt}: the {named[1]} split has {len(dataset)} images; "
                    f"the last is {named[1]}:{len(dataset) - 1}"
                )
            sample = dataset.sample(int(named[2]), None)
            pixels_CHW = sample["images"]
            table.caption = f"labelled {names[int(sample['targets'])]}"
        else:
            pixels_CHW = read_image(config.prompt, facts.image_size, facts.channels)
        images_BCHW = torch.from_numpy(standardize_images(pixels_CHW[None], facts.mean, facts.std))
        with run.worker.evaluation_mode():
            logits_BV = run.worker.forward({"images": images_BCHW.to(run.worker.device)})
        check_finite(logits_BV)
        probability_V = logits_BV[0, : len(names)].float().softmax(-1)
        top = probability_V.topk(min(TOP_CLASSES, len(names)))
        for probability, index in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            table.add_row(names[index], f"{probability:.1%}")
        return table

    def random_batch(
        self, model: ModelConfig, samples: int, seq_len: int, generator: torch.Generator
    ) -> MicroBatch:
        """Return random images and classes; one of the targets is IGNORED."""
        seeds = torch.randint(0, 1 << 62, (samples,), generator=generator)
        targets = torch.randint(0, model.classes, (samples,), generator=generator)
        targets[1] = IGNORED
        size = (samples, model.channels, model.image_size, model.image_size)
        images = torch.randn(size, generator=generator, dtype=torch.float64)
        return {"images": images, "targets": targets, "seeds": seeds}


class ClassificationMetrics(CrossEntropyMetrics):
    """Loss and accuracy (0 to 1)."""

    def compute(self) -> dict[str, float]:
        """Return the metrics over all ranks."""
        loss, accuracy = self.reduce()
        return {"eval_loss": loss, "accuracy": accuracy}


def read_image(name: str, size: int, channels: int) -> NDArray[np.uint8]:
    """Read a .npy array (H,W) or (H,W,C) of uint8, or an image file, as pixels (C,H,W).

    An image file is any that Pillow reads, decoded as in training (data/image_files.py). Raises
    ConfigError if it cannot be read or has another size.
    """
    if not name:
        raise ConfigError("prompt is empty; it must be a .png or .npy file, or e.g. test:0")
    if Path(name).suffix == ".npy":
        try:
            pixels = np.asarray(np.load(name, allow_pickle=False))
        except Exception as error:  # numpy raises exceptions of any type on damaged files
            raise ConfigError(
                f"prompt={name} cannot be read as an image ({error}); it must be a .png or .npy "
                "file, or e.g. test:0"
            ) from error
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    else:
        pixels = decode_image(Path(name), channels, "prompt")
    if pixels.dtype != np.uint8 or pixels.shape != (size, size, channels):
        raise ConfigError(
            f"prompt={name} is {pixels.dtype} of shape {pixels.shape}; the model reads uint8 of "
            f"shape {(size, size, channels)} (rows, columns, channels)"
        )
    return pixels.transpose(2, 0, 1)

"""Detection: find the objects of a picture, each with a box and a class."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn
from torch import distributed as dist

from parallel.parallel_model import MicroBatch, ParallelModel
from trainer.config.loss import IGNORED, LossConfig
from trainer.config.train import ConfigError, GenerateConfig, ModelConfig, outputs_of
from trainer.data import DataFacts, Dataset, open_split, prepare_data
from trainer.data.detection.dataset import DetectionSplit
from trainer.data.detection.scene import Letterbox
from trainer.data.image_files import decode_image
from trainer.data.images import standardize_images
from trainer.data.record import read_record
from trainer.inference.sampling import check_finite
from trainer.inference.trained_run import TrainedRun, unwrap_transformer
from trainer.nn.box_logits import class_logits, side_distances
from trainer.nn.boxes import NO_BOX, patch_targets
from trainer.nn.heads import QueryHead
from trainer.tasks.detection_loss import (
    ALPHA,
    GAMMA,
    count_boxes,
    dense_divergence_sum,
    dense_loss_sum,
)
from trainer.tasks.detection_metrics import DetectionMetrics, find_boxes
from trainer.tasks.detection_pictures import draw_boxes, place_detections
from trainer.tasks.set_prediction import reference_set_loss, set_loss_sum
from trainer.tasks.task import Decoding, Task

ROWS = 5  # of a random sample
SAMPLES, SHOWN_SCORE = 6, 0.3  # pictures of a report, and the least score of a box in them


class Detection(Task):
    """Detection with encoders of patches that give boxes."""

    data_kind = "detection"
    unit = "box"
    splits_classes = False
    divergence_sum: Callable[..., Tensor] = staticmethod(dense_divergence_sum)

    def fits(self, model: ModelConfig) -> bool:
        """Return whether the model gives boxes."""
        return outputs_of(model) == "boxes"

    def build_loss(self, head: nn.Module, config: LossConfig) -> Callable[..., Tensor]:
        """Return the loss of all patches, or of all queries, as a sum."""
        if isinstance(head, QueryHead):
            loss_sum = partial(set_loss_sum, queries=head.queries, box_weight=config.box_weight)
        else:
            loss_sum = partial(dense_loss_sum, box_weight=config.box_weight)
        return lambda logits, targets, count: loss_sum(logits, targets)

    def count_valid(self, targets: Tensor) -> Tensor:
        """Return the number of boxes that are learned."""
        return count_boxes(targets)

    def reference_divergence(
        self, logits: Tensor, told: Tensor, batch: MicroBatch, temperature: float
    ) -> Tensor:
        """Return the mean divergence from the teacher over the boxes, patch by patch."""
        total, rows = logits.new_zeros(()), patch_targets(batch["targets"], _side(logits))
        patches = (rows.flatten(0, 1), logits.flatten(0, 1), told.flatten(0, 1))
        for row, ours, theirs in zip(*patches, strict=True):
            if row[0] == IGNORED:
                continue
            chances = (torch.sigmoid(class_logits(said) / temperature) for said in (ours, theirs))
            for p, q in zip(*chances, strict=True):
                nats = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
                total = total + (p - q) ** GAMMA * nats
            if row[0] >= 0:
                apart = 1 - _generalised_overlap(side_distances(ours), side_distances(theirs))
                sure = torch.sigmoid(class_logits(theirs)).max() * row[5]
                total = total + apart * sure / temperature**2
        return total / count_boxes(batch["targets"])

    def reference_loss(self, logits: Tensor, batch: MicroBatch, label_smoothing: float) -> Tensor:
        """Return the mean loss over the boxes, patch by patch in the formulas of the papers."""
        targets = batch["targets"]
        side = _side(logits)
        if side**2 != logits.shape[1]:  # the queries of `verify` are no square grid of patches
            return reference_set_loss(logits, targets) / count_boxes(targets)
        rows = patch_targets(targets, side).flatten(0, 1)
        total = logits.new_zeros(())
        for said, row in zip(logits.flatten(0, 1), rows, strict=True):
            kind = int(row[0])
            if kind == IGNORED:
                continue
            chance = torch.sigmoid(class_logits(said))
            for number, p in enumerate(chance):
                share, right = (ALPHA, p) if number == kind else (1 - ALPHA, 1 - p)
                total = total - share * (1 - right) ** GAMMA * right.log()
            if kind >= 0:
                apart = 1 - _generalised_overlap(side_distances(said), row[1:5])
                total = total + LossConfig().box_weight * row[5] * apart
        return total / count_boxes(targets)

    def build_metrics(
        self, worker: ParallelModel, dataset: Dataset, decoding: Decoding | None
    ) -> DetectionMetrics:
        """Return empty metrics of loss and average precision."""
        model = unwrap_transformer(worker).config
        weight = LossConfig().box_weight

        def loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
            if model.queries:
                return set_loss_sum(logits, targets, model.queries, weight)
            side = model.image_size // model.patch_size
            return dense_loss_sum(logits, patch_targets(targets, side), weight)

        return DetectionMetrics(worker, dataset, model.queries, loss_sum)

    def generate(self, config: GenerateConfig, run: TrainedRun) -> Table:
        """Return the objects found in the picture that the prompt names, and write them into it.

        For a picture file only the run's folder is read; a prompt such as `test:0` reads the data.
        """
        facts = read_record(run.config.run_dir) or prepare_data(run.data_config)
        pixels_HWC, letterbox, square_HWC = _prompted_picture(config.prompt, run, facts)
        images_BCHW = standardize_images(square_HWC.transpose(2, 0, 1)[None], facts.mean, facts.std)
        inputs = {"images": torch.from_numpy(images_BCHW).to(run.worker.device)}
        with run.worker.evaluation_mode():
            logits_BPV = run.worker.forward(inputs)
        check_finite(logits_BPV)
        (found,) = find_boxes(logits_BPV, len(facts.class_names), run.config.model.queries)
        shown = place_detections(found, letterbox, facts.class_names, config.min_score)
        table = Table("class", "score", "left", "top", "width", "height", title=config.prompt)
        for box in shown:
            sides = (box.left, box.top, box.right - box.left, box.bottom - box.top)
            table.add_row(box.name, f"{box.score:.2f}", *(f"{side:.0f}" for side in sides))
        if dist.get_rank() == 0:
            name = re.sub(r"[^\w.-]+", "-", Path(config.prompt).stem or config.prompt)
            path = Path(run.config.run_dir) / f"{name}-boxes.png"
            path.write_bytes(draw_boxes(pixels_HWC, shown, facts.class_names))
            table.caption = f"drawn into {path}"
        return table

    def sample_pictures(
        self, worker: ParallelModel, open_split: Callable[[str], Dataset]
    ) -> dict[str, bytes]:
        """Return pictures of the valid split with what is found in them, and the true boxes."""
        dataset = open_split("valid")
        assert isinstance(dataset, DetectionSplit)
        drawn, queries = {}, unwrap_transformer(worker).config.queries
        for index in range(0, len(dataset), -(-len(dataset) // SAMPLES)):
            pixels_HWC, truth = dataset.picture(index, None)
            batch = dataset.collate([dataset.sample(index, None)])
            with worker.evaluation_mode():
                logits_BPV = worker.forward(
                    {"images": torch.from_numpy(batch["images"]).to(worker.device)}
                )
            check_finite(logits_BPV)
            (found,) = find_boxes(logits_BPV, len(dataset.class_names), queries)
            size = len(pixels_HWC)
            square = Letterbox(size, size, size)
            shown = place_detections(found, square, dataset.class_names, SHOWN_SCORE)
            drawn[f"valid-{index}.png"] = draw_boxes(pixels_HWC, shown, dataset.class_names, truth)
        return drawn

    def random_batch(
        self, model: ModelConfig, samples: int, seq_len: int, generator: torch.Generator
    ) -> MicroBatch:
        """Return random pictures with unequal numbers of boxes, one crowd; one has no targets."""
        seeds = torch.randint(0, 1 << 62, (samples,), generator=generator)
        size = (samples, model.channels, model.image_size, model.image_size)
        images = torch.randn(size, generator=generator, dtype=torch.float64)
        corners = torch.rand((samples, ROWS, 2, 2), generator=generator, dtype=torch.float64)
        kinds = torch.randint(0, model.classes, (samples, ROWS, 1), generator=generator)
        counts = torch.randint(0, ROWS + 1, (samples, 1, 1), generator=generator)
        kinds = torch.where(torch.arange(ROWS)[:, None] < counts, kinds.double(), NO_BOX)
        crowd = (torch.rand(kinds.shape, generator=generator) < 0.2).double()
        boxes = torch.cat((corners.amin(2), corners.amax(2)), -1)
        targets = torch.cat((kinds, boxes, crowd), -1)
        targets[0, 0] = torch.tensor([1.0, 0.1, 0.2, 0.7, 0.6, 0.0])  # one box at least
        targets[1] = IGNORED
        return {"images": images, "targets": targets, "seeds": seeds}


def _side(logits: Tensor) -> int:
    """Return the patches of a picture's side."""
    return round(float(logits.shape[1] ** 0.5))


def _prompted_picture(
    prompt: str, run: TrainedRun, facts: DataFacts
) -> tuple[np.ndarray, Letterbox, np.ndarray]:
    """Return the pixels of a picture, how it lies in its square, and the pixels of the square."""
    named = re.fullmatch(r"(train|valid|test):(\d+)", prompt)
    if not named:
        if not prompt:
            raise ConfigError("prompt is empty; it must be a picture file, or e.g. test:0")
        pixels_HWC = decode_image(Path(prompt), facts.channels, "prompt")
        letterbox = Letterbox(pixels_HWC.shape[1], pixels_HWC.shape[0], facts.image_size)
        return pixels_HWC, letterbox, letterbox.fit_pixels(pixels_HWC)
    prepare_data(run.data_config)
    dataset = open_split(run.data_config, named[1])
    assert isinstance(dataset, DetectionSplit)
    if int(named[2]) >= len(dataset):
        raise ConfigError(
            f"prompt={prompt}: the {named[1]} split has {len(dataset)} pictures; the last is "
            f"{named[1]}:{len(dataset) - 1}"
        )
    square_HWC = dataset.picture(int(named[2]), None)[0]
    size = facts.image_size
    return square_HWC, Letterbox(size, size, size), square_HWC


def _generalised_overlap(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return that of two boxes by their distances to the sides, as in arXiv 1902.09630."""
    least, most = torch.minimum(ours, theirs), torch.maximum(ours, theirs)
    shared = (least[0] + least[2]).clamp(min=0) * (least[1] + least[3]).clamp(min=0)
    areas = [(box[0] + box[2]) * (box[1] + box[3]) for box in (ours, theirs)]
    widest, highest = most[0] + most[2], most[1] + most[3]
    union = areas[0] + areas[1] - shared
    return shared / union - (widest * highest - union) / (widest * highest)

"""A split of pictures with boxes, as a model learns from it."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.cache import Record
from trainer.data.dataset import Dataset, Sample
from trainer.data.detection.augment import Augmentation
from trainer.data.detection.canvas import SCENES, Canvas
from trainer.data.detection.scene import Boxes, Letterbox, make_boxes
from trainer.data.images import standardize_images
from trainer.data.sampler import hash_to_seed

NO_BOX = -1.0  # class of the rows behind a sample's last box


class DetectionSplit(Dataset):
    """Square pictures with their boxes."""

    def __init__(self, record: Record):
        self.class_names: tuple[str, ...] = tuple(record["class_names"])
        self._mean, self._std = record["mean"], record["std"]

    @abstractmethod
    def picture(self, index: int, seed: int | None) -> tuple[np.ndarray, Boxes]:
        """Return a square picture (H,W,C) uint8 and its boxes in it; `seed` as in `sample`."""

    @abstractmethod
    def letterbox(self, index: int) -> Letterbox:
        """Return how the picture lies in its square."""

    @abstractmethod
    def truth(self, index: int) -> Boxes:
        """Return the boxes in pixels of the picture as it is, not of the square."""

    def sample(self, index: int, seed: int | None) -> Sample:
        """Return images (C,H,W) uint8 and targets (N,6): class, corners in sides, crowd."""
        pixels_HWC, boxes = self.picture(index, seed)
        targets_N6 = np.full((max(1, len(boxes)), 6), NO_BOX, np.float32)
        targets_N6[: len(boxes), 0] = boxes.classes_N
        targets_N6[: len(boxes), 1:5] = boxes.corners_N4 / len(pixels_HWC)
        targets_N6[: len(boxes), 5] = boxes.crowd_N
        return {"images": pixels_HWC.transpose(2, 0, 1), "targets": targets_N6}

    def collate(self, samples: Sequence[Sample]) -> Sample:
        """Return images (B,C,H,W) float32, standardized, and targets (B,N,6) with rows behind."""
        most = max(len(sample["targets"]) for sample in samples)
        targets_BN6 = np.full((len(samples), most, 6), NO_BOX, np.float32)
        for row, sample in enumerate(samples):
            targets_BN6[row, : len(sample["targets"])] = sample["targets"]
        images_BCHW = np.stack([sample["images"] for sample in samples])
        return {
            "images": standardize_images(images_BCHW, self._mean, self._std),
            "targets": targets_BN6,
        }


class CanvasSplit(DetectionSplit):
    """Scenes drawn as they are asked for."""

    def __init__(self, canvas: Canvas, split: str, record: Record, redraws: bool):
        super().__init__(record)
        self._canvas, self._split, self._redraws = canvas, split, redraws

    def __len__(self) -> int:
        return SCENES[self._split]

    def picture(self, index: int, seed: int | None) -> tuple[np.ndarray, Boxes]:
        """Return a scene; of training, a new one in every epoch."""
        new = seed is not None and self._redraws
        return self._canvas.draw_scene(seed if new and seed is not None else 0, index, mirrors=new)

    def letterbox(self, index: int) -> Letterbox:
        """Return the canvas, which is a square."""
        return Letterbox(self._canvas.size, self._canvas.size, self._canvas.size)

    def truth(self, index: int) -> Boxes:
        """Return the boxes of the scene that is evaluated."""
        return self.picture(index, None)[1]


@dataclass(frozen=True)
class StoredPicture:
    """A picture's size and boxes in a prepared folder."""

    letterbox: Letterbox
    boxes: Boxes  # in pixels of the picture as it is

    def with_classes(self, rows: np.ndarray) -> "StoredPicture":
        """Return the picture with the class rows[i] in place of class i."""
        return replace(self, boxes=replace(self.boxes, classes_N=rows[self.boxes.classes_N]))

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        boxes = {name: values.tolist() for name, values in vars(self.boxes).items()}
        return {"width": self.letterbox.width, "height": self.letterbox.height, **boxes}

    @classmethod
    def from_json(cls, values: dict[str, Any], size: int) -> "StoredPicture":
        """Return the picture that `to_json` wrote, in a square of `size`."""
        columns = ("corners_N4", "classes_N", "crowd_N", "areas_N")
        boxes = make_boxes(*(values[name] for name in columns))
        return cls(Letterbox(values["width"], values["height"], size), boxes)


class StoredSplit(DetectionSplit):
    """Pictures that are fitted into squares once, when the data are prepared."""

    def __init__(
        self,
        pixels: Path,
        pictures: Sequence[StoredPicture],
        record: Record,
        augmentation: Augmentation | None,
    ):
        super().__init__(record)
        self._pixels_NHWC = np.load(pixels, mmap_mode="r")
        self._pictures, self._augmentation = pictures, augmentation

    def __len__(self) -> int:
        return len(self._pictures)

    def picture(self, index: int, seed: int | None) -> tuple[np.ndarray, Boxes]:
        """Return a square picture; in training it is flipped, shifted and scaled at random."""
        stored = self._pictures[index]
        pixels_HWC = np.asarray(self._pixels_NHWC[index])
        boxes = stored.letterbox.fit_boxes(stored.boxes)
        if seed is None or self._augmentation is None:
            return pixels_HWC, boxes
        return self._augmentation.apply(pixels_HWC, boxes, hash_to_seed(seed, index))

    def letterbox(self, index: int) -> Letterbox:
        """Return how the picture lies in its square."""
        return self._pictures[index].letterbox

    def truth(self, index: int) -> Boxes:
        """Return the picture's own boxes."""
        return self._pictures[index].boxes

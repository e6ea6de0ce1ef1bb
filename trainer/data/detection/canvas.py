"""Scenes of labelled items on a black canvas: pictures with boxes made of an archive of images.

A scene is a function of a seed and its index. The items of a split stand in scenes of that split
only; in training every epoch has new scenes, unless data.augment is off.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from trainer.data.detection.scene import Boxes, make_boxes
from trainer.data.image_files import ImageTable
from trainer.data.sampler import hash_to_seed, uniform_draws

SCENES = {"train": 3000, "valid": 200, "test": 400}  # of an epoch
MOST_ITEMS = 5
SMALLEST, LARGEST = 0.7, 1.6  # scale of an item
BRIGHT = 25  # pixels above it belong to the item
MOST_OVERLAP = 0.25  # of the smaller of two boxes
TRIES = 8  # places tried for an item; it is left out if all overlap too much


@dataclass(frozen=True)
class Canvas:
    """The scenes of a split, of `size` pixels a side."""

    table: ImageTable
    size: int

    def draw_scene(self, seed: int, index: int, mirrors: bool) -> tuple[np.ndarray, Boxes]:
        """Return the pixels (H,W,C) uint8 of a scene, and its boxes."""
        draws = uniform_draws(hash_to_seed(seed, index), 1 + MOST_ITEMS * (3 + 2 * TRIES))
        pixels_HWC = np.zeros((self.size, self.size, self.table.shape[2]), np.uint8)
        corners: list[list[float]] = []
        classes = []
        for own in draws[1:].reshape(MOST_ITEMS, -1)[: 1 + int(draws[0] * MOST_ITEMS)]:
            row = int(own[0] * len(self.table.labels))
            item = self._draw_item(row, own[1], mirrors and own[2] < 0.5)
            for place in own[3:].reshape(TRIES, 2):
                free = self.size + 1 - np.array([item.shape[1], item.shape[0]])
                left, top = (place * free).astype(int).tolist()
                box = [left, top, left + item.shape[1], top + item.shape[0]]
                if all(_overlap(box, other) < MOST_OVERLAP for other in corners):
                    corners.append(box)
                    classes.append(int(self.table.labels[row]))
                    part = pixels_HWC[top : box[3], left : box[2]]
                    np.maximum(part, item, out=part)
                    break
        areas = [(right - left) * (bottom - top) for left, top, right, bottom in corners]
        return pixels_HWC, make_boxes(corners, classes, [False] * len(classes), areas)

    def _draw_item(self, row: int, draw: float, mirrored: bool) -> np.ndarray:
        """Return an item scaled at random and cut to its bright pixels."""
        pixels_HWC = self.table.read_image(row)
        pixels_HWC = pixels_HWC[:, ::-1] if mirrored else pixels_HWC
        scale = SMALLEST + draw * (LARGEST - SMALLEST)
        height, width, channels = pixels_HWC.shape
        sides = [min(self.size, max(1, round(side * scale))) for side in (width, height)]
        plain = np.ascontiguousarray(pixels_HWC[:, :, 0] if channels == 1 else pixels_HWC)
        image = Image.fromarray(plain).resize((sides[0], sides[1]), Image.Resampling.BILINEAR)
        scaled_HWC = np.asarray(image).reshape(sides[1], sides[0], channels)
        bright_HW = scaled_HWC.max(2) > BRIGHT
        if not bright_HW.any():
            return scaled_HWC
        rows, columns = (np.flatnonzero(bright_HW.any(axis)) for axis in (1, 0))
        return scaled_HWC[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _overlap(ours: list[float], theirs: list[float]) -> float:
    """Return the shared area as a fraction of the smaller box."""
    across = min(ours[2], theirs[2]) - max(ours[0], theirs[0])
    down = min(ours[3], theirs[3]) - max(ours[1], theirs[1])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (ours, theirs)]
    return max(across, 0) * max(down, 0) / min(areas)

"""Flips, quarter turns, shifts and scales of a picture with its boxes, chosen by a seed."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from trainer.data.detection.scene import FILL, LEAST_SHOWN, Boxes
from trainer.data.sampler import uniform_draws

# What data.flips lets happen: (mirrored, upside down, columns for rows).
MIRRORED, TURNED, SWAPPED = {"horizontal", "both", "turns"}, {"both", "turns"}, {"turns"}


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a training sample; see data.flips, data.zoom and data.shift."""

    flips: str
    zoom: float
    shift: float

    def apply(self, pixels_HWC: np.ndarray, boxes: Boxes, seed: int) -> tuple[np.ndarray, Boxes]:
        """Return the changed square picture and its boxes, a function of the seed."""
        draws = uniform_draws(seed, 6)
        pixels_HWC, boxes = self._flip(pixels_HWC, boxes, draws[:3] < 0.5)
        size = len(pixels_HWC)
        scale = float((1 + self.zoom) ** (2 * draws[3] - 1))
        # About the middle, then by a share of the side.
        moved = (draws[4:] * 2 - 1) * self.shift * size + (1 - scale) * size / 2
        pixels_HWC = _zoom_pixels(pixels_HWC, scale, moved)
        return pixels_HWC, boxes.moved(scale, moved).clipped(size, size, LEAST_SHOWN)

    def _flip(
        self, pixels_HWC: np.ndarray, boxes: Boxes, chosen: np.ndarray
    ) -> tuple[np.ndarray, Boxes]:
        size = len(pixels_HWC)
        corners = boxes.corners_N4
        if chosen[0] and self.flips in MIRRORED:
            pixels_HWC = pixels_HWC[:, ::-1]
            corners = np.stack(
                (size - corners[:, 2], corners[:, 1], size - corners[:, 0], corners[:, 3]), 1
            )
        if chosen[1] and self.flips in TURNED:
            pixels_HWC = pixels_HWC[::-1]
            corners = np.stack(
                (corners[:, 0], size - corners[:, 3], corners[:, 2], size - corners[:, 1]), 1
            )
        if chosen[2] and self.flips in SWAPPED:
            pixels_HWC, corners = pixels_HWC.transpose(1, 0, 2), corners[:, [1, 0, 3, 2]]
        return pixels_HWC, Boxes(corners, boxes.classes_N, boxes.crowd_N, boxes.areas_N)


def _zoom_pixels(pixels_HWC: np.ndarray, scale: float, moved: np.ndarray) -> np.ndarray:
    """Return the picture scaled about its corner, then moved by (x, y) pixels."""
    if scale == 1.0 and not moved.any():
        return pixels_HWC
    size, channels = len(pixels_HWC), pixels_HWC.shape[2]
    plain = np.ascontiguousarray(pixels_HWC[:, :, 0] if channels == 1 else pixels_HWC)
    # Pillow asks where each pixel of the result comes from.
    backward = (1 / scale, 0, -moved[0] / scale, 0, 1 / scale, -moved[1] / scale)
    image = Image.fromarray(plain).transform(
        (size, size),
        Image.Transform.AFFINE,
        backward,
        Image.Resampling.BILINEAR,
        fillcolor=FILL if channels == 1 else (FILL,) * 3,
    )
    return np.asarray(image).reshape(size, size, channels)

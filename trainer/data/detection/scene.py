"""Boxes of a picture, and the square that the picture is fitted into.

N boxes of a picture · H rows · W columns · C channels of pixels
"""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

FILL = 114  # grey level beside a picture in its square, as in YOLO's letterbox
LEAST_SHOWN = 0.4  # of a box's area: what a training sample must show of it


@dataclass(frozen=True)
class Boxes:
    """The boxes of a picture: corners (left, top, right, bottom) in pixels."""

    corners_N4: np.ndarray  # float32
    classes_N: np.ndarray  # int64
    crowd_N: np.ndarray  # bool: a region of many objects, neither learned nor counted as missed
    areas_N: np.ndarray  # float32, of the objects, by which COCO calls them small or large

    def __len__(self) -> int:
        return len(self.classes_N)

    def select(self, rows: np.ndarray) -> "Boxes":
        """Return the boxes of these rows."""
        return Boxes(*(values[rows] for values in vars(self).values()))

    def moved(self, scale: np.ndarray | float, shift: np.ndarray) -> "Boxes":
        """Return the boxes of the picture scaled about its corner, then shifted by (x, y)."""
        two_by_two = self.corners_N4.reshape(-1, 2, 2) * scale + shift
        corners_N4 = two_by_two.reshape(-1, 4).astype(np.float32)
        return replace(self, corners_N4=corners_N4)

    def clipped(self, width: float, height: float, least_shown: float = 0.0) -> "Boxes":
        """Return the parts of the boxes inside the picture; those that show less are left out."""
        low, high = np.zeros(4, np.float32), np.array([width, height] * 2, np.float32)
        inside = replace(self, corners_N4=np.clip(self.corners_N4, low, high))
        shown, whole = (
            np.prod(np.maximum(boxes.corners_N4[:, 2:] - boxes.corners_N4[:, :2], 0), axis=1)
            for boxes in (inside, self)
        )
        return inside.select((shown > 0) & (shown >= least_shown * whole))


def make_boxes(
    corners: list[list[float]], classes: list[int], crowd: list[bool], areas: list[float]
) -> Boxes:
    """Build the boxes of a picture; there may be none."""
    return Boxes(
        np.array(corners, np.float32).reshape(-1, 4),
        np.array(classes, np.int64),
        np.array(crowd, bool),
        np.array(areas, np.float32),
    )


@dataclass(frozen=True)
class Letterbox:
    """A picture of width × height, scaled into the middle of a square of `size` pixels a side."""

    width: int
    height: int
    size: int

    @property
    def scale(self) -> float:
        """Return the pixels of the square for one of the picture."""
        return self.size / max(self.width, self.height)

    @property
    def inner(self) -> tuple[int, int]:
        """Return the width and height of the picture in its square."""
        return (max(1, round(self.width * self.scale)), max(1, round(self.height * self.scale)))

    @property
    def shift(self) -> np.ndarray:
        """Return the place (x, y) of the picture's corner in the square."""
        return np.array([(self.size - side) // 2 for side in self.inner], np.float32)

    def fit_pixels(self, pixels_HWC: np.ndarray) -> np.ndarray:
        """Return the square with the picture in its middle, (size, size, C) uint8."""
        channels = pixels_HWC.shape[2]
        image = Image.fromarray(pixels_HWC[:, :, 0] if channels == 1 else pixels_HWC)
        small = np.asarray(image.resize(self.inner, Image.Resampling.BILINEAR, reducing_gap=2.0))
        square = np.full((self.size, self.size, channels), FILL, np.uint8)
        (left, top), (width, height) = self.shift.astype(int), self.inner
        square[top : top + height, left : left + width] = small.reshape(height, width, channels)
        return square

    def fit_boxes(self, boxes: Boxes) -> Boxes:
        """Return the picture's boxes in pixels of the square."""
        return boxes.moved(self._scales, self.shift)

    def restore_corners(self, corners_N4: np.ndarray) -> np.ndarray:
        """Return corners in sides of the square as pixels of the picture, clipped to it."""
        places = corners_N4.reshape(-1, 2, 2) * self.size - self.shift
        most = np.array([self.width, self.height])
        return np.clip(places / self._scales, 0, most).reshape(-1, 4)

    @property
    def _scales(self) -> np.ndarray:
        return np.array(self.inner) / np.array([self.width, self.height])

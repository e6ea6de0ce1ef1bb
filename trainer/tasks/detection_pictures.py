"""Pictures with the boxes that were found in them."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from trainer.data.detection.scene import Boxes, Letterbox
from trainer.nn.boxes import Detections

LEAST_SIDE = 480  # pixels: smaller pictures are enlarged
# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#ffffff")
TRUTH = "#9a9a9a"  # colour of true boxes


@dataclass(frozen=True)
class ShownBox:
    """An object found in a picture, in its pixels."""

    name: str
    score: float
    left: float
    top: float
    right: float
    bottom: float


def place_detections(
    found: Detections, letterbox: Letterbox, class_names: Sequence[str], least_score: float
) -> list[ShownBox]:
    """Return the detections of at least this score in the picture's own pixels, the best first."""
    corners_N4 = letterbox.restore_corners(found.boxes_N4.double().cpu().numpy())
    rows = zip(found.classes_N.tolist(), found.scores_N.tolist(), corners_N4.tolist(), strict=True)
    return [
        ShownBox(class_names[number], score, *corners)
        for number, score, corners in rows
        if score >= least_score
    ]


def draw_boxes(
    pixels_HWC: np.ndarray,
    shown: Sequence[ShownBox],
    class_names: Sequence[str],
    truth: Boxes | None = None,
) -> bytes:
    """Return the picture as a PNG file, with each box, its class and score; true boxes in grey."""
    plain = np.ascontiguousarray(pixels_HWC[:, :, 0] if pixels_HWC.shape[2] == 1 else pixels_HWC)
    image = Image.fromarray(plain).convert("RGB")
    factor = max(1, -(-LEAST_SIDE // max(image.size)))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    canvas = ImageDraw.Draw(image)
    pen = max(2, max(image.size) // 300)
    font = ImageFont.load_default(max(12, max(image.size) // 40))
    for corners in [] if truth is None else truth.corners_N4.tolist():
        canvas.rectangle([side * factor for side in corners], outline=TRUTH, width=pen)
    for box in reversed(shown):  # the best on top
        colour = COLOURS[class_names.index(box.name) % len(COLOURS)]
        corners = [side * factor for side in (box.left, box.top, box.right, box.bottom)]
        canvas.rectangle(corners, outline=colour, width=pen)
        label = f"{box.name} {box.score:.2f}"
        _, _, right, bottom = canvas.textbbox((0, 0), label, font=font)
        across = min(max(0.0, corners[0]), max(0.0, image.width - right - 4))
        down = max(0.0, corners[1] - bottom - 4)
        canvas.rectangle([across, down, across + right + 4, down + bottom + 4], fill=colour)
        canvas.text((across + 2, down + 1), label, fill="black", font=font)
    content = BytesIO()
    image.save(content, "PNG")
    return content.getvalue()

"""Small pictures with boxes, written in the formats that people have."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from trainer.config.train import DataConfig

SIZE = (40, 20)  # width and height
CLASSES = {7: "dot", 30: "bar"}  # category ids need not be 0, 1, …


def write_picture(path: Path, seed: int = 0, size: tuple[int, int] = SIZE) -> None:
    """Noise of this width and height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def write_coco(folder: Path, counts: dict[str, int], **changes) -> None:
    """Pictures of each split with two boxes each; `changes` replace keys of an annotation."""
    for number, (split, count) in enumerate(counts.items()):
        images, annotations = [], []
        for i in range(count):
            name = f"images/{split}-{i}.png"
            write_picture(folder / name, 100 * number + i)
            images.append({"id": 5 * i, "file_name": name, "width": SIZE[0], "height": SIZE[1]})
            for row, category in enumerate(CLASSES):
                box = {"bbox": [4 + 10 * row, 2, 8, 10], "category_id": category, "image_id": 5 * i}
                annotations.append({"id": len(annotations), **box, **changes})
        categories = [{"id": key, "name": name} for key, name in CLASSES.items()]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"{split}.json").write_text(json.dumps(content))


def boxed_data(folder: Path, **keys) -> DataConfig:
    """The data section that reads a folder."""
    defaults = {"image_size": 16, "cache": str(folder.parent / "cache"), "held_out": 0.5}
    return DataConfig(kind="detection", path=str(folder), **(defaults | keys))

"""Folders of pictures with boxes, as COCO, Pascal VOC and YOLO write them."""

import json
from dataclasses import dataclass
from io import BytesIO
from random import Random
from typing import Any

import numpy as np
from drafts import ROOT, Draft
from judge import Boxed
from PIL import Image

CLASSES = ("dot", "bar", "ring")
COUNTS = {"train": 5, "valid": 2, "test": 2}
WIDTH, HEIGHT = 16, 8
FORMATS = ("coco", "voc", "yolo")


@dataclass
class Picture:
    """A picture, its boxes (class, left, top, right, bottom) and what annotations say of it."""

    split: str
    name: str
    pixels: np.ndarray
    boxes: list[tuple[int, float, float, float, float]]


def begin(rng: Random) -> Draft:
    """Return pictures of three splits with boxes, of a format by chance."""
    draft = Draft("detection", rng, Boxed({}))
    draft.settings |= {"image_size": 16, "held_out": 0.4}
    pictures = []
    for split, count in COUNTS.items():
        for number in range(count):
            seed = rng.randrange(1 << 30)
            pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH), np.uint8)
            boxes = []
            for kind in range(1 + number % 3):
                left, top = rng.randrange(8), rng.randrange(4)
                size = rng.randint(2, 8), rng.randint(2, 4)
                boxes.append((kind, left, top, left + size[0], top + size[1]))
            pictures.append(Picture(split, f"{split}-{number}.png", pixels, boxes))
    pictures[0].boxes = [(kind, 2 * kind, 1, 2 * kind + 4, 5) for kind in range(3)]
    draft.traits |= {"pictures": pictures, "format": rng.choice(FORMATS), "finish": written}
    return draft


def written(draft: Draft) -> bool:
    """Write pictures and annotations down, if that is not done; return that it is."""
    pictures: list[Picture] | None = draft.traits.pop("pictures", None)
    if pictures is None:
        return True
    draft.traits.pop("finish", None)
    draft.clean = Boxed({})
    kind = draft.traits["format"]
    for picture in pictures:
        boxes = [(CLASSES[k], *map(float, corners), False) for k, *corners in picture.boxes]
        draft.clean.splits.setdefault(picture.split, []).append((picture.pixels.tobytes(), boxes))
        folder = {"coco": "images", "yolo": f"images/{picture.split}"}.get(kind, picture.split)
        file = BytesIO()
        Image.fromarray(picture.pixels).save(file, "PNG")
        draft.files[f"{ROOT}/{folder}/{picture.name}"] = file.getvalue()
    WRITERS[kind](draft, pictures)
    return True


def write_coco(draft: Draft, pictures: list[Picture]) -> None:
    """Write a json file for each split."""
    for split in dict.fromkeys(picture.split for picture in pictures):
        content: dict[str, Any] = {"images": [], "annotations": []}
        content["categories"] = [{"id": 3 * i + 1, "name": n} for i, n in enumerate(CLASSES)]
        for number, picture in enumerate(p for p in pictures if p.split == split):
            size = {"width": WIDTH, "height": HEIGHT}
            content["images"].append({"id": number, "file_name": picture.name, **size})
            for kind, left, top, right, bottom in picture.boxes:
                place = len(content["annotations"])
                box = {"bbox": [left, top, right - left, bottom - top], "iscrowd": 0}
                box |= {"id": place, "image_id": number, "category_id": 3 * kind + 1}
                content["annotations"].append(box)
        draft.files[f"{ROOT}/{split}.json"] = json.dumps(content).encode()


def write_voc(draft: Draft, pictures: list[Picture]) -> None:
    """Write an XML file for each picture."""
    for picture in pictures:
        objects = "\n".join(
            f"<object><name>{CLASSES[kind]}</name><difficult>0</difficult><bndbox><xmin>{left + 1}"
            f"</xmin><ymin>{top + 1}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox>"
            "</object>"
            for kind, left, top, right, bottom in picture.boxes
        )
        text = (
            f"<annotation>\n<filename>{picture.name}</filename><size><width>{WIDTH}</width>"
            f"<height>{HEIGHT}</height><depth>1</depth></size>\n{objects}</annotation>"
        )
        draft.files[f"{ROOT}/{picture.split}/{picture.name[:-4]}.xml"] = text.encode()


def write_yolo(draft: Draft, pictures: list[Picture]) -> None:
    """Write a text file for each picture, and the names."""
    for picture in pictures:
        lines = [
            f"{kind} {(left + right) / 2 / WIDTH:.6f} {(top + bottom) / 2 / HEIGHT:.6f} "
            f"{(right - left) / WIDTH:.6f} {(bottom - top) / HEIGHT:.6f}\n"
            for kind, left, top, right, bottom in picture.boxes
        ]
        place = f"{ROOT}/labels/{picture.split}/{picture.name[:-4]}.txt"
        draft.files[place] = "".join(lines).encode()
    draft.files[f"{ROOT}/data.yaml"] = f"names: [{', '.join(CLASSES)}]\n".encode()


WRITERS = {"coco": write_coco, "voc": write_voc, "yolo": write_yolo}

"""COCO's annotations: a json file for each split, with images, annotations and categories."""

import json
from collections import Counter
from typing import Any

from trainer.config.train import DataError
from trainer.data.detection.annotations import (
    AnnotatedPicture,
    Annotations,
    PictureIndex,
    folder_of,
    split_of_path,
)
from trainer.data.folders import Entry

UNNAMED = "{} categories have no name and are called after their number"
NO_PICTURE = "{} boxes are of pictures that are not listed, and left out"


def load_coco(entry: Entry) -> dict[str, Any] | None:
    """Return the content of a json file of COCO's kind, None if it is of another kind.

    Raises DataError if it is damaged.
    """
    try:
        content = json.loads(entry.path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"data.path: {entry.path} is not a json file: {error}") from error
    is_coco = isinstance(content, dict) and isinstance(content.get("images"), list)
    return content if is_coco and isinstance(content.get("annotations"), list) else None


def read_coco(files: list[tuple[Entry, dict[str, Any]]], index: PictureIndex) -> Annotations:
    """Return the annotations of these files; without a split's name a file is all of train."""
    splits: dict[str, list[AnnotatedPicture]] = {}
    sources: dict[str, tuple[str, ...]] = {}
    names: dict[str, list[str]] = {}
    counts: Counter[str] = Counter()
    alone = len(files) == 1
    for entry, content in files:
        split = split_of_path(entry.relative) or ("train" if alone else None)
        if split is None:
            raise DataError(
                f"data.path: {entry.relative} is one of {len(files)} annotation files but named "
                "after no split; rename it train.json, valid.json or test.json, or remove it"
            )
        try:
            pictures, found = _read_file(entry, content, index, counts)
        except DataError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"data.path: {entry.path} is not written as COCO's annotations are "
                f"({type(error).__name__}: {error}); images need id and file_name, annotations "
                "image_id, category_id and bbox, categories id and name"
            ) from error
        splits.setdefault(split, []).extend(pictures)
        sources[split] = (*sources.get(split, ()), entry.relative)
        names.setdefault(split, []).extend(found)
    return Annotations(splits, list(dict.fromkeys(names.get("train", []))), sources, {}, counts)


def _read_file(
    entry: Entry, content: dict[str, Any], index: PictureIndex, counts: Counter[str]
) -> tuple[list[AnnotatedPicture], list[str]]:
    """Return the pictures of a file, and its classes in the order of their ids."""
    _refuse_repeats(entry, "category", [c["id"] for c in content.get("categories") or []])
    names = _category_names(content, counts)
    beside = folder_of(entry.relative)
    pictures: dict[Any, AnnotatedPicture] = {}
    _refuse_repeats(entry, "image", [image["id"] for image in content["images"]])
    for image in content["images"]:
        file = index.find(image["file_name"], beside)
        size = (int(image.get("width") or 0), int(image.get("height") or 0))
        pictures[image["id"]] = AnnotatedPicture(
            f"{image['file_name']} of {entry.relative}" if file is None else file.relative,
            None if file is None else file.path,
            size if all(size) else None,
        )
    for annotation in content["annotations"]:
        picture = pictures.get(annotation["image_id"])
        if picture is None:
            counts[NO_PICTURE] += 1
            continue
        left, top, width, height = map(float, annotation["bbox"])
        picture.add_box(
            [left, top, left + width, top + height],
            names[annotation["category_id"]],
            bool(int(annotation.get("iscrowd") or 0)),
            float(annotation.get("area") or 0.0),
        )
    return list(pictures.values()), list(names.values())


def _category_names(content: dict[str, Any], counts: Counter[str]) -> dict[Any, str]:
    """Return the name of each category by its id, which may be any number or text."""
    known = {c["id"]: str(c.get("name") or "") for c in content.get("categories") or []}
    ids = dict.fromkeys([*known, *(a["category_id"] for a in content["annotations"])])
    unnamed = [number for number in ids if not known.get(number)]
    if unnamed:
        counts[UNNAMED] = max(counts[UNNAMED], len(unnamed))
    return {number: known.get(number) or f"category {number}" for number in ids}


def _refuse_repeats(entry: Entry, what: str, ids: list[Any]) -> None:
    """Raise DataError if an id that annotations name stands for two things."""
    if repeated := [key for key, count in Counter(ids).items() if count > 1]:
        raise DataError(
            f"data.path: {entry.path} has {what} id {repeated[0]} more than once, so that its "
            "boxes are of either; give each an id of its own"
        )

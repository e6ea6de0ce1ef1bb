"""COCO's annotations: a json file for each split, with images, annotations and categories."""

import json
from collections import Counter
from collections.abc import Container, Iterable
from typing import Any

from trainer.config.train import DataError
from trainer.data.detection.annotations import (
    SAME_NAME,
    AnnotatedPicture,
    Annotations,
    PictureIndex,
    folder_of,
    read_number,
    split_of_path,
)
from trainer.data.folders import Entry

UNNAMED = "{} categories have no name and are called after their number"
NO_PICTURE = "{} boxes are of pictures that are not listed, and left out"


def load_coco(entry: Entry) -> dict[str, Any] | None:
    """Return the content of a json file of COCO's kind, None if it is of another kind.

    Raises DataError if it is damaged.
    """
    twice: set[str] = set()

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice.update(
                key for key, count in Counter(key for key, _ in pairs).items() if count > 1
            )
        return found

    try:
        content = json.loads(entry.path.read_bytes(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"data.path: {entry.path} is not a json file: {str(error)[:200]}"
        ) from error
    is_coco = isinstance(content, dict) and isinstance(content.get("images"), list)
    if not is_coco or not isinstance(content.get("annotations"), list):
        return None
    if twice:
        raise DataError(
            f"data.path: {entry.path} has the key {sorted(twice)[0][:60]!r} twice in one object; "
            "keep one of them"
        )
    return content


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
        pictures, found = _read_file(entry, content, index, counts)
        splits.setdefault(split, []).extend(pictures)
        sources[split] = (*sources.get(split, ()), entry.relative)
        names.setdefault(split, []).extend(found)
    return Annotations(splits, list(dict.fromkeys(names.get("train", []))), sources, {}, counts)


def _read_file(
    entry: Entry, content: dict[str, Any], index: PictureIndex, counts: Counter[str]
) -> tuple[list[AnnotatedPicture], list[str]]:
    """Return the pictures of a file, and its classes in the order of their ids."""
    where, named, pictures = "categories", dict[str, str](), dict[str, AnnotatedPicture]()
    try:
        for place, category in enumerate(content.get("categories") or []):
            where = f"entry {place} of categories"
            name = category.get("name")
            key = _new_key(entry, "category", category["id"], named)
            named[key] = "" if name is None else str(name)
            named[key].encode()  # half of a character cannot be written
        for place, image in enumerate(content["images"]):
            where = f"entry {place} of images"
            key = _new_key(entry, "image", image["id"], pictures)
            pictures[key] = _picture_of(entry, image, index)
        used = dict.fromkeys(named, True)
        for place, annotation in enumerate(content["annotations"]):
            where = f"entry {place} of annotations"
            number = _key_of(annotation["category_id"])
            used[number] = True
            picture = pictures.get(_key_of(annotation["image_id"]))
            if picture is None:
                counts[NO_PICTURE] += 1
                continue
            _add_box(picture, annotation, named.get(number) or f"category {number}")
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(
            f"data.path: {entry.path}, {where}, is not written as COCO's annotations are "
            f"({type(error).__name__}: {str(error)[:200]}); images need id and file_name, "
            "annotations image_id, category_id and bbox, categories id and name"
        ) from error
    return list(pictures.values()), _class_names(used, named, counts)


def _picture_of(entry: Entry, image: dict[str, Any], index: PictureIndex) -> AnnotatedPicture:
    name = image["file_name"]
    if not isinstance(name, str) or not name.strip("./ "):
        raise ValueError(f"file_name={name!r}")
    name.encode("utf-8", "surrogateescape")  # half of a character is no name
    file = index.find(name, folder_of(entry.relative))
    size = (int(image.get("width") or 0), int(image.get("height") or 0))
    return AnnotatedPicture(
        f"{name} of {entry.relative}" if file is None else file.relative,
        None if file is None else file.path,
        size if all(size) else None,
    )


def _add_box(picture: AnnotatedPicture, annotation: dict[str, Any], name: str) -> None:
    if not isinstance(annotation["bbox"], list):
        raise TypeError("bbox is no list")
    left, top, width, height = map(read_number, annotation["bbox"])
    picture.add_box(
        [left, top, left + width, top + height],
        name,
        bool(int(annotation.get("iscrowd") or 0)),
        read_number(annotation.get("area") or 0.0),
    )


def _class_names(used: Iterable[str], named: dict[str, str], counts: Counter[str]) -> list[str]:
    """Return the names of the categories; what cannot be said of one is counted."""
    names = [named.get(number) or f"category {number}" for number in used]
    if unnamed := sum(not named.get(number) for number in used):
        counts[UNNAMED] = max(counts[UNNAMED], unnamed)
    if same := len(names) - len(set(names)):
        counts[SAME_NAME] = max(counts[SAME_NAME], same)
    return names


def _key_of(number: object) -> str:
    """Return an id as text, so that 7, 7.0 and "7" are one; raises ValueError."""
    if isinstance(number, float) and number == number // 1:
        number = int(number)
    if isinstance(number, bool) or not isinstance(number, int | str) or number == "":
        raise ValueError(f"an id is {number!r}"[:60])
    return str(number)


def _new_key(entry: Entry, what: str, number: object, known: Container[str]) -> str:
    """Return an id as text; raises DataError if it stands for two things."""
    key = _key_of(number)
    if key in known:
        raise DataError(
            f"data.path: {entry.path} has {what} id {key} more than once, so that its "
            "boxes are of either; give each an id of its own"
        )
    return key

"""Pascal VOC's annotations: an XML file for each picture."""

from collections import Counter
from collections.abc import Iterable
from xml.etree import ElementTree

from trainer.config.train import DataError
from trainer.data.detection.annotations import (
    AnnotatedPicture,
    Annotations,
    PictureIndex,
    folder_of,
    split_of_path,
)
from trainer.data.folders import Entry, split_of

DIFFICULT = "{} objects are marked difficult: neither learned nor counted as missed"
LISTS = "ImageSets/Main"  # where VOC keeps the names of each split


def load_voc(entry: Entry) -> ElementTree.Element | None:
    """Return the annotation of an XML file, None if it is of another kind; raises DataError."""
    try:
        root = ElementTree.fromstring(entry.path.read_bytes())
    except ElementTree.ParseError as error:
        raise DataError(f"data.path: {entry.path} is not an XML file: {error}") from error
    return root if root.tag == "annotation" else None


def read_voc(
    files: list[tuple[Entry, ElementTree.Element]], index: PictureIndex, lists: Iterable[Entry]
) -> Annotations:
    """Return the annotations of these files.

    `lists` are text files of names in ImageSets/Main; without them a picture is of the split that
    its folder is named after, or of train.
    """
    listed = {
        name: split
        for entry in lists
        if (split := split_of(entry.name))
        for name in entry.path.read_text(encoding="utf-8").split()
    }
    counts: Counter[str] = Counter()
    splits: dict[str, list[AnnotatedPicture]] = {}
    sources: dict[str, dict[str, None]] = {}
    for entry, root in files:
        stem = entry.name.rpartition(".")[0]
        split = listed.get(stem) if listed else split_of_path(folder_of(entry.relative)) or "train"
        if split is None:
            continue
        try:
            picture = _read_picture(entry, root, index, counts)
        except (AttributeError, TypeError, ValueError) as error:
            raise DataError(
                f"data.path: {entry.path} is not written as Pascal VOC's annotations are "
                f"({type(error).__name__}: {error}); an object needs a name and a bndbox of xmin, "
                "ymin, xmax and ymax"
            ) from error
        splits.setdefault(split, []).append(picture)
        sources.setdefault(split, {})[f"{folder_of(entry.relative)}/*.xml".lstrip("/")] = None
    names = sorted({name for picture in splits.get("train", []) for name in picture.classes})
    found = {split: tuple(folders) for split, folders in sources.items()}
    return Annotations(splits, names, found, {}, counts)


def _read_picture(
    entry: Entry, root: ElementTree.Element, index: PictureIndex, counts: Counter[str]
) -> AnnotatedPicture:
    stem, beside = entry.name.rpartition(".")[0], folder_of(entry.relative)
    named = root.findtext("filename") or f"{stem}.jpg"
    file = index.find(named, beside) or index.find(f"JPEGImages/{named}", "")
    width, height = (int(float(root.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
    picture = AnnotatedPicture(
        f"{named} of {entry.relative}" if file is None else file.relative,
        None if file is None else file.path,
        (width, height) if width and height else None,
    )
    for item in root.iter("object"):
        sides = ("xmin", "ymin", "xmax", "ymax")
        left, top, right, bottom = (_number(item, f"bndbox/{side}") for side in sides)
        difficult = (item.findtext("difficult") or "0").strip() == "1"
        if difficult:
            counts[DIFFICULT] += 1
        name = (item.findtext("name") or "").strip()
        if not name:
            raise ValueError("an object without a name")
        # VOC counts pixels from 1, and the last one is inside.
        picture.add_box([left - 1, top - 1, right, bottom], name, difficult)
    return picture


def _number(item: ElementTree.Element, place: str) -> float:
    text = item.findtext(place)
    if text is None:
        raise ValueError(f"an object without {place}")
    return float(text)

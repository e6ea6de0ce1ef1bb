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
    read_lines,
    read_number,
    split_of_path,
    stem_of,
)
from trainer.data.folders import Entry, split_of

RENAMED = "{} XML files name a picture that is not there, and have that of their own name"
WITHOUT = "{} names of the lists in ImageSets/Main have no XML file"
UNLISTED = "{} XML files are in no list of ImageSets/Main, and left out"
YES, NO = ("1", "true", "yes"), ("0", "false", "no", "unspecified", "")
DIFFICULT = "{} objects are marked difficult: neither learned nor counted as missed"
LISTS = "ImageSets/Main"  # where VOC keeps the names of each split


def load_voc(entry: Entry) -> ElementTree.Element | None:
    """Return the annotation of an XML file, None if it is of another kind; raises DataError."""
    try:
        root = ElementTree.fromstring(entry.path.read_bytes())
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # or an unknown encoding
        raise DataError(f"data.path: {entry.path} is not an XML file: {error}") from error
    return root if root.tag == "annotation" else None


def read_voc(
    files: list[tuple[Entry, ElementTree.Element]], index: PictureIndex, lists: Iterable[Entry]
) -> Annotations:
    """Return the annotations of these files.

    `lists` are text files of names in ImageSets/Main; without them a picture is of the split that
    its folder is named after, or of train.
    """
    counts: Counter[str] = Counter()
    listed = _read_lists(lists, {stem_of(entry.name) for entry, _ in files}, counts)
    splits: dict[str, list[AnnotatedPicture]] = {}
    sources: dict[str, dict[str, None]] = {}
    for entry, root in files:
        stem = stem_of(entry.name)
        split = listed.get(stem) if listed else split_of_path(folder_of(entry.relative)) or "train"
        if split is None:
            counts[UNLISTED] += 1
            continue
        try:
            picture = _read_picture(entry, root, index, counts)
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"data.path: {entry.path} is not written as Pascal VOC's annotations are "
                f"({type(error).__name__}: {str(error)[:200]}); an object needs a name "
                "and one bndbox of xmin, ymin, xmax and ymax"
            ) from error
        splits.setdefault(split, []).append(picture)
        sources.setdefault(split, {})[f"{folder_of(entry.relative)}/*.xml".lstrip("/")] = None
    names = sorted({name for picture in splits.get("train", []) for name in picture.classes})
    found = {split: tuple(folders) for split, folders in sources.items()}
    return Annotations(splits, names, found, {}, counts)


def _read_lists(lists: Iterable[Entry], stems: set[str], counts: Counter[str]) -> dict[str, str]:
    """Return the split of each name in the lists; raises DataError if a name has two."""
    listed: dict[str, str] = {}
    for entry in lists:
        if (split := split_of(entry.name)) is None:
            continue
        for line in filter(None, map(str.strip, read_lines(entry))):
            # A class's own lists have 1 or -1 behind each name, other tools' lists a suffix.
            shorter = line.rsplit(None, 1)[0]
            name = next((n for n in (line, shorter, stem_of(line)) if n in stems), line)
            if listed.setdefault(name, split) != split:
                raise DataError(
                    f"data.path: {name[:60]} is in the lists of {listed[name]} and of {split} in "
                    f"{LISTS}; a picture must be in one"
                )
    counts[WITHOUT] += sum(name not in stems for name in listed)
    return listed


def _read_picture(
    entry: Entry, root: ElementTree.Element, index: PictureIndex, counts: Counter[str]
) -> AnnotatedPicture:
    stem, beside = stem_of(entry.name), folder_of(entry.relative)
    named = (root.findtext("filename") or "").strip() or stem
    folders = (beside, "JPEGImages", f"{folder_of(beside)}/JPEGImages".lstrip("/"))
    file = index.find(named, *folders)
    if file is None:
        own = [
            found for folder in folders for found in index.of_stem(f"{folder}/{stem}".lstrip("/"))
        ]
        file = own[0] if len(set(own)) == 1 else None
        counts[RENAMED] += bool(file and stem_of(named) != stem)
    sizes = (root.findtext(f"size/{side}") or 0 for side in ("width", "height"))
    width, height = (int(read_number(size)) for size in sizes)
    picture = AnnotatedPicture(
        f"{named} of {entry.relative}" if file is None else file.relative,
        None if file is None else file.path,
        (width, height) if width and height else None,
    )
    for item in root.iter("object"):
        left, top, right, bottom = _corners(item)
        difficult = (item.findtext("difficult") or "").strip().lower()
        if difficult not in YES + NO:
            raise ValueError(f"difficult is {difficult}, not 0 or 1")
        counts[DIFFICULT] += difficult in YES
        name = (item.findtext("name") or "").strip()
        if not name:
            raise ValueError("an object without a name")
        # VOC counts pixels from 1, and the last one is inside.
        picture.add_box([left - 1, top - 1, right, bottom], name, difficult in YES)
    return picture


def _corners(item: ElementTree.Element) -> list[float]:
    boxes = item.findall("bndbox")
    if len(boxes) != 1:
        raise ValueError(f"an object with {len(boxes)} bndbox")
    texts = {side: boxes[0].findtext(side) for side in ("xmin", "ymin", "xmax", "ymax")}
    if missing := [side for side, text in texts.items() if text is None]:
        raise ValueError(f"an object without bndbox/{missing[0]}")
    return [read_number(text) for text in texts.values()]
